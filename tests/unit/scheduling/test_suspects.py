"""An executor that dies of a batch: the request that did it is found, the others are answered."""

from __future__ import annotations

import random

import pytest
from nos.errors import ExecutorLostError, LoadError
from nos_backend.scheduling.caps import Cap
from nos_backend.scheduling.device_queue import (
    Action,
    Batch,
    Capped,
    Culprit,
    DeviceQueue,
    End,
    PutBack,
    Request,
    Start,
)


class Fragile:
    """A device whose executor dies of some requests, or of too many."""

    def __init__(self, num_requests: int, deadly: set[int], max_rows: int = 64) -> None:
        self.queue = DeviceQueue(max_concurrent_batches=1)
        self.queue.open_model("a", "x", now_s=0)
        self.deadly, self.max_rows = deadly, max_rows
        self.ends: dict[int, object] = {}
        self.culprits: list[int] = []
        self.caps: list[Cap | None] = []
        self.batches: list[Batch] = []
        self._pending: list[Action] = []
        self.send(range(num_requests))

    def send(self, numbers: range) -> None:
        """Let requests arrive at once, and serve them."""
        self._pending += self.queue.hold("x", now_s=0)
        for number in numbers:
            tenant = "tu"[number % 2]
            request = Request(id=number, model="a", tenant=tenant, key="k", may_wait=True)
            self._pending += self.queue.arrive(request, now_s=0)
        self._pending += self.queue.release("x", now_s=0)
        while self._pending:
            self._carry_out(self._pending.pop(0))

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, End):
            assert action.request_id not in self.ends
            self.ends[action.request_id] = action.error
        elif isinstance(action, Culprit):
            self.culprits.append(action.request_id)
        elif isinstance(action, Capped):
            self.caps.append(action.cap)
        elif isinstance(action, Start):
            self.batches.append(action.batch)
            ids = {item.id for item in action.batch.requests}
            if ids & self.deadly or len(ids) > self.max_rows:
                self._pending += self.queue.executor_lost("x", "signal 11", now_s=1)
                self._pending += self.queue.open_model("a", "x", now_s=1)
            else:
                self._pending += self.queue.finish(action.batch.id, "x", now_s=1)


@pytest.mark.parametrize("seed", range(20))
def test_those_that_kill_are_found_and_all_others_answered(seed: int) -> None:
    rng = random.Random(seed)
    num_requests = rng.randint(2, 64)
    deadly = set(rng.sample(range(num_requests), rng.choice([1, 1, 1, 2])))
    device = Fragile(num_requests, deadly)
    assert set(device.culprits) == deadly
    assert len(device.ends) == num_requests
    for number, error in device.ends.items():
        assert isinstance(error, ExecutorLostError) == (number in deadly)


def test_suspects_run_among_themselves() -> None:
    device = Fragile(8, {2})
    for batch in device.batches:
        assert batch.is_suspect == (batch is not device.batches[0])
    sizes = [len(batch.requests) for batch in device.batches]
    assert sizes[:2] == [8, 4]
    assert sorted(sizes) == [1, 1, 2, 2, 4, 4, 8]


def test_a_batch_that_is_only_too_large_makes_batches_smaller() -> None:
    device = Fragile(32, set(), max_rows=16)
    assert device.caps == [], "once may be anything"
    device.send(range(32, 64))
    assert device.culprits == []
    assert len(device.ends) == 64
    assert set(device.ends.values()) == {None}
    assert [cap and cap.rows for cap in device.caps] == [16]


def test_a_model_that_always_dies_is_not_tried_for_ever() -> None:
    device = Fragile(64, set(range(64)))
    assert len(device.ends) == 64
    assert len(device.batches) <= 2 * 64


def test_a_single_request_that_kills_at_once_is_no_suspect() -> None:
    device = Fragile(1, {0})
    assert device.culprits == []
    assert isinstance(device.ends[0], ExecutorLostError)


def test_what_is_put_back_ends_with_its_model() -> None:
    queue = DeviceQueue(max_concurrent_batches=1)
    queue.open_model("a", "x", now_s=0)
    queue.hold("x", now_s=0)
    for number in range(4):
        queue.arrive(Request(id=number, model="a", tenant="t", key="k"), now_s=0)
    queue.release("x", now_s=0)
    assert any(isinstance(item, PutBack) for item in queue.executor_lost("x", "gone", now_s=1))
    ends = [
        item.request_id
        for item in queue.close_model("a", LoadError("quarantined"), now_s=1)
        if isinstance(item, End)
    ]
    assert sorted(ends) == [0, 1, 2, 3]
    assert queue.num_queued == 0
