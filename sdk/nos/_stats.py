"""What became of the requests of models, as `client.stats` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nos._control import Rpc
from nos.types import _Table
from nos.wire.v1 import models_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATH: Final = "/nos.v1.ModelService/GetStats"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats(_Table):
    """What became of one model version's requests since it was loaded, all workers together."""

    model: str
    """The version, as `name@v3`."""
    num_replicas: int = 0
    """Workers that it is on."""
    num_pending: int = 0
    """Requests that wait or run."""
    num_answered: int = 0
    """Requests that ended with a result."""
    num_failed: int = 0
    """Requests that ended with an error of the model or its executor."""
    num_refused: int = 0
    """Requests that were refused because of overload."""
    num_expired: int = 0
    """Requests whose deadline passed."""
    num_cancelled: int = 0
    """Requests that were withdrawn."""
    p50_s: float = 0.0
    """Half of the answers took at most so many seconds on the worker."""
    p99_s: float = 0.0
    """99 of 100 answers took at most so many seconds on the worker."""
    mean_queue_s: float = 0.0
    """Seconds that answered requests waited for a device, on average."""
    mean_batch_wait_s: float = 0.0
    """Seconds that answered requests waited for others to run with, on average."""
    device_s: float = 0.0
    """Seconds of devices in all."""
    batches: dict[int, int] = field(default_factory=dict)
    """Number of batches by how many requests they had."""
    tenants: dict[str, float] = field(default_factory=dict)
    """Seconds of devices by tenant, the most first; only admins see the names of others."""

    @property
    def mean_batch(self) -> float:
        """Requests per batch, on average; 0 before the first."""
        num_batches = sum(self.batches.values())
        return sum(size * count for size, count in self.batches.items()) / max(1, num_batches)

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        sizes = ", ".join(f"{count} of {size}" for size, count in self.batches.items())
        tenants = ", ".join(f"{name} {used_s:.3g} s" for name, used_s in self.tenants.items())
        rows = [
            ("pending", str(self.num_pending)),
            ("answered", str(self.num_answered)),
            ("failed", str(self.num_failed)),
            ("refused", str(self.num_refused)),
            ("expired", str(self.num_expired)),
            ("cancelled", str(self.num_cancelled)),
            ("latency", f"p50 {_ms(self.p50_s)}, p99 {_ms(self.p99_s)}"),
            ("waiting", f"device {_ms(self.mean_queue_s)}, batch {_ms(self.mean_batch_wait_s)}"),
            ("batches", sizes),
            ("device", f"{self.device_s:.3g} s" + (f": {tenants}" if tenants else "")),
        ]
        return (), rows, f"{self.model} on {self.num_replicas} worker(s)"


class StatsList(tuple[ModelStats, ...]):
    """What became of the requests of all models on workers, in order of names; shows itself as a table."""

    __slots__ = ()

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        header = (
            "model",
            "pending",
            "answered",
            "failed",
            "refused",
            "p50",
            "p99",
            "batch",
            "device",
        )
        rows = [
            (
                item.model,
                str(item.num_pending),
                str(item.num_answered),
                str(item.num_failed),
                str(item.num_refused),
                _ms(item.p50_s),
                _ms(item.p99_s),
                f"{item.mean_batch:.1f}",
                f"{item.device_s:.3g} s",
            )
            for item in self
        ]
        return header, rows, ""

    __str__ = _Table.__str__
    _repr_pretty_ = _Table._repr_pretty_
    _repr_html_ = _Table._repr_html_


def get(model: str) -> Rpc[ModelStats]:
    """Ask what became of one model's requests; nothing where it is on no worker."""

    def parse(raw: bytes) -> ModelStats:
        found = models_pb2.GetStatsResponse.FromString(raw).models
        return _to_stats(found[0]) if found else ModelStats(model=model)

    return Rpc(_PATH, models_pb2.GetStatsRequest(model=model), parse)


def get_all() -> Rpc[StatsList]:
    """Ask what became of the requests of all models on workers."""
    return Rpc(
        _PATH,
        models_pb2.GetStatsRequest(),
        lambda raw: StatsList(map(_to_stats, models_pb2.GetStatsResponse.FromString(raw).models)),
    )


def _to_stats(message: models_pb2.ModelStats) -> ModelStats:
    return ModelStats(
        model=message.model,
        num_replicas=message.num_replicas,
        num_pending=message.num_pending,
        num_answered=message.num_answered,
        num_failed=message.num_failed,
        num_refused=message.num_refused,
        num_expired=message.num_expired,
        num_cancelled=message.num_cancelled,
        p50_s=message.p50_s,
        p99_s=message.p99_s,
        mean_queue_s=message.mean_queue_s,
        mean_batch_wait_s=message.mean_batch_wait_s,
        device_s=message.device_s,
        batches={item.size: item.count for item in message.batches},
        tenants={item.tenant: item.device_s for item in message.tenants},
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
