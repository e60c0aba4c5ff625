"""The check that both sides run on a call's arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nos.errors import InvalidRequestError, InvalidTensorError, MethodNotFoundError
from nos.types import Media
from nos.wire.signature import bind, check_call, find_method
from nos.wire.v1 import models_pb2, values_pb2
from nos.wire.values import DTYPE_NUMBERS, write_arguments


def tensor_of(dtype: str = "", *shape: str | int) -> models_pb2.Type:
    dimensions = [
        models_pb2.Dimension(name=size)
        if isinstance(size, str)
        else models_pb2.Dimension(size=size)
        for size in shape
    ]
    return models_pb2.Type(
        kind=models_pb2.TYPE_KIND_TENSOR,
        dtype=DTYPE_NUMBERS[dtype] if dtype else values_pb2.DTYPE_UNSPECIFIED,
        has_shape=bool(shape),
        shape=dimensions,
    )


def plain(name: str, **more: Any) -> models_pb2.Type:
    return models_pb2.Type(kind=models_pb2.TypeKind.Value(f"TYPE_KIND_{name}"), **more)


def method(*parameters: models_pb2.Parameter | tuple[str, models_pb2.Type]) -> models_pb2.Method:
    return models_pb2.Method(
        name="__call__",
        parameters=[
            item
            if isinstance(item, models_pb2.Parameter)
            else models_pb2.Parameter(name=item[0], type=item[1])
            for item in parameters
        ],
    )


def check(target: models_pb2.Method, *args: Any, **kwargs: Any) -> None:
    nodes, _ = write_arguments([*(("", value) for value in args), *kwargs.items()])
    check_call(target, nodes)


IMAGES = method(("x", tensor_of("float32", "batch", 3, 4, 4)), ("mask", tensor_of("", "batch")))

FITTING = [
    (tensor_of(), np.zeros((2, 3))),
    (tensor_of("float32", "n", 3), np.zeros((7, 3), np.float32)),
    (tensor_of("", "...", 3), np.zeros((1, 2, 3))),
    (tensor_of("", "...", 3), np.zeros(3)),
    (tensor_of("uint8"), Media("image/png", b"png")),
    (plain("IMAGE"), np.zeros((4, 5, 3), np.uint8)),
    (plain("IMAGE"), np.zeros((4, 5), np.uint8)),
    (plain("IMAGE"), Media("image/jpeg", b"jpeg")),
    (plain("TEXT"), "a"),
    (plain("BYTES"), b"a"),
    (plain("INTEGER"), 3),
    (plain("REAL"), 3),
    (plain("REAL"), 3.5),
    (plain("FLAG"), True),
    (plain("LIST", item=plain("TEXT")), ["a", "b"]),
    (plain("LIST", item=plain("TEXT")), ("a",)),
    (plain("DICT", item=plain("REAL")), {"a": 1}),
    (plain("TEXT", is_optional=True), None),
    (plain("UNSPECIFIED"), {"a": [1, None, np.zeros(2)]}),
]


@pytest.mark.parametrize(("kind", "value"), FITTING)
def test_a_fitting_value_passes(kind: models_pb2.Type, value: Any) -> None:
    check(method(("x", kind)), value)


UNFIT = [
    (tensor_of("float32"), np.zeros(3), "expected float32, got float64"),
    (tensor_of("float32"), np.zeros(3, int), "expected float32, got int64"),
    (tensor_of("float32"), Media("image/png", b"png"), "float32 tensor, got image/png"),
    (
        tensor_of("", "batch", 3, 224, 224),
        np.zeros((3, 224)),
        "expected (batch, 3, 224, 224), got (3, 224)",
    ),
    (tensor_of("", "...", 3), np.zeros((3, 4)), "expected (..., 3), got (3, 4)"),
    (tensor_of(), [1.0, 2.0], "expected tensor, got a list of 2. Make it an array first"),
    (plain("IMAGE"), np.zeros((4, 5, 4), np.uint8), "got uint8 of shape (4, 5, 4)"),
    (plain("IMAGE"), np.zeros((4, 5, 3)), "got float64 of shape (4, 5, 3)"),
    (plain("IMAGE"), b"jpeg", "JPEG, PNG"),
    (plain("TEXT"), 3, "expected text, got int 3"),
    (plain("INTEGER"), 3.5, "expected whole number, got float 3.5"),
    (plain("INTEGER"), True, "expected whole number, got bool True"),
    (plain("REAL"), True, "expected number, got bool True"),
    (plain("FLAG"), 1, "expected truth value, got int 1"),
    (plain("LIST", item=plain("TEXT")), ["a", 1], "argument 'x[1]' does not fit"),
    (plain("LIST"), "a", "expected list, got text 'a'"),
    (plain("DICT", item=plain("REAL")), {"a": "b"}, "\"x['a']\" does not fit"),
    (plain("TEXT"), None, "expected text, got None"),
    (plain("TEXT", choices=[values_pb2.Value(text="a")]), "b", "expected one of 'a', got text 'b'"),
]


@pytest.mark.accept("A11")
@pytest.mark.parametrize(("kind", "value", "text"), UNFIT)
def test_an_unfit_value_is_refused_with_both_facts(
    kind: models_pb2.Type, value: Any, text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(method(("x", kind)), value)
    assert text in str(caught.value)
    assert caught.value.field.startswith("x")
    assert len(str(caught.value)) < 500


def test_a_named_dimension_has_one_size_in_a_call() -> None:
    check(IMAGES, np.zeros((2, 3, 4, 4), np.float32), np.zeros(2))
    with pytest.raises(
        InvalidTensorError, match=r"'mask' disagrees with 'x' about 'batch'.* 2, got 3"
    ):
        check(IMAGES, np.zeros((2, 3, 4, 4), np.float32), mask=np.zeros(3))


@pytest.mark.accept("A11")
@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "misses 'x', 'mask'"),
        ((1,), {}, "misses 'mask'"),
        ((1, 2, 3), {}, "takes 2 arguments by position, but more were given"),
        ((1, 2), {"x": 3}, "got 'x' twice"),
        ((1, 2), {"y": 3}, "has no parameter 'y'"),
    ],
)
def test_bind_refuses_what_python_would(
    args: tuple[int, ...], kwargs: dict[str, int], text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        bind(IMAGES, args, kwargs)
    assert text in str(caught.value)
    assert "__call__(x, mask)" in str(caught.value)


def test_bind_names_positional_arguments() -> None:
    assert bind(IMAGES, (1,), {"mask": 2}) == [("x", 1), ("mask", 2)]


def test_bind_keeps_positions_where_varargs_take_some() -> None:
    target = method(
        ("x", plain("REAL")),
        models_pb2.Parameter(name="rest", is_variadic=True),
        models_pb2.Parameter(name="more", is_keywords=True),
    )
    assert bind(target, (1, 2, 3), {"k": 4}) == [("", 1), ("", 2), ("", 3), ("k", 4)]


def test_bind_makes_numbers_of_numpy_scalars_where_numbers_are_wanted() -> None:
    target = method(("n", plain("INTEGER")), ("x", tensor_of()))
    n, x = (value for _, value in bind(target, (np.int64(3), np.float32(1)), {}))
    assert type(n) is int
    assert type(x) is np.float32


def test_a_default_may_be_left_out_and_none_may_be_given_where_it_is_none() -> None:
    target = method(
        models_pb2.Parameter(name="x", type=plain("REAL"), has_default=True, default_text="None")
    )
    check(target)
    check(target, None)


def test_position_after_name_is_refused() -> None:
    nodes = [
        values_pb2.Argument(name="x", value=values_pb2.Value(integer=1)),
        values_pb2.Argument(value=values_pb2.Value(integer=1)),
    ]
    with pytest.raises(InvalidRequestError, match="by position after one by name"):
        check_call(IMAGES, nodes)


@pytest.mark.accept("A12")
@pytest.mark.parametrize("name", ["_secret", "missing", "__init__"])
def test_an_unknown_or_private_method_is_not_found_and_the_public_ones_are_told(name: str) -> None:
    spec = models_pb2.ModelSpec(name="m", methods=[IMAGES, models_pb2.Method(name="embed")])
    with pytest.raises(MethodNotFoundError, match="expected one of __call__, embed"):
        find_method(spec, name)
    assert find_method(spec, "").name == "__call__"


def test_messages_stay_short_whatever_comes() -> None:
    target = method(*((f"parameter_{index}" * 9, plain("TEXT")) for index in range(50)))
    with pytest.raises(InvalidRequestError) as caught:
        bind(target, (), {"k" * 10_000: 1})
    assert len(str(caught.value)) < 500
    with pytest.raises(InvalidRequestError) as caught:
        check(method(("x" * 400, plain("REAL"))), "y" * 100_000)
    assert len(str(caught.value)) < 500
