"""Carries out what `nos_backend.scheduling.residency` decides, and keeps a record of each move."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nos.errors import InternalError, NosError, OutOfDeviceMemoryError

from nos_backend.scheduling.eviction import POLICIES
from nos_backend.scheduling.residency import (
    Action,
    Added,
    CapacityChanged,
    Event,
    Evict,
    Evicted,
    Finished,
    Footprint,
    Load,
    Loaded,
    LoadFailed,
    NoRoom,
    Overran,
    Refuse,
    Removed,
    Residency,
    Started,
    Tick,
    Tier,
    Unwanted,
    Wanted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

_logger = logging.getLogger(__name__)

#: How often time is looked at while something waits for it.
_TICK_S: Final = 0.02
_MAX_HISTORY: Final = 16
_STATES: Final = {
    Tier.HOST: "host",
    Tier.LOADING: "loading",
    Tier.DEVICE: "device",
    Tier.DRAINING: "device",
    Tier.EVICTING: "device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """What a worker's models may use, and who leaves first."""

    capacity_bytes: int | None = None
    """Of the device; None means what there is."""
    headroom_bytes: int = 0
    """Of the capacity, what stays free always."""
    context_bytes: int = 512 << 20
    """What an executor holds of a device that is not the CPU before it has a model: 426 MiB were seen with
    torch 2.10 (pytorch issue 86509 names 287 to 667 MB by generation)."""
    eviction: str = "lru"
    """`lru`, `fifo`, `lfu` or `gdsf`."""
    max_models: int | None = None
    """How many may be on the device at once; None means as many as fit."""
    idle_unload_s: float | None = None
    """After how long without use a model leaves the device although nobody needs the room; None: never."""
    executor_idle_s: float = 30.0
    """An executor ends that has had nothing on the device for so many seconds; its models are put together
    again when they are wanted, without their constructors."""
    min_residency_s: float = 0.05
    """For how long a model that was loaded keeps its place, against thrash."""
    host_bytes: int | None = None
    """The most that host copies may take in memory; None means no limit."""
    folder: Path | None = None
    """Where host copies go that do not fit; None keeps all in memory."""

    def __post_init__(self) -> None:
        """Refuse nonsense."""
        if self.eviction not in POLICIES:
            raise ValueError(
                f"eviction must be one of {', '.join(POLICIES)}, got {self.eviction!r}"
            )

    def to_residency(self, capacity_bytes: int) -> Residency:
        """Return the state machine that keeps to this."""
        return Residency(
            capacity_bytes=capacity_bytes,
            headroom_bytes=self.headroom_bytes,
            policy=POLICIES[self.eviction],
            max_models=self.max_models,
            min_residency_s=self.min_residency_s,
        )


@dataclass(frozen=True, slots=True)
class Transition:
    """One move of a model."""

    time_s: float
    """When it ended, in seconds since 1970."""
    source: str
    """`none`, `device`, `host` or `disk`."""
    target: str
    """As well."""
    reason: str
    """In words."""
    moved_bytes: int
    """Bytes that were copied for it."""
    took_s: float
    """Seconds, waiting in the executor behind a call included."""


@dataclass(slots=True, eq=False)
class _Record:
    footprint: Footprint
    #: Grows whenever the device copy is lost: what was begun before that counts for nothing.
    generation: int = 0
    #: Resolve when it is on the device, or cannot be.
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    history: deque[Transition] = field(default_factory=lambda: deque(maxlen=_MAX_HISTORY))
    #: `host` or `disk`, as its host copy is; where it is said to be while it is not on the device.
    below: str = "host"


class DeviceMemory:
    """The weights of one device's models. Belongs to one event loop.

    Args:
        residency: Decides.
        load: Brings a model's weights to the device; returns the bytes that it copied. Its errors are
            handed to `on_failed`.
        evict: Takes them off.
        has_work: Whether requests for a model wait.
        on_moved: Called with a model after each move.
        on_failed: Called with a model that cannot be loaded, and why.
        on_refused: Called with a model whose work is to be refused, and why.
    """

    def __init__(
        self,
        residency: Residency,
        *,
        load: Callable[[str], Coroutine[Any, Any, int]],
        evict: Callable[[str], Coroutine[Any, Any, int]],
        has_work: Callable[[str], bool],
        on_moved: Callable[[str, Transition], None],
        on_failed: Callable[[str, NosError], None],
        on_refused: Callable[[str, NosError], None],
    ) -> None:
        self._residency = residency
        self._load = load
        self._evict = evict
        self._has_work = has_work
        self._on_moved = on_moved
        self._on_failed = on_failed
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._records: dict[str, _Record] = {}
        #: Resolve when the next model has left the device.
        self._room: list[asyncio.Future[None]] = []
        #: Resolve when a model was removed.
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def used_bytes(self) -> int:
        """What the models on the device need together."""
        return self._residency.used_bytes

    def used_bytes_beside(self, key: str) -> int:
        """Return what the models on the device need together, the activations of one left out."""
        return self._residency.used_bytes_beside(key)

    def set_capacity(self, capacity_bytes: int) -> None:
        """The device has more or less room for models than was thought."""
        self._handle(CapacityChanged(capacity_bytes))

    def may_start(self, key: str) -> bool:
        """Return whether a batch of the model may be started now."""
        return self._residency.may_start(key)

    def state(self, key: str) -> str:
        """Return where a model is: `device`, `loading`, `host` or `disk`; empty if it is not known."""
        if not self._residency.knows(key):
            return ""
        tier = self._residency.tier(key)
        return self._records[key].below if tier is Tier.HOST else _STATES[tier]

    def is_known(self, key: str) -> bool:
        """Return whether a model was added, and not removed since."""
        return self._residency.knows(key)

    def is_on_device(self, key: str) -> bool:
        """Return whether its bytes are on the device, or on the way."""
        return self._residency.knows(key) and self._residency.tier(key) is not Tier.HOST

    def history(self, key: str) -> list[dict[str, Any]]:
        """Return a model's last moves in plain types, the oldest first."""
        record = self._records.get(key)
        return [asdict(item) for item in record.history] if record else []

    def add(
        self,
        key: str,
        footprint: Footprint,
        *,
        is_pinned: bool = False,
        idle_unload_s: float | None = None,
    ) -> None:
        """Make a model known, or say anew what it needs."""
        record = self._records.setdefault(key, _Record(footprint))
        record.footprint = footprint
        self._handle(Added(key, footprint, is_pinned, idle_unload_s))

    def want(self, key: str) -> None:
        """There is work for a model."""
        if key in self._records:
            self._handle(Wanted(key))

    def started(self, key: str) -> None:
        """A batch of a model was started."""
        self._handle(Started(key))

    def finished(self, key: str) -> None:
        """A batch of a model ended."""
        self._handle(Finished(key))

    async def bring(self, key: str) -> None:
        """Wait until a model is on the device.

        Raises:
            NosError: If it cannot be brought there.
        """
        if self.may_start(key):
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._records[key].waiters.append(future)
        self._handle(Wanted(key))
        await future

    async def make_room(self, key: str) -> bool:
        """Take one more model off the device for a call of `key` that ran out of memory.

        Returns:
            Whether one has left; False at once where none can.
        """
        self._handle(Overran(key))
        if not self._residency.is_evicting:
            return False
        left: asyncio.Future[None] = self._loop.create_future()
        self._room.append(left)
        await left
        return True

    def lost(self, key: str) -> bool:
        """A model's device copy died with its executor; return whether there was one or was to be."""
        record = self._records.get(key)
        if record is None:
            return False
        was_there = self.is_on_device(key)
        record.generation += 1
        self._handle(Unwanted(key, is_lost=True))
        if was_there:
            self._note(key, "device", record.below, "its executor ended", 0, 0.0)
        return was_there

    def note_parked(self, key: str, moved_bytes: int, took_s: float) -> None:
        """A model's host copy went to a file."""
        if key not in self._records:
            return  # unloaded meanwhile
        self._records[key].below = "disk"
        self._note(key, "host", "disk", "host memory is short", moved_bytes, took_s)

    async def remove(self, key: str) -> None:
        """Forget a model, after taking it off the device."""
        record = self._records.get(key)
        if record is None:
            return
        self._handle(Removed(key))
        if self._residency.knows(key):
            gone = self._leaving.setdefault(key, self._loop.create_future())
            await asyncio.shield(gone)
        self._records.pop(key, None)

    def forget(self, key: str, error: NosError) -> None:
        """Forget a model at once; who waits for it hears `error`."""
        record = self._records.get(key)
        if record is None:
            return
        record.generation += 1
        self._handle(Removed(key, is_lost=True))
        self._end_waiters(key, error)
        self._records.pop(key, None)

    async def close(self) -> None:
        """Stop."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for record in self._records.values():
            for waiter in record.waiters:
                waiter.cancel()
        for gone in (*self._leaving.values(), *self._room):
            gone.cancel()

    # Carrying out.

    def _handle(self, event: Event) -> None:
        for action in self._residency.handle(event, self._loop.time()):
            self._carry_out(action)
        for key in [key for key in self._leaving if not self._residency.knows(key)]:
            self._leaving.pop(key).set_result(None)
        if self._room and not self._residency.is_evicting:
            waiting, self._room = self._room, []
            for left in waiting:
                left.set_result(None)
        if self._timer is None and self._residency.needs_ticks:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._handle(Tick())

    def _carry_out(self, action: Action) -> None:
        key = action.model
        match action:
            case Load():
                self._spawn(self._bring_in(key, self._records[key]))
            case Evict(reason=reason):
                self._spawn(self._take_off(key, self._records[key], reason))
            case Refuse():
                error = OutOfDeviceMemoryError(
                    f"{key} does not fit on the device",
                    key,
                    f"at most {action.capacity_bytes} bytes",
                    f"{action.needed_bytes} bytes"
                    + (f", {action.pinned_bytes} of them pinned" if action.pinned_bytes else ""),
                    f"Unpin or unload {', '.join(action.pinned)}"
                    if action.pinned
                    else "Raise --capacity-bytes, or use a smaller model",
                )
                self._end_waiters(key, error)
                self._on_refused(key, error)

    async def _bring_in(self, key: str, record: _Record) -> None:
        generation, started_s = record.generation, self._loop.time()
        error: NosError | None = None
        moved_bytes = 0
        try:
            moved_bytes = await self._load(key)
        except NosError as failure:
            error = failure
        except Exception:  # the top level of this move
            _logger.exception("bringing %s to the device failed by a defect", key)
            error = InternalError(f"{key} cannot be loaded")
        if record.generation != generation or self._records.get(key) is not record:
            return
        if error is None:
            source, record.below = record.below if record.history else "none", "host"
            took_s = self._loop.time() - started_s
            self._handle(Loaded(key, took_s if source == "host" else None))
            self._note(key, source, "device", "wanted", moved_bytes, took_s)
            self._end_waiters(key, None)
            return
        if isinstance(error, OutOfDeviceMemoryError) and not error.field:
            # Not the budget but the device said so.
            _logger.warning("%s; another model has to leave", error)
            self._handle(NoRoom(key))
            return
        self._handle(LoadFailed(key))
        self._end_waiters(key, error)
        self._on_failed(key, error)

    async def _take_off(self, key: str, record: _Record, reason: str) -> None:
        generation, started_s = record.generation, self._loop.time()
        moved_bytes = 0
        try:
            moved_bytes = await self._evict(key)
        except NosError as failure:
            _logger.warning("evicting %s failed: %s", key, failure)
        except Exception:  # the top level of this move
            _logger.exception("evicting %s failed by a defect", key)
        if record.generation != generation or self._records.get(key) is not record:
            return
        self._note(key, "device", "host", reason, moved_bytes, self._loop.time() - started_s)
        self._handle(Evicted(key))
        if self._residency.knows(key) and self._has_work(key):
            self._handle(Wanted(key))

    def _note(
        self, key: str, source: str, target: str, reason: str, moved_bytes: int, took_s: float
    ) -> None:
        transition = Transition(time.time(), source, target, reason, moved_bytes, took_s)
        self._records[key].history.append(transition)
        self._on_moved(key, transition)

    def _end_waiters(self, key: str, error: NosError | None) -> None:
        waiters, self._records[key].waiters = self._records[key].waiters, []
        for waiter in waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
