"""Several calls as one, and its result back as one for each: headers only, no bytes are touched.

Calls are joined along their rows. The bytes stay where they came, each call's in its own block; the
executor is told which pieces make up the joined input (`Arena.gather`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from nos.errors import LimitExceededError
from nos.wire.signature import is_any_leading
from nos.wire.v1 import models_pb2

from nos_backend.executor.arena import ALIGNMENT_BYTES
from nos_backend.executor.messages import ITEM_BYTES
from nos_backend.scheduling.batching import BatchLimits
from nos_backend.worker.executors import Blocks, Reply

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from nos_backend.worker.executors import Block

Node: TypeAlias = Any

#: Instead of a number of trailing dimensions: a list, whose items are the rows.
_LIST: Final = -1
#: The first dimension counts the rows.
_FIRST: Final = -2


class WrongRowsError(Exception):
    """A result that does not have a row for each that went in; its text says what it has."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a call is to a batch."""

    key: Hashable
    """Calls of one method with equal keys can be joined."""
    leading: tuple[int, ...]
    """The leading dimensions that its rows are spread over."""
    num_rows: int


class Plan:
    """How the calls of one method are joined."""

    def __init__(self, method: models_pb2.Method) -> None:
        """Make the plan of a method that declares `batching`."""
        #: Rows of every run; 0 for as many as there are.
        self.exact_rows: int = method.batching.exact_rows
        #: Whether the first batch is repeated call by call and compared.
        self.is_checked: bool = method.batching.is_checked
        self._names = [parameter.name for parameter in method.parameters]
        #: By joined parameter: how many of its last dimensions make up a row, `_LIST` or `_FIRST`.
        self._joined: dict[str, int] = {}
        wanted = set(method.batching.parameters)
        for parameter in method.parameters:
            if parameter.name in wanted:
                shape = parameter.type.shape
                if parameter.type.kind == models_pb2.TYPE_KIND_LIST:
                    self._joined[parameter.name] = _LIST
                elif shape and is_any_leading(shape[0].name):
                    self._joined[parameter.name] = len(shape) - 1
                else:
                    self._joined[parameter.name] = _FIRST

    def part(self, arguments: Sequence[Sequence[Any]]) -> Part | None:
        """Return what a call is to a batch; None if it has to run alone."""
        key: list[Hashable] = []
        leading: tuple[int, ...] | None = None
        for position, (given, node) in enumerate(arguments):
            kind = self._joined.get(given or self._names[position])
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
                    here = tuple(shape[:split])
                    key.append((given, dtype, *shape[split:]))
                case _:
                    return None
            if leading is not None and here != leading:
                return None
            leading = here
        num_rows = math.prod(leading or ()) if leading is not None else 0
        return Part(tuple(key), leading, num_rows) if leading is not None and num_rows else None

    def is_joined(self, position: int, given: str) -> bool:
        """Whether an argument is joined rather than equal in all calls."""
        return (given or self._names[position]) in self._joined


def too_many_rows(plan: Plan, part: Part) -> LimitExceededError:
    """Return why a call has more rows than every run of its model has."""
    return LimitExceededError(
        "a call of a model that is exact has too many rows",
        "batch",
        f"at most {plan.exact_rows} rows",
        str(part.num_rows),
        "Send them in several calls",
    )


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

    def add(self, block: Block | None, offset: int, size: int) -> None:
        if block is not None and size:
            self.pieces.append((block.offset + offset, size, self.size))
            self.size += size


def join(plan: Plan, members: Sequence[Member]) -> tuple[list[list[Any]], Blocks]:
    """Return the arguments of the one call that stands for all, and the input that they count into.

    Rows that are missing to what the plan wants exactly are repeated from the first.

    Args:
        plan: Of their method.
        members: At least one, of equal keys.
    """
    layout = _Layout()
    num_missing = max(0, plan.exact_rows - sum(member.part.num_rows for member in members))
    arguments: list[list[Any]] = []
    for position, (given, node) in enumerate(members[0].arguments):
        if not plan.is_joined(position, given):
            arguments.append([given, node])
        elif "l" in node:
            items = _join_lists(members, position, layout)
            arguments.append([given, {"l": items + items[:1] * num_missing}])
        else:
            tensor = _join_tensors(members, position, layout, num_missing)
            arguments.append([given, {"t": tensor}])
    blocks = [member.block for member in members if member.block is not None]
    return arguments, Blocks(blocks, layout.pieces, layout.size)


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


def _join_lists(members: Sequence[Member], position: int, layout: _Layout) -> list[Node]:
    joined: list[Node] = []
    for member in members:
        items = member.arguments[position][1]["l"]
        if any(_has_bytes(item) for item in items) and member.block is not None:
            start = layout.align()
            layout.add(member.block, 0, len(member.block.view))
            items = [_shifted(item, start) for item in items]
        joined += items
    return joined


def split(reply: Reply, parts: Sequence[Part], exact_rows: int = 0) -> list[Reply]:
    """Return the replies of a batch's calls, in order; `reply` is released with the last of them.

    Args:
        reply: To all of them.
        parts: What each call was to the batch.
        exact_rows: Rows that went in, where that is more than the calls had.

    Raises:
        WrongRowsError: If the result has not exactly the rows that went in.
        NosError: If there is none: what it failed with.
    """
    if reply.error is not None:
        raise reply.error
    if reply.kind != "result":
        raise WrongRowsError("it is a generator")
    total = max(exact_rows, sum(part.num_rows for part in parts))
    cuts, start = [], 0
    for part in parts:
        cut = _Cut(start, part, total)
        cuts.append((cut.node(reply.node), cut))
        start += part.num_rows
    num_open = len(parts)

    def release() -> None:
        nonlocal num_open
        num_open -= 1
        if not num_open:
            reply.release()

    return [
        Reply.shared(node, cut.block(reply.block), reply.compute_s, len(parts), release)
        for node, cut in cuts
    ]


def check(reply: Reply, part: Part) -> None:
    """Accept the result of a call that ran alone.

    Raises:
        WrongRowsError: If it has not the rows of the call.
    """
    _check(reply.node, part)


def _check(node: Node, part: Part) -> None:
    match node:
        case {"t": [_, shape, _]}:
            if tuple(shape[: len(part.leading)]) != part.leading:
                raise WrongRowsError(f"shape {tuple(shape)} for {part.leading}")
        case {"l": items}:
            if len(items) != part.num_rows:
                raise WrongRowsError(f"a list of {len(items)} for {part.num_rows}")
        case {"u": items}:
            for item in items:
                _check(item, part)
        case {"d": members}:
            for _, item in members:
                _check(item, part)


class _Cut:
    """One call's share of a result."""

    def __init__(self, start: int, part: Part, total: int) -> None:
        self._start = start
        self._part = part
        self._total = total
        #: (offset in the whole block, bytes, offset in ours).
        self._segments: list[tuple[int, int, int]] = []
        self._size = 0

    def node(self, node: Node) -> Node:
        """Return the share of a node, its offsets counting into `block`."""
        match node:
            case {"t": [dtype, [int(rows), *row], offset]}:
                if rows != self._total:
                    raise WrongRowsError(f"{rows} rows for {self._total}")
                row_bytes = math.prod(row) * ITEM_BYTES[dtype]
                num_bytes = self._part.num_rows * row_bytes
                at = self._add(offset + self._start * row_bytes, num_bytes)
                return {"t": [dtype, [*self._part.leading, *row], at]}
            case {"l": items}:
                if len(items) != self._total:
                    raise WrongRowsError(f"a list of {len(items)} for {self._total}")
                own = items[self._start : self._start + self._part.num_rows]
                return {"l": [self._whole(item) for item in own]}
            case {"u": items}:
                return {"u": [self.node(item) for item in items]}
            case {"d": members}:
                return {"d": [[key, self.node(item)] for key, item in members]}
        raise WrongRowsError("something that has no rows")

    def block(self, whole: memoryview) -> memoryview:
        """Return the bytes of the share; a view where they lie in one run."""
        if not self._segments:
            return memoryview(b"")
        if len(self._segments) == 1:
            offset, size, _ = self._segments[0]
            return whole[offset : offset + size]
        joined = bytearray(self._size)
        for offset, size, at in self._segments:
            joined[at : at + size] = whole[offset : offset + size]
        return memoryview(joined)

    def _whole(self, node: Node) -> Node:
        match node:
            case {"t": [dtype, shape, offset]}:
                size = math.prod(shape) * ITEM_BYTES[dtype]
                return {"t": [dtype, shape, self._add(offset, size)]}
            case {"m": [mime_type, offset, size]}:
                return {"m": [mime_type, self._add(offset, size), size]}
            case {"l": items}:
                return {"l": [self._whole(item) for item in items]}
            case {"u": items}:
                return {"u": [self._whole(item) for item in items]}
            case {"d": members}:
                return {"d": [[key, self._whole(item)] for key, item in members]}
        return node

    def _add(self, offset: int, size: int) -> int:
        if not size:
            return 0
        at = -(-self._size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._segments.append((offset, size, at))
        self._size = at + size
        return at


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


def _shifted(node: Node, by: int) -> Node:
    match node:
        case {"t": [dtype, shape, offset]}:
            return {"t": [dtype, shape, offset + by]}
        case {"m": [mime_type, offset, size]}:
            return {"m": [mime_type, offset + by, size]}
        case {"l": items}:
            return {"l": [_shifted(item, by) for item in items]}
        case {"u": items}:
            return {"u": [_shifted(item, by) for item in items]}
        case {"d": members}:
            return {"d": [[key, _shifted(item, by)] for key, item in members]}
    return node
