"""Exact decisions of the device queue: event in, actions out."""

from __future__ import annotations

from typing import Any

import pytest
from nos.errors import (
    CancelledError,
    DeadlineExceededError,
    ExecutorLostError,
    LoadError,
    OverloadedError,
    UnavailableError,
)
from nos_backend.scheduling.device_queue import (
    Action,
    Batch,
    BatchLimits,
    CancelCall,
    DeviceQueue,
    Drained,
    End,
    Held,
    KillExecutor,
    PutBack,
    Refuse,
    Request,
    Start,
)


def queue(grants: int = 1, **limits: int) -> DeviceQueue:
    made = DeviceQueue(max_concurrent_batches=grants, **limits)
    made.open_model("a", "x", now_s=0, call_timeout_s=10)
    made.open_model("b", "y", now_s=0, call_timeout_s=10)
    return made


def request(
    id: int,
    model: str = "a",
    tenant: str = "t",
    size_bytes: int = 0,
    deadline_s: float | None = None,
    *,
    may_wait: bool = False,
    key: str | None = None,
) -> Request:
    return Request(
        id=id,
        model=model,
        tenant=tenant,
        size_bytes=size_bytes,
        deadline_s=deadline_s,
        may_wait=may_wait,
        key=key,
    )


def started(actions: list[Action]) -> list[int]:
    return [item.batch.requests[0].id for item in actions if isinstance(item, Start)]


def batch_id(actions: list[Action]) -> int:
    return next(item.batch.id for item in actions if isinstance(item, Start))


def batch_of(actions: list[Action]) -> Batch:
    return next(item.batch for item in actions if isinstance(item, Start))


def errors(actions: list[Action]) -> dict[int, type[Exception]]:
    return {
        item.request_id: type(item.error)
        for item in actions
        if isinstance(item, End | Refuse) and item.error is not None
    }


def test_a_request_for_an_idle_executor_starts_at_once() -> None:
    assert started(queue().arrive(request(1), now_s=0)) == [1]


def test_grants_are_never_exceeded() -> None:
    one, two = queue(1), queue(2)
    for made in (one, two):
        made.arrive(request(1, "a"), now_s=0)
    assert started(one.arrive(request(2, "b"), now_s=0)) == []
    assert started(two.arrive(request(2, "b"), now_s=0)) == [2]


def test_an_executor_runs_one_batch_at_a_time() -> None:
    made = queue(2)
    first = made.arrive(request(1), now_s=0)
    assert started(made.arrive(request(2), now_s=0)) == []
    assert started(made.finish(batch_id(first), "x", now_s=1)) == [2]


def test_finish_tells_to_deliver_the_result() -> None:
    made = queue()
    first = made.arrive(request(1), now_s=0)
    assert made.finish(batch_id(first), "x", now_s=1) == [End(1, None)]
    assert made.finish(batch_id(first), "x", now_s=1) == []


@pytest.mark.accept("A5")
def test_a_saturated_lane_and_its_neighbours_take_turns() -> None:
    made = queue()
    actions = made.arrive(request(1), now_s=0)
    for index in range(2, 7):
        made.arrive(request(index), now_s=0)
    made.arrive(request(7, "b"), now_s=0)
    made.arrive(request(8, "a", tenant="u"), now_s=0)
    made.arrive(request(9, "b"), now_s=0)
    order = []
    while started(actions):
        order += started(actions)
        batch = next(item.batch for item in actions if isinstance(item, Start))
        actions = made.finish(batch.id, batch.executor, now_s=0)
    assert order == [1, 7, 8, 2, 9, 3, 4, 5, 6]


def test_two_lanes_that_come_straight_back_do_not_starve_a_third() -> None:
    made = queue()
    made.open_model("c", "z", now_s=0)
    actions = made.arrive(request(1, "a"), now_s=0)
    for index in range(100, 120):
        made.arrive(request(index, "c"), now_s=0)
    made.arrive(request(2, "b"), now_s=0)
    served = []
    for index in range(3, 33):
        batch = next(item.batch for item in actions if isinstance(item, Start))
        served.append(batch.model)
        actions = made.finish(batch.id, batch.executor, now_s=0)
        if batch.model != "c":
            made.arrive(request(index, batch.model), now_s=0)
    assert served.count("c") == 10


def test_full_queue_refuses_the_next_request() -> None:
    made = queue(max_queued=2)
    for index in range(1, 4):
        assert not errors(made.arrive(request(index), now_s=0))
    assert errors(made.arrive(request(4), now_s=0)) == {4: OverloadedError}
    assert not errors(made.arrive(request(5, "b"), now_s=0))


def test_a_request_whose_sender_waits_for_it_is_admitted_to_a_full_queue() -> None:
    made = queue(max_queued=2)
    for index in range(1, 4):
        made.arrive(request(index), now_s=0)
    assert not errors(made.arrive(request(4, may_wait=True), now_s=0))
    assert errors(made.arrive(request(5), now_s=0)) == {5: OverloadedError}


def test_queued_bytes_are_bounded_but_one_larger_request_passes_alone() -> None:
    made = queue(max_queued_bytes=100)
    made.arrive(request(1), now_s=0)
    assert not errors(made.arrive(request(2, size_bytes=1000), now_s=0))
    assert errors(made.arrive(request(3, size_bytes=1), now_s=0)) == {3: OverloadedError}


def test_a_refusal_says_when_to_come_back() -> None:
    made = queue(max_queued=2)
    first = made.arrive(request(1), now_s=0)
    made.finish(batch_id(first), "x", now_s=0.5)
    for index in range(2, 5):
        made.arrive(request(index), now_s=1)
    (refusal,) = made.arrive(request(5), now_s=1)
    assert isinstance(refusal, Refuse)
    assert refusal.error.retry_after_s == pytest.approx(1.0)


def test_a_request_past_its_deadline_never_runs() -> None:
    made = queue()
    first = made.arrive(request(1), now_s=0)
    made.arrive(request(2, deadline_s=1), now_s=0)
    assert made.next_wake_s() == 1
    assert errors(made.tick(now_s=1)) == {2: DeadlineExceededError}
    assert made.finish(batch_id(first), "x", now_s=2) == [End(1, None)]


def test_a_deadline_in_the_run_ends_the_request_but_not_the_executor() -> None:
    made = queue()
    first = made.arrive(request(1, deadline_s=1), now_s=0)
    actions = made.tick(now_s=1)
    assert errors(actions) == {1: DeadlineExceededError}
    assert CancelCall(1, "x") in actions
    assert made.num_running == 1
    assert made.finish(batch_id(first), "x", now_s=2) == []
    assert made.num_running == 0


def test_a_cancelled_waiting_request_never_runs() -> None:
    made = queue()
    first = made.arrive(request(1), now_s=0)
    made.arrive(request(2), now_s=0)
    assert errors(made.cancel(2, now_s=0)) == {2: CancelledError}
    assert started(made.finish(batch_id(first), "x", now_s=1)) == []
    assert made.cancel(2, now_s=2) == []


def test_a_call_over_its_time_ends_its_executor() -> None:
    made = queue()
    made.arrive(request(1), now_s=0)
    made.arrive(request(2), now_s=0)
    assert made.next_wake_s() == 10
    actions = made.tick(now_s=10)
    assert errors(actions) == {1: DeadlineExceededError}
    assert [item.executor for item in actions if isinstance(item, KillExecutor)] == ["x"]
    assert made.tick(now_s=11) == []
    assert made.executor_lost("x", "signal 9", now_s=11) == []
    assert started(made.open_model("a", "x", now_s=12)) == [2]


@pytest.mark.accept("A6")
def test_a_lost_executor_fails_what_ran_and_keeps_what_waited_once() -> None:
    made = queue()
    made.arrive(request(1), now_s=0)
    made.arrive(request(2), now_s=0)
    made.arrive(request(3), now_s=0)
    assert errors(made.executor_lost("x", "signal 9", now_s=1)) == {1: ExecutorLostError}
    assert started(made.open_model("a", "x", now_s=2)) == [2]
    lost = made.executor_lost("x", "signal 9", now_s=3)
    assert errors(lost) == {2: ExecutorLostError, 3: ExecutorLostError}


def test_a_lost_executor_frees_its_grant_for_others() -> None:
    made = queue()
    made.arrive(request(1, "a"), now_s=0)
    made.arrive(request(2, "b"), now_s=0)
    assert started(made.executor_lost("x", "signal 9", now_s=1)) == [2]


def test_a_held_executor_starts_nothing_until_released() -> None:
    made = queue()
    first = made.arrive(request(1), now_s=0)
    made.arrive(request(2), now_s=0)
    assert made.hold("x", now_s=0) == []
    assert made.finish(batch_id(first), "x", now_s=1) == [End(1, None), Held("x")]
    assert started(made.release("x", now_s=2)) == [2]
    assert made.hold("y", now_s=2) == [Held("y")]


def test_a_draining_model_admits_nothing_and_says_when_it_is_empty() -> None:
    made = queue()
    first = made.arrive(request(1), now_s=0)
    assert made.drain("a", now_s=0) == []
    assert errors(made.arrive(request(2), now_s=0)) == {2: UnavailableError}
    assert made.finish(batch_id(first), "x", now_s=1) == [End(1, None), Drained("a")]
    assert made.drain("b", now_s=1) == [Drained("b")]


def test_closing_a_model_ends_what_waits_for_it() -> None:
    made = queue()
    first = made.arrive(request(1), now_s=0)
    made.arrive(request(2), now_s=0)
    assert errors(made.close_model("a", LoadError("gone"), now_s=0)) == {2: LoadError}
    assert made.finish(batch_id(first), "x", now_s=1) == [End(1, None)]
    assert errors(made.arrive(request(3), now_s=1)) == {3: UnavailableError}


def test_a_deadline_in_the_past_ends_the_request_and_nothing_runs() -> None:
    made = queue()
    actions = made.arrive(request(1, deadline_s=-5), now_s=0)
    assert errors(actions) == {1: DeadlineExceededError}
    assert started(actions) == []
    assert made.num_queued == made.num_running == 0


def test_a_clock_that_jumps_ahead_ends_what_is_late_and_serves_the_rest() -> None:
    made = queue()
    made.arrive(request(1), now_s=0)
    made.arrive(request(2, deadline_s=60), now_s=0)
    made.arrive(request(3), now_s=0)
    actions = made.tick(now_s=1e6)
    assert errors(actions) == {1: DeadlineExceededError, 2: DeadlineExceededError}
    assert [item.executor for item in actions if isinstance(item, KillExecutor)] == ["x"]
    made.executor_lost("x", "killed", now_s=1e6)
    assert started(made.open_model("a", "x", now_s=1e6)) == [3]


def test_no_batch_is_longer_than_the_quantum_while_another_model_waits() -> None:
    made = DeviceQueue(max_concurrent_batches=1, quantum_s=0.05)
    for model, executor in (("a", "x"), ("b", "y")):
        made.open_model(model, executor, now_s=0)
    made.advise("a", 64, [(1, 0.011), (1, 0.011), (8, 0.018), (64, 0.074)])
    made.hold("x", now_s=0)
    for number in range(64):
        made.arrive(Request(id=number, model="a", tenant="t", key="k"), now_s=0)
    made.hold("y", now_s=0)
    made.arrive(Request(id=100, model="b", tenant="t"), now_s=0)
    (start,) = [item for item in made.release("x", now_s=0) if isinstance(item, Start)]
    assert 30 <= start.batch.rows <= 40


def bulk(id: int, **facts: Any) -> Request:
    return Request(id=id, model="a", tenant="t", may_wait=True, is_bulk=True, **facts)


def test_a_tenants_call_goes_before_its_bulk_that_waits() -> None:
    made = queue()
    running = batch_id(made.arrive(bulk(1), now_s=0))
    made.arrive(bulk(2), now_s=0)
    made.arrive(request(3), now_s=0.5)
    assert started(made.finish(running, "x", now_s=1)) == [3]


def test_bulk_has_a_small_share_beside_calls_and_is_not_forgotten() -> None:
    made = queue()
    for number in range(100):
        made.arrive(bulk(1000 + number), now_s=0)
        made.arrive(request(1 + number, may_wait=True), now_s=0)
    order, now_s, actions = [1000], 0.0, [Start(next(iter(made._busy.values())).batch)]
    for _ in range(100):
        now_s += 0.01
        actions = made.finish(batch_id(actions), "x", now_s=now_s)
        order += started(actions)
    assert 4 <= sum(item >= 1000 for item in order) <= 9


def test_bulk_joins_no_batch_of_a_call_but_a_call_joins_its_batch() -> None:
    made = DeviceQueue(max_concurrent_batches=1)
    made.open_model("a", "x", now_s=0, limits=BatchLimits(max_rows=8, queue_delay_s=0))
    first = made.arrive(bulk(1, key="k"), now_s=0)
    for item in (bulk(2, key="k"), bulk(3, key="k"), request(4, key="k"), request(5, key="k")):
        made.arrive(item, now_s=0)
    calls = made.finish(batch_id(first), "x", now_s=0.01)
    assert [item.id for item in batch_of(calls).requests] == [4, 5]
    made.arrive(bulk(6, key="k"), now_s=0.01)
    assert {it.id for it in batch_of(made.finish(batch_id(calls), "x", now_s=0.02)).requests} == {
        *(2, 3, 6)
    }


def test_a_batch_of_bulk_keeps_to_the_quantum_although_nobody_else_waits() -> None:
    made = DeviceQueue(max_concurrent_batches=1, quantum_s=0.05)
    made.open_model("a", "x", now_s=0, limits=BatchLimits(max_rows=64, queue_delay_s=0))
    made.advise("a", 64, [(1, 0.01), (2, 0.02), (4, 0.04), (8, 0.08), (16, 0.16)])
    actions = made.arrive(bulk(1, key="k"), now_s=0)
    for number in range(2, 40):
        made.arrive(bulk(number, key="k"), now_s=0)
    following = batch_of(made.finish(batch_id(actions), "x", now_s=0.01))
    assert 1 <= following.rows <= 8


def test_a_request_has_as_many_rows_as_its_author_and_the_memory_allow() -> None:
    made = DeviceQueue(max_concurrent_batches=1)
    made.open_model("a", "x", now_s=0, limits=BatchLimits(max_rows=32))
    assert made.whole_rows("a", is_bulk=False) == 32
    made.advise("a", 1, [])
    assert made.whole_rows("a", is_bulk=False) == 32, "its best batch is about those of several"
    made.advise("a", 1, [], memory_rows=8)
    assert made.whole_rows("a", is_bulk=False) == 8
    made.failed_together("a", 8, now_s=0)
    assert made.whole_rows("a", is_bulk=False) == 4
    assert made.whole_rows("b", is_bulk=False) == 1, "it is not here"


def test_a_request_is_no_longer_than_the_quantum_while_another_model_waits() -> None:
    made = queue()
    made.advise("a", 1, [(1, 0.01), (2, 0.02), (4, 0.04), (8, 0.08)])
    assert made.whole_rows("a", is_bulk=False) == 64
    assert 1 <= made.whole_rows("a", is_bulk=True) <= 8
    made.hold("y", now_s=0)
    made.arrive(request(1, model="b"), now_s=0)
    assert 1 <= made.whole_rows("a", is_bulk=False) <= 8


def brisk(call_s: float = 1e-4, grants: int = 1) -> DeviceQueue:
    """A queue that knows how long a call of `a` takes; it is 1 s by its clock."""
    made = queue(grants)
    for index in range(20):
        first = made.arrive(request(1000 + index), now_s=index * 0.01)
        made.finish(batch_id(first), "x", now_s=index * 0.01 + call_s)
    return made


def train(made: DeviceQueue, num_requests: int = 4, **others: str) -> Batch:
    """Let requests 1, 2, ... come, of which the first is answered; return what runs then."""
    first = made.arrive(request(1), now_s=1)
    for index in range(2, num_requests + 2):
        made.arrive(request(index), now_s=1)
    for id, tenant in others.items():
        made.arrive(request(int(id[1:]), tenant=tenant), now_s=1)
    return batch_of(made.finish(batch_id(first), "x", now_s=1.0001))


def test_short_requests_that_run_alone_are_started_together() -> None:
    batch = train(brisk())
    assert [item.id for item in batch.requests] == [2, 3, 4, 5]
    assert batch.is_train


@pytest.mark.parametrize(("call_s", "num_requests"), [(1e-4, 8), (1.3e-3, 3), (3e-3, 1), (1.0, 1)])
def test_a_train_takes_no_longer_than_a_few_milliseconds(call_s: float, num_requests: int) -> None:
    assert len(train(brisk(call_s), 12).requests) == num_requests


def test_nothing_is_started_together_before_it_is_known_to_be_short() -> None:
    assert len(train(queue()).requests) == 1


@pytest.mark.accept("A5")
def test_nothing_is_started_together_while_another_tenant_has_work() -> None:
    assert len(train(brisk(), i20="u").requests) == 1


def test_a_request_of_a_train_ends_as_it_is_answered() -> None:
    made = brisk()
    batch = train(made)
    assert made.answered(batch.id, "x", 2, now_s=2) == [End(2, None)]
    assert made.answered(batch.id, "x", 2, now_s=2) == []
    assert made.finish(batch.id, "x", now_s=3) == [End(3, None), End(4, None), End(5, None)]


def test_a_request_of_a_train_can_be_withdrawn() -> None:
    made = brisk()
    batch = train(made)
    ended, told = made.cancel(3, now_s=2)
    assert isinstance(ended, End)
    assert isinstance(ended.error, CancelledError)
    assert told == CancelCall(3, "x")
    assert made.answered(batch.id, "x", 3, now_s=2) == []


@pytest.mark.accept("A6")
def test_an_executor_that_dies_of_one_of_a_train_takes_no_other_along() -> None:
    made = brisk()
    batch = train(made)
    made.answered(batch.id, "x", 2, now_s=2)
    actions = made.executor_lost("x", "signal 9", now_s=2)
    assert errors(actions) == {3: ExecutorLostError}
    assert PutBack(batch) in actions
    again = batch_of(made.open_model("a", "x", now_s=3))
    assert [item.id for item in again.requests] == [4, 5]


def test_only_the_one_of_a_train_that_runs_can_run_too_long() -> None:
    made = brisk()
    batch = train(made)
    made.answered(batch.id, "x", 2, now_s=5)
    assert made.tick(now_s=12) == []
    assert errors(made.tick(now_s=15)) == {3: DeadlineExceededError}
    assert errors(made.executor_lost("x", "killed", now_s=15)) == {}
    again = batch_of(made.open_model("a", "x", now_s=16))
    assert [item.id for item in again.requests] == [4, 5]
