"""What the hop to an executor costs: round trips, starts and memory.

Run: python benchmarks/executor_hop.py
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from nos_backend.definition import ModelDefinition
from nos_backend.worker.executors import Executor, ForkServer, Reply

SIZES = (64, 921_600)
NUM_CALLS = 2000
NUM_STARTS = 20
SOURCE = """
def digest(x): return int(x[0])
def echo(x): return x
"""


class Caller:
    """One call at a time, through the loop, as the worker makes them."""

    def __init__(self, executor: Executor, key: str) -> None:
        self._executor = executor
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._ids = 0

    async def __call__(self, frame: bytes) -> Reply:
        """Call the model with `frame`; the reply wants to be released."""
        self._ids += 1
        future: asyncio.Future[Reply] = self._loop.create_future()
        block = self._executor.allocate(len(frame))
        block.view[:] = frame
        arguments: list[list[Any]] = [["", {"t": ["uint8", [len(frame)], 0]}]]
        self._executor.call(self._ids, self._key, "__call__", arguments, block, future.set_result)
        return await future


def definition(function: str) -> ModelDefinition:
    """Return the model that is this function of the source."""
    return ModelDefinition(
        name=function,
        version=1,
        owner="nos",
        source=SOURCE,
        source_name="bench.py",
        class_name=function,
    )


async def round_trips(executor: Executor, function: str, size: int) -> list[float]:
    """Return sorted seconds of calls beyond the model's own time."""
    caller = Caller(executor, definition(function).key)
    frame = bytes(size)
    times_s = []
    for _ in range(NUM_CALLS):
        started_s = time.perf_counter()
        reply = await caller(frame)
        times_s.append(time.perf_counter() - started_s - reply.compute_s)
        assert reply.error is None, reply.error
        reply.release()
    return sorted(times_s[NUM_CALLS // 10 :])


def ping_pong() -> list[float]:
    """Bounce 64 bytes between two processes over a UNIX socket, blocking on both sides: the floor."""
    ours, theirs = socket.socketpair()
    if not (pid := os.fork()):
        ours.close()
        while data := theirs.recv(4096):
            theirs.sendall(data)
        os._exit(0)
    theirs.close()
    times_s = []
    with ours:
        for _ in range(NUM_CALLS):
            started_s = time.perf_counter()
            ours.sendall(bytes(64))
            ours.recv(4096)
            times_s.append(time.perf_counter() - started_s)
    os.waitpid(pid, 0)
    return sorted(times_s[NUM_CALLS // 10 :])


async def start_times(forkserver: ForkServer | None, num_starts: int) -> list[float]:
    """Return sorted seconds until an executor takes calls."""
    times_s = []
    for _ in range(num_starts):
        started_s = time.perf_counter()
        executor = await Executor.start("bench", device="cpu", num_threads=1, forkserver=forkserver)
        times_s.append(time.perf_counter() - started_s)
        await executor.close()
    return sorted(times_s)


def pss_mb(pid: int) -> float:
    """Return the memory of a process; what it shares counts in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def show(name: str, times_s: list[float], floor_s: float) -> None:
    """Print one line of the table."""
    p50_s = statistics.median(times_s)
    p99_s = times_s[int(len(times_s) * 0.99)]
    print(
        f"{name:34} p50 {p50_s * 1e6:8.1f} us   p99 {p99_s * 1e6:8.1f} us   "
        f"{p50_s / floor_s:6.1f} x ping-pong"
    )


async def main() -> None:
    """Measure and print everything."""
    floor = ping_pong()
    floor_s = statistics.median(floor)
    show("UNIX socket ping-pong, 64 bytes", floor, floor_s)
    started_s = time.perf_counter()
    forkserver = await ForkServer.start()
    print(f"fork server ready after {time.perf_counter() - started_s:.2f} s")
    executor = await Executor.start("bench", device="cpu", num_threads=1, forkserver=forkserver)
    print(
        f"memory (PSS): fork server {pss_mb(forkserver.pid):.1f} MB, "
        f"idle executor {pss_mb(executor.pid):.1f} MB"
    )
    for function in ("digest", "echo"):
        await executor.load(definition(function), 60)
        for size in SIZES:
            show(f"{function}, {size} bytes", await round_trips(executor, function, size), floor_s)
    await executor.close()
    print(f"alone: fork server {pss_mb(forkserver.pid):.1f} MB")
    forked = await start_times(forkserver, NUM_STARTS)
    await forkserver.close()
    spawned = await start_times(None, 5)
    print(
        f"start of an executor, p50: forked {statistics.median(forked) * 1e3:.1f} ms, "
        f"spawned {statistics.median(spawned) * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    asyncio.run(main())
