"""The load generator: so many callers, each of which waits for its answer before it sends again.

Prints one JSON object; `table.py` runs it. Answers are compared with what is right: the first four of each
caller, and every 64th.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import uvloop
from clients import CLIENTS, Target
from workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from clients import Client
    from workloads import Array

_MAX_ERRORS: Final = 100
_CLOSE_S: Final = 3.0


@dataclass(kw_only=True)
class Outcome:
    """What one measurement found."""

    rate_hz: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    num_sent: int = 0
    """Warm-up and errors included: what the server worked on."""
    num_errors: int = 0
    num_wrong: int = 0
    client_us: float = 0.0
    """Processor time of this process for each request."""
    error: str = ""
    """The first one."""
    times_s: list[float] = field(default_factory=list)


def is_right(workload: Workload, got: Array, wanted: Array) -> bool:
    """Whether an answer is the expected one, up to the order of additions."""
    if workload.name == "echo":
        return np.array_equal(got, wanted)
    return got.shape == wanted.shape and np.allclose(got, wanted, rtol=1e-3, atol=1e-3)


async def measure(
    client: Client, workload: Workload, num_callers: int, warm_s: float, seconds: float
) -> Outcome:
    """Send for so long and return what came of it."""
    inputs = workload.inputs()
    expected = workload.expected(inputs)
    outcome = Outcome()
    await client.open()
    callers = [await client.caller() for _ in range(num_callers)]
    begin_s = time.perf_counter() + warm_s
    end_s = begin_s + seconds
    used_s = 0.0

    async def call(number: int) -> None:
        count = 0
        while (sent_s := time.perf_counter()) < end_s and outcome.num_errors < _MAX_ERRORS:
            index = (number + count) % len(inputs)
            count += 1
            outcome.num_sent += 1
            try:
                answer = await callers[number](inputs[index])
            except Exception as error:  # noqa: BLE001 - counted, whatever a peer's client raises
                outcome.num_errors += 1
                outcome.error = outcome.error or f"{type(error).__name__}: {error}"[:200]
                await asyncio.sleep(0.01)
                callers[number] = await client.caller()
                continue
            done_s = time.perf_counter()
            if begin_s <= sent_s and done_s <= end_s:
                outcome.times_s.append(done_s - sent_s)
            if (count <= 4 or count % 64 == 0) and not is_right(workload, answer, expected[index]):
                outcome.num_wrong += 1

    async def count_time() -> None:
        nonlocal used_s
        await asyncio.sleep(warm_s)
        before_s = time.process_time()
        await asyncio.sleep(seconds)
        used_s = time.process_time() - before_s

    await asyncio.gather(count_time(), *(call(number) for number in range(num_callers)))
    with contextlib.suppress(Exception):  # a peer that does not close well is measured all the same
        await asyncio.wait_for(client.close(), _CLOSE_S)
    if outcome.times_s:
        times_ms = np.sort(outcome.times_s) * 1e3
        outcome.rate_hz = len(times_ms) / seconds
        outcome.p50_ms, outcome.p99_ms = (float(np.quantile(times_ms, q)) for q in (0.5, 0.99))
        outcome.client_us = used_s / len(times_ms) * 1e6
    return outcome


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--client", choices=sorted(CLIENTS), required=True)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/predict")
    parser.add_argument("--folder", default=".", help="of the server")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--warm-s", type=float, default=0.5)
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    kind = CLIENTS[options.client]
    client = kind(Target(workload, options.port, options.path, options.folder))
    measuring = measure(client, workload, options.callers, options.warm_s, options.seconds)
    # gRPC's asyncio has its own poller, which gains nothing by another loop.
    run = uvloop.run if kind.is_plain else asyncio.run
    outcome = asdict(run(measuring))
    del outcome["times_s"]
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
