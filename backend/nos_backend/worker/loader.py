"""How a model comes into an executor: constructed apart, packed into host memory, bound where it is served.

The construction happens in an executor of its own, where a constructor that sleeps, prints, forks or ends
the process harms nobody. A model whose object cannot be moved from there stays there.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from nos.errors import ExecutorLostError, LoadError, OutOfDeviceMemoryError

from nos_backend.worker.integrity import check_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.definition import ModelDefinition
    from nos_backend.worker.arguments import Call
    from nos_backend.worker.entries import Entry
    from nos_backend.worker.executors import Executor
    from nos_backend.worker.host_store import HostStore
    from nos_backend.worker.launcher import Launcher

_logger = logging.getLogger(__name__)

#: Models of one owner that are constructed at the same time.
_MAX_CONSTRUCTIONS: Final = 4


class Loader:
    """Belongs to one event loop.

    Args:
        launcher: Starts executors.
        store: Holds the host copies; the loader's to fill.
        evicted: Gives the models that are not on the device.
        on_parked: Called with a model whose copy went to a file, its bytes and the seconds it took.
        timeout_s: The longest that each step of a load may take.
    """

    def __init__(
        self,
        launcher: Launcher,
        store: HostStore,
        evicted: Callable[[], list[Entry]],
        on_parked: Callable[[str, int, float], None],
        timeout_s: float,
    ) -> None:
        self._launcher = launcher
        self._store = store
        self._evicted = evicted
        self._on_parked = on_parked
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        #: By owner.
        self._gates: dict[str, asyncio.Semaphore] = {}
        #: Every executor that no slot has, for now or for ever.
        self._scratches: set[Executor] = set()

    async def construct(self, entry: Entry) -> None:
        """Make a model in an executor of its own and pack it; sets the entry's copy, scratch and note.

        Raises:
            LoadError: If its code fails, its environment cannot be built, or its files were changed.
            ExecutorLostError: If its code ends the executor.
            OutOfDeviceMemoryError: If it does not fit into host memory.
        """
        key = entry.key
        self.release(entry)
        # Before the gate: a build of minutes is not to hold up the owner's other models.
        await self._launcher.python(entry.slot.requirements)
        await asyncio.to_thread(check_folder, entry.definition.folder)
        gate = self._gates.setdefault(entry.definition.owner, asyncio.Semaphore(_MAX_CONSTRUCTIONS))
        async with gate:
            scratch = await self._launcher.start(
                f"{entry.definition.owner}/{key}",
                entry.definition.owner,
                entry.slot.device,
                entry.slot.requirements,
            )
            self._scratches.add(scratch)
            entry.scratch = scratch
            try:
                made = await scratch.construct(entry.definition, self._timeout_s)
                await self._make_room(made.size_bytes + made.skeleton_bytes)
                copy = self._store.create(key, made.size_bytes, made.skeleton_bytes)
                entry.copy = copy
                await scratch.store(key, copy.weights_fd, copy.skeleton_fd, self._timeout_s)
                self._store.seal(copy)
            except BaseException as error:
                scratch.kill("its model was not constructed")
                self.release(entry)
                if isinstance(error, ExecutorLostError):
                    raise ExecutorLostError(str(error), got=await scratch.closed) from error
                raise
        entry.is_loose = bool(made.loose)
        notes = [f"own executor: {made.immovable}"] if made.immovable else []
        if made.made_first:
            notes.append(f"loaded with its weights in memory twice: {made.made_first}")
        if made.loose:
            notes.append(f"outside its run of weights: {', '.join(made.loose)}")
        entry.note = "; ".join(notes)

    async def attempt(
        self, definition: ModelDefinition, device: str, call: Call | None, data: bytes
    ) -> None:
        """Make a model in an executor of its own, and one call of it; nothing of it stays.

        Raises:
            LoadError: If its code fails or ends the executor.
            OutOfDeviceMemoryError: If the device has no room.
        """
        gate = self._gates.setdefault(definition.owner, asyncio.Semaphore(_MAX_CONSTRUCTIONS))
        async with gate:
            scratch = await self._launcher.start(
                f"{definition.owner}/{definition.key} tried",
                definition.owner,
                device,
                tuple(definition.environment),
            )
            self._scratches.add(scratch)
            scratch.mute()
            try:
                await scratch.construct(definition, self._timeout_s)
                if call is not None:
                    await scratch.attempt(definition, call, data, self._timeout_s)
            except ExecutorLostError as error:
                message = f"{definition.key} ended its executor when it was tried"
                raise LoadError(message, got=await scratch.closed) from error
            finally:
                self._scratches.discard(scratch)
                scratch.kill("it was tried")

    def take_scratch(self, entry: Entry) -> Executor | None:
        """Hand over the executor that a model was constructed in, if it lives."""
        scratch, entry.scratch = entry.scratch, None
        if scratch is None:
            return None
        self._scratches.discard(scratch)
        return None if scratch.closed.done() else scratch

    async def serve(self, entry: Entry, executor: Executor) -> int:
        """Have an executor serve a constructed model; returns the bytes that were copied for it.

        An executor that only has it constructed is its own, and serves what it has.

        Raises:
            LoadError: If its code fails, or its packed weights are damaged.
            ExecutorLostError: If the executor ends.
            OutOfDeviceMemoryError: If the device has no room.
        """
        copy = entry.copy
        if copy is None:
            raise AssertionError("constructed before")
        if not entry.is_movable:
            has_run = copy.size_bytes > 0 and not entry.is_loose
            await executor.adopt(entry.key, copy.weights_fd if has_run else None, self._timeout_s)
            return 0 if executor.device == "cpu" else copy.size_bytes
        fetched_bytes = 0
        if not copy.is_in_memory:
            await self._make_room(copy.total_bytes)
            await self._store.fetch(copy)
            fetched_bytes = copy.total_bytes
        await executor.bind(entry.definition, copy.weights, copy.skeleton, self._timeout_s)
        return fetched_bytes + (0 if executor.device == "cpu" else copy.size_bytes)

    async def _make_room(self, size_bytes: int) -> None:
        """Move host copies of evicted models to files, the longest unused first, until so much fits.

        Raises:
            OutOfDeviceMemoryError: If it never does.
        """
        while missing_bytes := self._store.missing_bytes(size_bytes):
            idle = self._longest_idle()
            if idle is None:
                raise OutOfDeviceMemoryError(
                    "host memory is full",
                    "host_bytes",
                    f"at most {self._store.budget_bytes} bytes",
                    f"{self._store.used_bytes} bytes beside {size_bytes} more",
                    f"Unload {self._store.largest(missing_bytes)}, or raise --host-bytes",
                )
            await self._park(idle)

    async def park_idle(self, size_bytes: int) -> int:
        """Move host copies of evicted models to files until so many bytes are free; return how many are.

        Raises:
            OutOfDeviceMemoryError: If the files cannot be written.
        """
        freed_bytes = 0
        while freed_bytes < size_bytes and (idle := self._longest_idle()) is not None:
            freed_bytes += idle.copy.total_bytes if idle.copy else 0
            await self._park(idle)
        return freed_bytes

    def _longest_idle(self) -> Entry | None:
        """Return the evicted model that left first and whose host copy can go to a file."""
        found = [
            entry
            for entry in self._evicted()
            if self._store.has_folder
            and entry.is_movable
            and entry.copy is not None
            and entry.copy.is_in_memory
            and not entry.lock.locked()
        ]
        return min(found, key=lambda entry: entry.left_s, default=None)

    async def _park(self, entry: Entry) -> None:
        copy, started_s = entry.copy, self._loop.time()
        if copy is None:
            return
        async with entry.lock:
            if entry.is_bound and entry.slot.executor is not None:
                await entry.slot.executor.unload(entry.key)
            entry.is_bound = False
            try:
                await self._store.park(copy)
            except OSError as error:
                raise OutOfDeviceMemoryError(
                    "host memory is full, and its copies cannot be written to a file",
                    "host_bytes",
                    got=str(error),
                ) from error
        self._on_parked(entry.key, copy.total_bytes, self._loop.time() - started_s)

    def release(self, entry: Entry) -> None:
        """Give back what was constructed."""
        if entry.copy is not None:
            self._store.release(entry.copy)
            entry.copy = None
        scratch = self.take_scratch(entry)
        if scratch is not None:
            scratch.kill("its model is not needed any more")

    async def close(self) -> None:
        """End what is left."""
        scratches = list(self._scratches)
        self._scratches.clear()
        await asyncio.gather(*(scratch.close() for scratch in scratches))
        self._store.close()
