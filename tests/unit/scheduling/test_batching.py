"""Batches in virtual time: how full, how late, how fair, over thousands of seeded schedules."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nos_backend.scheduling.batching import BatchLimits, BatchTime, bucket, divided, form
from nos_backend.scheduling.device_queue import Request

from tests.accept import Accept
from tests.unit.scheduling.virtual import ROW_S, T0_S, Device, closed_loop, tau_s


def inoue_bound_s(rate_hz: float, t0_s: float = T0_S, row_s: float = ROW_S) -> float:
    """Mean latency of batch-while-busy under Poisson arrivals (Inoue 2021, arXiv 1912.06322)."""
    load, base = rate_hz * row_s, rate_hz * t0_s
    light = (row_s + t0_s) / (2 * (1 - load)) * (1 + 2 * base + (1 - base) / (1 + load))
    heavy = 1.5 * t0_s / (1 - load) + row_s / 2 * (load + 2) / (1 - load**2)
    return min(light, heavy)


def open_loop(rate_hz: float, limits: BatchLimits | None = None, num: int = 20_000) -> Device:
    rng, device, time_s = random.Random(7), Device({"a": limits or BatchLimits()}), 0.0
    for _ in range(num):
        time_s += rng.expovariate(rate_hz)
        device.at(time_s, lambda: device.send(sender=1))
    device.run()
    return device


@pytest.mark.accept("C6")
@pytest.mark.parametrize("rate_hz", [20, 100, 500, 1000, 2000, 2900])
def test_mean_latency_in_open_loop_meets_the_bound_of_batch_while_busy(
    rate_hz: float, accept: Accept
) -> None:
    device = open_loop(rate_hz, num=20_000 if accept.strict else 5_000)
    mean_s = statistics.fmean(item.latency_s for item in device.done)
    accept.figure(mean_s / inoue_bound_s(rate_hz), 1.10, f"x the bound at {rate_hz}/s")
    assert mean_s <= 1.10 * inoue_bound_s(rate_hz)


def ratio_of(num_clients: int, round_trip_s: float, jitter: float) -> float:
    """Throughput in closed loop against a device that always waits for all and knows when all are here."""
    rng = random.Random(num_clients)
    shape = 1 / jitter**2 if jitter else 0

    def draw() -> float:
        return rng.gammavariate(shape, round_trip_s / shape) if shape else round_trip_s

    device = closed_loop(num_clients, draw, seconds=5)
    num = sum(item.ended_s > 1 for item in device.done)
    return num / 4 / (num_clients / (tau_s(num_clients) + round_trip_s))


@pytest.mark.accept("C6")
@pytest.mark.parametrize("jitter", [0.0, 0.3])
@pytest.mark.parametrize("round_trip_s", [0.3e-3, 0.5e-3, 1e-3])
@pytest.mark.parametrize("num_clients", [2, 4, 16, 64])
def test_throughput_in_closed_loop_is_close_to_full_batches(
    num_clients: int, round_trip_s: float, jitter: float, accept: Accept
) -> None:
    ratio = ratio_of(num_clients, round_trip_s, jitter)
    accept.figure(ratio, 0.90, f"x full batches, {num_clients} clients", at_least=True)
    assert ratio >= 0.90


@pytest.mark.parametrize("num_clients", [4, 16, 64])
def test_senders_that_are_longer_on_their_way_are_gathered_too(num_clients: int) -> None:
    assert ratio_of(num_clients, 2e-3, 0.0) >= 0.95
    assert ratio_of(num_clients, 2e-3, 0.3) >= 0.85


def test_senders_that_take_longer_than_a_batch_costs_are_not_waited_for() -> None:
    device = closed_loop(16, lambda: 20e-3, seconds=2)
    assert max(batch.gather_s for batch in device.batches) < 1e-9


@pytest.mark.accept("C6")
def test_a_single_client_is_never_kept_waiting(accept: Accept) -> None:
    ratio = ratio_of(1, 0.5e-3, 0.3)
    accept.figure(ratio, 0.95, "x 1 / (tau(1) + rtt)", at_least=True)
    assert ratio >= 0.98


@pytest.mark.accept("C2")
@pytest.mark.parametrize("delay_s", [0.0, 2e-3, 10e-3])
def test_a_lone_request_waits_no_longer_than_the_queue_delay(delay_s: float) -> None:
    device = Device({"a": BatchLimits(queue_delay_s=delay_s)})
    device.send()
    device.run()
    assert device.done[0].latency_s == pytest.approx(delay_s + tau_s(1))
    assert device.batches[0].gather_s == pytest.approx(delay_s)


@pytest.mark.accept("C2")
def test_a_lone_request_without_a_queue_delay_starts_at_once() -> None:
    device = Device({"a": BatchLimits()})
    device.send(sender=1)
    device.run()
    assert device.done[0].latency_s == pytest.approx(tau_s(1))


def test_a_full_batch_does_not_wait_for_the_queue_delay() -> None:
    device = Device({"a": BatchLimits(queue_delay_s=1, max_rows=3)})
    for _ in range(3):
        device.send()
    device.run()
    assert [batch.rows for batch in device.batches] == [3]
    assert device.now_s == pytest.approx(tau_s(3))


def test_other_models_run_while_one_waits_out_its_queue_delay() -> None:
    device = Device({"a": BatchLimits(queue_delay_s=20e-3), "b": BatchLimits()})
    device.send("a")
    device.send("b")
    device.run()
    assert [(item.request.model, item.started_s) for item in device.done] == [("b", 0), ("a", 0.02)]


def test_nobody_is_gathered_while_another_model_has_work() -> None:
    device = Device({"a": BatchLimits(), "b": BatchLimits()})

    def client(sender: int) -> None:
        device.send(sender=sender, then=lambda _: device.at(device.now_s + 5e-4, again[sender]))

    again = {sender: (lambda sender=sender: client(sender)) for sender in (1, 2)}
    for resend in again.values():
        resend()
    for step in range(200):
        device.at(step * 1e-3, lambda: device.send("b", key=None))
    device.run(0.2)
    assert max(batch.gather_s for batch in device.batches) < 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_every_schedule_keeps_limits_order_and_ends(seed: int) -> None:
    rng = random.Random(seed)
    limits = {
        "a": BatchLimits(max_rows=rng.randint(1, 16)),
        "b": BatchLimits(max_rows=8, queue_delay_s=rng.choice([0.0, 5e-3])),
        "c": BatchLimits(),
    }
    device = Device(limits, grants=rng.randint(1, 2))

    def arrive() -> None:
        request_id = device.send(
            rng.choice("abc"),
            tenant=rng.choice("tuv"),
            sender=rng.randint(0, 5),
            rows=rng.randint(1, 3),
            key=rng.choice(["k", "l", None]),
            ttl_s=rng.choice([None, None, 0.02, 0.5]),
        )
        if rng.random() < 0.1:
            device.at(device.now_s + rng.uniform(0, 0.02), lambda: device.cancel(request_id))

    for _ in range(1500):
        device.at(rng.uniform(0, 1), arrive)
    device.run()
    assert len(device.done) == 1500
    assert set(device.ends.values()) == {1}, "an end for each, and one"
    for batch in device.batches:
        assert len(batch.requests) == 1 or batch.rows <= limits[batch.model].max_rows
        assert len({item.key for item in batch.requests}) == 1
        assert len(batch.requests) == 1 or batch.requests[0].key is not None
        for tenant in "tuv":
            ids = [item.id for item in batch.requests if item.tenant == tenant]
            assert ids == sorted(ids)
    assert sum(len(batch.requests) > 1 for batch in device.batches) > 20


def test_a_batch_stops_where_it_would_make_a_deadline_late() -> None:
    time = BatchTime()
    for rows in (1, 1, 4, 8, 16):
        time.observe(rows, tau_s(rows))
    waiting = [
        Request(id=number, model="a", tenant="t", key="k", deadline_s=tau_s(10) + 1e-6)
        for number in range(1, 33)
    ]
    batch = form(waiting[0], [(0.0, 0, waiting)], BatchLimits(), time, 0.0)
    assert len(batch) == 10


def test_deadlines_that_are_lost_anyway_do_not_shrink_a_batch() -> None:
    time = BatchTime()
    for rows in (1, 1, 4, 8):
        time.observe(rows, tau_s(rows))
    waiting = [
        Request(id=number, model="a", tenant="t", key="k", deadline_s=1e-3) for number in range(8)
    ]
    assert len(form(waiting[0], [(0.0, 0, waiting)], BatchLimits(), time, 0.0)) == 8


@pytest.mark.accept("C2")
def test_a_request_waits_for_no_companions_that_would_make_it_late() -> None:
    device = Device({"a": BatchLimits(queue_delay_s=1.0)})
    device.send()
    device.run()
    device.send()
    device.run()  # two runs, so that the batch's time is known
    device.send(ttl_s=20e-3)
    device.run()
    assert not device.done[-1].is_error


@pytest.mark.parametrize("seed", range(5))
def test_the_time_of_a_batch_is_learnt_from_noisy_batches(seed: int) -> None:
    rng, time = random.Random(seed), BatchTime()
    time.observe(1, 3.0)  # the first one compiles, allocates, pages in
    for _ in range(300):
        rows = rng.randint(1, 64)
        time.observe(rows, tau_s(rows) * rng.uniform(0.95, 1.05))
    assert time.predict_s(32) == pytest.approx(tau_s(32), rel=0.05)
    assert time.t0_s == pytest.approx(T0_S, rel=0.2)


def test_a_model_that_became_slower_is_noticed() -> None:
    time = BatchTime()
    for rows in [1, 8, 64] * 50:
        time.observe(rows, tau_s(rows))
    for rows in [1, 8, 64] * 100:
        time.observe(rows, 2 * tau_s(rows))
    assert time.predict_s(32) == pytest.approx(2 * tau_s(32), rel=0.1)


def test_tenants_share_a_batch_in_turns() -> None:
    device = Device({"a": BatchLimits(max_rows=4)})
    device.send(tenant="first")
    for _ in range(20):
        device.send(tenant="hog")
    for _ in range(2):
        device.send(tenant="light")
    device.run()
    assert [item.tenant for item in device.batches[1].requests].count("light") == 2


@pytest.mark.accept("C7")
def test_equal_tenants_get_equal_seconds_of_the_device(accept: Accept) -> None:
    cost_s = {"a": (2e-3, 1e-3), "b": (10e-3, 0.1e-3), "c": (1e-3, 4e-3)}
    device = Device(
        {model: BatchLimits(max_rows=8) for model in cost_s},
        cost_s=lambda model, rows: cost_s[model][0] + cost_s[model][1] * rows,
    )

    def again(model: str) -> None:
        device.send(
            model, tenant=model, then=lambda _: device.at(device.now_s, lambda: again(model))
        )

    for model in list(cost_s) * 32:
        again(model)
    device.run(10)
    shares = [device.used_s[tenant] for tenant in cost_s]
    accept.figure(max(shares) / min(shares), 1.10, "x largest against smallest share")
    assert max(shares) / min(shares) <= 1.10


@pytest.mark.accept("C7")
def test_tenants_get_seconds_of_the_device_by_their_weights() -> None:
    device = Device({model: BatchLimits(max_rows=8) for model in "abc"})
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}

    def again(model: str) -> None:
        request = {"tenant": model, "weight": weights[model]}
        device.send(model, **request, then=lambda _: again(model))

    for model in weights:
        for _ in range(40):
            again(model)
    device.run(10)
    for model, weight in weights.items():
        assert device.used_s[model] == pytest.approx(10 * weight / 7, rel=0.1)


@pytest.mark.accept("C7")
def test_a_light_tenant_waits_for_two_batches_of_a_hog_at_most(accept: Accept) -> None:
    device, rng = Device({"a": BatchLimits(max_rows=32), "b": BatchLimits()}), random.Random(3)

    def hog() -> None:
        device.send("a", tenant="hog", then=lambda _: device.at(device.now_s + 3e-4, hog))

    for _ in range(256):
        device.at(0, hog)
    for light in range(20):
        for _ in range(40):
            device.at(
                rng.uniform(0.1, 10),
                lambda light=light: device.send("b", tenant=f"light{light}"),
            )
    device.run(10.5)
    lights = sorted(item.latency_s for item in device.done if item.request.tenant != "hog")
    assert len(lights) == 800
    p99_s = lights[int(0.99 * len(lights))]
    longest_s = max(tau_s(batch.rows) for batch in device.batches)
    accept.figure(p99_s, 2 * longest_s + tau_s(1), "s p99 of light tenants")
    assert p99_s <= 2 * longest_s + tau_s(1)


@given(st.integers(1, 1 << 20))
def test_rows_share_a_batch_with_those_a_half_longer_at_most(length: int) -> None:
    longest = bucket(length)
    assert length <= longest <= max(length + 1, 1.5 * length)
    assert bucket(longest) == longest
    assert bucket(longest + 1) > longest


@given(st.integers(2, 1 << 24), st.integers(1, 1 << 12))
def test_a_request_of_many_rows_is_divided_into_full_batches(num_rows: int, max_rows: int) -> None:
    sizes = divided(num_rows, max_rows)
    assert sum(sizes) == num_rows
    assert len(sizes) <= 1024
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0]
    assert sizes[0] <= max_rows or len(sizes) > 512
