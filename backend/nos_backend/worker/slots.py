"""The places of executors on one device: which model goes where, and what lives there at the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nos.errors import ExecutorLostError, LoadError

from nos_backend.worker.entries import Slot
from nos_backend.worker.environments import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nos_backend.definition import ModelDefinition
    from nos_backend.worker.dispatch import Dispatcher
    from nos_backend.worker.entries import Entry
    from nos_backend.worker.executors import Executor
    from nos_backend.worker.launcher import Launcher


#: Of an environment's name, in that of an executor.
_NAME_CHARACTERS: Final = 12


class Slots:
    """Belongs to one event loop.

    Args:
        device: The worker's, as torch writes it.
        launcher: Starts executors.
        dispatcher: Hands them calls.
        on_started: Called with the name of each executor that was started.
        on_lost: Called with (slot, executor, reason) when one ended.
    """

    def __init__(
        self,
        device: str,
        launcher: Launcher,
        dispatcher: Dispatcher,
        *,
        on_started: Callable[[str], None],
        on_lost: Callable[[str, Executor, str], None],
    ) -> None:
        self._device = device
        self._launcher = launcher
        self._dispatcher = dispatcher
        self._on_started = on_started
        self._on_lost = on_lost
        self._slots: dict[str, Slot] = {}

    def get(self, name: str) -> Slot | None:
        """Return a slot by its name."""
        return self._slots.get(name)

    def pids(self) -> dict[str, int]:
        """Return the process of each executor that lives, by its slot's name."""
        return {name: slot.executor.pid for name, slot in self._slots.items() if slot.executor}

    def place(self, definition: ModelDefinition, *, is_isolated: bool) -> Slot:
        """Return the slot of a model: its owner's, or its own if it is isolated.

        Raises:
            LoadError: If the model wants another device.
        """
        device = self.device_of(definition)
        name = definition.owner
        if is_isolated or definition.isolation == "process":
            name = f"{name}/{definition.key}"
        if definition.environment:
            name = f"{name}+{name_of(definition.environment)[:_NAME_CHARACTERS]}"
        if device != self._device:
            name = f"{name}@{device}"
        requirements = tuple(definition.environment)
        return self._slots.setdefault(name, Slot(name, definition.owner, device, requirements))

    def device_of(self, definition: ModelDefinition) -> str:
        """Return where a model runs.

        Raises:
            LoadError: If it wants another device.
        """
        if definition.device == "cuda" and self._device == "cpu":
            raise LoadError(
                f"{definition.key} wants a GPU and this worker has none",
                "device",
                "a cuda device",
                self._device,
            )
        return "cpu" if definition.device == "cpu" else self._device

    def drop_if_idle(self, slot: Slot) -> None:
        """Forget a slot that no model has, unless something is going on there."""
        if slot.executor is None and not slot.lock.locked():
            self._slots.pop(slot.name, None)

    async def idle_executor(self, slot: Slot) -> Executor:
        """Return the slot's living executor once it is idle; it gets no call until it is released."""
        while True:
            executor = await self._living(slot)
            await self._dispatcher.hold(slot.name)
            if slot.executor is executor:  # else the call that it ran took it down
                return executor

    async def _living(self, slot: Slot) -> Executor:
        if slot.executor is None:
            self.attach(slot, await self._start(slot))
        if slot.executor is None:
            raise ExecutorLostError(f"executor {slot.name} ended at once")
        return slot.executor

    async def _start(self, slot: Slot) -> Executor:
        return await self._launcher.start(slot.name, slot.owner, slot.device, slot.requirements)

    def attach(self, slot: Slot, executor: Executor) -> None:
        """Make an executor the slot's."""
        slot.executor = executor
        self._dispatcher.attach(slot.name, executor)
        executor.closed.add_done_callback(
            lambda closed: self._on_lost(slot.name, executor, closed.result())
        )
        self._on_started(executor.name)

    async def clear(self, slot: Slot) -> None:
        """End the slot's executor."""
        executor, slot.executor = slot.executor, None
        if executor is not None:
            self._dispatcher.detach(slot.name)
            await executor.close()

    async def end_if_empty(self, slot: Slot, here: Iterable[Entry]) -> None:
        """End the executor of a slot whose models, `here`, all failed or left; the caller has its lock."""
        models = list(here)
        if any(item.error is None for item in models):
            return
        if not models:
            self._slots.pop(slot.name, None)
        await self.clear(slot)

    def take_all(self) -> list[Executor]:
        """Hand over every executor."""
        executors = [slot.executor for slot in self._slots.values() if slot.executor]
        for slot in self._slots.values():
            slot.executor = None
        return executors
