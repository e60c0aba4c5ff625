"""Memory that two processes share: a sealed memfd, and who owns which part of it.

One side allocates, the other only reads or writes where it is told. Pages come into being when they
are first written, so an arena costs what is in use and not its size.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
from typing import Final

DEFAULT_ARENA_BYTES: Final = 4 << 30
ALIGNMENT_BYTES: Final = 64
#: Larger blocks give their pages back when freed; smaller ones stay warm for the next frame, since a
#: fresh page costs more than the copy into it.
PUNCH_BYTES: Final = 8 << 20

#: Instead of an offset here: a piece of bytes that are 1.
ONES: Final = -1

_PAGE_BYTES: Final = mmap.PAGESIZE


class ArenaFullError(Exception):
    """No gap is large enough."""


class Allocator:
    """First fit at the lowest address, so that what is warm is used again. Pure bookkeeping."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        #: Offset to length of every allocated block; lengths are multiples of the alignment.
        self._blocks: dict[int, int] = {}
        #: Gaps as (offset, length), by offset; no two touch.
        self._gaps: list[tuple[int, int]] = [(0, size_bytes)]

    @property
    def used_bytes(self) -> int:
        """Bytes in allocated blocks, padding included."""
        return sum(self._blocks.values())

    def allocate(self, size: int) -> int:
        """Return the offset of `size` free bytes.

        Raises:
            ArenaFullError: If no gap is that large.
        """
        need = max(ALIGNMENT_BYTES, -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        for index, (offset, length) in enumerate(self._gaps):
            if length >= need:
                if length == need:
                    del self._gaps[index]
                else:
                    self._gaps[index] = (offset + need, length - need)
                self._blocks[offset] = need
                return offset
        raise ArenaFullError(f"{size} bytes of {self.size_bytes}")

    def free(self, offset: int) -> int:
        """Free the block at `offset` and return its length.

        Raises:
            KeyError: If no block starts there.
        """
        length = self._blocks.pop(offset)
        start, size = offset, length
        index = bisect.bisect_left(self._gaps, (offset, 0))
        if index < len(self._gaps) and self._gaps[index][0] == offset + length:
            size += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == offset:
            start, before = self._gaps.pop(index - 1)
            size += before
            index -= 1
        self._gaps.insert(index, (start, size))
        return length


class Arena:
    """A mapping of a memfd. Create it on one side, attach its descriptor on the other."""

    def __init__(self, fd: int, *, writable: bool = True) -> None:
        """Map the memfd `fd`, which stays the caller's to close."""
        self.size_bytes = os.fstat(fd).st_size
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, self.size_bytes, mmap.MAP_SHARED, access)
        self.view = memoryview(self._map)
        self._allocator = Allocator(self.size_bytes)

    def gather(self, pieces: list[list[int]], size: int) -> memoryview:
        """Return `size` bytes made up of pieces: where they lie if they lie so, else a copy.

        Args:
            pieces: (offset here or `ONES`, bytes, offset in the result) each. What none of them covers is
                0 if one of them is of ones, else undefined.
            size: Bytes of the result.
        """
        if len({offset - at for offset, _, at in pieces}) == 1:
            start = pieces[0][0] - pieces[0][2]
            if 0 <= start <= self.size_bytes - size:
                return self.view[start : start + size]
        joined = memoryview(bytearray(size))
        for offset, length, at in pieces:
            joined[at : at + length] = (
                b"\1" * length if offset == ONES else self.view[offset : offset + length]
            )
        return joined

    @staticmethod
    def create_fd(size_bytes: int = DEFAULT_ARENA_BYTES) -> int:
        """Return the descriptor of a new, empty memfd that nobody can shrink or grow.

        A peer that could shrink it would end the other side by SIGBUS.
        """
        size = -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        fd = os.memfd_create("nos-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    @property
    def used_bytes(self) -> int:
        """Bytes in allocated blocks."""
        return self._allocator.used_bytes

    def allocate(self, size: int) -> int:
        """Return the offset of `size` bytes that nobody else uses until `free`.

        Raises:
            ArenaFullError: If no gap is that large.
        """
        return self._allocator.allocate(size)

    def free(self, offset: int) -> None:
        """Give a block back, and its pages too if it is large.

        Raises:
            KeyError: If no block starts at `offset`.
        """
        length = self._allocator.free(offset)
        if length > PUNCH_BYTES and not self._map.closed:
            start = -(-offset // _PAGE_BYTES) * _PAGE_BYTES
            end = (offset + length) // _PAGE_BYTES * _PAGE_BYTES
            self._map.madvise(mmap.MADV_REMOVE, start, end - start)

    def close(self) -> None:
        """Unmap it; while someone still holds a view, it is unmapped when that view goes."""
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            return
