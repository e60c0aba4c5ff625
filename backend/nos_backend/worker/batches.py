"""Several calls as one: headers only, no bytes are touched.

Calls are joined along their rows. The bytes stay where they came, each call's in its own block; the
executor is told which pieces make up the joined input (`Arena.gather`). Calls of a method that takes single
items are handed over side by side, and the executor runs one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from nos.wire.signature import is_any_leading
from nos.wire.v1 import models_pb2

from nos_backend.executor.arena import ALIGNMENT_BYTES, ONES
from nos_backend.executor.messages import ITEM_BYTES
from nos_backend.scheduling.batching import BatchLimits, bucket
from nos_backend.worker.blocks import Blocks

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from nos_backend.worker.blocks import Block

Node: TypeAlias = Any

#: The parameter of models that pad which says what is real.
MASK: Final = "mask"
#: Instead of a number of trailing dimensions: a list, whose items are the rows.
_LIST: Final = -1
#: The first dimension counts the rows.
_FIRST: Final = -2


@dataclass(frozen=True, slots=True)
class Part:
    """What a call is to a batch."""

    key: Hashable
    """Calls of one method with equal keys can be joined."""
    leading: tuple[int, ...]
    """The leading dimensions that its rows are spread over."""
    num_rows: int
    length: int | None = None
    """Of the dimension that is padded; None if none is."""
    is_item: bool = False
    """Whether the method takes single items: in a batch its result is an item of a list."""


class Plan:
    """How the calls of one method are joined."""

    def __init__(self, method: models_pb2.Method) -> None:
        """Make the plan of a method that declares `batching`."""
        declared = method.batching
        #: Rows of every run; 0 for as many as there are.
        self.exact_rows: int = declared.exact_rows
        #: Whether the first batch is repeated call by call and compared.
        self.is_checked: bool = declared.is_checked
        #: Whether the method takes single items, one after the other.
        self.is_each: bool = declared.is_each
        #: Whether a result has the padded dimension too, which is cut to each call's own length.
        self.is_cut = bool(declared.padded) and _is_padded(method.returns, declared.padded)
        self._names = [parameter.name for parameter in method.parameters]
        #: By joined parameter: how many of its last dimensions make up a row, `_LIST` or `_FIRST`.
        self._joined: dict[str, int] = {}
        #: Those whose rows begin with the padded dimension.
        self._padded: set[str] = set()
        wanted = set(declared.parameters)
        for parameter in method.parameters:
            if parameter.name in wanted:
                shape = parameter.type.shape
                if parameter.type.kind == models_pb2.TYPE_KIND_LIST:
                    self._joined[parameter.name] = _LIST
                elif shape and is_any_leading(shape[0].name):
                    self._joined[parameter.name] = len(shape) - 1
                else:
                    self._joined[parameter.name] = _FIRST
                if declared.padded and _is_padded(parameter.type, declared.padded):
                    self._padded.add(parameter.name)

    def part(self, arguments: Sequence[Sequence[Any]]) -> Part | None:
        """Return what a call is to a batch; None if it has to run alone."""
        if self.is_each:
            return Part((), (), 1, is_item=True)
        key: list[Hashable] = []
        leading: tuple[int, ...] | None = None
        length: int | None = None
        for position, (given, node) in enumerate(arguments):
            name = given or self._names[position]
            kind = self._joined.get(name)
            if kind is None:
                if _has_bytes(node):
                    return None
                key.append((given, repr(node)))
                continue
            match node:
                case {"l": items} if kind == _LIST:
                    here: tuple[int, ...] = (len(items),)
                    key.append(given)
                case {"t": [dtype, shape, _]} if kind != _LIST:
                    split = 1 if kind == _FIRST else len(shape) - kind
                    here, row = tuple(shape[:split]), shape[split:]
                    if name in self._padded:
                        length = row[0]
                        row = [bucket(length), *row[1:]]
                    key.append((given, dtype, *row))
                case _:
                    return None
            if leading is not None and here != leading:
                return None
            leading = here
        if leading is None or not (num_rows := math.prod(leading)):
            return None
        return Part(tuple(key), leading, num_rows, length)

    def is_mask(self, position: int, given: str) -> bool:
        """Whether an argument, which a caller left open, is where padding is told."""
        return bool(self._padded) and (given or self._names[position]) == MASK

    def is_padded(self, position: int, given: str) -> bool:
        """Whether an argument's rows begin with the padded dimension."""
        return (given or self._names[position]) in self._padded

    def is_joined(self, position: int, given: str) -> bool:
        """Whether an argument is joined rather than equal in all calls."""
        return (given or self._names[position]) in self._joined


def _is_padded(kind: models_pb2.Type, padded: str) -> bool:
    """Whether a tensor's dimension behind the rows is the padded one."""
    return len(kind.shape) > 1 and kind.shape[1].name == padded


def plans(spec: models_pb2.ModelSpec) -> dict[str, Plan]:
    """Return the plans of a model's methods that batch, by method."""
    return {method.name: Plan(method) for method in spec.methods if method.HasField("batching")}


def limits(spec: models_pb2.ModelSpec) -> BatchLimits:
    """Return what a model's batches keep to."""
    for method in spec.methods:
        if method.HasField("batching"):
            declared = method.batching
            delay_s = declared.queue_delay_s if declared.HasField("queue_delay_s") else None
            usual = BatchLimits(queue_delay_s=delay_s)
            return (
                BatchLimits(max_rows=declared.max_rows, queue_delay_s=delay_s)
                if declared.max_rows
                else usual
            )
    return BatchLimits()


@dataclass(frozen=True, slots=True)
class Member:
    """One call of a batch."""

    arguments: Sequence[Sequence[Any]]
    part: Part
    block: Block | None


@dataclass(slots=True)
class _Layout:
    """Where pieces go in the joined input."""

    size: int = 0
    #: (offset in the arena, bytes, offset in the joined input).
    pieces: list[tuple[int, int, int]] = field(default_factory=list)

    def align(self) -> int:
        self.size = -(-self.size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return self.size

    def add(self, block: Block | None, offset: int, size: int, room: int = 0) -> None:
        """Append bytes of a block, and zeros up to `room` bytes."""
        if block is not None and size:
            self.pieces.append((block.offset + offset, size, self.size))
        self.size += max(size, room) if block is not None else 0

    def add_ones(self, num: int, room: int) -> None:
        """Append so many bytes of value 1, and zeros up to `room` bytes."""
        if num:
            self.pieces.append((ONES, num, self.size))
        self.size += room


def join(plan: Plan, members: Sequence[Member]) -> tuple[list[list[Any]], Blocks]:
    """Return the arguments of the one call that stands for all, and the input that they count into.

    Rows that are missing to what the plan wants exactly are repeated from the first.

    Args:
        plan: Of their method.
        members: At least one, of equal keys.
    """
    if plan.is_each:
        return _side_by_side(members)
    layout = _Layout()
    num_missing = max(0, plan.exact_rows - sum(member.part.num_rows for member in members))
    lengths = {member.part.length for member in members}
    longest = max((length for length in lengths if length is not None), default=0)
    is_ragged = len(lengths) > 1
    arguments: list[list[Any]] = []
    for position, (given, node) in enumerate(members[0].arguments):
        if not plan.is_joined(position, given):
            if not is_ragged or not plan.is_mask(position, given):
                arguments.append([given, node])
        elif "l" in node:
            items = _join_lists(members, position, layout)
            arguments.append([given, {"l": items + items[:1] * num_missing}])
        elif is_ragged and plan.is_padded(position, given):
            arguments.append([given, {"t": _join_ragged(members, position, layout, longest)}])
        else:
            tensor = _join_tensors(members, position, layout, num_missing)
            arguments.append([given, {"t": tensor}])
    if is_ragged:
        arguments.append([MASK, {"t": _mask(members, layout, longest)}])
    blocks = [member.block for member in members if member.block is not None]
    return arguments, Blocks(blocks, layout.pieces, layout.size)


def _side_by_side(members: Sequence[Member]) -> tuple[list[list[Any]], Blocks]:
    """Return the arguments of each call, and an input in which all blocks lie as they do in the arena."""
    blocks = [member.block for member in members if member.block is not None]
    start = min((block.offset for block in blocks), default=0)
    pieces = [(block.offset, len(block.view), block.offset - start) for block in blocks]
    size = max((at + length for _, length, at in pieces), default=0)
    arguments: list[list[Any]] = []
    for member in members:
        at = member.block.offset - start if member.block is not None else 0
        arguments.append([[given, shifted(node, at)] for given, node in member.arguments])
    return arguments, Blocks(blocks, pieces, size)


def _join_tensors(
    members: Sequence[Member], position: int, layout: _Layout, num_missing: int
) -> list[Any]:
    dtype, shape, _ = members[0].arguments[position][1]["t"]
    row = shape[len(members[0].part.leading) :]
    row_bytes = math.prod(row) * ITEM_BYTES[dtype]
    start, num_rows = layout.align(), 0
    for member in members:
        offset = member.arguments[position][1]["t"][2]
        layout.add(member.block, offset, member.part.num_rows * row_bytes)
        num_rows += member.part.num_rows
    for _ in range(num_missing):
        layout.add(members[0].block, members[0].arguments[position][1]["t"][2], row_bytes)
        num_rows += 1
    return [dtype, [num_rows, *row], start]


def _join_ragged(
    members: Sequence[Member], position: int, layout: _Layout, longest: int
) -> list[Any]:
    """Join rows of different lengths, each filled with zeros up to the longest."""
    dtype, shape, _ = members[0].arguments[position][1]["t"]
    inner = shape[len(members[0].part.leading) + 1 :]
    item_bytes = math.prod(inner) * ITEM_BYTES[dtype]
    start, num_rows = layout.align(), 0
    for member in members:
        offset = member.arguments[position][1]["t"][2]
        row_bytes = (member.part.length or 0) * item_bytes
        for row in range(member.part.num_rows):
            layout.add(member.block, offset + row * row_bytes, row_bytes, longest * item_bytes)
        num_rows += member.part.num_rows
    return [dtype, [num_rows, longest, *inner], start]


def _mask(members: Sequence[Member], layout: _Layout, longest: int) -> list[Any]:
    """Return the tensor that is true where rows are not filled up."""
    start, num_rows = layout.align(), 0
    for member in members:
        for _ in range(member.part.num_rows):
            layout.add_ones(member.part.length or 0, longest)
        num_rows += member.part.num_rows
    return ["bool", [num_rows, longest], start]


def _join_lists(members: Sequence[Member], position: int, layout: _Layout) -> list[Node]:
    joined: list[Node] = []
    for member in members:
        items = member.arguments[position][1]["l"]
        if any(_has_bytes(item) for item in items) and member.block is not None:
            start = layout.align()
            layout.add(member.block, 0, len(member.block.view))
            items = [shifted(item, start) for item in items]
        joined += items
    return joined


def _has_bytes(node: Node) -> bool:
    """Whether a node refers to its block."""
    match node:
        case {"t": _} | {"m": _}:
            return True
        case {"l": items} | {"u": items}:
            return any(_has_bytes(item) for item in items)
        case {"d": members}:
            return any(_has_bytes(item) for _, item in members)
    return False


def shifted(node: Node, by: int) -> Node:
    """Return a node whose offsets are so much larger."""
    match node:
        case {"t": [dtype, shape, offset]}:
            return {"t": [dtype, shape, offset + by]}
        case {"m": [mime_type, offset, size]}:
            return {"m": [mime_type, offset + by, size]}
        case {"l": items}:
            return {"l": [shifted(item, by) for item in items]}
        case {"u": items}:
            return {"u": [shifted(item, by) for item in items]}
        case {"d": members}:
            return {"d": [[key, shifted(item, by)] for key, item in members]}
    return node
