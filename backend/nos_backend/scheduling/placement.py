"""Which worker a model goes to: a pure decision."""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A worker as placement sees it."""

    address: str
    """Names it within the scheduler."""
    name: str = ""
    """Names it for people, and from one start of it to the next."""
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
    is_flapping: bool = False
    """Whether it came and went so often that others are better."""


class Refusal(enum.Enum):
    """Why no worker was chosen."""

    NO_WORKER = "no worker is connected"
    NO_DEVICE = "no worker has such a device"
    NO_ROOM = "it is larger than every device"
    TAKEN = "every worker that could has a replica already"


class Seats:
    """Workers in the order in which they are filled; each choice takes room.

    Args:
        workers: All that may be given models.
    """

    def __init__(self, workers: Iterable[WorkerLoad]) -> None:
        self._workers = {load.address: load for load in workers}
        self._holders: dict[str, list[str]] = {}
        #: Sorted.
        self._order: list[tuple[tuple[int, ...], str]] = []
        for load in self._workers.values():
            self._order.append((_rank(load), load.address))
            for key in load.keys:
                self._holders.setdefault(key, []).append(load.address)
        self._order.sort()

    def take(
        self, key: str, device: str, need_bytes: int, without: Container[str] = ()
    ) -> WorkerLoad | Refusal:
        """Choose where a model is loaded.

        The one that has it already; else, among those with room, the least loaded one, which for `auto` is
        one with a GPU if there is any; else the least loaded one, which has to make room.

        Args:
            key: The model, `name@v3`.
            device: `auto`, `cpu` or `cuda`, as its author asked.
            need_bytes: Bytes of its weights; 0 if unknown.
            without: Addresses that are out of the question.
        """
        if not self._workers:
            return Refusal.NO_WORKER
        for address in self._holders.get(key, ()):
            if address not in without and _suits(device, self._workers[address].device):
                return self._sit(address, 0)
        refusal, choice, best = Refusal.NO_DEVICE, "", (True, True)
        for _, address in self._order:
            load = self._workers[address]
            if not _suits(device, load.device):
                continue
            if 0 < load.capacity_bytes < need_bytes:
                refusal = Refusal.NO_ROOM if refusal is Refusal.NO_DEVICE else refusal
                continue
            refusal = Refusal.TAKEN
            if address in without:
                continue
            has_room = (
                load.capacity_bytes == 0 or load.capacity_bytes - load.used_bytes >= need_bytes
            )
            rank = (not has_room, device == "auto" and load.device == "cpu")
            if not choice or rank < best:
                choice, best = address, rank
            if best == (False, False):
                break
        return self._sit(choice, need_bytes) if choice else refusal

    def _sit(self, address: str, need_bytes: int) -> WorkerLoad:
        load = self._workers[address]
        del self._order[bisect.bisect_left(self._order, (_rank(load), address))]
        after = replace(
            load, num_models=load.num_models + 1, used_bytes=load.used_bytes + need_bytes
        )
        self._workers[address] = after
        bisect.insort(self._order, (_rank(after), address))
        return load


def _suits(wanted: str, device: str) -> bool:
    return wanted == "auto" or device.partition(":")[0] == wanted.partition(":")[0]


def suits(device: str, need_bytes: int, load: WorkerLoad) -> bool:
    """Return whether a worker could ever hold a model."""
    return _suits(device, load.device) and not 0 < load.capacity_bytes < need_bytes


def _rank(load: WorkerLoad) -> tuple[int, ...]:
    return (
        load.is_flapping,
        load.num_pending,
        load.num_models,
        load.used_bytes - load.capacity_bytes,
    )
