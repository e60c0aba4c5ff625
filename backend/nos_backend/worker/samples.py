"""One call of a method to profile it with: made up from its signature, or the first that somebody made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from nos.wire.signature import is_any_leading
from nos.wire.v1 import models_pb2, values_pb2
from nos.wire.values import DTYPE_NAMES

from nos_backend.executor.arena import ALIGNMENT_BYTES
from nos_backend.executor.messages import FIRST_DIMENSION, IN_LIST, ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A larger call is not kept to be profiled with.
MAX_SAMPLE_BYTES: Final = 16 << 20

_CALL: Final = "__call__"
_BATCH: Final = "batch"
_NUM_PIXEL_VALUES: Final = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """A call whose batch can have any number of rows."""

    method: str
    arguments: list[list[Any]]
    """[name or nothing, node] each."""
    data: bytes
    """What the nodes' offsets count from."""
    joined: dict[str, int]
    """How rows are counted, by parameter; empty for a method that does not batch."""
    origin: str
    """`signature` or `first call`."""


def methods_to_profile(spec: models_pb2.ModelSpec) -> list[models_pb2.Method]:
    """Return those that batch, and what calling the model runs."""
    return [
        method
        for method in spec.methods
        if not method.is_generator and (method.HasField("batching") or method.name == _CALL)
    ]


def from_signature(method: models_pb2.Method) -> Sample | None:
    """Return a call with one row of made-up numbers; None where a size or a value is open."""
    arguments: list[list[Any]] = []
    data = bytearray()
    random = np.random.default_rng(0)
    for parameter in method.parameters:
        if parameter.has_default or parameter.is_variadic or parameter.is_keywords:
            continue
        shape = _shape(parameter.type)
        if shape is None:
            return None
        dtype = DTYPE_NAMES[parameter.type.dtype or values_pb2.DTYPE_FLOAT32]
        data += bytes(-len(data) % ALIGNMENT_BYTES)
        arguments.append([parameter.name, {"t": [dtype, shape, len(data)]}])
        if math.prod(shape) * ITEM_BYTES[dtype] > MAX_SAMPLE_BYTES:
            return None
        data += _numbers(random, dtype, math.prod(shape))
    return Sample(method.name, arguments, bytes(data), _joined(method), "signature")


def from_call(
    method: models_pb2.Method, arguments: Sequence[Sequence[Any]], data: memoryview | None
) -> Sample | None:
    """Return a copy of a call that was made; None if it is too large to keep."""
    if data is not None and data.nbytes > MAX_SAMPLE_BYTES:
        return None
    kept = [list(argument) for argument in arguments]
    return Sample(method.name, kept, bytes(data or b""), _joined(method), "first call")


def _shape(kind: models_pb2.Type) -> list[int] | None:
    """Return the shape of one row; None if it is not declared in full."""
    if kind.kind != models_pb2.TYPE_KIND_TENSOR or not kind.has_shape:
        return None
    shape = []
    for index, dimension in enumerate(kind.shape):
        if not dimension.name:
            shape.append(dimension.size)
        elif index == 0 and (dimension.name == _BATCH or is_any_leading(dimension.name)):
            shape.append(1)
        else:
            return None
    return shape


def _numbers(random: np.random.Generator, dtype: str, count: int) -> bytes:
    """Return floats between 0 and 1 and any pixels; other whole numbers are 0, which is always an index."""
    if dtype in {"float16", "float32", "float64"}:
        return random.random(count).astype(dtype).tobytes()
    if dtype == "uint8":
        return random.integers(0, _NUM_PIXEL_VALUES, count).astype(np.uint8).tobytes()
    return bytes(count * ITEM_BYTES[dtype])


def _joined(method: models_pb2.Method) -> dict[str, int]:
    joined = {}
    wanted = set(method.batching.parameters)
    for parameter in method.parameters:
        if parameter.name not in wanted:
            continue
        shape = parameter.type.shape
        if parameter.type.kind == models_pb2.TYPE_KIND_LIST:
            joined[parameter.name] = IN_LIST
        elif shape and is_any_leading(shape[0].name):
            joined[parameter.name] = len(shape) - 1
        else:
            joined[parameter.name] = FIRST_DIMENSION
    return joined
