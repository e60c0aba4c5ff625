"""Who is let into the queue, who is sent away, and what that does under overload."""

from __future__ import annotations

import random

import pytest
from nos.errors import NosError, OverloadedError
from nos_backend.scheduling.batching import BatchLimits
from nos_backend.scheduling.device_queue import DeviceQueue, End, Refuse, Request, Start

from tests.accept import Accept
from tests.unit.scheduling.virtual import Device, tau_s

MAX_ROWS = 16


def busy_queue(**limits: int) -> DeviceQueue:
    """A queue whose device runs a request for ever."""
    made = DeviceQueue(max_concurrent_batches=1, **limits)
    made.open_model("a", "x", now_s=0)
    made.arrive(Request(id=1, model="a", tenant="other"), now_s=0)
    return made


def refusals(queue: DeviceQueue, tenant: str, ids: range, *, size_bytes: int = 0) -> list[NosError]:
    """Let requests of a tenant arrive; return the errors of all that were refused or ended."""
    actions = [
        action
        for number in ids
        for action in queue.arrive(
            Request(id=number, model="a", tenant=tenant, size_bytes=size_bytes), now_s=0
        )
    ]
    return [
        item.error for item in actions if isinstance(item, End | Refuse) and item.error is not None
    ]


def test_a_tenant_alone_may_fill_the_queue() -> None:
    queue = busy_queue(max_queued=8)
    assert refusals(queue, "hog", range(10, 18)) == []
    (error,) = refusals(queue, "hog", range(18, 19))
    assert isinstance(error, OverloadedError)
    assert error.retryable
    assert error.retry_after_s > 0


def test_a_tenant_holds_half_of_the_queue_while_others_wait() -> None:
    queue = busy_queue(max_queued=8)
    assert refusals(queue, "light", range(10, 12)) == []
    (first, *_) = errors = refusals(queue, "hog", range(20, 30))
    assert len(errors) == 6
    assert "at most 4 requests" in str(first)
    assert queue.num_queued == 6


def test_a_newcomer_takes_the_place_of_the_newest_of_who_holds_most() -> None:
    queue = busy_queue(max_queued=8)
    refusals(queue, "hog", range(10, 18))
    actions = queue.arrive(Request(id=30, model="a", tenant="light"), now_s=0)
    (left,) = [item for item in actions if isinstance(item, End)]
    assert left.request_id == 17
    assert isinstance(left.error, OverloadedError)
    assert queue.is_live(30)
    assert queue.num_queued == 8


def test_nobody_takes_a_place_from_whoever_holds_no_more() -> None:
    queue = busy_queue(max_queued=4)
    refusals(queue, "a", range(10, 12))
    refusals(queue, "b", range(20, 22))
    assert len(refusals(queue, "c", range(30, 31))) == 1, "makes room for one"
    assert len(refusals(queue, "c", range(31, 32))) == 1, "is refused"
    assert queue.num_queued == 4


def test_bytes_are_shared_like_places() -> None:
    queue = DeviceQueue(max_concurrent_batches=1, max_queued_bytes=100)
    queue.open_model("a", "x", now_s=0)
    queue.arrive(Request(id=1, model="a", tenant="other"), now_s=0)
    assert refusals(queue, "hog", range(10, 14), size_bytes=25) == []
    assert len(refusals(queue, "light", range(20, 21), size_bytes=25)) == 1
    assert queue.is_live(20)
    assert not queue.is_live(13)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    device = learnt()
    for _ in range(MAX_ROWS):
        device.send(may_wait=False)
    before = device.refused
    device.send(may_wait=False, ttl_s=tau_s(1) / 2)
    assert device.refused == before + 1
    device.send(may_wait=False, ttl_s=10 * tau_s(MAX_ROWS))
    assert device.refused == before + 1


def test_an_idle_device_tries_even_what_seems_too_slow() -> None:
    device = learnt()
    device.send(may_wait=False, ttl_s=tau_s(1) / 2)
    assert device.refused == 0
    device.run()
    assert device.done[-1].is_error, "its deadline passed"


def test_deadlines_are_no_reason_to_refuse_before_the_model_is_known() -> None:
    device = Device({"a": BatchLimits()})
    for _ in range(4):
        device.send(may_wait=False, ttl_s=1e-3)
    assert device.refused == 0


def test_deadlines_are_no_reason_to_refuse_where_calls_take_what_they_like() -> None:
    rng = random.Random(5)
    device = Device({"a": BatchLimits()}, cost_s=lambda _model, _rows: rng.choice([1e-3, 0.1, 3.0]))
    for _ in range(30):
        device.send(key=None)
    device.run()
    for _ in range(4):
        device.send(may_wait=False, ttl_s=1e-3, key=None)
    assert device.refused == 0


def test_work_of_another_model_counts_only_as_far_as_it_goes_first() -> None:
    device = Device({"a": BatchLimits(max_rows=1), "b": BatchLimits(max_rows=1)})
    for model in "ab" * 4:
        device.send(model)
    device.run()
    for _ in range(200):
        device.send("b", tenant="hog")
    device.send("a", may_wait=False, ttl_s=4 * tau_s(1))
    assert device.refused == 0
    device.run()
    mine = [item for item in device.done if item.request.model == "a"][-1]
    assert not mine.is_error


def learnt(max_rows: int = MAX_ROWS) -> Device:
    """A device whose model is known."""
    device = Device({"a": BatchLimits(max_rows=max_rows)}, max_queued=256)
    for rows in (1, 1, 4, 8, 1, 4, 8, 1):
        device.send(rows=rows)
        device.run()
    return device


def offered(device: Device, rate_hz: float, seconds: float, ttl_s: float, seed: int) -> None:
    """Let requests of 20 tenants arrive at random from now on."""
    rng, time_s = random.Random(seed), device.now_s
    end_s = time_s + seconds
    while (time_s := time_s + rng.expovariate(rate_hz)) < end_s:
        tenant = f"t{rng.randrange(20)}"
        device.at(
            time_s, lambda tenant=tenant: device.send(tenant=tenant, may_wait=False, ttl_s=ttl_s)
        )


@pytest.mark.accept("C8")
@pytest.mark.parametrize(("batches", "seed"), [(3, 1), (6, 2), (20, 3)])
def test_ten_times_the_load_is_refused_and_not_queued(
    batches: int, seed: int, accept: Accept
) -> None:
    device, ttl_s = learnt(), batches * tau_s(MAX_ROWS)
    peak_hz = MAX_ROWS / tau_s(MAX_ROWS)
    begin_s, before = device.now_s, len(device.done)
    offered(device, 10 * peak_hz, 1.0, ttl_s, seed)
    device.run()
    answered = [item for item in device.done[before:] if not item.is_error]
    latencies_s = sorted(item.latency_s for item in answered)
    late = sum(item.is_error and not item.is_refused for item in device.done[before:])
    goodput = len(answered) / (device.now_s - begin_s) / peak_hz
    accept.figure(goodput, 0.8, "of the peak", at_least=True)
    accept.figure(latencies_s[int(0.99 * len(latencies_s))], ttl_s, "s p99 of what was admitted")
    assert goodput >= 0.8
    assert late <= 0.01 * len(answered), "admitted and late"
    assert device.refused > 5 * len(answered)


@pytest.mark.accept("C8")
def test_after_overload_everything_is_as_before() -> None:
    device, ttl_s = learnt(), 6 * tau_s(MAX_ROWS)
    peak_hz = MAX_ROWS / tau_s(MAX_ROWS)
    offered(device, 10 * peak_hz, 0.5, ttl_s, 1)
    device.run()
    refused, before = device.refused, len(device.done)
    offered(device, 0.5 * peak_hz, 1.0, ttl_s, 2)
    device.run()
    assert device.refused == refused
    assert not any(item.is_error for item in device.done[before:])


def test_a_stall_of_the_device_costs_what_waited_and_no_more() -> None:
    stall = {"until_s": 0.0}
    device = Device({"a": BatchLimits(max_rows=MAX_ROWS)}, max_queued=256)
    device.cost_s = lambda _model, rows: max(tau_s(rows), stall["until_s"] - device.now_s)
    ttl_s = 6 * tau_s(MAX_ROWS)
    peak_hz = MAX_ROWS / tau_s(MAX_ROWS)
    offered(device, 4 * peak_hz, 2.0, ttl_s, 4)
    device.run(0.5)
    stall["until_s"] = device.now_s + 3 * ttl_s
    device.run(2.0)
    after = [item for item in device.done if not item.is_error and item.ended_s > 1.0]
    assert len(after) / peak_hz >= 0.8


def test_a_started_request_is_not_pushed_out() -> None:
    queue = busy_queue(max_queued=1)
    actions = [*queue.arrive(Request(id=5, model="a", tenant="hog"), now_s=0)]
    assert not [item for item in actions if isinstance(item, Start)]
    refusals(queue, "light", range(6, 7))
    assert queue.is_live(1)
