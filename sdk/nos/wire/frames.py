"""Messages whose last field is `data`: a small header and raw bytes, joined and split without copies.

Wire-compatible with the generated classes: a message made here parses there and the other way round.
Large messages are built by one join (the only copy besides gRPC's own) and taken apart as a view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypeVar

from nos.errors import InvalidRequestError
from nos.wire.limits import CHUNK_BYTES, SMALL_MESSAGE_BYTES
from nos.wire.v1 import inference_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Buffer: TypeAlias = bytes | bytearray | memoryview

#: A message type that ends in `data`.
M = TypeVar(
    "M",
    inference_pb2.StreamRequest,
    inference_pb2.StreamResponse,
    inference_pb2.RunRequest,
    inference_pb2.RunResponse,
)

#: One of a stream.
S = TypeVar("S", inference_pb2.StreamRequest, inference_pb2.StreamResponse)

_DATA_FIELD = 15
#: Field 15, length-delimited.
_DATA_TAG = bytes([_DATA_FIELD << 3 | 2])
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MORE = 0x80
_MAX_VARINT_BYTES = 10


def join(header: M, buffers: Sequence[Buffer], size: int) -> bytes:
    """Serialize `header` with `buffers` as its `data`.

    Args:
        header: The message; its own `data` must be empty.
        buffers: Contiguous bytes; copied once.
        size: Their total length.
    """
    if not size:
        return header.SerializeToString()
    return b"".join((header.SerializeToString(), _DATA_TAG, _varint(size), *buffers))


def split(kind: type[M], raw: bytes) -> tuple[M, memoryview]:
    """Parse a message; its `data` comes as a view of `raw`, and is empty in the message.

    Raises:
        InvalidRequestError: If `raw` is not a message of that kind.
    """
    try:
        if len(raw) >= SMALL_MESSAGE_BYTES:
            start, end = _find_data(raw)
            if end == len(raw):
                tag_start = start - len(_varint(end - start)) - 1
                return kind.FromString(raw[:tag_start]), memoryview(raw)[start:end]
        message = kind.FromString(raw)
    except Exception as error:  # protobuf's DecodeError is no stable class across its backends
        if type(error).__name__ not in {"DecodeError", "_MalformedError"}:
            raise
        raise InvalidRequestError(
            f"the message is not a nos.v1.{kind.DESCRIPTOR.name}", got=f"{len(raw)} other bytes"
        ) from error
    data = memoryview(message.data)
    message.ClearField("data")
    return message, data


def chunked(
    buffers: Iterable[Buffer], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[list[memoryview]]:
    """Cut `buffers` into groups of at most `chunk_bytes`, in order and without copying.

    Yields nothing for no bytes. Every group but the last is exactly `chunk_bytes` long.
    """
    group: list[memoryview] = []
    room = chunk_bytes
    for buffer in buffers:
        view = memoryview(buffer).cast("B") if not isinstance(buffer, memoryview) else buffer
        while view.nbytes:
            piece = view[:room]
            group.append(piece)
            room -= piece.nbytes
            view = view[piece.nbytes :]
            if not room:
                yield group
                group, room = [], chunk_bytes
    if group:
        yield group


def pack(header: S, buffers: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """Yield a frame's or result's messages: `header` with as much data as goes into one, and chunks.

    Args:
        header: The first message, without data; it says how many bytes follow in all.
        buffers: Contiguous bytes; copied once.
        size: Their total length.
    """
    if size <= CHUNK_BYTES:
        yield join(header, buffers, size)
        return
    seq, kind = header.seq, type(header)
    for group in chunked(buffers):
        yield join(header, group, sum(piece.nbytes for piece in group))
        header = kind(seq=seq, chunk=inference_pb2.Chunk())


class _MalformedError(ValueError):
    """The bytes are no protobuf message."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= _MORE:
        out.append(value & 0x7F | _MORE)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position >= len(raw):
            break
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < _MORE:
            return value, position
    raise _MalformedError("truncated")


def _find_data(raw: bytes) -> tuple[int, int]:
    """Return where the last `data` field starts and ends; (0, 0) if there is none."""
    position, found = 0, (0, 0)
    while position < len(raw):
        tag, position = _read_varint(raw, position)
        wire_type = tag & 7
        if wire_type == _LENGTH:
            size, position = _read_varint(raw, position)
            if tag >> 3 == _DATA_FIELD:
                found = (position, position + size)
            position += size
        elif wire_type == _VARINT:
            _, position = _read_varint(raw, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        else:
            raise _MalformedError(f"wire type {wire_type}")
    if position != len(raw):
        raise _MalformedError("truncated")
    return found
