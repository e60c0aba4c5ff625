"""What became of the requests of each model on this worker: counts, times and the device's seconds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nos.errors import CancelledError, DeadlineExceededError, OverloadedError

if TYPE_CHECKING:
    from nos.errors import NosError

    from nos_backend.scheduling.device_queue import Batch

#: Latencies are counted in four buckets per doubling, from 10 us on; the 120th is over 3 hours.
_LEAST_LATENCY_S: Final = 1e-5
_BUCKETS_PER_DOUBLING: Final = 4
_MAX_BUCKET: Final = 120
#: Tenants of one model that are counted by name; the rest together.
_MAX_TENANTS: Final = 256
_OTHERS: Final = "(others)"


@dataclass(slots=True)
class ModelStatistics:
    """Of one model since it was loaded."""

    #: By outcome: `answered`, `failed`, `refused`, `expired`, `cancelled`.
    outcomes: Counter[str] = field(default_factory=Counter)
    #: Number of batches by how many requests they had.
    batches: Counter[int] = field(default_factory=Counter)
    #: Number of answers by the bucket of their time from arrival to end.
    latencies: Counter[int] = field(default_factory=Counter)
    #: Seconds of all answers, `queue` and `batch_wait`, and of all batches, `compute`.
    seconds: dict[str, float] = field(
        default_factory=lambda: {"queue": 0.0, "batch_wait": 0.0, "compute": 0.0}
    )
    #: Seconds of the device by tenant.
    device_s: dict[str, float] = field(default_factory=dict)

    def answered(self, latency_s: float, queue_s: float, batch_wait_s: float) -> None:
        """A request ended with a result."""
        self.outcomes["answered"] += 1
        self.latencies[_bucket(latency_s)] += 1
        self.seconds["queue"] += queue_s
        self.seconds["batch_wait"] += batch_wait_s

    def ended(self, error: NosError) -> None:
        """A request ended without one."""
        outcome = "failed"
        if isinstance(error, OverloadedError):
            outcome = "refused"
        elif isinstance(error, DeadlineExceededError):
            outcome = "expired"
        elif isinstance(error, CancelledError):
            outcome = "cancelled"
        self.outcomes[outcome] += 1

    def ran(self, batch: Batch, took_s: float) -> None:
        """A batch held the device for so long; its requests pay by their rows."""
        size = len(batch.requests)
        self.batches[1 if batch.is_train else size] += size if batch.is_train else 1
        self.seconds["compute"] += took_s
        for item in batch.requests:
            tenant = item.tenant
            if tenant not in self.device_s and len(self.device_s) >= _MAX_TENANTS:
                tenant = _OTHERS
            part_s = took_s * item.rows / batch.rows
            self.device_s[tenant] = self.device_s.get(tenant, 0.0) + part_s

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain containers; keys of numbers are numbers."""
        return {
            "outcomes": dict(self.outcomes),
            "batches": dict(self.batches),
            "latencies": dict(self.latencies),
            "seconds": dict(self.seconds),
            "device_s": dict(self.device_s),
        }


def _bucket(latency_s: float) -> int:
    if latency_s <= _LEAST_LATENCY_S:
        return 0
    place = math.ceil(math.log2(latency_s / _LEAST_LATENCY_S) * _BUCKETS_PER_DOUBLING)
    return min(place, _MAX_BUCKET)
