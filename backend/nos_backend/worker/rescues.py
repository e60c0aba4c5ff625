"""Calls that ran out of the device's memory: room is made, model by model, and they are made again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from nos.errors import OutOfDeviceMemoryError

from nos_backend.worker.requests import failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.worker.executors import Block, Executor, Reply
    from nos_backend.worker.memory import DeviceMemory
    from nos_backend.worker.requests import Request, Run

#: Models that leave the device for one batch, at most; beyond it the batch is the one that is too large.
_MAX_RESCUES: Final = 8


class Rescues:
    """Of one device. Belongs to one event loop."""

    def __init__(self, memory: DeviceMemory, executor_of: Callable[[str], Executor | None]) -> None:
        """Make one; `executor_of` says which executor a slot has."""
        self._memory = memory
        self._executor_of = executor_of
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    def can_help(run: Run, reply: Reply) -> bool:
        """Whether a call may be made again after another model has left the device."""
        return reply.can_repeat and run.num_rescues < _MAX_RESCUES

    def start(
        self,
        run: Run,
        reply: Reply,
        again: Callable[[], None],
        give_up: Callable[[Reply], None],
    ) -> None:
        """Take another model off the device and call `again`; `give_up` where none can leave."""
        run.num_rescues += 1

        async def rescue() -> None:
            has_room = await self._memory.make_room(run.batch.model)
            if has_room or self._executor_of(run.batch.executor) is not run.executor:
                reply.take_input()
                again()  # on an executor that died meanwhile it ends at once
            else:
                run.num_rescues = _MAX_RESCUES
                give_up(reply)

        task = asyncio.create_task(rescue(), name=f"make room for {run.batch.model}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def no_room(
        self, request: Request, block: Block | None, reply: Reply, error: OutOfDeviceMemoryError
    ) -> Reply:
        """Return the end of a request that does not fit although it is alone and nothing more can leave."""
        reply.release()
        input_bytes = len(block.view) if block is not None else 0
        return failure(
            OutOfDeviceMemoryError(
                f"a call of {request.model} does not fit on the device: {error.message}",
                expected=error.expected,
                got=f"{input_bytes} bytes of input beside {self._memory.used_bytes} bytes of models",
                hint="Send fewer rows at once, or unload other models",
            )
        )

    def close(self) -> None:
        """Make no more room."""
        for task in self._tasks:
            task.cancel()
