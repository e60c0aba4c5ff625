"""Calls and results between the wire and executors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nos.errors import (
    InternalError,
    InvalidRequestError,
    InvalidTensorError,
    LimitExceededError,
    MethodNotFoundError,
)
from nos.types import Media
from nos.wire.v1 import models_pb2, values_pb2
from nos.wire.values import Payload, write, write_arguments
from nos_backend.worker.arguments import check_arguments, from_node, to_node

SPEC = models_pb2.ModelSpec(
    name="m",
    methods=[
        models_pb2.Method(name="__call__", parameters=[models_pb2.Parameter(name="x")]),
        models_pb2.Method(name="embed"),
    ],
)

TREES = [
    None,
    True,
    -3,
    2.5,
    float("inf"),
    "text",
    [],
    {},
    (1, [2, None], {"a": "b"}),
    np.zeros((0, 3), np.float16),
    np.float32(1),
    [np.zeros(3), {"image": Media("image/png", b"png"), "raw": b"raw"}],
]


@pytest.mark.parametrize("value", TREES)
def test_a_tree_survives_both_ways(value: Any) -> None:
    tree = values_pb2.Value()
    write(value, tree, Payload(), "x")
    back = values_pb2.Value()
    from_node(to_node(tree), back)
    assert back == tree


def test_a_call_becomes_names_and_nodes() -> None:
    nodes, payload = write_arguments([("", 1), ("", 2)][:1])
    call = check_arguments(SPEC, "", nodes, payload.size)
    assert call.method == "__call__"
    assert call.arguments == [["", 1]]


def test_a_method_that_is_not_public_is_not_found() -> None:
    with pytest.raises(MethodNotFoundError, match="one of __call__, embed"):
        check_arguments(SPEC, "_secret", [], 0)


def argument(**tensor: Any) -> values_pb2.Argument:
    return values_pb2.Argument(name="x", value=values_pb2.Value(tensor=values_pb2.Tensor(**tensor)))


HUGE = 2**62


@pytest.mark.accept("A11")
@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": values_pb2.DTYPE_FLOAT32, "shape": [3]},
        {"dtype": values_pb2.DTYPE_UINT8, "shape": [8], "offset_bytes": 1},
        {"dtype": values_pb2.DTYPE_UINT8, "shape": [-1, -8]},
        {"dtype": values_pb2.DTYPE_UINT8, "shape": [HUGE, HUGE, HUGE]},
        {"dtype": values_pb2.DTYPE_UNSPECIFIED, "shape": [1]},
        {"dtype": 99, "shape": [1]},
        {"dtype": values_pb2.DTYPE_UINT8, "shape": [1] * 9},
        {"dtype": values_pb2.DTYPE_UINT8, "shape": [1], "offset_bytes": 2**64 - 1},
    ],
)
def test_a_tensor_that_reaches_beyond_its_bytes_is_refused(tensor: dict[str, Any]) -> None:
    with pytest.raises(InvalidTensorError) as caught:
        check_arguments(SPEC, "", [argument(**tensor)], 8)
    assert caught.value.field == "x"
    assert len(str(caught.value)) < 500


def test_deep_nesting_is_refused() -> None:
    value = values_pb2.Value()
    inner = value
    for _ in range(40):
        inner = inner.items.items.add()
    with pytest.raises(LimitExceededError):
        check_arguments(SPEC, "", [values_pb2.Argument(value=value)], 0)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'y'"):
        check_arguments(SPEC, "", [values_pb2.Argument(name="y")], 0)


@pytest.mark.parametrize(
    "node",
    [{"z": []}, {"t": ["object", [1], 0]}, {"t": [1]}, {"d": [["a"]]}, {"m": [1, 2, 3]}, 2**64],
)
def test_a_malformed_result_is_a_defect_and_not_a_crash(node: Any) -> None:
    with pytest.raises(InternalError):
        from_node(node, values_pb2.Value())
