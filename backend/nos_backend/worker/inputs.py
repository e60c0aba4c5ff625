"""Where a request's bytes wait: in its executor's input memory, or beside it while there is no executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from nos.errors import ExecutorLostError

if TYPE_CHECKING:
    from nos_backend.worker.executors import Block, Executor


class Input:
    """A request's bytes. They are copied once more only if the executor changes before the call."""

    def __init__(self, view: memoryview, block: Block | None, executor: Executor | None) -> None:
        #: Writable, exactly as long as was asked.
        self.view = view
        self._block = block
        self._executor = executor

    @classmethod
    def allocate(cls, executor: Executor | None, size: int) -> Self:
        """Return room for `size` bytes, shared with `executor` if there is one.

        Raises:
            OverloadedError: If its input memory is full.
        """
        if executor is None or executor.closed.done():
            return cls(memoryview(bytearray(size)), None, None)
        block = executor.allocate(size)
        return cls(block.view, block, executor)

    @classmethod
    def copy_of(cls, view: memoryview) -> Self:
        """Return the same bytes again, of no executor."""
        return cls(memoryview(bytearray(view)), None, None)

    def hand_over(self, executor: Executor) -> Block:
        """Return the bytes as a block of `executor`, which releases it; this object is then empty.

        Raises:
            OverloadedError: If its input memory is full.
            ExecutorLostError: If it has ended.
        """
        if executor.closed.done():
            raise ExecutorLostError("the executor has ended", got=executor.closed.result())
        block = self._block
        if block is None or self._executor is not executor:
            block = executor.allocate(self.view.nbytes)
            block.view[:] = self.view
            self.release()
        self._block = self._executor = None
        self.view = memoryview(b"")
        return block

    def release(self) -> None:
        """Give the room back; more than once is once."""
        block, self._block, self._executor = self._block, None, None
        self.view = memoryview(b"")
        if block is not None:
            block.release()
