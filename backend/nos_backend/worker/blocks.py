"""Parts of an executor's input arena, as they are handed out and given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nos_backend.executor.arena import Arena


class Block:
    """A reservation in the input arena of an executor."""

    __slots__ = ("_arena", "_is_released", "offset", "view")

    def __init__(self, arena: Arena, size: int) -> None:
        self._arena = arena
        self._is_released = False
        self.offset = arena.allocate(size)
        #: Writable, exactly as large as asked for.
        self.view = arena.view[self.offset : self.offset + size]

    def release(self) -> None:
        """Give it back; once handed to a call, that call does it. More than once does no harm."""
        if not self._is_released:
            self._is_released = True
            self._arena.free(self.offset)


class Blocks:
    """The inputs of a batch: pieces of blocks that the executor puts together.

    Held by the call and by whoever made the batch, who needs the blocks again if it fails.
    """

    __slots__ = ("_blocks", "_num_holders", "pieces", "size")

    def __init__(self, blocks: list[Block], pieces: list[tuple[int, int, int]], size: int) -> None:
        self._blocks = blocks
        self._num_holders = 2
        #: (offset in the arena, bytes, offset in the joined input).
        self.pieces = pieces
        #: Bytes of the joined input.
        self.size = size

    @property
    def is_kept(self) -> bool:
        """Whether the call has not let go of it; while it runs, or a model refers to its input."""
        return self._num_holders > 1

    def release(self) -> None:
        """Let go of it, each holder once; the last one frees the blocks."""
        self._num_holders -= 1
        if not self._num_holders:
            for block in self._blocks:
                block.release()
