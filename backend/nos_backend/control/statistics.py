"""What became of requests, all workers together; pure."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from nos.wire.v1 import models_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nos_backend.control.cluster import State

#: As the workers count latencies: so many buckets per doubling, from here on.
_LEAST_LATENCY_S: Final = 1e-5
_BUCKETS_PER_DOUBLING: Final = 4
_OTHERS: Final = "(others)"


def replicas(state: State) -> list[tuple[str, dict[str, Any]]]:
    """Return what each worker says of each of its models that has counted something."""
    return [
        (worker["name"], model)
        for worker in state["workers"]
        for model in worker["status"].get("models", ())
        if model.get("statistics")
    ]


def stats(
    state: State, keys: Iterable[str] | None, tenant: str | None
) -> list[models_pb2.ModelStats]:
    """Describe models that are on workers, in order of their keys.

    Args:
        state: Of the cluster.
        keys: Of the versions wanted; None for all.
        tenant: The only one whose use is named; None names all.
    """
    wanted = None if keys is None else set(keys)
    by_key: dict[str, list[dict[str, Any]]] = {}
    for _, model in replicas(state):
        if wanted is None or model["key"] in wanted:
            by_key.setdefault(model["key"], []).append(model)
    return [_stats(key, by_key[key], tenant) for key in sorted(by_key)]


def _stats(key: str, models: list[dict[str, Any]], tenant: str | None) -> models_pb2.ModelStats:
    outcomes, batches, latencies, seconds, uses = (
        _sum(model["statistics"][name] for model in models)
        for name in ("outcomes", "batches", "latencies", "seconds", "device_s")
    )
    num_answered = int(outcomes["answered"])
    named: defaultdict[str, float] = defaultdict(float)
    for who, used_s in uses.items():
        named[who if tenant in {None, who} else _OTHERS] += used_s
    return models_pb2.ModelStats(
        model=key,
        num_replicas=len(models),
        num_pending=sum(model.get("num_pending", 0) for model in models),
        num_answered=num_answered,
        num_failed=int(outcomes["failed"]),
        num_refused=int(outcomes["refused"]),
        num_expired=int(outcomes["expired"]),
        num_cancelled=int(outcomes["cancelled"]),
        p50_s=quantile_s(latencies, 0.5),
        p99_s=quantile_s(latencies, 0.99),
        mean_queue_s=seconds["queue"] / max(1, num_answered),
        mean_batch_wait_s=seconds["batch_wait"] / max(1, num_answered),
        device_s=sum(uses.values()),
        batches=[
            models_pb2.BatchCount(size=int(size), count=int(batches[size]))
            for size in sorted(batches)
        ],
        tenants=[
            models_pb2.TenantUse(tenant=who, device_s=used_s)
            for who, used_s in sorted(named.items(), key=lambda item: -item[1])
        ],
    )


def quantile_s(latencies: Mapping[Any, float], part: float) -> float:
    """Return what `part` of the counted latencies are at most, to a fifth; 0 if there are none."""
    total, seen = sum(latencies.values()), 0.0
    for bucket in sorted(latencies):
        seen += latencies[bucket]
        if seen >= part * total:
            return upper_s(bucket)
    return 0.0


def upper_s(bucket: int) -> float:
    """Return the upper bound of a bucket of latencies."""
    return float(_LEAST_LATENCY_S * 2 ** (bucket / _BUCKETS_PER_DOUBLING))


def _sum(parts: Iterable[Mapping[Any, float]]) -> defaultdict[Any, float]:
    total: defaultdict[Any, float] = defaultdict(float)
    for part in parts:
        for name, count in part.items():
            total[name] += count
    return total
