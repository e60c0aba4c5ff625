"""A stream between two processes of one host: bytes of frames in shared memory, messages on a UNIX socket.

The client makes a memfd that nobody can shrink or grow and hands it over with its first message. Its first
part carries requests and is written by the client alone, the rest results, by the server alone. On the
socket goes, both ways::

    head     size of the message, number of blocks the sender has read and no longer needs (in all, of those
             sent to it, in order), offset and size of the block that is the message's data
    message  as on gRPC (`nos.v1.StreamRequest`, `StreamResponse`); its own `data` is used where the offset is
             `INLINE`; empty to give back blocks only, or where the offset is `FINISH`: nothing will follow

A block is the writer's again once its reader said so; what finds no room goes inline. Whoever reads takes
nothing on trust: neither offsets nor counts.
"""

from __future__ import annotations

import bisect
import struct
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos.errors import InvalidRequestError
from nos.wire import frames
from nos.wire.limits import (
    ALIGNMENT_BYTES,
    INLINE_BYTES,
    MESSAGE_BYTES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nos.wire.frames import Buffer

    Array = np.ndarray[Any, Any]

HEAD: Final = struct.Struct("<IQQQ")
#: An offset that stands for "in the message itself".
INLINE: Final = (1 << 64) - 1
#: An offset that stands for "nothing will follow", in a head without a message.
FINISH: Final = INLINE - 1
#: How much a message may have beside its data.
_SLACK_BYTES: Final = 1 << 20
#: Rooms that wait for their data; more frames than that are never under way.
_MAX_ROOMS: Final = 16


class Blocks:
    """The writer's part of the memory: who uses what. Blocks come free in the order they were given."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        #: Of every block in use, by offset; no two overlap.
        self._used: list[tuple[int, int]] = []
        #: Offsets of the blocks in use, as they were given.
        self._order: deque[int] = deque()
        #: How many came free so far.
        self._num_freed = 0

    @property
    def num_used(self) -> int:
        """How many are in use."""
        return len(self._order)

    def close(self) -> None:
        """Let go of the memory."""
        self._view.release()

    def reserve(self, size: int) -> int | None:
        """Return the offset of a place that is kept until `give` or `withdraw`; None if there is none."""
        start = 0
        for offset, end in self._used:  # the lowest gap, since what was used lately is warm
            if offset - start >= size:
                break
            start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if start + size > self._view.nbytes:
            return None
        bisect.insort(self._used, (start, start + size))
        return start

    def give(self, offset: int) -> None:
        """Make what was reserved a block: the reader's from now on."""
        self._order.append(offset)

    def withdraw(self, offset: int) -> None:
        """Take back what was reserved."""
        del self._used[bisect.bisect_left(self._used, (offset, 0))]

    def at(self, offset: int, size: int) -> memoryview:
        """Return a part of the memory."""
        return self._view[offset : offset + size]

    def put(self, buffers: Sequence[Buffer], size: int) -> int | None:
        """Copy `buffers` into a new block; return its offset, or None if there is no room."""
        start = self.reserve(size)
        if start is None:
            return None
        self.give(start)
        at = start
        for buffer in buffers:
            piece = buffer if isinstance(buffer, memoryview) else memoryview(buffer)
            self._view[at : at + piece.nbytes] = piece
            at += piece.nbytes
        return start

    def free_until(self, num_freed: int) -> None:
        """Take back blocks until `num_freed` came free in all.

        Raises:
            InvalidRequestError: If there were never so many.
        """
        if num_freed < self._num_freed or num_freed - self._num_freed > len(self._order):
            raise InvalidRequestError(
                "the peer gave back what it was not given",
                "released",
                f"{self._num_freed} .. {self._num_freed + len(self._order)}",
                str(num_freed),
            )
        for _ in range(num_freed - self._num_freed):
            offset = self._order.popleft()
            del self._used[bisect.bisect_left(self._used, (offset, 0))]
        self._num_freed = num_freed


class SharedEnd:
    """One end of such a stream: turns messages into what goes on the socket, and back. No I/O.

    Args:
        outgoing: What this end writes; of whole bytes.
        incoming: What it reads.
    """

    def __init__(self, outgoing: memoryview, incoming: memoryview) -> None:
        self._blocks = Blocks(outgoing)
        self._incoming = incoming
        #: Rooms that wait for their data, by address: offset, bytes, and what tells of their end.
        self._rooms: dict[int, tuple[int, int, weakref.ref[Array]]] = {}
        #: Those of them that nobody refers to any more.
        self._dropped: deque[int] = deque()
        self._received = bytearray()
        #: Blocks that this end has read, and how many of them the peer was told of.
        self._num_read = self._num_told = 0
        #: The peer said that nothing will follow.
        self.is_finished = False
        #: Bytes read of which the peer was not told.
        self._untold_bytes = 0

    def close(self) -> None:
        """Let go of the memory; nothing may be packed or fed any more."""
        self._blocks.close()
        self._incoming.release()

    def pack(
        self, seq: int, header: bytes, buffers: Sequence[Buffer], size: int
    ) -> Iterator[bytes]:
        """Yield what to send, in order; the bytes are copied before the first is yielded, or as chunks.

        Args:
            seq: Number of the frame or result.
            header: The message, serialized without data; a frame or result says in it how many bytes it has.
            buffers: Its data, whole.
            size: Their total length.
        """
        if size <= INLINE_BYTES:
            yield self._frame(frames.with_data(header, buffers, size))
            return
        offset = self._take_room(buffers, size) if self._rooms else None
        if offset is None:
            offset = self._blocks.put(buffers, size)
        if offset is not None:
            yield self._frame(header, offset, size)
            return
        for group in frames.chunked(buffers):
            piece_bytes = sum(piece.nbytes for piece in group)
            offset = self._blocks.put(group, piece_bytes)
            if offset is not None:
                yield self._frame(header, offset, piece_bytes)
            else:
                yield self._frame(frames.with_data(header, group, piece_bytes))
            header = frames.chunk_header(seq)

    def room(self, size: int) -> Array | None:
        """Return a place for the data of one message, which `pack` need not copy then; None if there is none.

        It comes free when nobody refers to it any more, or, once it was packed, like any block.
        """
        while self._dropped:
            dropped = self._rooms.pop(self._dropped.popleft(), None)
            if dropped is not None:
                self._blocks.withdraw(dropped[0])
        if size <= INLINE_BYTES or len(self._rooms) >= _MAX_ROOMS:
            return None
        offset = self._blocks.reserve(size)
        if offset is None:
            return None
        # Arrays made of this one refer to it, which they would not to a memoryview.
        place: Array = np.frombuffer(self._blocks.at(offset, size), np.uint8)
        address, dropped_rooms = _address(place), self._dropped
        ending = weakref.ref(place, lambda _: dropped_rooms.append(address))
        self._rooms[address] = (offset, size, ending)
        return place

    def _take_room(self, buffers: Sequence[Buffer], size: int) -> int | None:
        """Return the offset of a room that the data lies in already, all of it; else None."""
        address = _address(buffers[0]) if len(buffers) == 1 else 0
        found = self._rooms.get(address)
        if found is None or found[1] != size:
            return None
        del self._rooms[address]
        self._blocks.give(found[0])
        return found[0]

    def wrap(self, message: bytes) -> bytes:
        """Return what to send for a message that is about the stream, or has its data in it."""
        return self._frame(message)

    def finish(self) -> bytes:
        """Return what to send to say that nothing will follow."""
        return self._frame(b"", FINISH)

    def receipt(self) -> bytes | None:
        """Return what to send so that the peer does not run out of blocks, if that is due."""
        if self._untold_bytes * 4 < self._incoming.nbytes:
            return None
        return self._frame(b"")

    def feed(self, data: bytes) -> Iterator[tuple[bytes, memoryview]]:
        """Take bytes from the socket; yield each message that is complete, serialized, and its data.

        The data of one message is the peer's again when the next is asked for: copy it before.

        Raises:
            InvalidRequestError: If they make no sense; nothing that follows does then.
        """
        pending = self._received
        received: bytes | bytearray = data
        if pending:
            pending += data
            received = pending
        at, num_bytes = 0, len(received)
        try:
            while num_bytes - at >= HEAD.size:
                size, num_freed, offset, block_bytes = HEAD.unpack_from(received, at)
                if size > MESSAGE_BYTES + _SLACK_BYTES:
                    raise InvalidRequestError(
                        "the message is too large",
                        expected=f"at most {MESSAGE_BYTES} bytes",
                        got=str(size),
                    )
                end = at + HEAD.size + size
                if num_bytes < end:
                    break
                self._blocks.free_until(num_freed)
                if size:
                    yield self._open(bytes(received[at + HEAD.size : end]), offset, block_bytes)
                    if offset != INLINE:
                        self._num_read += 1
                        self._untold_bytes += block_bytes
                elif offset == FINISH:
                    self.is_finished = True
                at = end
        finally:
            if received is pending:
                del pending[:at]
            elif at < num_bytes:
                pending += data[at:]

    def _open(self, raw: bytes, offset: int, size: int) -> tuple[bytes, memoryview]:
        if offset == INLINE:
            return frames.cut(raw)
        if offset + size > self._incoming.nbytes:
            raise InvalidRequestError(
                "the block is not in the shared memory",
                "offset",
                f"within {self._incoming.nbytes} bytes",
                f"{size} bytes at {offset}",
            )
        return raw, self._incoming[offset : offset + size]

    def _frame(self, message: bytes, offset: int = INLINE, size: int = 0) -> bytes:
        self._num_told, self._untold_bytes = self._num_read, 0
        return HEAD.pack(len(message), self._num_read, offset, size) + message


def _address(buffer: Buffer | Array) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])
