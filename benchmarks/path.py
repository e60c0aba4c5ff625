"""Cost of every hop of a frame: time and CPU per call, as ratios to a bare gRPC echo of the same run.

Usage: `python benchmarks/path.py [--calls N] [--rounds N] [--json FILE]`.

One frame in flight, a 1x16 float32 tensor and a 640x480x3 uint8 image, `nos/echo` as the model. The paths are
interleaved in every round, so that a busy neighbour hits all alike; figures are medians over rounds.

- `grpc echo`: bare grpc.aio server, raw bytes both ways. The floor.
- `local`: client -> shared memory -> worker's data plane -> executor and back.
- `direct`: the same by gRPC, as from another host.
- `relayed`: client -> gateway -> worker -> executor and back.

CPU per call is what each process of that path spent on the run, divided by the calls.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
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
from report import write_json
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAYLOADS = {
    "1x16 float32": np.ones((1, 16), np.float32),
    "640x480x3 uint8": np.zeros((480, 640, 3), np.uint8),
}
MODEL = "nos/echo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One path with one payload, medians over rounds."""

    path: str
    payload: str
    p50_s: float
    """Median time of one call, in seconds."""
    ratio: float
    """`p50_s` over that of the bare echo in the same rounds."""
    cpu_s: dict[str, float]
    """CPU seconds per call, by process role."""


@contextmanager
def echo_call(port: int) -> Iterator[Callable[[np.ndarray[Any, Any]], None]]:
    """Give a function that sends one frame's bytes through the bare echo and waits for them."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        replies = channel.stream_stream(grpc_echo.METHOD)(iter(outbox.get, None))

        def call(array: np.ndarray[Any, Any]) -> None:
            nodes, payload = values.write_arguments([("x", array)])
            request = inference_pb2.StreamRequest(seq=1)
            request.frame.arguments.extend(nodes)
            outbox.put(frames.join(request, payload.buffers, payload.size))
            next(replies)

        yield call
        outbox.put(None)


def roles(status: Any, state_dir: Path) -> dict[str, list[psutil.Process]]:
    """Return the server's processes by role, found from the supervisor's process tree."""
    record = json.loads((state_dir / "backend.json").read_text())
    found: dict[str, list[psutil.Process]] = {"gateway": [], "worker": [], "executor": []}
    workers = {worker.pid for worker in status.workers}
    for process in psutil.Process(record["pid"]).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # it has ended, and may wait for its parent to see that
            continue
        if process.pid in workers:
            found["worker"].append(process)
        elif "nos_backend.app" in line:
            found["gateway"].append(process)
        elif "nos_backend.executor" in line:
            found["executor"].append(process)
    return found


def cpu_s(processes: list[psutil.Process]) -> float:
    """Return the CPU seconds that the processes have spent so far; one that has ended is struck off."""
    total_s = 0.0
    for process in list(processes):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # an executor in which a model was only constructed
            processes.remove(process)
        else:
            total_s += times.user + times.system
    return total_s


def measure(calls: int, rounds: int) -> list[Figure]:
    """Run all paths interleaved and return their figures."""
    me = [psutil.Process()]
    with ExitStack() as stack:
        port, echo_pid = stack.enter_context(grpc_echo.running())
        state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        owner = stack.enter_context(nos.start(state_dir=state_dir, owned=True))
        stack.callback(nos.stop, state_dir=state_dir)
        local, direct, relayed = (
            stack.enter_context(nos.connect(owner.address, token_file=state_dir / "token", via=via))
            for via in ("local", "direct", "relay")
        )
        direct.model(MODEL)(PAYLOADS["1x16 float32"])
        servers = roles(direct.status(), state_dir)
        paths: dict[
            str, tuple[Callable[[np.ndarray[Any, Any]], Any], dict[str, list[psutil.Process]]]
        ] = {
            "grpc echo": (
                stack.enter_context(echo_call(port)),
                {"client": me, "echo": [psutil.Process(echo_pid)]},
            ),
            "local": (local.model(MODEL), {"client": me, **servers}),
            "direct": (direct.model(MODEL), {"client": me, **servers}),
            "relayed": (relayed.model(MODEL), {"client": me, **servers}),
        }
        samples: dict[tuple[str, str], list[tuple[float, dict[str, float]]]] = {}
        for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr):
            for payload, array in PAYLOADS.items():
                for path, (call, processes) in paths.items():
                    samples.setdefault((path, payload), []).append(
                        run(call, array, calls, processes)
                    )
    return summarise(samples)


def run(
    call: Callable[[np.ndarray[Any, Any]], Any],
    array: np.ndarray[Any, Any],
    calls: int,
    processes: dict[str, list[psutil.Process]],
) -> tuple[float, dict[str, float]]:
    """Return the median seconds of one call, and CPU seconds per call by role."""
    for _ in range(max(5, calls // 20)):
        call(array)
    before = {role: cpu_s(found) for role, found in processes.items()}
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call(array)
        times.append(time.perf_counter() - start)
    spent = {role: (cpu_s(found) - before[role]) / calls for role, found in processes.items()}
    return statistics.median(times), spent


def summarise(
    samples: dict[tuple[str, str], list[tuple[float, dict[str, float]]]],
) -> list[Figure]:
    """Return medians over rounds, with ratios taken within each round."""
    figures = []
    for (path, payload), found in samples.items():
        floors = [sample[0] for sample in samples["grpc echo", payload]]
        figures.append(
            Figure(
                path=path,
                payload=payload,
                p50_s=statistics.median(sample[0] for sample in found),
                ratio=statistics.median(
                    sample[0] / floor for sample, floor in zip(found, floors, strict=True)
                ),
                cpu_s={
                    role: statistics.median(sample[1][role] for sample in found)
                    for role in found[0][1]
                },
            )
        )
    return figures


def main() -> None:
    """Measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--calls", type=int, default=300, help="calls per path, payload and round")
    parser.add_argument("--rounds", type=int, default=7, help="how often all paths are run in turn")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.calls, options.rounds)
    print(f"{'payload':<16} {'path':<10} {'p50 us':>8} {'x echo':>7}  CPU us per call")
    for figure in figures:
        cpu = "  ".join(f"{role} {seconds * 1e6:.0f}" for role, seconds in figure.cpu_s.items())
        print(
            f"{figure.payload:<16} {figure.path:<10} {figure.p50_s * 1e6:>8.0f} {figure.ratio:>7.2f}  {cpu}"
        )
    if options.json:
        write_json(options.json, [asdict(figure) for figure in figures])


if __name__ == "__main__":
    main()
