"""Which models are in a device's memory: events and the time in, actions out.

The budget that always holds, with `resident` the models on the device, on the way to it or off it::

    contexts of executors + sum(weights of resident) + max(activation peaks of resident) + headroom
        <= capacity

Activations are a maximum and not a sum: one batch runs at a time, on the device's shared arena.

Pure: no clock, no I/O, no torch. The shell feeds every event, carries out every action and reports its end as
another event. A model leaves only when nothing of it runs; while it is to leave, it starts nothing new.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from nos_backend.scheduling.eviction import Candidate, Policy, Usage, lru


class Tier(enum.Enum):
    """Where a model's weights are."""

    HOST = "host"
    """Not on the device: in host memory or in a file."""
    LOADING = "loading"
    """On the way to the device; its bytes are counted."""
    DEVICE = "device"
    """On the device; it may run."""
    DRAINING = "draining"
    """On the device; it leaves as soon as nothing of it runs."""
    EVICTING = "evicting"
    """On the way off the device; its bytes are still counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a model needs."""

    weight_bytes: int
    """Its flat run, exact."""
    activation_bytes: int = 0
    """The peak of one forward pass at its largest batch."""
    executor: str = ""
    """The executor it runs in; the first model of an executor brings its context."""
    context_bytes: int = 0
    """What that executor holds without any model."""
    reload_s: float = 0.001
    """Seconds to bring it to the device from host memory, until that was measured."""

    def __post_init__(self) -> None:
        """Refuse nonsense."""
        if min(self.weight_bytes, self.activation_bytes, self.context_bytes) < 0:
            raise ValueError(f"negative bytes: {self}")


@dataclass(frozen=True, slots=True)
class Added:
    """A model is known, or needs something else than was thought."""

    model: str
    footprint: Footprint
    pinned: bool = False
    """Never leaves but by `Removed`."""
    idle_unload_s: float | None = None
    """After how long without use it leaves although nobody needs the room; None means never."""


@dataclass(frozen=True, slots=True)
class Removed:
    """A model is to be forgotten; it leaves the device first."""

    model: str
    is_lost: bool = False
    """The device memory is gone already, and nothing of it is to come back: it is forgotten at once."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """There is work for a model."""

    model: str


@dataclass(frozen=True, slots=True)
class Started:
    """A batch of a model was started; only ever for one on the device."""

    model: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch of a model ended."""

    model: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A `Load` was carried out."""

    model: str
    took_s: float | None = None
    """Seconds from host memory, the wait for the executor included; None if it came from elsewhere."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A `Load` was given up; the model is wanted no more."""

    model: str


@dataclass(frozen=True, slots=True)
class NoRoom:
    """A `Load` failed because the device had less room than the budget said.

    It is tried again after one more model has left, and refused when none can.
    """

    model: str


@dataclass(frozen=True, slots=True)
class Overran:
    """A batch of a model, which still counts as running, found less room than the budget said.

    One more model leaves, if one can; whether that is so says `is_evicting`.
    """

    model: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """An `Evict` was carried out."""

    model: str


@dataclass(frozen=True, slots=True)
class Unwanted:
    """A user asks to take a model off the device, or its executor died."""

    model: str
    is_lost: bool = False
    """The device memory is gone already."""


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """The device has more or less room for us than was thought."""

    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = (
    Added
    | Removed
    | Wanted
    | Started
    | Finished
    | Loaded
    | LoadFailed
    | NoRoom
    | Overran
    | Evicted
    | Unwanted
    | CapacityChanged
    | Tick
)


@dataclass(frozen=True, slots=True)
class Load:
    """Bring a model to the device; answer with `Loaded` or `LoadFailed`."""

    model: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Take a model off the device; nothing of it runs; answer with `Evicted`."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """A wanted model cannot be loaded whatever leaves; its work fails."""

    model: str
    needed_bytes: int
    capacity_bytes: int
    pinned_bytes: int
    """Of what is needed and cannot leave."""
    pinned: tuple[str, ...] = ()
    """Whose that is: one of these would have to go."""


Action: TypeAlias = Load | Evict | Refuse

#: What every batch tells.
_WORK: Final = (Wanted, Started, Finished)


@dataclass(slots=True)
class _Model:
    footprint: Footprint
    pinned: bool
    idle_unload_s: float | None
    tier: Tier = Tier.HOST
    #: Batches running; 0 unless DEVICE or DRAINING.
    running: int = 0
    #: Since when there is work for it while it is not on the device; None if there is none.
    wanted_s: float | None = None
    #: The device had no room for it; it waits until some model has left.
    is_blocked: bool = False
    #: Forget it when it is off the device.
    is_leaving: bool = False
    usage: Usage = field(default_factory=Usage)
    #: The least that a load from host memory took; None before the first.
    measured_reload_s: float | None = None

    @property
    def reload_s(self) -> float:
        return self.footprint.reload_s if self.measured_reload_s is None else self.measured_reload_s

    @property
    def is_resident(self) -> bool:
        return self.tier is not Tier.HOST


class Residency:
    """The models of one device.

    Args:
        capacity_bytes: What the device has for us.
        headroom_bytes: What stays free always, for what nobody predicted.
        policy: Which one leaves first; see `nos_backend.scheduling.eviction`.
        max_models: How many may be resident at once; None means as many as fit.
        min_residency_s: For how long a model that was loaded keeps its place, against thrash; or twice
            its reload time, if that is longer.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        headroom_bytes: int = 0,
        policy: Policy = lru,
        max_models: int | None = None,
        min_residency_s: float = 0.0,
    ) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, got {capacity_bytes}")
        if max_models is not None and max_models < 1:
            raise ValueError(f"max_models must be at least 1, got {max_models}")
        self._capacity = capacity_bytes
        self._headroom = headroom_bytes
        self._policy = policy
        self._max_models = max_models
        self._min_residency_s = min_residency_s
        self._models: dict[str, _Model] = {}
        #: The L of GDSF: the score of the last victim.
        self._floor = 0.0

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take in what happened and say what to do."""
        actions: list[Action] = []
        match event:
            case Added():
                self._add(event)
            case CapacityChanged():
                self._capacity = event.capacity_bytes
            case Tick():
                self._unload_idle(now_s, actions)
            case _:
                model = self._models.get(event.model)
                if model is None:
                    return []
                if isinstance(event, _WORK):
                    self._note_work(event, model, now_s)
                    if model.tier is Tier.DEVICE and self._is_calm:
                        return []  # what every batch of a device with room costs
                elif isinstance(event, NoRoom):
                    self._note_no_room(event.model, model, now_s, actions)
                elif isinstance(event, Overran):
                    self._note_overrun(event.model, now_s, actions)
                else:
                    self._note_move(event, model, now_s)
        self._evict_drained(actions, "room")
        self._serve_wanted(now_s, actions)
        self._shrink(now_s, actions)
        return actions

    def tier(self, name: str) -> Tier:
        """Return where a model is.

        Raises:
            KeyError: If it is unknown.
        """
        return self._models[name].tier

    def may_start(self, name: str) -> bool:
        """Return whether a batch of the model may be started now."""
        model = self._models.get(name)
        return model is not None and model.tier is Tier.DEVICE

    def knows(self, name: str) -> bool:
        """Return whether a model was added and is not forgotten."""
        return name in self._models

    @property
    def needs_ticks(self) -> bool:
        """Whether something may become due by the passing of time alone."""
        return any(
            model.wanted_s is not None
            or (model.idle_unload_s is not None and model.tier is Tier.DEVICE)
            for model in self._models.values()
        )

    @property
    def is_evicting(self) -> bool:
        """Whether a model is on its way off the device."""
        return any(model.tier is Tier.EVICTING for model in self._models.values())

    @property
    def used_bytes(self) -> int:
        """What the left side of the budget says now, headroom excluded."""
        return self._needed([model for model in self._models.values() if model.is_resident])

    def used_bytes_beside(self, name: str) -> int:
        """Return what `used_bytes` would be if a model had weights alone."""
        resident = [model for model in self._models.values() if model.is_resident]
        own = self._models.get(name)
        others = [model for model in resident if model is not own]
        return self._needed(resident) - self._peak(resident) + self._peak(others)

    @property
    def _has_blocked(self) -> bool:
        """Whether a model that found no room waits for another one to leave."""
        return any(model.is_blocked for model in self._models.values())

    @property
    def _is_calm(self) -> bool:
        """Whether no model waits to come or to leave."""
        return not any(
            model.wanted_s is not None or model.tier is Tier.DRAINING
            for model in self._models.values()
        )

    def _add(self, event: Added) -> None:
        known = self._models.get(event.model)
        if known is None:
            self._models[event.model] = _Model(event.footprint, event.pinned, event.idle_unload_s)
            return
        known.footprint = event.footprint
        known.pinned, known.idle_unload_s = event.pinned, event.idle_unload_s

    def _note_work(self, event: Wanted | Started | Finished, model: _Model, now_s: float) -> None:
        if isinstance(event, Finished):
            model.running -= 1
            return
        model.usage.use(now_s, self._floor)
        if isinstance(event, Started):
            model.running += 1
        elif model.tier is Tier.DRAINING and not model.is_leaving and not self._has_blocked:
            model.tier = Tier.DEVICE
        elif model.tier is not Tier.DEVICE and model.wanted_s is None:
            model.wanted_s = now_s

    def _note_move(
        self, event: Loaded | LoadFailed | Evicted | Unwanted | Removed, model: _Model, now_s: float
    ) -> None:
        match event:
            case Loaded():
                model.tier, model.wanted_s = Tier.DEVICE, None
                if event.took_s is not None:
                    known_s = model.measured_reload_s
                    model.measured_reload_s = min(event.took_s, known_s or event.took_s)
                model.usage.loaded_s = now_s
                if model.is_leaving:
                    model.tier = Tier.DRAINING
            case LoadFailed():
                model.wanted_s = None
                self._leave(event.model, model)
            case Evicted():
                for waiting in self._models.values():
                    waiting.is_blocked = False
                self._leave(event.model, model)
            case Unwanted(is_lost=True):
                model.running = 0
                self._leave(event.model, model)
            case Removed(is_lost=True):
                model.is_leaving = True
                self._leave(event.model, model)
            case Unwanted() | Removed():
                model.wanted_s = None
                model.is_leaving = isinstance(event, Removed)
                if model.tier is Tier.DEVICE:
                    model.tier = Tier.DRAINING
                elif model.tier is Tier.HOST:
                    self._leave(event.model, model)

    def _note_no_room(self, name: str, model: _Model, now_s: float, actions: list[Action]) -> None:
        self._leave(name, model)
        model.wanted_s = None
        others = [item for item in self._models.values() if item.is_resident]
        victims = [item for item in others if item.tier is Tier.DEVICE and not item.pinned]
        leaving = [item for item in others if item.tier in {Tier.DRAINING, Tier.EVICTING}]
        if not victims and not leaving:
            needed = self._needed([*others, model]) + self._headroom
            actions.append(self._refusal(name, needed, [item for item in others if item.pinned]))
            return
        model.wanted_s, model.is_blocked = now_s, True
        if not leaving:
            min(victims, key=lambda item: self._score(item, now_s)).tier = Tier.DRAINING

    def _note_overrun(self, name: str, now_s: float, actions: list[Action]) -> None:
        victims = [
            item
            for other, item in self._models.items()
            if other != name and item.tier is Tier.DEVICE and not item.pinned and not item.running
        ]
        if victims and not self.is_evicting:
            min(victims, key=lambda item: self._score(item, now_s)).tier = Tier.DRAINING
            self._evict_drained(actions, f"room for a call of {name}")

    def _leave(self, name: str, model: _Model) -> None:
        model.tier = Tier.HOST
        if model.is_leaving:
            del self._models[name]

    def _serve_wanted(self, now_s: float, actions: list[Action]) -> None:
        """Load what is wanted, oldest first; make room for the first that does not fit, then stop.

        Stopping keeps small models from taking the room that a large one waits for.
        """
        if not any(item.tier in {Tier.DRAINING, Tier.EVICTING} for item in self._models.values()):
            for model in self._models.values():
                model.is_blocked = False  # what it waited for was lost
        wanted = sorted(
            (model.wanted_s, name)
            for name, model in self._models.items()
            if model.wanted_s is not None and model.tier is Tier.HOST and not model.is_blocked
        )
        for _, name in wanted:
            model = self._models[name]
            pinned = [m for m in self._models.values() if m.is_resident and m.pinned]
            if not self._fits([*pinned, model]):
                model.wanted_s = None
                needed = self._needed([*pinned, model]) + self._headroom
                actions.append(self._refusal(name, needed, pinned))
                continue
            resident = [m for m in self._models.values() if m.is_resident]
            if self._fits([*resident, model]):
                model.tier = Tier.LOADING
                actions.append(Load(name))
                continue
            self._make_room(model, now_s)
            self._evict_drained(actions, f"room for {name}")
            return

    def _refusal(self, name: str, needed: int, pinned: list[_Model]) -> Refuse:
        names = tuple(other for other, item in self._models.items() if item in pinned)
        return Refuse(name, needed, self._capacity, self._needed(pinned), names)

    def _make_room(self, newcomer: _Model | None, now_s: float) -> None:
        """Mark victims as draining until the rest, and the newcomer, fit."""
        staying = [
            model
            for model in self._models.values()
            if model.tier in {Tier.DEVICE, Tier.LOADING} or (model.is_resident and model.pinned)
        ]
        if newcomer is not None:
            staying.append(newcomer)
        victims = sorted(
            (model for model in staying if self._may_leave(model, now_s, urgent=newcomer is None)),
            key=lambda model: self._score(model, now_s),
        )
        for victim in victims:
            if self._fits(staying):
                return
            self._floor = max(self._floor, self._score(victim, now_s))
            victim.tier = Tier.DRAINING
            staying.remove(victim)

    def _may_leave(self, model: _Model, now_s: float, *, urgent: bool) -> bool:
        if model.tier is not Tier.DEVICE or model.pinned:
            return False
        guard_s = max(self._min_residency_s, 2 * model.reload_s)
        return urgent or self._min_residency_s <= 0 or now_s - model.usage.loaded_s >= guard_s

    def _score(self, model: _Model, now_s: float) -> float:
        candidate = Candidate(model.usage, model.footprint.weight_bytes, model.reload_s)
        return self._policy(candidate, now_s)

    def _evict_drained(self, actions: list[Action], reason: str) -> None:
        for name, model in self._models.items():
            if model.tier is Tier.DRAINING and not model.running:
                model.tier = Tier.EVICTING
                actions.append(Evict(name, "unloaded" if model.is_leaving else reason))

    def _unload_idle(self, now_s: float, actions: list[Action]) -> None:
        for name, model in self._models.items():
            limit_s = model.idle_unload_s
            if (
                limit_s is not None
                and model.tier is Tier.DEVICE
                and not model.pinned
                and not model.running
                and now_s - max(model.usage.used_s, model.usage.loaded_s) >= limit_s
            ):
                model.tier = Tier.EVICTING
                actions.append(Evict(name, f"idle for {limit_s:g} s"))

    def _shrink(self, now_s: float, actions: list[Action]) -> None:
        """Take models off when what is resident has grown beyond the capacity."""
        if not self._fits([model for model in self._models.values() if model.is_resident]):
            self._make_room(None, now_s)
            self._evict_drained(actions, "capacity shrank")

    def _fits(self, models: list[_Model]) -> bool:
        if self._max_models is not None and len(models) > self._max_models:
            return False
        return self._needed(models) + self._headroom <= self._capacity

    @staticmethod
    def _needed(models: list[_Model]) -> int:
        contexts = {m.footprint.executor: m.footprint.context_bytes for m in models}
        return (
            sum(contexts.values())
            + sum(model.footprint.weight_bytes for model in models)
            + Residency._peak(models)
        )

    @staticmethod
    def _peak(models: list[_Model]) -> int:
        return max((model.footprint.activation_bytes for model in models), default=0)
