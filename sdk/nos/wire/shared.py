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
from collections import deque
from typing import TYPE_CHECKING, Final

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

HEAD: Final = struct.Struct("<IQQQ")
#: An offset that stands for "in the message itself".
INLINE: Final = (1 << 64) - 1
#: An offset that stands for "nothing will follow", in a head without a message.
FINISH: Final = INLINE - 1
#: How much a message may have beside its data.
_SLACK_BYTES: Final = 1 << 20


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

    def put(self, buffers: Sequence[Buffer], size: int) -> int | None:
        """Copy `buffers` into a new block; return its offset, or None if there is no room."""
        start = 0
        for offset, end in self._used:  # the lowest gap, since what was used lately is warm
            if offset - start >= size:
                break
            start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if start + size > self._view.nbytes:
            return None
        bisect.insort(self._used, (start, start + size))
        self._order.append(start)
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
