"""Which worker a model goes to: a pure decision."""

from __future__ import annotations

import bisect
import enum
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model wants of the workers that it is loaded on."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    weight_bytes: int = 0
    """Bytes of its weights; 0 if unknown."""
    profiled_bytes: int = 0
    """What it took with its largest batch where it was measured; 0 if unknown. It can do with less."""
    memory_bytes: int = 0
    """The least that models may use on its device; 0 for any."""
    has_packages: bool = False
    """Whether it needs packages besides the server's."""
    is_packed: bool = False
    """Whether its replicas go to as few devices as can be instead of to as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A worker as placement sees it."""

    address: str
    """Names it within the scheduler."""
    name: str = ""
    """Names it for people, and from one start of it to the next."""
    device: str
    """As torch writes it: `cpu`, `cuda:0`."""
    place: str = ""
    """Names the device among those of all machines: workers may share one. Empty: it is its own."""
    installs: bool = True
    """Whether it makes environments for models with packages."""
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
    NO_PACKAGES = "no worker installs packages"
    NO_MEMORY = "no device has as much memory as it asks for"
    NO_ROOM = "it is larger than every device"
    TAKEN = "every worker that could has a replica already"

    @property
    def is_final(self) -> bool:
        """Whether no worker that there is will ever do."""
        return self in _UNSUITED


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

    def take(self, key: str, needs: Needs, without: Collection[str] = ()) -> WorkerLoad | Refusal:
        """Choose where a model is loaded.

        The one that has it already; else, among those with room, by devices that have few replicas of it, or
        many where it is packed, the least loaded one, which for `auto` is one with a GPU if there is any;
        else one that has to make room.

        Args:
            key: The model, `name@v3`.
            needs: What it wants.
            without: Addresses that are out of the question: they have it, or cannot load it.
        """
        if not self._workers:
            return Refusal.NO_WORKER
        for address in self._holders.get(key, ()):
            if address not in without and unsuited(needs, self._workers[address]) is None:
                return self._sit(address, 0)
        siblings = Counter(
            self._workers[address].place for address in without if address in self._workers
        )
        refusals, choice, best = set(), "", (True, True, 0)
        for _, address in self._order:
            load = self._workers[address]
            refusal = unsuited(needs, load) or (Refusal.TAKEN if address in without else None)
            if refusal is not None:
                refusals.add(refusal)
                continue
            has_room = load.capacity_bytes == 0 or load.capacity_bytes - load.used_bytes >= max(
                needs.weight_bytes, needs.profiled_bytes
            )
            crowd = siblings[load.place] if load.place else 0
            rank = (
                not has_room,
                needs.device == "auto" and load.device == "cpu",
                -crowd if needs.is_packed else crowd,
            )
            if not choice or rank < best:
                choice, best = address, rank
            if best == (False, False, 0) and not (siblings and needs.is_packed):
                break
        if choice:
            return self._sit(choice, needs.weight_bytes)
        # What stands in the way of the worker that comes closest.
        return max(refusals, key=_CLOSENESS.index)

    def _sit(self, address: str, need_bytes: int) -> WorkerLoad:
        load = self._workers[address]
        del self._order[bisect.bisect_left(self._order, (_rank(load), address))]
        after = replace(
            load, num_models=load.num_models + 1, used_bytes=load.used_bytes + need_bytes
        )
        self._workers[address] = after
        bisect.insort(self._order, (_rank(after), address))
        return load


def unsuited(needs: Needs, load: WorkerLoad) -> Refusal | None:
    """Return why a worker could never hold a model; None if it could."""
    if needs.device != "auto" and load.device.partition(":")[0] != needs.device.partition(":")[0]:
        return Refusal.NO_DEVICE
    if needs.has_packages and not load.installs:
        return Refusal.NO_PACKAGES
    if 0 < load.capacity_bytes < needs.memory_bytes:
        return Refusal.NO_MEMORY
    if 0 < load.capacity_bytes < needs.weight_bytes:
        return Refusal.NO_ROOM
    return None


_CLOSENESS: Final = (
    Refusal.NO_DEVICE,
    Refusal.NO_PACKAGES,
    Refusal.NO_MEMORY,
    Refusal.NO_ROOM,
    Refusal.TAKEN,
)
_UNSUITED: Final = frozenset(_CLOSENESS) - {Refusal.TAKEN}


def _rank(load: WorkerLoad) -> tuple[int, ...]:
    return (
        load.is_flapping,
        load.num_pending,
        load.num_models,
        load.used_bytes - load.capacity_bytes,
    )
