"""What worker and executor say to each other: JSON messages, each after its length in four bytes.

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
        fds                                 + the descriptors of the next message, whose `num_fds` counts them
        unload  key
        call    id, key, method, args, block            items, then one result, end or error follow
        cancel  id
        free                                            carries nothing but what every message may carry:
                                                        `free`, offsets in the output arena, and
                                                        `released`, a call for each item that was read
    executor -> worker
        ready
        done    id, took_s                              load: weight_bytes; construct: size_bytes (weights),
                                                        skeleton_bytes (0: cannot be moved), reason (why),
                                                        loose (tensors that are in no run)
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
executor makes the block. `kept` says that
the model still holds views of the call's input, whose block is therefore not to be used again yet.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final

_LENGTH: Final = struct.Struct("<I")
#: `json.dumps` would make an encoder for every message.
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
OCTETS: Final = "application/octet-stream"


class MalformedError(ValueError):
    """The peer sent what this protocol does not allow."""


def encode(message: dict[str, Any]) -> bytes:
    """Return the message with its length in front."""
    body = _encode(message).encode()
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that are complete with `data`.

        Raises:
            MalformedError: If a message is too long or no JSON object.
        """
        self._pending += data
        messages = []
        start = 0
        while len(self._pending) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending, start)
            if length > MAX_MESSAGE_BYTES:
                raise MalformedError(f"a message of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._pending) < end:
                break
            messages.append(_parse(bytes(self._pending[start + _LENGTH.size : end])))
            start = end
        del self._pending[:start]
        return messages


def _parse(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedError("no JSON") from error
    if not isinstance(message, dict):
        raise MalformedError("no object")
    return message


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
            size = math.prod(_whole(length) for length in shape) * ITEM_BYTES[dtype]
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
