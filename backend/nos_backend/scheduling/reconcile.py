"""The replicas that there should be against those that there are: events in, commands out; pure.

A replica has a worker of its own. Each goes through

::

    (missing) --a worker suits--> loading --it answers--> serving --surplus, or its worker retires--> draining

and is forgotten when its worker is lost, refuses to load it, or has drained it. What is missing is placed
again at the next `step`; nothing is drained before what replaces it serves.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from nos_backend.scheduling.placement import Needs, Refusal, Seats, WorkerLoad, unsuited

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Workers lost while they loaded one model, before the model is taken for the cause.
MAX_LOST_LOADS: Final = 2
#: A worker that was lost so often within so long is given models only where there is no other.
MAX_LOSSES: Final = 3
LOSS_WINDOW_S: Final = 60.0
#: What a replica that serves may be moved for: what its model wants was changed.
_MISPLACED: Final = frozenset({Refusal.NO_DEVICE, Refusal.NO_MEMORY})


class Phase(enum.StrEnum):
    """Where a replica is in its life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Load:
    """Have a worker load a model; answered by `loaded`, `refused` or `lost`."""

    key: str
    address: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Have a worker's streams of a model move on, then unload it; answered by `drained` or `lost`."""

    key: str
    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class Retired:
    """A worker that was to retire holds nothing any more."""

    address: str


Command: TypeAlias = Load | Drain | Retired


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model is not loaded."""

    message: str
    detail: bytes = b""
    """What the worker said, as it said it; empty if none did."""


@dataclass(slots=True)
class Model:
    """A wanted model."""

    needs: Needs = field(default_factory=Needs)
    min_replicas: int = 0
    max_replicas: int = 1
    #: Whether the load decides how many there are, within the limits.
    is_elastic: bool = False
    #: Replicas wanted now; within the limits, 0 until somebody asks.
    target: int = 0
    #: Why the target is what it is, for people.
    why: str = "never asked for"
    #: By worker.
    replicas: dict[str, Phase] = field(default_factory=dict)
    #: Why replicas are missing; None if none is.
    pending: Refusal | Failure | None = None
    #: Set while it is not tried any more; then there is no replica.
    failure: Failure | None = None
    #: Workers that could not load it, while others can.
    refused: dict[str, Failure] = field(default_factory=dict)
    #: Workers in a row that were lost while they loaded it.
    num_lost_loads: int = 0

    def count(self, *phases: Phase) -> int:
        """Return how many replicas are in these phases."""
        return sum(phase in phases for phase in self.replicas.values())

    @property
    def serving(self) -> list[str]:
        """The workers that may be sent calls."""
        return [address for address, phase in self.replicas.items() if phase is Phase.SERVING]

    @property
    def state(self) -> str:
        """`loaded`, `loading`, `failed`, `waiting` for a worker, or `idle` without a replica wanted."""
        if self.count(Phase.SERVING):
            return "loaded"
        if self.failure is not None:
            return "failed"
        if self.count(Phase.LOADING):
            return "loading"
        return "waiting" if self.target else "idle"


class Reconciler:
    """Wanted models and the workers that there are. Every method is an event; `step` decides."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        #: By address.
        self.workers: dict[str, WorkerLoad] = {}
        #: Addresses of those that are to hold nothing.
        self.retiring: set[str] = set()
        self._is_told: set[str] = set()
        #: When a worker of that name was lost, as far back as it matters.
        self._losses: dict[str, deque[float]] = {}

    # What is wanted.

    def want(self, key: str, needs: Needs) -> Model:
        """Have at least one replica; one that failed is tried again."""
        model = self.models.setdefault(key, Model())
        model.needs = needs
        if model.failure is not None:
            model.failure, model.num_lost_loads = None, 0
            model.refused.clear()
        if model.target == 0:
            model.target, model.why = max(1, model.min_replicas), "a request came"
        return model

    def scale(self, key: str, needs: Needs, *, min_replicas: int, max_replicas: int) -> Model:
        """Set the limits, and the target to what is nearest within them."""
        model = self.models.setdefault(key, Model())
        model.needs = needs
        model.min_replicas, model.max_replicas = min_replicas, max_replicas
        model.is_elastic = min_replicas < max_replicas
        before = max(model.target, model.count(Phase.SERVING, Phase.LOADING))
        model.target = min(max(before, min_replicas), max_replicas)
        model.why = f"{min_replicas} to {max_replicas} were asked for"
        model.failure, model.num_lost_loads = None, 0
        model.refused.clear()
        return model

    def aim(self, key: str, target: int, why: str) -> None:
        """Set the target of a model, within its limits."""
        model = self.models[key]
        model.target, model.why = min(max(target, model.min_replicas), model.max_replicas), why

    def forget(self, key: str) -> Model | None:
        """Want a model no more; whoever has it is the caller's to unload."""
        return self.models.pop(key, None)

    # What there is.

    def joined(self, load: WorkerLoad, now_s: float) -> None:
        """Take note of a worker."""
        losses = self._losses.get(load.name, deque())
        while losses and losses[0] <= now_s - LOSS_WINDOW_S:
            losses.popleft()
        self.workers[load.address] = replace(load, is_flapping=len(losses) >= MAX_LOSSES)
        for model in self.models.values():
            model.refused.pop(load.address, None)

    def observed(self, load: WorkerLoad) -> None:
        """Take note of how a worker stands; `num_models` is our own count."""
        before = self.workers.get(load.address)
        if before is not None:
            self.workers[load.address] = replace(load, is_flapping=before.is_flapping)

    def lost(self, address: str, now_s: float) -> list[str]:
        """Take note that a worker is gone; returns the models that failed for it."""
        load = self.workers.pop(address, None)
        if load is None:
            return []
        if address not in self.retiring:
            self._losses.setdefault(load.name, deque()).append(now_s)
        self.retiring.discard(address)
        self._is_told.discard(address)
        failed = []
        for key, model in self.models.items():
            if self._lose(key, model, address):
                failed.append(key)
        return failed

    def load_lost(self, key: str, address: str) -> bool:
        """Take note that a worker went away over a load; returns whether the model failed for it."""
        model = self.models.get(key)
        return model is not None and self._lose(key, model, address)

    def _lose(self, key: str, model: Model, address: str) -> bool:
        phase = model.replicas.pop(address, None)
        if phase is not Phase.LOADING:
            return False
        model.num_lost_loads += 1
        if model.num_lost_loads < MAX_LOST_LOADS or model.replicas:
            return False
        message = f"{model.num_lost_loads} workers ended while they loaded model {key!r}"
        model.failure = Failure(message)
        return True

    def loaded(self, key: str, address: str) -> bool:
        """Take note that a replica answers; returns whether it was waited for."""
        model = self.models.get(key)
        if model is None or model.replicas.get(address) is not Phase.LOADING:
            return False
        model.replicas[address] = Phase.SERVING
        model.num_lost_loads = 0
        return True

    def refused(self, key: str, address: str, failure: Failure) -> bool:
        """Take note that a worker cannot load a model; returns whether the model failed for it."""
        model = self.models.get(key)
        if model is None or model.replicas.get(address) is not Phase.LOADING:
            return False
        del model.replicas[address]
        if model.count(Phase.SERVING):
            model.refused[address] = failure
            return False
        model.failure = failure
        return True

    def drained(self, key: str, address: str) -> None:
        """Take note that a worker has a model no more."""
        model = self.models.get(key)
        if model is not None and model.replicas.get(address) is Phase.DRAINING:
            del model.replicas[address]

    def retire(self, addresses: Iterable[str]) -> None:
        """Have these workers hold nothing, once others serve in their place."""
        self.retiring.update(address for address in addresses if address in self.workers)

    def keep(self, address: str) -> None:
        """Take back `retire`."""
        self.retiring.discard(address)
        self._is_told.discard(address)

    def pinned(self, addresses: Iterable[str]) -> dict[str, int]:
        """Return the models that need more replicas than workers would be left without these."""
        left = [load for at, load in self.workers.items() if at not in set(addresses)]
        return {
            key: model.min_replicas
            for key, model in self.models.items()
            if model.min_replicas > sum(unsuited(model.needs, load) is None for load in left)
        }

    # What is to be done.

    def step(self) -> list[Command]:
        """Return what brings what there is closer to what is wanted."""
        commands: list[Command] = []
        seats: Seats | None = None
        for key, model in self.models.items():
            if model.failure is not None:
                continue
            misplaced = [
                address
                for address in model.replicas
                if unsuited(model.needs, self.workers[address]) in _MISPLACED
            ]
            live = [
                address
                for address, phase in model.replicas.items()
                if phase is not Phase.DRAINING
                and address not in self.retiring
                and address not in misplaced
            ]
            num_missing = model.target - len(live)
            if num_missing > 0:
                seats = seats or self._seats()
                commands += self._fill(key, model, num_missing, seats)
            else:
                model.pending = None
                if num_missing < 0:
                    commands += self._shrink(key, model, live)
            if self.retiring or misplaced:
                commands += self._leave(key, model, live, misplaced)
        return commands + self._retired()

    def _seats(self) -> Seats:
        counts: dict[str, int] = {}
        for model in self.models.values():
            for address in model.replicas:
                counts[address] = counts.get(address, 0) + 1
        return Seats(
            replace(load, num_models=counts.get(address, 0))
            for address, load in self.workers.items()
            if address not in self.retiring
        )

    def _fill(self, key: str, model: Model, num_missing: int, seats: Seats) -> list[Command]:
        commands: list[Command] = []
        model.pending = None
        for _ in range(num_missing):
            without = model.replicas.keys() | model.refused.keys()
            choice = seats.take(key, model.needs, without)
            if isinstance(choice, Refusal):
                said = next(iter(model.refused.values()), None)
                model.pending = said if choice is Refusal.TAKEN and said else choice
                break
            model.replicas[choice.address] = Phase.LOADING
            commands.append(Load(key, choice.address))
        return commands

    def _shrink(self, key: str, model: Model, live: list[str]) -> list[Command]:
        serving = [address for address in live if model.replicas[address] is Phase.SERVING]
        # One that loads cannot be stopped: it is drained when it serves, and until then none is given up.
        num_surplus = len(serving) - model.target
        crowds = Counter(self.workers[address].place or address for address in live)
        sign = 1 if model.needs.is_packed else -1

        def rank(address: str) -> tuple[int, int, str]:
            load = self.workers[address]
            return sign * crowds[load.place or address], load.num_pending, address

        serving.sort(key=rank)
        return [
            self._drain(key, model, address, model.why)
            for address in serving[: max(0, num_surplus)]
        ]

    def _leave(
        self, key: str, model: Model, live: list[str], misplaced: list[str]
    ) -> list[Command]:
        """Drain replicas of workers that retire, once as many serve elsewhere as are wanted, or can be.

        Those whose workers do not suit any more stay until as many serve elsewhere as are wanted.
        """
        num_elsewhere = sum(model.replicas[address] is Phase.SERVING for address in live)
        is_done = num_elsewhere >= model.target
        is_settled = is_done or (model.pending is not None and num_elsewhere == len(live))
        commands: list[Command] = []
        for address in model.serving:
            if address in self.retiring and is_settled:
                commands.append(self._drain(key, model, address, "its worker retires"))
            elif address in misplaced and is_done:
                commands.append(self._drain(key, model, address, "it is to run elsewhere"))
        return commands

    @staticmethod
    def _drain(key: str, model: Model, address: str, reason: str) -> Drain:
        model.replicas[address] = Phase.DRAINING
        return Drain(key, address, reason)

    def _retired(self) -> list[Command]:
        if not self.retiring - self._is_told:
            return []
        held = {address for model in self.models.values() for address in model.replicas}
        empty = sorted(self.retiring - self._is_told - held)
        self._is_told.update(empty)
        return [Retired(address) for address in empty]
