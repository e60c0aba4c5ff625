"""What worker and executor say to each other: messages after their length in four bytes, JSON but for two.

::

    worker -> executor
        load      id, key, definition                   one done or failed follows each of these:
        construct id, key, definition                   makes a model, without serving it
        store     id, key                   + weights, skeleton: writes what was constructed to them
        adopt     id, key                   + weights or nothing: serves what was constructed
        bind      id, key, definition, size_bytes, skeleton_bytes
                                            + weights, skeleton: serves what was constructed anywhere
        evict     id, key                               takes the weights off the device
        reload    id, key                               brings them back
        predict   id, key, method, args, joined, sizes, size_bytes
        measure   id, key, method, args, joined, rows, limit_s, size_bytes
                                            + the sample's bytes: what a method needs at these sizes
        fds                                 + the descriptors of the next message, whose `num_fds` counts them
        unload  key
        call    id, key, method, args, block            items, then one result, end or error follow
        forget                                          the forms that calls were given names for
        cancel  id
        free                                            carries nothing but what every message may carry:
                                                        `free`, offsets in the output arena, and
                                                        `released`, a call for each item that was read
    executor -> worker
        ready
        done    id, took_s                              load: weight_bytes; construct: size_bytes (weights),
                                                        skeleton_bytes (0: cannot be moved), reason (why),
                                                        made_first (why its weights were made before
                                                        they were read from their file),
                                                        loose (tensors that are in no run);
                                                        predict, measure: points
        failed  id, error
        result  id, node, block, compute_s, kept
        item    id, node, block, compute_s
        end     id, compute_s, kept
        error   id, error, compute_s, kept
        need                                            the executor waits for `free`
        doomed  reason                                  it lost its device and ends without further replies
        unkept  ids                                     inputs that the model let go of at last

`block` is (offset, size) in the arena; offsets in nodes count from the block's start. A call that stands
for a batch has `pieces` beside it, (offset in the arena, size, offset in the block) each, of which the
executor makes the block (`Arena.gather`). With `each`, `args` holds the arguments of several calls, which run
one after the other; the result is a list of theirs. `kept` says that
the model still holds views of the call's input, whose block is therefore not to be used again yet.

Most calls differ from one before them in their id and block only. So a call may have `form`, a number for its
key, method and args; one that comes later with the same is `ShortCall`, and what tensors it results in
`ShortResult`: a byte that no JSON starts with, and numbers. Its block may be a part of the call's own input,
where that is what the model returned and does not hold any more; it is the worker's as that was.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final, NamedTuple, TypeAlias

_LENGTH: Final = struct.Struct("<I")
_SHORT_CALL: Final = struct.Struct("<IBQQQQH")
_SHORT_RESULT: Final = struct.Struct("<IBQQQd??")
_OFFSET: Final = struct.Struct("<Q")
_CALL, _RESULT = 1, 2
#: The most offsets that a short call gives back.
MAX_SHORT_FREED: Final = 64
#: `json.dumps` would make an encoder for every message, `json.loads` look for the encoding.
_decode: Final = json.JSONDecoder().decode
_encode: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
MAX_MESSAGE_BYTES: Final = 64 << 20
#: What a result may hold outside its block: characters of text, and `NODE_BYTES` for every node. JSON
#: escapes make up to twelve bytes of a character, so that a message stays below its own limit.
MAX_TREE_BYTES: Final = 4 << 20
NODE_BYTES: Final = 16
MAX_DEPTH: Final = 32
MAX_RANK: Final = 8
_MAX_MIME_CHARS: Final = 255
_INT64: Final = 2**63

#: dtype names on the wire and their sizes.
ITEM_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
#: In a sample's `joined`, by parameter: its items are the rows, its first dimension counts them, or, where
#: not negative, so many of its last dimensions make up one.
IN_LIST: Final = -1
FIRST_DIMENSION: Final = -2
OCTETS: Final = "application/octet-stream"


class MalformedError(ValueError):
    """The peer sent what this protocol does not allow."""


class ShortCall(NamedTuple):
    """A call in a form that the executor knows."""

    id: int
    form: int
    offset: int
    """Of its block in the input arena, and its bytes; both 0 if it has none."""
    size: int
    freed: list[int]
    """Offsets in the output arena."""

    def encode(self) -> bytes:
        """Return the message with its length in front."""
        call_id, form, offset, size, freed = self
        length = _SHORT_CALL.size - _LENGTH.size + len(freed) * _OFFSET.size
        head = _SHORT_CALL.pack(length, _CALL, call_id, form, offset, size, len(freed))
        return head + b"".join(map(_OFFSET.pack, freed)) if freed else head


class ShortResult(NamedTuple):
    """The result of a call, with bytes in the output arena, or in place."""

    id: int
    offset: int
    """Of its block in the output arena, and its bytes."""
    size: int
    compute_s: float
    is_kept: bool
    is_in_place: bool
    """Whether `offset` is one in the input arena, and the block a part of the call's."""
    node: bytes
    """JSON."""

    def encode(self) -> bytes:
        """Return the message with its length in front."""
        *numbers, node = self
        length = _SHORT_RESULT.size - _LENGTH.size + len(node)
        return _SHORT_RESULT.pack(length, _RESULT, *numbers) + node


Message: TypeAlias = dict[str, Any] | ShortCall | ShortResult


def encode(message: dict[str, Any]) -> bytes:
    """Return the message with its length in front."""
    body = _encode(message).encode()
    return _LENGTH.pack(len(body)) + body


def encode_node(node: Any) -> bytes:
    """Return a node as JSON."""
    return _encode(node).encode()


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        #: The beginning of a message.
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that are complete with `data`.

        Raises:
            MalformedError: If a message is too long, or none of this protocol's.
        """
        pending = self._pending
        received: bytes | bytearray = data
        if pending:
            pending += data
            received = pending
        messages = []
        start, size = 0, len(received)
        while size - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, start)
            if length > MAX_MESSAGE_BYTES:
                raise MalformedError(f"a message of {length} bytes")
            end = start + _LENGTH.size + length
            if size < end:
                break
            messages.append(_parse(received, start, end))
            start = end
        if received is pending:
            del pending[:start]
        else:
            pending += data[start:]
        return messages


def _parse(received: bytes | bytearray, start: int, end: int) -> Message:
    """Return the message that lies, with its length, in that part of what was received."""
    kind = received[start + _LENGTH.size] if end - start > _LENGTH.size else None
    if kind == _CALL and end - start >= _SHORT_CALL.size:
        _, _, call_id, form, offset, size, num_freed = _SHORT_CALL.unpack_from(received, start)
        start += _SHORT_CALL.size
        if end - start != num_freed * _OFFSET.size:
            raise MalformedError("a call of another length")
        freed = [offset for (offset,) in _OFFSET.iter_unpack(received[start:end])]
        return ShortCall(call_id, form, offset, size, freed)
    if kind == _RESULT and end - start >= _SHORT_RESULT.size:
        _, _, call_id, offset, size, compute_s, kept, in_place = _SHORT_RESULT.unpack_from(
            received, start
        )
        node = bytes(received[start + _SHORT_RESULT.size : end])
        return ShortResult(call_id, offset, size, compute_s, kept, in_place, node)
    message = decode_json(received[start + _LENGTH.size : end])
    if not isinstance(message, dict):
        raise MalformedError("no object")
    return message


def decode_json(raw: bytes | bytearray) -> Any:
    """Return what JSON from an untrusted peer says.

    Raises:
        MalformedError: If it is none.
    """
    try:
        return _decode(raw.decode())
    except (ValueError, RecursionError) as error:
        raise MalformedError("no JSON") from error


def check_block(block: Any, arena_bytes: int) -> tuple[int, int]:
    """Return (offset, size) from an untrusted peer, or refuse it.

    Raises:
        MalformedError: If it does not lie inside the arena.
    """
    if not isinstance(block, list) or len(block) != 2:  # noqa: PLR2004 - offset and size
        raise MalformedError("block is no pair")
    offset, size = _whole(block[0]), _whole(block[1])
    if offset + size > arena_bytes:
        raise MalformedError("block outside the arena")
    return offset, size


def check_node(node: Any, block_bytes: int, depth: int = 0) -> None:
    """Accept a node from an untrusted peer, or refuse it.

    Raises:
        MalformedError: If it is no node, nested too deep, or reaches outside its block.
    """
    if node is None or isinstance(node, bool | float | str):
        return
    if isinstance(node, int):
        if not -_INT64 <= node < _INT64:
            raise MalformedError("number over 64 bits")
        return
    if not isinstance(node, dict) or len(node) != 1:
        raise MalformedError("no node")
    ((kind, content),) = node.items()
    if not isinstance(content, list):
        raise MalformedError("node without content")
    if kind == "t":
        _check_tensor(content, block_bytes)
    elif kind == "m":
        _check_media(content, block_bytes)
    elif kind in {"l", "u", "d"}:
        if depth >= MAX_DEPTH:
            raise MalformedError("nested too deep")
        _check_members(kind, content, block_bytes, depth)
    else:
        raise MalformedError("unknown node")


def _check_members(kind: str, content: list[Any], block_bytes: int, depth: int) -> None:
    if kind != "d":
        for item in content:
            check_node(item, block_bytes, depth + 1)
        return
    for member in content:
        match member:
            case [str(), value]:
                check_node(value, block_bytes, depth + 1)
            case _:
                raise MalformedError("no member")


def _check_tensor(content: list[Any], block_bytes: int) -> None:
    match content:
        case [str(dtype), list(shape), offset] if dtype in ITEM_BYTES and len(shape) <= MAX_RANK:
            lengths = [_whole(length) for length in shape]
            if math.prod(length or 1 for length in lengths) * ITEM_BYTES[dtype] >= _INT64:
                raise MalformedError("tensor over 64 bits")
            size = math.prod(lengths) * ITEM_BYTES[dtype]
        case _:
            raise MalformedError("no tensor")
    if _whole(offset) + size > block_bytes:
        raise MalformedError("tensor outside its block")


def _check_media(content: list[Any], block_bytes: int) -> None:
    match content:
        case [str(mime_type), offset, size] if len(mime_type) <= _MAX_MIME_CHARS:
            if _whole(offset) + _whole(size) > block_bytes:
                raise MalformedError("media outside its block")
        case _:
            raise MalformedError("no media")


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _INT64:
        raise MalformedError("no whole number")
    return value
