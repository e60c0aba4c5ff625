"""Counts of several workers together, their quantiles, and the same as Prometheus metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import pytest
from nos.errors import (
    CancelledError,
    ConfigError,
    DeadlineExceededError,
    ModelError,
    OverloadedError,
)
from nos_backend.control.cluster import StateCache
from nos_backend.control.statistics import stats
from nos_backend.rpc.metrics import Metrics
from nos_backend.scheduling.device_queue import Batch, Request
from nos_backend.worker.statistics import ModelStatistics

from tests.fakes.cluster import FakeCluster

KEY = "me/net@v2"


def counted(tenant: str, num_answered: int, latency_s: float) -> dict[str, Any]:
    """What a worker tells of a model that answered so many requests in batches of two."""
    found = ModelStatistics()
    for _ in range(num_answered):
        found.answered(latency_s, 0.25 * latency_s, 0.0)
    for number in range(0, num_answered, 2):
        requests = tuple(Request(id=number + i, model=KEY, tenant=tenant) for i in range(2))
        batch = Batch(id=number, model=KEY, executor="x", requests=requests, rows=2)
        found.ran(batch, 0.1)
    for error in (
        ModelError("no"),
        OverloadedError("full"),
        DeadlineExceededError("late"),
        CancelledError("gone"),
    ):
        found.ended(error)
    return {"key": KEY, "num_pending": 1, "statistics": found.to_plain()}


class CountingCluster(FakeCluster):
    """Two workers that have counted."""

    async def state(self) -> dict[str, Any]:
        told = [counted("ann", 8, 0.01), counted("bob", 2, 1.0)]
        workers = [
            {"name": f"w{place}", "device": "cpu", "status": {"num_queued": 3, "models": [model]}}
            for place, model in enumerate(told)
        ]
        return {"workers": workers, "models": {}}


def test_counts_of_all_workers_are_added() -> None:
    (found,) = stats(asyncio.run(CountingCluster().state()), None, None)
    assert (found.model, found.num_replicas, found.num_pending) == (KEY, 2, 2)
    assert (found.num_answered, found.num_failed, found.num_refused) == (10, 2, 2)
    assert (found.num_expired, found.num_cancelled) == (2, 2)
    assert [(item.size, item.count) for item in found.batches] == [(2, 5)]
    assert found.device_s == pytest.approx(0.5)
    assert {item.tenant: item.device_s for item in found.tenants} == pytest.approx(
        {"ann": 0.4, "bob": 0.1}
    )


def test_quantiles_are_right_to_a_fifth() -> None:
    (found,) = stats(asyncio.run(CountingCluster().state()), None, None)
    assert 0.01 <= found.p50_s <= 0.012
    assert 1.0 <= found.p99_s <= 1.2


def test_others_are_not_named_to_a_tenant() -> None:
    (found,) = stats(asyncio.run(CountingCluster().state()), [KEY], "bob")
    assert [item.tenant for item in found.tenants] == ["(others)", "bob"]
    assert stats(asyncio.run(CountingCluster().state()), ["me/other@v1"], "bob") == []


def test_tenants_beyond_a_bound_are_counted_together() -> None:
    found = ModelStatistics()
    for number in range(300):
        request = Request(id=number, model=KEY, tenant=f"t{number}")
        found.ran(Batch(id=1, model=KEY, executor="x", requests=(request,)), 1.0)
    assert len(found.device_s) == 257
    assert found.device_s["(others)"] == 44.0


def test_prometheus_reads_the_same_counts() -> None:
    text = asyncio.run(scraped())
    assert 'nos_requests_total{model="me/net@v2",outcome="answered",worker="w0"} 8.0' in text
    assert 'nos_device_seconds_total{model="me/net@v2",tenant="bob",worker="w1"} 0.1' in text
    assert 'nos_batch_size_bucket{le="2",model="me/net@v2",worker="w0"} 4.0' in text
    assert 'nos_request_seconds_count{model="me/net@v2",worker="w1"} 2.0' in text
    assert 'nos_worker_num_queued{device="cpu",worker="w0"} 3.0' in text


async def scraped() -> str:
    metrics = Metrics(StateCache(CountingCluster()), 0)
    try:
        with pytest.raises(ConfigError, match="metrics"):
            Metrics(StateCache(CountingCluster()), metrics.port)
        return await asyncio.to_thread(fetch, metrics.port)
    finally:
        await metrics.close()


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())
