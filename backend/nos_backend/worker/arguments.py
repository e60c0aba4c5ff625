"""Calls from the wire to the executor, and results back: checked trees, no bytes touched.

Executors speak JSON nodes (ARCHITECTURE.md, hop 3), so that they need no protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from nos.errors import InternalError
from nos.wire.limits import MAX_DEPTH
from nos.wire.signature import check_call, find_method
from nos.wire.values import DTYPE_NAMES, DTYPE_NUMBERS, check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nos.wire.v1 import models_pb2, values_pb2

#: None, a bool, number or text, or a dict with one of the keys `t`, `m`, `l`, `u`, `d`.
Node: TypeAlias = Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call that fits its method."""

    method: str
    arguments: list[list[Node]]
    """[name, node] each; an empty name means by position."""


def check_arguments(
    spec: models_pb2.ModelSpec,
    method: str,
    arguments: Sequence[values_pb2.Argument],
    data_bytes: int,
) -> Call:
    """Accept a call from the network, or say what is wrong with it.

    Args:
        spec: The model's interface.
        method: The method's name; empty means `__call__`.
        arguments: As they came.
        data_bytes: Length of the block that their offsets count into.

    Raises:
        MethodNotFoundError: If the model has no such public method.
        InvalidRequestError: If the arguments do not fit the method.
        InvalidTensorError: If a tensor does not fit, or reaches beyond the block.
        LimitExceededError: If something is nested too deep.
    """
    target = find_method(spec, method)
    for index, argument in enumerate(arguments):
        check(argument.value, data_bytes, argument.name or f"argument {index}")
    check_call(target, arguments)
    nodes = [[argument.name, to_node(argument.value)] for argument in arguments]
    return Call(method=target.name, arguments=nodes)


def to_node(value: values_pb2.Value) -> Node:
    """Return the JSON node of a tree that was checked."""
    kind = value.WhichOneof("kind")
    match kind:
        case None | "null":
            return None
        case "tensor":
            tensor = value.tensor
            return {"t": [DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.offset_bytes]}
        case "media":
            media = value.media
            return {"m": [media.mime_type, media.offset_bytes, media.size_bytes]}
        case "items":
            nodes = [to_node(item) for item in value.items.items]
            return {"u" if value.items.is_tuple else "l": nodes}
        case "fields":
            return {"d": [[item.key, to_node(item.value)] for item in value.fields.fields]}
        case _:
            return getattr(value, kind)


def from_node(node: Node, target: values_pb2.Value, base: int = 0) -> None:
    """Write an executor's node into an empty `target`, with `base` added to each offset.

    The executor handle has checked that tensors and media lie inside their block.

    Raises:
        InternalError: If it is no node all the same.
    """
    try:
        _from_node(node, target, base, 0)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InternalError("the executor sent a malformed result") from error


def _from_node(node: Node, target: values_pb2.Value, base: int, depth: int) -> None:
    match node:
        case None:
            target.null.SetInParent()
        case bool():
            target.flag = node
        case int():
            target.integer = node
        case float():
            target.real = node
        case str():
            target.text = node
        case {"t": [dtype, shape, offset]}:
            target.tensor.dtype = DTYPE_NUMBERS[dtype]
            target.tensor.shape.extend(shape)
            target.tensor.offset_bytes = base + offset
        case {"m": [mime_type, offset, size]}:
            target.media.mime_type = mime_type
            target.media.offset_bytes = base + offset
            target.media.size_bytes = size
        case {"l": items} | {"u": items} if depth < MAX_DEPTH:
            target.items.is_tuple = "u" in node
            for item in items:
                _from_node(item, target.items.items.add(), base, depth + 1)
        case {"d": members} if depth < MAX_DEPTH:
            target.fields.SetInParent()
            for key, member in members:
                _from_node(member, target.fields.fields.add(key=key).value, base, depth + 1)
        case _:
            raise ValueError("no node")
