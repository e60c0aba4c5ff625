"""Whether a call's result is the same in a batch and alone, as far as arithmetic allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from nos_backend.executor.messages import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nos_backend.worker.replies import Reply

Node: TypeAlias = Any

#: Of the largest number in a tensor: kernels sum in another order in another batch.
_TOLERANCE: Final = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}


def is_same(one: Reply, other: Reply) -> bool:
    """Compare two results; integers, text and bytes have to be equal, real numbers nearly."""
    found = zip(_leaves(one.node, one.block), _leaves(other.node, other.block), strict=False)
    return _form(one.node) == _form(other.node) and all(
        _is_close(dtype, mine, theirs) for (dtype, mine), (_, theirs) in found
    )


def _form(node: Node) -> Node:
    """Return a node without its offsets."""
    match node:
        case {"t": [dtype, shape, _]}:
            return {"t": [dtype, list(shape)]}
        case {"m": [mime_type, _, size]}:
            return {"m": [mime_type, size]}
        case {"l": items} | {"u": items}:
            return [_form(item) for item in items]
        case {"d": members}:
            return {"d": [[key, _form(item)] for key, item in members]}
    return node


def _leaves(node: Node, block: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Yield (dtype, bytes) of each tensor, and of media with an empty dtype."""
    match node:
        case {"t": [dtype, shape, offset]}:
            count = int(np.prod(shape, dtype=np.int64))
            yield dtype, block[offset : offset + count * ITEM_BYTES[dtype]]
        case {"m": [_, offset, size]}:
            yield "", block[offset : offset + size]
        case {"l": items} | {"u": items}:
            for item in items:
                yield from _leaves(item, block)
        case {"d": members}:
            for _, item in members:
                yield from _leaves(item, block)


def _is_close(dtype: str, one: memoryview, other: memoryview) -> bool:
    tolerance = _TOLERANCE.get(dtype)
    if tolerance is None or not len(one):
        return one == other
    mine, theirs = _numbers(dtype, one), _numbers(dtype, other)
    with np.errstate(all="ignore"):
        largest = float(np.nanmax(np.abs(theirs), initial=0.0, where=np.isfinite(theirs)))
        return bool(
            np.allclose(mine, theirs, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
        )


def _numbers(dtype: str, data: memoryview) -> NDArray[Any]:
    if dtype == "bfloat16":
        wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(data, dtype)
