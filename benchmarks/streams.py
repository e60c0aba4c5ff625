"""Frames per second by every road, as ratios to bare roads of the same run.

Usage: `python benchmarks/streams.py [--frames N] [--rounds N] [--loads 1x1,1x16,16x1] [--json FILE]`.

A run of some of the loads replaces their figures in the file and leaves the others, so that the whole can be
measured in pieces.

A 640x480x3 uint8 image and a 1x16 float32 tensor; a model that answers with what it got, and one that answers
with three numbers; one frame in flight, 16 in flight on one stream, and 16 streams with one each. One thread
drives them. The roads are interleaved in every round; figures are medians over rounds, ratios are taken
within each round.

- `a grpc`: bare grpc.aio server, raw bytes both ways.
- `b direct`: ours over gRPC to the worker.
- `c relayed`: ours through the gateway.
- `d ring`: bare shared memory and an 8-byte message over a UNIX socket, one copy in and one out per side; one
  stream only.
- `e local`: ours through shared memory.

README.md counts the copies.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import grpc_echo
import nos
import numpy as np
import psutil
from nos.wire import frames, values
from nos.wire.options import CHANNEL_OPTIONS
from nos.wire.v1 import inference_pb2
from path import PAYLOADS, cpu_s, roles
from report import write_json
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Array = np.ndarray[Any, Any]

MODELS: Final = Path(__file__).resolve().parent / "models"
#: By what comes back.
ANSWERS: Final = {"frame": "nos/echo", "3 floats": "bench/mean"}
_SLOT_BYTES: Final = 1 << 20
_TOKEN: Final = struct.Struct("<II")

#: The other end of the bare ring: copies each frame out of its slot, and all or some of it into the result's.
_RING_ECHO: Final = """
import mmap, socket, struct, sys
end = socket.socket(fileno=int(sys.argv[1]))
ring = memoryview(mmap.mmap(int(sys.argv[2]), 0))
slot_bytes, most, half = int(sys.argv[3]), int(sys.argv[4]), len(ring) // 2
held = bytearray(slot_bytes)
token = struct.Struct("<II")
received = b""
while data := end.recv(1 << 16):
    received += data
    done = len(received) // 8 * 8
    for slot, size in token.iter_unpack(received[:done]):
        at = slot * slot_bytes
        held[:size] = ring[at : at + size]
        back = min(size, most)
        ring[half + at : half + at + back] = memoryview(held)[:back]
    end.sendall(received[:done])
    received = received[done:]
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How frames are sent."""

    num_streams: int
    in_flight: int
    """On each stream."""

    def __str__(self) -> str:
        return f"{self.num_streams}x{self.in_flight}"


LOADS: Final = (
    Load(num_streams=1, in_flight=1),
    Load(num_streams=1, in_flight=16),
    Load(num_streams=16, in_flight=1),
)


class Lane(Protocol):
    """One stream of a road."""

    def send(self, array: Array) -> None:
        """Send a frame; waits where the road has no room."""

    def take(self) -> None:
        """Wait for the next result."""


@dataclass(kw_only=True)
class Road:
    """A way that frames go."""

    open: Callable[[], Lane]
    """Opens a stream; it is closed with the benchmark."""
    processes: dict[str, list[psutil.Process]]
    """By role; all that work for it."""
    max_streams: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One road under one load, medians over rounds."""

    payload: str
    answer: str
    load: str
    road: str
    frames_hz: float
    of_a: float
    """Its rate over that of the bare gRPC echo in the same rounds."""
    of_b: float
    of_d: float | None
    """None where the ring was not run."""
    cpu_us: dict[str, int]
    """Microseconds of CPU per frame, by process role."""


class _GrpcLane:
    def __init__(self, channel: grpc.Channel, method: str) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies = channel.stream_stream(method)(iter(self._outbox.get, None))

    def send(self, array: Array) -> None:
        nodes, payload = values.write_arguments([("x", array)])
        request = inference_pb2.StreamRequest(seq=1)
        request.frame.arguments.extend(nodes)
        self._outbox.put(frames.join(request, payload.buffers, payload.size))

    def take(self) -> None:
        next(self._replies)

    def close(self) -> None:
        self._outbox.put(None)


@contextmanager
def grpc_road(port: int, echo_pid: int, method: str = grpc_echo.METHOD) -> Iterator[Road]:
    """Give the bare gRPC road."""
    with ExitStack() as stack:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS)
        stack.enter_context(channel)

        def open_lane() -> _GrpcLane:
            lane = _GrpcLane(channel, method)
            stack.callback(lane.close)
            return lane

        processes = {"client": [psutil.Process()], "echo": [psutil.Process(echo_pid)]}
        yield Road(open=open_lane, processes=processes)


class _RingLane:
    def __init__(self, end: socket.socket, ring: memoryview, num_slots: int, most: int) -> None:
        self._end, self._ring = end, ring
        self._num_slots, self._most = num_slots, most
        self._next = 0

    def send(self, array: Array) -> None:
        raw = memoryview(array).cast("B")
        at = self._next * _SLOT_BYTES
        self._ring[at : at + raw.nbytes] = raw
        self._end.sendall(_TOKEN.pack(self._next, raw.nbytes))
        self._next = (self._next + 1) % self._num_slots

    def take(self) -> None:
        slot, size = _TOKEN.unpack(self._end.recv(_TOKEN.size, socket.MSG_WAITALL))
        at = (self._num_slots + slot) * _SLOT_BYTES
        np.frombuffer(self._ring, np.uint8, min(size, self._most), at).copy()


@contextmanager
def ring_road(num_slots: int, most: int) -> Iterator[Road]:
    """Give the bare ring; `most` bytes of a frame come back."""
    memory = os.memfd_create("bench-ring")
    os.ftruncate(memory, 2 * num_slots * _SLOT_BYTES)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", _RING_ECHO, str(theirs.fileno()), str(memory)]
    command += [str(_SLOT_BYTES), str(most)]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(), memory))
    theirs.close()
    lane = _RingLane(ours, memoryview(mmap.mmap(memory, 0)), num_slots, most)
    try:
        processes = {"client": [psutil.Process()], "echo": [psutil.Process(process.pid)]}
        yield Road(open=lambda: lane, processes=processes, max_streams=1)
    finally:
        ours.close()
        process.wait(10)
        os.close(memory)


class _OurLane:
    def __init__(self, stream: nos.Stream) -> None:
        self._stream = stream

    def send(self, array: Array) -> None:
        self._stream.send(array)

    def take(self) -> None:
        result = next(self._stream)
        if result.error is not None:
            raise result.error


def our_road(
    client: nos.Client, model: str, servers: dict[str, list[psutil.Process]], stack: ExitStack
) -> Road:
    """Return our road to a model, as this client goes it; its streams end with `stack`."""
    handle = client.model(model)
    return Road(
        open=lambda: _OurLane(stack.enter_context(handle.stream())),
        processes={"client": [psutil.Process()], **servers},
    )


def drive(lanes: list[Lane], array: Array, num_frames: int, in_flight: int) -> None:
    """Send so many frames, the same number on each lane, and take all results."""
    per_lane = max(1, num_frames // len(lanes))
    first = min(in_flight, per_lane)
    for _ in range(first):
        for lane in lanes:
            lane.send(array)
    for number in range(per_lane):
        for lane in lanes:
            lane.take()
            if number + first < per_lane:
                lane.send(array)


@dataclass(slots=True)
class Run:
    """One road under one load, once."""

    frame_s: float
    """Wall time per frame."""
    cpu_s: dict[str, float]
    """Per frame, by process role."""


def measure_once(road: Road, lanes: list[Lane], array: Array, frames: int, in_flight: int) -> Run:
    """Drive the lanes, after a few frames that do not count."""
    drive(lanes, array, 2 * in_flight * len(lanes), in_flight)
    before = {role: cpu_s(them) for role, them in road.processes.items()}
    start_s = time.perf_counter()
    drive(lanes, array, frames, in_flight)
    frame_s = (time.perf_counter() - start_s) / frames
    spent = {role: (cpu_s(them) - before[role]) / frames for role, them in road.processes.items()}
    return Run(frame_s, spent)


def open_roads(stack: ExitStack) -> dict[str, dict[str, Road]]:
    """Start servers; return the roads by answer."""
    port, echo_pid = stack.enter_context(grpc_echo.running())
    state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    first = stack.enter_context(nos.start(state_dir=state_dir, owned=True, models=[str(MODELS)]))
    stack.callback(nos.stop, state_dir=state_dir)
    ways = {
        name: stack.enter_context(
            nos.connect(first.address, token_file=state_dir / "token", via=via)
        )
        for name, via in (("b direct", "direct"), ("c relayed", "relay"), ("e local", "local"))
    }
    for model in ANSWERS.values():
        first.model(model)(PAYLOADS["1x16 float32"])
    servers = roles(first.status(), state_dir)
    roads: dict[str, dict[str, Road]] = {}
    for answer, model in ANSWERS.items():
        is_short = answer != "frame"
        method = grpc_echo.SHORT_METHOD if is_short else grpc_echo.METHOD
        most = grpc_echo.SHORT_BYTES if is_short else _SLOT_BYTES
        roads[answer] = {
            "a grpc": stack.enter_context(grpc_road(port, echo_pid, method)),
            "d ring": stack.enter_context(ring_road(16, most)),
            **{name: our_road(way, model, servers, stack) for name, way in ways.items()},
        }
    return roads


def measure(num_frames: int, rounds: int, loads: list[Load]) -> list[Figure]:
    """Run all roads interleaved under these loads."""
    with ExitStack() as stack:
        roads = open_roads(stack)
        lanes: dict[int, list[Lane]] = {}
        runs: dict[tuple[str, str, str], dict[str, list[Run]]] = {}
        for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr):
            for load in loads:
                for answer, by_name in roads.items():
                    for payload, array in PAYLOADS.items():
                        for name, road in by_name.items():
                            if load.num_streams > road.max_streams:
                                continue
                            own = lanes.setdefault(id(road), [])
                            while len(own) < load.num_streams:
                                own.append(road.open())
                            run = measure_once(
                                road, own[: load.num_streams], array, num_frames, load.in_flight
                            )
                            found = runs.setdefault((payload, answer, str(load)), {})
                            found.setdefault(name, []).append(run)
    return [figure for case, by_road in runs.items() for figure in summarise(case, by_road)]


def ratio(ours: list[Run], bare: list[Run]) -> float:
    """Return the rate of one road over that of another, the median over rounds."""
    return statistics.median(b.frame_s / a.frame_s for a, b in zip(ours, bare, strict=True))


def summarise(case: tuple[str, str, str], by_road: dict[str, list[Run]]) -> list[Figure]:
    """Return medians over rounds, with ratios taken within each round."""
    payload, answer, load = case
    return [
        Figure(
            payload=payload,
            answer=answer,
            load=load,
            road=road,
            frames_hz=1 / statistics.median(run.frame_s for run in runs),
            of_a=ratio(runs, by_road["a grpc"]),
            of_b=ratio(runs, by_road["b direct"]),
            of_d=ratio(runs, by_road["d ring"]) if "d ring" in by_road else None,
            cpu_us={
                role: round(statistics.median(run.cpu_s[role] for run in runs) * 1e6)
                for role in runs[0].cpu_s
            },
        )
        for road, runs in sorted(by_road.items())
    ]


def loads_of(text: str) -> list[Load]:
    """Return the loads that the command line names."""
    by_name = {str(load): load for load in LOADS}
    names = text.split(",")
    if unknown := set(names) - set(by_name):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def merged(path: Path, figures: list[Figure]) -> list[dict[str, Any]]:
    """Return the figures with those of the file whose loads were not measured now."""
    loads = {figure.load for figure in figures}
    before = json.loads(path.read_text())["figures"] if path.exists() else []
    kept = [figure for figure in before if figure["load"] not in loads]
    found = [*kept, *map(asdict, figures)]
    order = [str(load) for load in LOADS]
    return sorted(found, key=lambda it: order.index(it["load"]))


def main() -> None:
    """Measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frames", type=int, default=96, help="frames per road, load and round")
    parser.add_argument("--rounds", type=int, default=5, help="how often all roads are run in turn")
    parser.add_argument("--loads", type=loads_of, default=LOADS, help="streams x in flight of each")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.frames, options.rounds, options.loads)
    print(
        f"{'payload':<16} {'answer':<9} {'streams x in flight':<20} {'road':<10} {'frames/s':>9} "
        f"{'of a':>6} {'of b':>6} {'of d':>6}  CPU us per frame"
    )
    for it in figures:
        cpu = "  ".join(f"{role} {spent}" for role, spent in it.cpu_us.items())
        of_d = f"{it.of_d:6.2f}" if it.of_d is not None else "     -"
        print(
            f"{it.payload:<16} {it.answer:<9} {it.load:<20} {it.road:<10} {it.frames_hz:>9.0f} "
            f"{it.of_a:>6.2f} {it.of_b:>6.2f} {of_d}  {cpu}"
        )
    if options.json:
        write_json(options.json, merged(options.json, figures))


if __name__ == "__main__":
    main()
