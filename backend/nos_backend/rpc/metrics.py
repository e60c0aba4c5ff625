"""The cluster's state as Prometheus metrics, on a port of loopback."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import TYPE_CHECKING, Any, Final

from nos.errors import ConfigError
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from nos_backend.control.statistics import replicas, upper_s

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

    from nos_backend.control.cluster import State, StateCache

_LOOPBACK: Final = "127.0.0.1"
#: Of one scrape; a scheduler that does not answer leaves the metrics empty.
_READ_TIMEOUT_S: Final = 5.0
_MODEL: Final = ("model", "worker")
_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Serves `/metrics` from a thread of its own. Made, and closed, on the event loop of `states`."""

    def __init__(self, states: StateCache, port: int) -> None:
        """Listen.

        Args:
            states: Read anew at each scrape, at most ten times a second.
            port: On loopback; 0 takes any free one.

        Raises:
            ConfigError: If the port is taken.
        """
        self._states = states
        self._loop = asyncio.get_running_loop()
        registry = CollectorRegistry()
        registry.register(self)
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, _LOOPBACK, registry)
        except OSError as error:
            raise ConfigError(
                "the metrics cannot be served there", "metrics_port", "a free port", str(port)
            ) from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    async def close(self) -> None:
        """Free the port."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
        self._thread.join()

    def describe(self) -> list[Metric]:
        """Called by the registry, which would collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for each scrape, in its thread."""
        read = asyncio.run_coroutine_threadsafe(self._states.read(), self._loop)
        try:
            state = read.result(_READ_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            read.cancel()
            return
        yield from _workers(state)
        yield from _models(state)


def _workers(state: State) -> Iterator[Metric]:
    gauges = {
        name: GaugeMetricFamily(f"nos_worker_{name}", text, labels=["worker", "device"])
        for name, text in (
            ("num_queued", "Requests that wait."),
            ("num_running", "Batches that run."),
            ("num_streams", "Open streams."),
            ("num_executors", "Executor processes."),
            ("used_bytes", "Bytes of the device that models use."),
            ("host_bytes", "Bytes of main memory that copies of models use."),
        )
    }
    for worker in state["workers"]:
        for name, gauge in gauges.items():
            gauge.add_metric([worker["name"], worker["device"]], worker["status"].get(name, 0))
    yield from gauges.values()


def _models(state: State) -> Iterator[Metric]:
    pending = GaugeMetricFamily("nos_pending", "Requests that wait or run.", labels=_MODEL)
    requests = CounterMetricFamily(
        "nos_requests", "Requests that ended.", labels=[*_MODEL, "outcome"]
    )
    latencies = HistogramMetricFamily(
        "nos_request_seconds", "From arrival at the worker to the answer.", labels=_MODEL
    )
    batches = HistogramMetricFamily("nos_batch_size", "Requests per batch.", labels=_MODEL)
    device_s = CounterMetricFamily(
        "nos_device_seconds", "Seconds of the device.", labels=[*_MODEL, "tenant"]
    )
    waited_s = CounterMetricFamily(
        "nos_waited_seconds", "Seconds that answers waited.", labels=[*_MODEL, "for"]
    )
    for worker, model in replicas(state):
        labels, found = [model["key"], worker], model["statistics"]
        pending.add_metric(labels, model.get("num_pending", 0))
        for outcome, count in found["outcomes"].items():
            requests.add_metric([*labels, outcome], count)
        for tenant, used_s in found["device_s"].items():
            device_s.add_metric([*labels, tenant], used_s)
        seconds = found["seconds"]
        waited_s.add_metric([*labels, "device"], seconds["queue"])
        waited_s.add_metric([*labels, "batch"], seconds["batch_wait"])
        bounds = {upper_s(bucket): count for bucket, count in found["latencies"].items()}
        total_s = sum(bound * count for bound, count in bounds.items())
        latencies.add_metric(labels, _buckets(bounds, sorted(bounds)), total_s)
        num_requests = sum(size * count for size, count in found["batches"].items())
        batches.add_metric(labels, _buckets(found["batches"], _BATCH_SIZES), num_requests)
    yield from (pending, requests, latencies, batches, device_s, waited_s)


def _buckets(counts: Mapping[Any, int], bounds: Any) -> list[tuple[str, float]]:
    """Return cumulative counts by upper bound."""
    found = [
        (f"{bound:.6g}", float(sum(count for value, count in counts.items() if value <= bound)))
        for bound in bounds
    ]
    return [*found, ("+Inf", float(sum(counts.values())))]
