"""Which worker a model goes to: a pure decision."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A worker as placement sees it."""

    address: str
    """Names it within the scheduler."""
    device: str
    """As torch writes it: `cpu`, `cuda:0`."""
    capacity_bytes: int = 0
    """Bytes that models may use; 0 if unknown."""
    used_bytes: int = 0
    """Bytes in use by models."""
    num_models: int = 0
    """Models placed on it, those still loading included."""
    num_pending: int = 0
    """Requests that wait or run there."""
    keys: frozenset[str] = field(default_factory=frozenset)
    """Models that it has loaded."""


class Refusal(enum.Enum):
    """Why no worker was chosen."""

    NO_WORKER = "no worker is connected"
    NO_DEVICE = "no worker has such a device"
    NO_ROOM = "it is larger than every device"


def choose_worker(
    key: str, device: str, need_bytes: int, workers: Iterable[WorkerLoad]
) -> WorkerLoad | Refusal:
    """Choose where a model is loaded.

    The one that has it already; else, among those with room, the least loaded one; else the one with the
    most room for it once it made some.

    Args:
        key: The model, `name@v3`.
        device: `auto`, `cpu` or `cuda`, as its author asked.
        need_bytes: Bytes of its weights; 0 if unknown.
        workers: All that are connected.
    """
    connected = list(workers)
    if not connected:
        return Refusal.NO_WORKER
    fitting = [load for load in connected if _suits(device, load.device)]
    if not fitting:
        return Refusal.NO_DEVICE
    fitting = [load for load in fitting if not 0 < load.capacity_bytes < need_bytes]
    if not fitting:
        return Refusal.NO_ROOM
    return min(fitting, key=lambda load: _rank(key, device, need_bytes, load))


def _suits(wanted: str, device: str) -> bool:
    return wanted == "auto" or device.partition(":")[0] == wanted.partition(":")[0]


def _rank(key: str, device: str, need_bytes: int, load: WorkerLoad) -> tuple[int, ...]:
    free_bytes = load.capacity_bytes - load.used_bytes
    has_room = load.capacity_bytes == 0 or free_bytes >= need_bytes
    return (
        key not in load.keys,
        not has_room,
        device == "auto" and load.device == "cpu",
        load.num_pending,
        load.num_models,
        -free_bytes,
    )
