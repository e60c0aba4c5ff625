"""Ten times the load that a model can bear: refused at the door, and what is let in is answered in time."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import nos
import numpy as np
import pytest
from nos import errors

from tests.accept import Accept
from tests.servers import Server, wait_for

MODEL = "fake/slow-device"
#: Of 16 rows in 480 ms.
CAPACITY_HZ = 16 / 0.48
DEADLINE_S = 1.6
#: A client's calls share a stream, which holds 16.
NUM_CLIENTS, NUM_CALLERS = 12, 168
ROW = np.zeros((1, 16), np.float32)


@dataclass
class Outcome:
    answered_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    hints_s: list[float] = field(default_factory=list)

    @property
    def num_sent(self) -> int:
        return len(self.answered_s) + len(self.late_s) + len(self.hints_s)


async def load(
    handles: list[nos.AsyncModelHandle], num_callers: int, seconds: float, pause_s: float
) -> Outcome:
    """Call with a deadline; after each answer or refusal again, after a pause."""
    outcome, end_s = Outcome(), time.perf_counter() + seconds

    async def one(number: int) -> None:
        handle = handles[number % len(handles)]
        await asyncio.sleep(pause_s * number / num_callers)
        while (sent_s := time.perf_counter()) < end_s:
            try:
                await handle(ROW, timeout_s=DEADLINE_S)
                outcome.answered_s.append(time.perf_counter() - sent_s)
            except errors.OverloadedError as error:
                outcome.hints_s.append(error.retry_after_s)
            except errors.DeadlineExceededError:
                outcome.late_s.append(time.perf_counter() - sent_s)
            await asyncio.sleep(pause_s)

    await asyncio.gather(*(one(number) for number in range(num_callers)))
    return outcome


@pytest.mark.accept("C8")
def test_ten_times_the_load_leaves_goodput_and_deadlines_as_they_are(
    server: Server, client: nos.Client, accept: Accept
) -> None:
    seconds = 30.0 if accept.strict else 2.0

    async def measure() -> tuple[float, Outcome, Outcome, int]:
        async with AsyncExitStack() as clients:
            handles = []
            for _ in range(NUM_CLIENTS):
                one = await clients.enter_async_context(
                    await nos.AsyncClient.connect(server.address, token_file=str(server.token_file))
                )
                handles.append(await one.model(MODEL))
            for _ in range(10):
                await handles[0](ROW)
            begin_s = time.perf_counter()
            peak = await load(handles, 32, min(seconds, 6.0), 0.0)
            peak_hz = len(peak.answered_s) / (time.perf_counter() - begin_s)
            begin_s = time.perf_counter()
            over = await load(handles, NUM_CALLERS, seconds, 0.16)
            goodput = len(over.answered_s) / (time.perf_counter() - begin_s) / peak_hz
            after = await load(handles, 2, 1.0, 0.05)
            return goodput, over, after, 10 + peak.num_sent + over.num_sent + after.num_sent

    client.unload(MODEL)
    goodput, over, after, num_sent = asyncio.run(measure())
    admitted_s = sorted(over.answered_s + over.late_s)
    p99_s = admitted_s[int(0.99 * len(admitted_s))]
    accept.figure(over.num_sent / seconds / CAPACITY_HZ, 10.0, "x the capacity", at_least=True)
    accept.figure(goodput, 0.8, "of the peak", at_least=True)
    accept.figure(p99_s, DEADLINE_S, "s p99 of what was admitted")
    assert over.hints_s
    assert all(0 < hint <= 5 for hint in over.hints_s)
    assert len(after.answered_s) > len(after.hints_s) + len(after.late_s), "not normal again"
    # Nothing was sent a second time behind the caller's back.
    wait_for(lambda: num_ended(client.stats(MODEL)) >= num_sent, "what the worker counted")
    assert num_ended(client.stats(MODEL)) == num_sent


def num_ended(stats: nos.ModelStats) -> int:
    ends = stats.num_answered, stats.num_failed, stats.num_refused, stats.num_expired
    return sum(ends) + stats.num_cancelled
