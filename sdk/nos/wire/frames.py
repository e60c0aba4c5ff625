"""Messages whose last field is `data`: a small header and raw bytes, joined and split without copies.

Wire-compatible with the generated classes: a message made here parses there and the other way round.
Messages are built by one join (the only copy besides gRPC's own) and taken apart as a view. What is the same
in frame after frame, and in result after result, is encoded once; the rest of their headers is written here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from nos.errors import InvalidRequestError
from nos.wire.limits import CHUNK_BYTES
from nos.wire.v1 import inference_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Buffer: TypeAlias = bytes | bytearray | memoryview

#: See `result_header`.
Timings: TypeAlias = tuple[float, float, float, float, int]

#: A message type that ends in `data`.
M = TypeVar(
    "M",
    inference_pb2.StreamRequest,
    inference_pb2.StreamResponse,
    inference_pb2.RunRequest,
    inference_pb2.RunResponse,
)

_DATA_FIELD = 15
#: Field 15, length-delimited.
_DATA_TAG = bytes([_DATA_FIELD << 3 | 2])
#: `seq` of both messages of a stream, and what follows it in them: a frame or result, and a chunk.
_SEQ_TAG, _BODY_TAG, _CHUNK = b"\x08", b"\x1a", b"\x22\x00"
#: `acknowledged` of a request, which we write behind `seq`; `resumes` of a frame.
_ACKNOWLEDGED_TAG, _RESUMES_TAG = b"\x48", b"\x30"
#: Of a result: its value, its timings up to the size of the batch, and `data_bytes`.
_VALUE_TAG, _DATA_BYTES_TAG = b"\x0a", b"\x20"
_TIMINGS = struct.Struct("<BBBdBdBdBdB")
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
    return with_data(header.SerializeToString(), buffers, size)


def with_data(header: bytes, buffers: Sequence[Buffer], size: int) -> bytes:
    """Append `buffers` as `data` to a serialized message; as `join`."""
    if not size:
        return header
    return b"".join((header, _DATA_TAG, _varint(size), *buffers))


def request_header(seq: int, frame: bytes, acknowledged: int = 0) -> bytes:
    """Return the header of frame `seq`, a `StreamRequest`.

    Args:
        seq: Its number.
        frame: The serialized `Frame`.
        acknowledged: Up to which frame all have their ends; 0 says nothing.
    """
    ends = _ACKNOWLEDGED_TAG + _varint(acknowledged) if acknowledged else b""
    return b"".join((_SEQ_TAG, _varint(seq), ends, _BODY_TAG, _varint(len(frame)), frame))


def resumed(frame: bytes, seq: int) -> bytes:
    """Return a serialized `Frame` that had the number `seq` on the stream before."""
    return frame + _RESUMES_TAG + _varint(seq)


def renumbered(seq: int, header: bytes) -> bytes:
    """Return the header of a result, as `split_seq` cuts it, for another number."""
    return _SEQ_TAG + _varint(seq) + header


def result_header(seq: int, value: bytes, timings: Timings, data_bytes: int) -> bytes:
    """Return the header of the last result of frame `seq`, a `StreamResponse`.

    Args:
        seq: The frame's number.
        value: The serialized `Value`.
        timings: Seconds in the queue, waiting for a batch, in the model and at the server, and the size of
            the batch, in the order of `Timings`.
        data_bytes: Of the whole result.
    """
    queue_s, batch_wait_s, compute_s, server_s, batch_size = timings
    count = _varint(batch_size)
    length = _TIMINGS.size - 2 + len(count)
    seconds = _TIMINGS.pack(
        0x12, length, 0x09, queue_s, 0x11, batch_wait_s, 0x19, compute_s, 0x21, server_s, 0x28
    )
    parts = (_VALUE_TAG, _varint(len(value)), value, seconds, count, _DATA_BYTES_TAG)
    result = b"".join((*parts, _varint(data_bytes)))
    return b"".join((_SEQ_TAG, _varint(seq), _BODY_TAG, _varint(len(result)), result))


def chunk_header(seq: int) -> bytes:
    """Return the header of a chunk of frame or result `seq`."""
    return _SEQ_TAG + _varint(seq) + _CHUNK


def split_seq(header: bytes) -> tuple[int, int, bytes]:
    """Return the number that a serialized message starts with, what it acknowledges, and the rest.

    Returns:
        (0, 0, b"") if it starts with none.
    """
    if header[:1] != _SEQ_TAG:
        return 0, 0, b""
    try:
        seq, end = _read_varint(header, 1)
        acknowledged = 0
        if header[end : end + 1] == _ACKNOWLEDGED_TAG:
            acknowledged, end = _read_varint(header, end + 1)
    except _MalformedError:
        return 0, 0, b""
    return seq, acknowledged, header[end:]


def split(kind: type[M], raw: bytes) -> tuple[M, memoryview]:
    """Parse a message; its `data` comes as a view of `raw`, and is empty in the message.

    Raises:
        InvalidRequestError: If `raw` is not a message of that kind.
    """
    try:
        header, data = cut(raw)
    except InvalidRequestError as error:
        raise _not_a(kind, raw) from error
    return parse(kind, header), data


def cut(raw: bytes) -> tuple[bytes, memoryview]:
    """Return a serialized message without its `data`, and that as a view of `raw`.

    Raises:
        InvalidRequestError: If `raw` is no message.
    """
    try:
        tag, start, end = _find_data(raw)
    except _MalformedError as error:
        raise InvalidRequestError(
            "the message is none of protobuf", got=f"{len(raw)} other bytes"
        ) from error
    if not start:
        return raw, memoryview(b"")
    return raw[:tag] + raw[end:], memoryview(raw)[start:end]


def parse(kind: type[M], header: bytes) -> M:
    """Parse a message without its `data`.

    Raises:
        InvalidRequestError: If it is not one of that kind.
    """
    try:
        message = kind.FromString(header)
    except Exception as error:  # protobuf's DecodeError is no stable class across its backends
        if type(error).__name__ != "DecodeError":
            raise
        raise _not_a(kind, header) from error
    message.ClearField("data")  # one that another followed, which is what counts
    return message


def _not_a(kind: type[M], raw: bytes) -> InvalidRequestError:
    name = kind.DESCRIPTOR.name
    return InvalidRequestError(f"the message is not a nos.v1.{name}", got=f"{len(raw)} other bytes")


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


def pack(seq: int, header: bytes, buffers: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """Yield a frame's or result's messages: `header` with as much data as goes into one, and chunks.

    Args:
        seq: Its number.
        header: The first message, serialized without data; it says how many bytes follow in all.
        buffers: Contiguous bytes; copied once.
        size: Their total length.
    """
    if size <= CHUNK_BYTES:
        yield with_data(header, buffers, size)
        return
    for group in chunked(buffers):
        yield with_data(header, group, sum(piece.nbytes for piece in group))
        header = chunk_header(seq)


class _MalformedError(ValueError):
    """The bytes are no protobuf message."""


def _varint(value: int) -> bytes:
    if value < _MORE:
        return _BYTES[value]
    out = bytearray()
    while value >= _MORE:
        out.append(value & 0x7F | _MORE)
        value >>= 7
    out.append(value)
    return bytes(out)


#: Varints of one byte.
_BYTES = [bytes([value]) for value in range(_MORE)]


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    if position < len(raw) and (value := raw[position]) < _MORE:  # nearly all are
        return value, position + 1
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


def _find_data(raw: bytes) -> tuple[int, int, int]:
    """Return where the last `data` field, its content and what follows start; zeros if there is none."""
    position, found = 0, (0, 0, 0)
    size = len(raw)
    while position < size:
        start = position
        tag = raw[position]
        if tag < _MORE:
            position += 1
        else:
            tag, position = _read_varint(raw, position)
        wire_type = tag & 7
        if wire_type == _LENGTH:
            length = raw[position] if position < size else _MORE
            if length < _MORE:
                position += 1
            else:
                length, position = _read_varint(raw, position)
            if tag >> 3 == _DATA_FIELD:
                found = (start, position, position + length)
            position += length
        elif wire_type == _VARINT:
            _, position = _read_varint(raw, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        else:
            raise _MalformedError(f"wire type {wire_type}")
    if position != size:
        raise _MalformedError("truncated")
    return found
