"""The floor of a local frame: hand-overs and copies between three bare Python processes, and nothing else.

Usage: `python benchmarks/local_floor.py [--calls N] [--bytes N]`.

Client, worker and executor pass a message of 24 bytes over UNIX sockets, there and back, and copy a frame
through shared memory on the way: not at all, three times (in, through the executor, out), or five times, as
the real ones do (in, to the executor's memory, through it, back, out). Medians.
"""

from __future__ import annotations

import argparse
import mmap
import os
import socket
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MESSAGE_BYTES = 24


def memory(size: int) -> memoryview:
    """Return memory that forked children share."""
    return memoryview(mmap.mmap(-1, size))


def forked(serve: Callable[[], None]) -> None:
    """Run `serve` in a child that ends with it."""
    if not os.fork():
        serve()
        os._exit(0)


def round_trip_s(size: int, num_copies: int, num_calls: int) -> float:
    """Return the median seconds of a frame's way there and back."""
    request, result, to_executor, from_executor = (memory(size) for _ in range(4))
    client, upper = socket.socketpair()
    lower, executor = socket.socketpair()

    def work() -> None:
        client.close()
        executor.close()
        while message := upper.recv(_MESSAGE_BYTES):
            if num_copies > 3:
                to_executor[:] = request
            lower.send(message)
            message = lower.recv(_MESSAGE_BYTES)
            if num_copies > 3:
                result[:] = from_executor
            upper.send(message)

    def execute() -> None:
        for end in (client, upper, lower):
            end.close()
        while message := executor.recv(_MESSAGE_BYTES):
            if num_copies > 3:
                from_executor[:] = to_executor
            elif num_copies:
                result[:] = request
            executor.send(message)

    forked(execute)
    forked(work)
    for end in (upper, lower, executor):
        end.close()
    frame, back, times_s = memoryview(os.urandom(size)), memoryview(bytearray(size)), []
    with client:
        for _ in range(num_calls):
            start_s = time.perf_counter()
            if num_copies:
                request[:] = frame
            client.send(bytes(_MESSAGE_BYTES))
            client.recv(_MESSAGE_BYTES)
            if num_copies:
                back[:] = result
            times_s.append(time.perf_counter() - start_s)
    for _ in range(2):
        os.wait()
    return statistics.median(times_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--calls", type=int, default=1000, help="round trips of each kind")
    parser.add_argument("--bytes", type=int, default=640 * 480 * 3, help="of a frame")
    options = parser.parse_args()
    for num_copies in (0, 3, 5):
        took_s = round_trip_s(options.bytes, num_copies, options.calls)
        print(f"{num_copies} copies of {options.bytes} bytes: p50 {took_s * 1e6:.0f} us")


if __name__ == "__main__":
    main()
