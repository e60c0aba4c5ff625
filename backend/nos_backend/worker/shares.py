"""A batch's result as one for each of its calls; a call as several, and their results as one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from nos_backend.executor.arena import ALIGNMENT_BYTES
from nos_backend.executor.messages import ITEM_BYTES
from nos_backend.worker.batches import shifted
from nos_backend.worker.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nos_backend.worker.batches import Part

Node: TypeAlias = Any


class WrongRowsError(Exception):
    """A result that does not have a row for each that went in; its text says what it has."""


def split(
    reply: Reply, parts: Sequence[Part], exact_rows: int = 0, *, is_cut: bool = False
) -> list[Reply]:
    """Return the replies of a batch's calls, in order; `reply` is released with the last of them.

    Args:
        reply: To all of them.
        parts: What each call was to the batch.
        exact_rows: Rows that went in, where that is more than the calls had.
        is_cut: Whether the result has the padded dimension, of which each call gets its own length.

    Raises:
        WrongRowsError: If the result has not exactly the rows that went in.
        NosError: If there is none: what it failed with.
    """
    if reply.error is not None:
        raise reply.error
    if reply.kind != "result":
        raise WrongRowsError("it is a generator")
    total = max(exact_rows, sum(part.num_rows for part in parts))
    longest = max((part.length or 0 for part in parts), default=0) if is_cut else 0
    cuts, start = [], 0
    for part in parts:
        cut = _Cut(start, part, total, longest)
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
    if not part.is_item:
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

    def __init__(self, start: int, part: Part, total: int, longest: int = 0) -> None:
        self._start = start
        self._part = part
        self._total = total
        #: What rows were filled up to; 0 where they are not to be cut.
        self._longest = longest
        #: (offset in the whole block, bytes, offset in ours).
        self._segments: list[tuple[int, int, int]] = []
        self._size = 0

    def node(self, node: Node) -> Node:
        """Return the share of a node, its offsets counting into `block`."""
        match node:
            case {"t": [dtype, [int(rows), *row], offset]}:
                if rows != self._total:
                    raise WrongRowsError(f"{rows} rows for {self._total}")
                if self._part.length is not None and self._part.length < self._longest:
                    return {"t": self._cut_rows(dtype, row, offset)}
                row_bytes = math.prod(row) * ITEM_BYTES[dtype]
                num_bytes = self._part.num_rows * row_bytes
                at = self._add(offset + self._start * row_bytes, num_bytes)
                return {"t": [dtype, [*self._part.leading, *row], at]}
            case {"l": items}:
                if len(items) != self._total:
                    raise WrongRowsError(f"a list of {len(items)} for {self._total}")
                if self._part.is_item:
                    return self._whole(items[self._start])
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

    def _cut_rows(self, dtype: str, row: list[int], offset: int) -> list[Any]:
        """Return a tensor of our rows, each without what it was filled up with."""
        if not row or row[0] != self._longest:
            raise WrongRowsError(f"rows of {row[:1]} for {self._longest}")
        length = self._part.length or 0
        item_bytes = math.prod(row[1:]) * ITEM_BYTES[dtype]
        stride, size = row[0] * item_bytes, length * item_bytes
        at = -(-self._size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if size else 0
        for number in range(self._part.num_rows if size else 0):
            begins = offset + (self._start + number) * stride
            self._segments.append((begins, size, at + number * size))
            self._size = at + (number + 1) * size
        return [dtype, [*self._part.leading, length, *row[1:]], at]

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


def pieces(
    arguments: Sequence[Sequence[Any]],
    joined: Sequence[bool],
    part: Part,
    data: memoryview,
    sizes: Sequence[int],
) -> list[tuple[list[list[Any]], memoryview]]:
    """Return a call's rows as several calls: the arguments of each, and the bytes that they count into.

    Args:
        arguments: Of the call.
        joined: Which of them have rows.
        part: What it is to a batch.
        data: Its bytes; views of them are returned.
        sizes: Rows of each; as many as it has in all.
    """
    found, start = [], 0
    for num_rows in sizes:
        piece = replace(part, leading=(num_rows,), num_rows=num_rows)
        cut = _Cut(start, piece, part.num_rows)
        cut_arguments = []
        for (given, node), has_rows in zip(arguments, joined, strict=True):
            flat = _flat(node, part) if has_rows else node
            cut_arguments.append([given, cut.node(flat) if has_rows else node])
        found.append((cut_arguments, cut.block(data)))
        start += num_rows
    return found


def _flat(node: Node, part: Part) -> Node:
    """Return a joined argument with its leading dimensions as one."""
    match node:
        case {"t": [dtype, shape, offset]}:
            return {"t": [dtype, [part.num_rows, *shape[len(part.leading) :]], offset]}
    return node


def whole(replies: Sequence[Reply], part: Part) -> Reply:
    """Return the result of a call of which `replies` are the results of its pieces; those are released.

    Raises:
        WrongRowsError: If they hold something that has no rows; then nothing is released.
    """
    sum_ = _Sum([reply.block for reply in replies])
    node = sum_.node([reply.node for reply in replies], part)
    compute_s = sum(reply.compute_s for reply in replies)
    batch_size = max(reply.batch_size for reply in replies)
    joined = Reply("result", node, sum_.block(), compute_s, batch_size=batch_size)
    for reply in replies:
        reply.release()
    return joined


class _Sum:
    """Results put one behind the other."""

    def __init__(self, blocks: Sequence[memoryview]) -> None:
        self._blocks = blocks
        self._joined = bytearray()

    def node(self, nodes: Sequence[Node], part: Part) -> Node:
        """Return the node that stands for all of these, its offsets counting into `block`."""
        match nodes[0]:
            case {"t": [dtype, [int(), *row], _]}:
                tensors = [node.get("t") if isinstance(node, dict) else None for node in nodes]
                if any(it is None or (it[0], it[1][1:]) != (dtype, row) for it in tensors):
                    raise WrongRowsError("rows of different kinds")
                return {"t": [dtype, [*part.leading, *row], self._tensors(tensors)]}
            case {"l": _} if all(isinstance(node, dict) and "l" in node for node in nodes):
                bases = [self._append(block) for block in self._blocks]
                items = zip(bases, nodes, strict=True)
                return {"l": [shifted(it, base) for base, node in items for it in node["l"]]}
            case {"u": first} if all(_has(node, "u", len(first)) for node in nodes):
                columns = zip(*(node["u"] for node in nodes), strict=True)
                return {"u": [self.node(column, part) for column in columns]}
            case {"d": first} if all(_has(node, "d", len(first)) for node in nodes):
                members = []
                for column in zip(*(node["d"] for node in nodes), strict=True):
                    keys = {key for key, _ in column}
                    if len(keys) > 1:
                        raise WrongRowsError("different keys")
                    members.append([*keys, self.node([it for _, it in column], part)])
                return {"d": members}
        raise WrongRowsError("something that has no rows")

    def block(self) -> memoryview:
        """Return the bytes of all."""
        return memoryview(self._joined)

    def _tensors(self, tensors: Sequence[Any]) -> int:
        self._align()
        at = len(self._joined)
        for block, (dtype, shape, offset) in zip(self._blocks, tensors, strict=True):
            size = math.prod(shape) * ITEM_BYTES[dtype]
            self._joined += block[offset : offset + size]
        return at if len(self._joined) > at else 0

    def _append(self, block: memoryview) -> int:
        self._align()
        at = len(self._joined)
        self._joined += block
        return at

    def _align(self) -> None:
        self._joined += bytes(-len(self._joined) % ALIGNMENT_BYTES)


def _has(node: Node, kind: str, num: int) -> bool:
    return isinstance(node, dict) and kind in node and len(node[kind]) == num
