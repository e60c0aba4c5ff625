"""Frames per second through one stream, as ratios to bare roads of the same run.

Usage: `python benchmarks/streams.py [--frames N] [--rounds N] [--in-flight N] [--json FILE]`.

A 640x480x3 uint8 image and a 1x16 float32 tensor, `nos/echo` as the model, 16 in flight. The roads are
interleaved in every round; figures are medians over rounds, ratios are taken within each round.

- `a grpc`: bare grpc.aio server, raw bytes both ways.
- `b direct`: ours over gRPC to the worker.
- `c relayed`: ours through the gateway.
- `d ring`: bare shared memory and an 8-byte message over a UNIX socket, one copy in and one out per side.
- `e local`: ours through shared memory.

Copies of a frame's bytes, beside those of the kernel and of gRPC: on b one out (the message), one into the
executor's arena; back one out, one into the result. On c the same; the gateway hands bytes on. On e one into
the shared memory, one into the arena; back one into the shared memory, one into the result.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc_echo
import nos
import numpy as np
import psutil
from nos.wire import frames, values
from nos.wire.options import CHANNEL_OPTIONS
from nos.wire.v1 import inference_pb2
from path import PAYLOADS, cpu_s, roles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Array = np.ndarray[Any, Any]
    #: Sends so many frames with so many in flight.
    Road = Callable[[Array, int, int], None]

MODEL = "nos/echo"
_SLOT_BYTES = 1 << 20
_TOKEN = struct.Struct("<II")

#: The other end of the bare ring: copies each frame out of its slot and back into the result's.
_RING_ECHO = """
import mmap, socket, struct, sys
end = socket.socket(fileno=int(sys.argv[1]))
ring = memoryview(mmap.mmap(int(sys.argv[2]), 0))
slot_bytes, half = int(sys.argv[3]), len(ring) // 2
held = bytearray(slot_bytes)
token = struct.Struct("<II")
received = b""
while data := end.recv(1 << 16):
    received += data
    done = len(received) // 8 * 8
    for slot, size in token.iter_unpack(received[:done]):
        at = slot * slot_bytes
        held[:size] = ring[at : at + size]
        ring[half + at : half + at + size] = memoryview(held)[:size]
    end.sendall(received[:done])
    received = received[done:]
"""


@contextmanager
def grpc_road(port: int) -> Iterator[Road]:
    """Give the bare gRPC road."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        replies = channel.stream_stream(grpc_echo.METHOD)(iter(outbox.get, None))

        def run(array: Array, num_frames: int, in_flight: int) -> None:
            nodes, payload = values.write_arguments([("x", array)])
            request = inference_pb2.StreamRequest(seq=1)
            request.frame.arguments.extend(nodes)
            for number in range(num_frames):
                outbox.put(frames.join(request, payload.buffers, payload.size))
                if number >= in_flight - 1:
                    next(replies)
            for _ in range(min(in_flight - 1, num_frames)):
                next(replies)

        yield run
        outbox.put(None)


@contextmanager
def ring_road(num_slots: int) -> Iterator[tuple[Road, int]]:
    """Give the bare ring, and the process at its other end."""
    memory = os.memfd_create("bench-ring")
    os.ftruncate(memory, 2 * num_slots * _SLOT_BYTES)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", _RING_ECHO]
    command += [str(theirs.fileno()), str(memory), str(_SLOT_BYTES)]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(), memory))
    theirs.close()
    ring = memoryview(mmap.mmap(memory, 0))
    half = num_slots * _SLOT_BYTES

    def take(array: Array) -> None:
        slot, size = _TOKEN.unpack(ours.recv(_TOKEN.size, socket.MSG_WAITALL))
        at = half + slot * _SLOT_BYTES
        np.frombuffer(ring, np.uint8, size, at).copy()

    def run(array: Array, num_frames: int, in_flight: int) -> None:
        raw = memoryview(array).cast("B")
        for number in range(num_frames):
            slot = number % num_slots
            ring[slot * _SLOT_BYTES : slot * _SLOT_BYTES + raw.nbytes] = raw
            ours.sendall(_TOKEN.pack(slot, raw.nbytes))
            if number >= in_flight - 1:
                take(array)
        for _ in range(min(in_flight - 1, num_frames)):
            take(array)

    try:
        yield run, process.pid
    finally:
        ours.close()
        process.wait(10)
        os.close(memory)


def our_road(client: nos.Client) -> Road:
    """Return our road, as this client goes it."""
    model = client.model(MODEL)

    def run(array: Array, num_frames: int, in_flight: int) -> None:
        for _ in model.map((array for _ in range(num_frames)), max_in_flight=in_flight):
            pass

    return run


def measure(num_frames: int, rounds: int, in_flight: int) -> dict[str, dict[str, Any]]:
    """Run all roads interleaved; return figures by payload and road."""
    me = [psutil.Process()]
    with ExitStack() as stack:
        port, echo_pid = stack.enter_context(grpc_echo.running())
        ring, ring_pid = stack.enter_context(ring_road(in_flight))
        state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = stack.enter_context(nos.start(state_dir=state_dir, owned=True))
        stack.callback(nos.stop, state_dir=state_dir)
        ways = {
            via: stack.enter_context(
                nos.connect(first.address, token_file=state_dir / "token", via=via)
            )
            for via in ("direct", "relay", "local")
        }
        ways["direct"].model(MODEL)(1)
        servers = roles(first.status(), state_dir)
        ours = {"client": me, **servers}
        roads = {
            "a grpc": (
                stack.enter_context(grpc_road(port)),
                {"client": me, "echo": [psutil.Process(echo_pid)]},
            ),
            "b direct": (our_road(ways["direct"]), ours),
            "c relayed": (our_road(ways["relay"]), ours),
            "d ring": (ring, {"client": me, "echo": [psutil.Process(ring_pid)]}),
            "e local": (our_road(ways["local"]), ours),
        }
        found: dict[str, dict[str, list[tuple[float, dict[str, float]]]]] = {}
        for _ in range(rounds):
            for payload, array in PAYLOADS.items():
                for name, (road, processes) in roads.items():
                    road(array, 2 * in_flight, in_flight)
                    before = {role: cpu_s(them) for role, them in processes.items()}
                    start = time.perf_counter()
                    road(array, num_frames, in_flight)
                    took_s = time.perf_counter() - start
                    spent = {
                        role: (cpu_s(them) - before[role]) / num_frames
                        for role, them in processes.items()
                    }
                    rate = num_frames / took_s
                    found.setdefault(payload, {}).setdefault(name, []).append((rate, spent))
    return {payload: summarise(by_road) for payload, by_road in found.items()}


def summarise(by_road: dict[str, list[tuple[float, dict[str, float]]]]) -> dict[str, Any]:
    """Return medians over rounds, with ratios taken within each round."""

    def ratio(road: str, floor: str) -> float:
        pairs = zip(by_road[road], by_road[floor], strict=True)
        return statistics.median(ours[0] / bare[0] for ours, bare in pairs)

    figures: dict[str, Any] = {}
    for road, samples in by_road.items():
        figures[road] = {
            "frames_hz": statistics.median(rate for rate, _ in samples),
            "of a": ratio(road, "a grpc"),
            "of d": ratio(road, "d ring"),
            "of b": ratio(road, "b direct"),
            "cpu_us": {
                role: round(statistics.median(spent[role] for _, spent in samples) * 1e6)
                for role in samples[0][1]
            },
        }
    return figures


def main() -> None:
    """Measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frames", type=int, default=400, help="frames per road and round")
    parser.add_argument("--rounds", type=int, default=5, help="how often all roads are run in turn")
    parser.add_argument("--in-flight", type=int, default=16, help="frames without an answer")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.frames, options.rounds, options.in_flight)
    print(f"{'payload':<16} {'road':<10} {'frames/s':>9} {'of a':>6} {'of d':>6} {'of b':>6}")
    for payload, by_road in figures.items():
        for road, it in by_road.items():
            cpu = "  ".join(f"{role} {spent}" for role, spent in it["cpu_us"].items())
            print(
                f"{payload:<16} {road:<10} {it['frames_hz']:>9.0f} {it['of a']:>6.2f} "
                f"{it['of d']:>6.2f} {it['of b']:>6.2f}  CPU us per frame: {cpu}"
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
