"""What devices held over time, as users see it, and the call that asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from nos import _tables
from nos._control import Rpc
from nos.types import _Table
from nos.wire.v1 import cluster_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """What one device held from a moment on, until its next sample."""

    time_s: float
    """In seconds since 1970, by the worker's clock."""
    worker: str
    device: str
    """As torch writes it."""
    used_bytes: int
    """Weights, contexts and activations, as the device's budget counts them."""
    models: dict[str, int]
    """Bytes of weights on the device, by model version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHistory(_Table):
    """What the devices held, from change to change; the oldest first."""

    samples: tuple[MemorySample, ...] = ()

    def series(self, worker: str = "") -> dict[str, list[float]]:
        """Return one device's history in columns, for a step plot or a data frame.

        Args:
            worker: Whose; by default the first there is.

        Returns:
            `time_s`, `used_bytes`, and for each model version its bytes: a number per sample each.
        """
        name = worker or (self.samples[0].worker if self.samples else "")
        samples = [sample for sample in self.samples if sample.worker == name]
        models = sorted({model for sample in samples for model in sample.models})
        return {
            "time_s": [sample.time_s for sample in samples],
            "used_bytes": [sample.used_bytes for sample in samples],
            **{model: [sample.models.get(model, 0) for sample in samples] for model in models},
        }

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            (
                datetime.fromtimestamp(it.time_s).astimezone().strftime("%H:%M:%S"),
                it.worker,
                it.device,
                _tables.format_bytes(it.used_bytes),
                ", ".join(f"{key} {_tables.format_bytes(size)}" for key, size in it.models.items()),
            )
            for it in self.samples
        ]
        return ("time", "worker", "device", "used", "models"), rows, ""


def get() -> Rpc[MemoryHistory]:
    """Ask what the devices held."""

    def parse(raw: bytes) -> MemoryHistory:
        samples = cluster_pb2.GetMemoryHistoryResponse.FromString(raw).samples
        return MemoryHistory(
            samples=tuple(
                MemorySample(
                    time_s=it.time_s,
                    worker=it.worker,
                    device=it.device,
                    used_bytes=it.used_bytes,
                    models=dict(sorted(it.models.items())),
                )
                for it in samples
            )
        )

    request = cluster_pb2.GetMemoryHistoryRequest()
    return Rpc("/nos.v1.ClusterService/GetMemoryHistory", request, parse)
