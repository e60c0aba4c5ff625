"""The models of one device: loaded into executors, restarted when one is lost, quarantined if they crash.

Knows neither Dask nor gRPC, and runs on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from nos.errors import (
    ExecutorLostError,
    InternalError,
    LoadError,
    NosError,
    OutOfDeviceMemoryError,
    QuarantinedError,
    UnavailableError,
)
from nos.wire.v1 import models_pb2

from nos_backend.executor.host_memory import host_memory_bytes
from nos_backend.scheduling.residency import Footprint
from nos_backend.worker.dispatch import Dispatcher, Request
from nos_backend.worker.entries import CRASH_WINDOW_S, MAX_CRASHES, Entry
from nos_backend.worker.host_store import HostStore
from nos_backend.worker.inputs import Input
from nos_backend.worker.launcher import Launcher
from nos_backend.worker.limits import WorkLimits
from nos_backend.worker.loader import Loader
from nos_backend.worker.memory import DeviceMemory, MemoryOptions, Transition
from nos_backend.worker.model_logs import ModelLogs
from nos_backend.worker.profiles import Profiles, advice, rows_within
from nos_backend.worker.slots import Slots
from nos_backend.worker.surroundings import Probes, Surroundings
from nos_backend.worker.timeline import Sample, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from nos_backend.definition import ModelDefinition
    from nos_backend.scheduling.caps import Cap
    from nos_backend.worker.arguments import Call
    from nos_backend.worker.bounds import Confinement
    from nos_backend.worker.entries import Slot
    from nos_backend.worker.environments import Environments
    from nos_backend.worker.executors import Executor
    from nos_backend.worker.profiles import ProfileOptions

__all__ = ["ModelManager", "Request"]

_logger = logging.getLogger(__name__)

#: From this crash on a model gets an executor of its own.
_ISOLATE_AT: Final = 2
_CUDA_HOST_THREADS: Final = 4
#: Of what the machine can still give, where no capacity is set.
_HOST_SHARE: Final = 0.8
_RESOLVE: Final = "Resolve the model again"


def _ignore(_kind: str, _model: str, _message: str) -> None:
    """Nobody listens to events."""


class ModelManager:
    """The models of one device."""

    def __init__(
        self,
        *,
        device: str,
        capacity_bytes: int | None = None,
        memory: MemoryOptions | None = None,
        max_concurrent_batches: int | None = None,
        num_threads: int | None = None,
        use_forkserver: bool = True,
        environments: Environments | None = None,
        confinement: Confinement | None = None,
        profiles: ProfileOptions | None = None,
        on_event: Callable[[str, str, str], None] = _ignore,
        probes: Probes | None = None,
        limits: WorkLimits | None = None,
    ) -> None:
        """Make a manager without models, on the running event loop.

        Args:
            device: As torch writes it: `cpu`, `cuda:0`.
            capacity_bytes: Short for `MemoryOptions(capacity_bytes=...)`.
            memory: What the models may use, and who leaves first.
            max_concurrent_batches: Batches that run at once; None means 1 on cuda, and on cpu the number
                of cores.
            num_threads: Threads of one operation in an executor; None means 1 on cpu, where as many
                executors as cores run at once, and two threads that contend for a core at OpenMP's
                spinning barriers were measured 5 to 20 times slower than one.
            use_forkserver: Whether executors are forked from a prepared process.
            environments: Builds the environments of models that need packages of their own; None refuses
                such models.
            confinement: What executors are held to; None holds them to the least.
            profiles: How models are profiled; None does not, and uses what is known of them.
            on_event: Called on the loop with (kind, model key, message). Kinds: `loading`, `loaded`,
                `profiled`, `unloaded`, `evicted`, `failed`, `quarantined`, `executor-started`,
                `executor-lost`.
            probes: How to look at what others use of the machine and the device.
            limits: What it takes at most; None for what is usual.
        """
        self.limits = limits or WorkLimits()
        on_cpu = device == "cpu"
        cores = len(os.sched_getaffinity(0))
        self.device = device
        options = memory or MemoryOptions(capacity_bytes=capacity_bytes)
        self.capacity_bytes = options.capacity_bytes
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._logs = ModelLogs()
        usable_bytes = options.capacity_bytes or int(host_memory_bytes() * _HOST_SHARE)
        self._memory = DeviceMemory(
            options.to_residency(usable_bytes),
            load=self._bring,
            evict=self._take_off,
            has_work=lambda key: self._dispatcher.num_pending(key) > 0,
            on_moved=self._on_moved,
            on_failed=self._on_load_failed,
            on_refused=self._on_refused,
        )
        #: Slots whose executors are looked at again when they may have become idle.
        self._watched: set[str] = set()
        max_batches = max_concurrent_batches or (cores if on_cpu else 1)
        self._dispatcher = Dispatcher(
            max_concurrent_batches=max_batches,
            on_lost=self._on_lost,
            memory=self._memory,
            on_capped=self._on_capped,
            limits=self.limits,
        )
        num_threads = num_threads or (1 if on_cpu else min(cores, _CUDA_HOST_THREADS))
        self._confinement = confinement
        self._launcher = Launcher(
            num_threads=num_threads,
            use_forkserver=use_forkserver,
            environments=environments,
            confinement=confinement,
            on_line=self._logs.add,
            limits=self.limits,
        )
        self._store = HostStore(budget_bytes=options.host_bytes, folder=options.folder)
        self._loader = Loader(
            self._launcher,
            self._store,
            self._evicted,
            self._memory.note_parked,
            self.limits.load_timeout_s,
        )
        self._surroundings = Surroundings(
            probes or Probes(), self._memory, self._loader, usable_bytes
        )
        self._profiles = Profiles(
            self._launcher,
            device=device,
            options=profiles,
            num_threads=num_threads,
            is_quiet=lambda: (
                not self._dispatcher.num_queued and self._dispatcher.num_running < max_batches
            ),
            room_bytes=lambda key: usable_bytes - self._memory.used_bytes_beside(key),
            on_profile=self._on_profile,
            on_cap=self._dispatcher.recall,
            on_measured=lambda key: self._on_event("profiled", key, ""),
        )
        self._timeline = Timeline()
        self._on_event = on_event
        self._entries: dict[str, Entry] = {}
        self._slots = Slots(
            device,
            self._launcher,
            self._dispatcher,
            on_started=lambda name: self._on_event("executor-started", "", name),
            on_lost=self._on_lost,
        )
        #: Work of our own: loads and restarts.
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_draining = False
        self._is_closed = False

    async def start(self) -> None:
        """Prepare the fork server in the background."""
        self._launcher.prepare()
        self._spawn(self._surroundings.watch(), "watch the surroundings")
        self._spawn(self._profiles.watch(self._dispatcher.recent), "watch the profiles")

    def spec(self, key: str) -> models_pb2.ModelSpec:
        """Return the interface of a model that is here or on its way.

        Raises:
            UnavailableError: If it is not here.
            LoadError: If it failed.
        """
        return self._entry(key).spec

    def owner(self, key: str) -> str:
        """Return who registered a model; empty if it is not here."""
        entry = self._entries.get(key)
        return entry.definition.owner if entry else ""

    async def attempt(
        self, definition: ModelDefinition, call: Call | None = None, data: bytes = b""
    ) -> None:
        """Try a model that nobody is served yet: make it, make one call of it, and forget it.

        Raises:
            LoadError: If its code fails.
            OutOfDeviceMemoryError: If the device has no room.
        """
        await self._loader.attempt(definition, self._slots.device_of(definition), call, data)

    async def load(self, definition: ModelDefinition) -> None:
        """Make a model answer; at once if it does. A caller that leaves does not stop the load.

        Raises:
            LoadError: If its code cannot be loaded; `QuarantinedError` if it crashed too often.
            OutOfDeviceMemoryError: If it does not fit.
            UnavailableError: If the worker is shutting down.
        """
        if self._is_draining:
            raise UnavailableError("the worker is shutting down", hint=_RESOLVE)
        entry = self._entries.get(definition.key)
        while entry is not None and entry.gone is not None:
            await asyncio.shield(entry.gone)
            entry = self._entries.get(definition.key)
        if entry is None:
            slot = self._slots.place(definition, is_isolated=False)
            spec = models_pb2.ModelSpec.FromString(definition.spec)
            entry = Entry(definition, spec, slot, self._loop.create_future())
            self._entries[entry.key] = entry
            self._spawn(self._load_new(entry), f"load {entry.key}")
        elif entry.error is not None and not isinstance(entry.error, QuarantinedError):
            entry.error, entry.ready = None, self._loop.create_future()
            entry.slot = self._slots.place(definition, is_isolated=entry.is_isolated)
            self._spawn(self._load_new(entry), f"load {entry.key}")
        await asyncio.shield(entry.ready)
        if entry.error is not None:
            raise entry.error
        if entry.definition.spec != definition.spec:
            entry.definition = definition
            entry.spec = models_pb2.ModelSpec.FromString(definition.spec)
            self._keep(entry)
        if self._entries.get(entry.key) is entry and entry.gone is None:
            await self._memory.bring(entry.key)

    async def unload(self, key: str) -> None:
        """Take a model off the device after its work in flight; one that is not here is no error."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.gone is None:
            entry.gone = self._loop.create_future()
            self._spawn(self._unload(entry, entry.gone), f"unload {key}")
        await asyncio.shield(entry.gone)

    def allocate(self, key: str, size: int) -> Input:
        """Return room for a request's bytes, in its executor's memory if that is there.

        Raises:
            OverloadedError: If the executor's input memory is full.
            UnavailableError: If the model is not here.
            LoadError: If the model failed.
        """
        return Input.allocate(self._entry(key).slot.executor, size)

    def submit(self, request: Request) -> None:
        """Queue a request, whose arguments fit; its sink hears of everything else, refusals at once."""
        self._profiles.saw(request)
        if not self._memory.may_start(request.model):
            self._memory.want(request.model)
        self._dispatcher.submit(request)

    def cancel(self, request_id: int) -> None:
        """End a request for which nobody waits; its sink hears CancelledError, unless it has ended."""
        self._dispatcher.cancel(request_id)

    def status(self) -> dict[str, Any]:
        """Return the state of the device in plain types."""
        self._note_memory()
        return {
            "device": self.device,
            "capacity_bytes": self._surroundings.capacity_bytes if self.capacity_bytes else 0,
            "used_bytes": self._memory.used_bytes,
            "num_queued": self._dispatcher.num_queued,
            "num_running": self._dispatcher.num_running,
            "num_executors": len(self._slots.pids()),
            "confinement": self._confinement.describe() if self._confinement else {},
            "host_bytes": self._store.used_bytes,
            "models": [self._status_of(entry) for entry in self._entries.values()],
        }

    def logs(self, key: str, max_lines: int) -> list[tuple[float, str]]:
        """Return the last lines that a model printed, loaded or not; times in seconds since 1970."""
        return self._logs.lines(key, max_lines)

    def _status_of(self, entry: Entry) -> dict[str, Any]:
        key, state = entry.key, self._memory.state(entry.key)
        if entry.error is not None:
            state = "failed"
        elif not entry.ready.done() or not state:
            state = "loading"
        is_on_device = state in {"device", "loading"} and self._memory.is_on_device(key)
        copy = entry.copy
        return {
            "key": key,
            "name": entry.definition.name,
            "owner": entry.definition.owner,
            "state": state,
            "device_bytes": entry.weight_bytes if is_on_device else 0,
            "host_bytes": copy.total_bytes if copy and copy.is_in_memory else 0,
            "num_pending": self._dispatcher.num_pending(key),
            "num_answered": self._dispatcher.num_answered(key),
            "statistics": self._dispatcher.statistics(key),
            "load_s": entry.load_s,
            "note": self._note_of(entry),
            "history": self._memory.history(key),
            "error": str(entry.error) if entry.error else "",
        }

    def _note_of(self, entry: Entry) -> str:
        cap = self._dispatcher.cap(entry.key)
        learnt = (
            f"at most {cap.rows} rows in a batch: {cap.failed_rows} did not go together"
            if cap
            else ""
        )
        return "; ".join(filter(None, (entry.note, learnt, self._profiles.note(entry.key))))

    def profile(self, key: str) -> dict[str, Any]:
        """Return what was measured of a model, in plain types; see `Profiles.get`."""
        return self._profiles.get(key) if key in self._entries else {}

    def executor_pids(self) -> dict[str, int]:
        """Return the process of each executor that lives, by its slot's name."""
        return self._slots.pids()

    async def drain(self, grace_s: float) -> None:
        """Admit nothing more, and wait for the work in flight, but not longer than that."""
        self._is_draining = True
        drains = [asyncio.ensure_future(self._dispatcher.drain(key)) for key in self._entries]
        if drains:
            _, late = await asyncio.wait(drains, timeout=grace_s)
            for drain in late:
                drain.cancel()

    async def close(self) -> None:
        """End all executors; what has not ended gets UnavailableError."""
        self._is_draining = self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._profiles.close()
        await self._memory.close()
        error = UnavailableError("the worker is shutting down", hint=_RESOLVE)
        self._dispatcher.end_all(error)
        for entry in self._entries.values():
            if not entry.ready.done():
                self._fail(entry, error)
            if entry.gone is not None and not entry.gone.done():
                entry.gone.set_result(None)
        await asyncio.gather(*(executor.close() for executor in self._slots.take_all()))
        await self._loader.close()
        await self._launcher.close()

    # Loading.

    def _entry(self, key: str) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise UnavailableError(f"{key} is not loaded on this worker", "model", hint=_RESOLVE)
        if entry.error is not None:
            raise entry.error
        return entry

    async def _load_new(self, entry: Entry) -> None:
        key, started_s = entry.key, self._loop.time()
        packages = ", ".join(entry.definition.environment)
        self._on_event("loading", key, f"with {packages}" if packages else "")
        try:
            self._check_size(entry)
            async with entry.lock:
                await self._construct(entry)
            self._profiles.recall(entry)
            await self._predict(entry)
            self._keep(entry)
            await self._memory.bring(key)
            if entry.predicted_rows:
                rows = entry.predicted_rows
                self._dispatcher.advise(key, rows, [], memory_rows=rows)
        except NosError as error:
            if entry.error is None:
                self._fail(entry, error)
        except Exception:  # the top level of this load
            _logger.exception("loading %s failed by a defect", key)
            self._fail(entry, InternalError(f"{key} cannot be loaded"))
        else:
            entry.load_s = self._loop.time() - started_s
            self._settle(entry)
            self._profiles.begin(entry)
            self._on_event("loaded", key, f"in {entry.load_s:.2f} s")
        async with entry.slot.lock:
            await self._end_if_empty(entry.slot)

    def _on_profile(self, entry: Entry, profile: models_pb2.Profile) -> None:
        """Take into the budget what a batch needs beside the weights, and how large it is best."""
        key = entry.key
        if entry.activation_bytes != profile.activation_bytes:
            entry.activation_bytes = profile.activation_bytes
            if self._memory.is_known(key):
                self._keep(entry)
        rows, times = advice(profile)
        self._dispatcher.advise(key, rows, times, rows_within(profile, self._room_beside(entry)))

    def _room_beside(self, entry: Entry) -> int:
        """Return what the device has beside a model's weights when nothing else is on it."""
        context_bytes = 0 if entry.slot.device == "cpu" else self._options.context_bytes
        taken_bytes = entry.weight_bytes + context_bytes + self._options.headroom_bytes
        return self._surroundings.capacity_bytes - taken_bytes

    async def _predict(self, entry: Entry) -> None:
        """See what a model needs beside its weights, where nobody measured it and room is short."""
        entry.predicted_rows, room_bytes = 0, self._room_beside(entry)
        left_bytes = room_bytes - self._memory.used_bytes
        if not entry.activation_bytes and 2 * left_bytes < self._surroundings.capacity_bytes:
            found = await self._profiles.predict(entry, room_bytes)
            entry.predicted_rows, entry.activation_bytes = found

    def _on_capped(self, key: str, cap: Cap | None) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            self._profiles.keep_cap(entry, cap)

    def _keep(self, entry: Entry) -> None:
        """Say what a model needs, and how long it may stay."""
        idle_unload_s = self._options.idle_unload_s
        if entry.spec.HasField("idle_unload_s"):
            idle_unload_s = entry.spec.idle_unload_s or None
        self._memory.add(
            entry.key,
            Footprint(
                weight_bytes=entry.weight_bytes,
                activation_bytes=entry.activation_bytes,
                executor=entry.slot.name,
                context_bytes=0 if entry.slot.device == "cpu" else self._options.context_bytes,
            ),
            is_pinned=entry.spec.is_pinned or not entry.can_leave,
            idle_unload_s=idle_unload_s if entry.can_leave else None,
        )

    async def _construct(self, entry: Entry) -> None:
        """Construct a model apart, and see where it can be served."""
        try:
            await self._loader.construct(entry)
        except ExecutorLostError as error:
            self._on_event("executor-lost", entry.key, error.got)
            self._count_crash(entry, error.got)
            message = f"{entry.key} ended its executor while loading"
            raise LoadError(message, got=error.got) from error
        if not entry.is_movable:
            self._isolate(entry)

    def _isolate(self, entry: Entry) -> None:
        entry.is_isolated = True
        before, entry.slot = entry.slot, self._slots.place(entry.definition, is_isolated=True)
        if not any(item.slot is before for item in self._entries.values()):
            self._slots.drop_if_idle(before)

    def _check_size(self, entry: Entry) -> None:
        size_bytes, capacity_bytes = entry.spec.weight_bytes, self.capacity_bytes
        if capacity_bytes is not None and size_bytes > capacity_bytes:
            raise OutOfDeviceMemoryError(
                f"{entry.key} does not fit on {self.device}",
                entry.key,
                f"at most {capacity_bytes} bytes of weights",
                f"{size_bytes}",
                "Raise --capacity-bytes, or use a smaller model",
            )

    async def _bring(self, key: str) -> int:
        """Bring a model to the device; see `DeviceMemory`."""
        entry = self._entries[key]
        async with entry.lock:
            executor = entry.slot.executor
            if entry.is_bound and executor is not None:
                try:
                    await executor.reload(key)
                except ExecutorLostError as error:
                    self._on_lost(entry.slot.name, executor, error.got)
                    raise
                moved_bytes = 0 if executor.device == "cpu" else entry.weight_bytes
            else:
                moved_bytes = await self._bind(entry)
            timeout_s = entry.definition.call_timeout_s
            self._dispatcher.open(key, entry.slot.name, timeout_s, entry.spec)
        return moved_bytes

    async def _bind(self, entry: Entry) -> int:
        """Have the slot's executor serve a model, whose lock the caller holds."""
        while True:
            if not entry.is_movable and entry.scratch is None:
                await self._construct(entry)
            slot = entry.slot
            async with slot.lock:
                await self._promote_scratch(entry, slot)
                executor = await self._slots.idle_executor(slot)
                slot.loading = entry
                try:
                    moved_bytes = await self._loader.serve(entry, executor)
                except ExecutorLostError as error:
                    self._on_lost(slot.name, executor, error.got)
                    if entry.error is not None:
                        raise entry.error from error
                    if entry.is_isolated:
                        entry.slot = self._slots.place(entry.definition, is_isolated=True)
                    continue
                except LoadError as error:
                    if isinstance(error.__cause__, TimeoutError):
                        self._on_lost(slot.name, executor, str(error))
                        raise
                    if entry.scratch is None or entry.copy is None:
                        raise
                    # It cannot be made again elsewhere, so it stays where it was made.
                    entry.copy.skeleton_bytes = 0
                    entry.note = f"own executor: {error}"
                    self._isolate(entry)
                    continue
                finally:
                    slot.loading = None
                    self._dispatcher.release(slot.name)
            entry.is_bound = True
            scratch = self._loader.take_scratch(entry)
            if scratch is not None:
                self._spawn(scratch.close(), f"close {scratch.name}")
            return moved_bytes

    async def _promote_scratch(self, entry: Entry, slot: Slot) -> None:
        """Make the executor that a model was constructed in the slot's, if the slot is the model's own."""
        if not slot.name.startswith(f"{entry.definition.owner}/"):
            return
        if slot.executor is not None and not entry.is_movable:
            await self._slots.clear(slot)
        if slot.executor is None:
            scratch = self._loader.take_scratch(entry)
            if scratch is not None:
                self._slots.attach(slot, scratch)

    async def _take_off(self, key: str) -> int:
        """Take a model off the device; see `DeviceMemory`."""
        entry = self._entries[key]
        async with entry.lock:
            executor = entry.slot.executor
            if not entry.is_bound or executor is None:
                return 0
            entry.left_s = self._loop.time()
            if entry.weight_bytes and not entry.is_loose:
                await executor.evict(key)
            else:
                await executor.unload(key)
                entry.is_bound = False
        self._watch(entry.slot)
        return 0

    def _watch(self, slot: Slot) -> None:
        """See later whether an executor still has nothing on the device: its context takes room there."""
        if slot.name not in self._watched:
            self._watched.add(slot.name)
            ending = partial(self._end_if_idle, slot)
            self._loop.call_later(
                self._options.executor_idle_s, lambda: self._spawn(ending(), f"watch {slot.name}")
            )

    async def _end_if_idle(self, slot: Slot) -> None:
        self._watched.discard(slot.name)
        async with slot.lock:
            here = [item for item in self._entries.values() if item.slot is slot and not item.error]
            is_needed = any(
                self._memory.is_on_device(item.key)
                or self._dispatcher.num_pending(item.key)
                or not item.ready.done()
                or not item.is_movable
                for item in here
            )
            if self._is_closed or slot.executor is None or not here or is_needed:
                return
            left_s = max(item.left_s for item in here)
            if left_s > self._loop.time() - self._options.executor_idle_s:
                self._watch(slot)
                return
            for item in here:
                item.is_bound = False
            await self._slots.clear(slot)

    def _evicted(self) -> list[Entry]:
        """Return the models that are not on the device nor on their way."""
        return [
            entry
            for entry in self._entries.values()
            if entry.ready.done() and not self._memory.is_on_device(entry.key)
        ]

    def timeline(self) -> list[dict[str, Any]]:
        """Return what the device held, in plain types; see `timeline.Sample`."""
        self._note_memory()
        return self._timeline.read()

    def _note_memory(self) -> None:
        models = {
            key: entry.weight_bytes
            for key, entry in self._entries.items()
            if self._memory.is_on_device(key)
        }
        self._timeline.note(Sample(time.time(), self._memory.used_bytes, models))

    def _on_moved(self, key: str, transition: Transition) -> None:
        self._note_memory()
        if transition.target == "device":
            self._dispatcher.look_again()
        elif transition.source == "device":
            self._on_event("evicted", key, transition.reason)

    def _on_load_failed(self, key: str, error: NosError) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.error is None:
            self._fail(entry, error)

    def _on_refused(self, key: str, error: NosError) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.ready.done():
            self._dispatcher.refuse_waiting(key, error)

    async def _unload(self, entry: Entry, gone: asyncio.Future[None]) -> None:
        key = entry.key
        await asyncio.shield(entry.ready)
        await self._dispatcher.drain(key)
        await self._memory.remove(key)
        slot = entry.slot
        async with slot.lock:
            del self._entries[key]
            self._profiles.forget(key)
            error = UnavailableError(f"{key} was unloaded from this worker", "model", hint=_RESOLVE)
            self._dispatcher.close(key, error)
            if slot.executor is not None:
                await slot.executor.unload(key)
            async with entry.lock:
                self._loader.release(entry)
            await self._end_if_empty(slot)
        gone.set_result(None)
        self._on_event("unloaded", key, "")

    async def _end_if_empty(self, slot: Slot) -> None:
        """End the executor of a slot that has no model left, whose lock the caller holds."""
        here = (item for item in self._entries.values() if item.slot is slot)
        await self._slots.end_if_empty(slot, here)

    def _fail(self, entry: Entry, error: NosError) -> None:
        entry.error = error
        self._profiles.forget(entry.key)
        self._dispatcher.close(entry.key, error)
        self._memory.forget(entry.key, error)
        if entry.is_bound and entry.slot.executor is not None:
            self._spawn(entry.slot.executor.unload(entry.key), f"drop {entry.key}")
        entry.is_bound = False
        self._loader.release(entry)
        self._settle(entry)
        kind = "quarantined" if isinstance(error, QuarantinedError) else "failed"
        self._on_event(kind, entry.key, str(error))

    @staticmethod
    def _settle(entry: Entry) -> None:
        if not entry.ready.done():
            entry.ready.set_result(None)

    # Crashes.

    def _on_lost(self, name: str, executor: Executor, reason: str) -> None:
        """An executor died: put it down to a model, and get a new one for the others."""
        slot = self._slots.get(name)
        if slot is None or slot.executor is not executor or self._is_closed:
            return
        slot.executor = None
        others = [item for item in self._entries.values() if item.slot is slot and not item.error]
        running = self._dispatcher.running_model(name)
        culprit = self._entries.get(running) if running else slot.loading
        if culprit is None and len(others) == 1:
            culprit = others[0]
        _logger.warning(
            "executor %s was lost%s: %s",
            executor.name,
            f" while it ran {culprit.key}" if culprit else "",
            reason,
        )
        self._on_event("executor-lost", culprit.key if culprit else "", reason)
        is_searching = self._dispatcher.lost(name, reason)
        if not is_searching:
            self._blame(slot, culprit, others, reason)
        lost = [entry for entry in others if entry.is_bound and entry.error is None]
        for entry in lost:
            # Before anything of theirs is loaded again: it is loaded where its slot says.
            entry.is_bound = False
            entry.slot = self._slots.place(entry.definition, is_isolated=entry.is_isolated)
        returning = []
        for entry in lost:
            if self._memory.lost(entry.key):
                if entry.ready.done():
                    entry.ready = self._loop.create_future()
                returning.append(entry)
        self._spawn(self._restart(slot, returning), f"restart {name}")

    def _blame(
        self, slot: Slot, culprit: Entry | None, others: Iterable[Entry], reason: str
    ) -> None:
        if culprit is not None:
            self._count_crash(culprit, reason)
        elif slot.crashes.add(self._loop.time()) >= _ISOLATE_AT:
            for entry in others:
                entry.is_isolated = True

    def _count_crash(self, culprit: Entry, reason: str) -> None:
        count = culprit.crashes.add(self._loop.time())
        culprit.is_isolated |= count >= _ISOLATE_AT
        if count >= MAX_CRASHES and culprit.error is None:
            error = QuarantinedError(
                f"{culprit.key} ended its executor {count} times within {CRASH_WINDOW_S:g} s",
                culprit.key,
                got=reason,
                hint="Repair it and register it again, or unload it to try once more",
            )
            self._fail(culprit, error)

    async def _restart(self, slot: Slot, returning: Iterable[Entry]) -> None:
        """Bring a lost executor's models back."""
        for entry in returning:
            if entry.error is None:
                self._spawn(self._return(entry), f"return {entry.key}")
        async with slot.lock:
            await self._end_if_empty(slot)

    async def _return(self, entry: Entry) -> None:
        """Have a model that lost its executor answer again."""
        try:
            await self._memory.bring(entry.key)
        except NosError as error:
            if entry.error is None:
                self._fail(entry, error)
        self._settle(entry)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
