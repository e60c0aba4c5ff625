"""Forms made from signatures, and arguments made from what a page sends."""

from __future__ import annotations

import numpy as np
import pytest
from nos.errors import InvalidRequestError, InvalidTensorError
from nos.types import MethodInfo, ParameterInfo
from nos_jupyter.forms import arguments, method_form

DOC = """Return scores.

Args:
    images: Grey levels from 0.0 (paper) to 16.0 (ink), shape (..., 8, 8).
"""
IMAGES = ParameterInfo(name="images", kind="tensor", dtype="float32", shape=("*batch", 8, 8))


def method(*parameters: ParameterInfo) -> MethodInfo:
    return MethodInfo(name="__call__", doc=DOC, parameters=parameters)


@pytest.mark.parametrize(
    ("parameter", "control"),
    [
        (IMAGES, "drawing"),
        (
            ParameterInfo(name="x", kind="tensor", dtype="float32", shape=("b", 1, 28, 28)),
            "drawing",
        ),
        (ParameterInfo(name="x", kind="tensor", dtype="float32", shape=("b", 3, 8, 8)), "json"),
        (ParameterInfo(name="x", kind="tensor", shape=("b", 3)), "json"),
        (ParameterInfo(name="x", kind="tensor", shape=(4,)), "json"),
        (ParameterInfo(name="x", kind="tensor", shape=(224, 224)), "json"),
        (ParameterInfo(name="x", kind="image"), "image"),
        (ParameterInfo(name="x", kind="text"), "text"),
        (ParameterInfo(name="x", kind="list", item_kind="text"), "lines"),
        (ParameterInfo(name="x", kind="list", item_kind="image"), "json"),
        (ParameterInfo(name="x", kind="integer"), "integer"),
        (ParameterInfo(name="x", kind="flag"), "flag"),
        (ParameterInfo(name="x", kind="text", choices=("fast", "exact")), "choice"),
        (ParameterInfo(name="x", kind="bytes"), "file"),
        (ParameterInfo(name="x"), "json"),
    ],
)
def test_each_type_has_its_control(parameter: ParameterInfo, control: str) -> None:
    (form,) = method_form(method(parameter))["parameters"]
    assert form["control"] == control


def test_the_range_of_a_drawing_is_read_from_the_docstring() -> None:
    (form,) = method_form(method(IMAGES))["parameters"]
    assert (form["paper"], form["ink"], form["height"], form["width"]) == (0.0, 16.0, 8, 8)


def test_parameters_without_a_name_of_their_own_have_no_control() -> None:
    parameters = (
        ParameterInfo(name="values", is_variadic=True),
        ParameterInfo(name="named", is_keywords=True),
    )
    assert method_form(method(*parameters))["parameters"] == []


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(("*batch", 8, 8), (8, 8)), (("batch", 8, 8), (1, 8, 8)), (("batch", 1, 8, 8), (1, 1, 8, 8))],
)
def test_a_drawing_becomes_a_tensor_of_the_declared_shape(
    shape: tuple[int | str, ...], expected: tuple[int, ...]
) -> None:
    parameter = ParameterInfo(name="images", kind="tensor", dtype="float64", shape=shape)
    drawn = np.arange(64, dtype=np.float32).tobytes()
    entry = {"buffer": 0, "as": "pixels"}
    tensor = arguments(method(parameter), {"images": entry}, [drawn])["images"]
    assert tensor.shape == expected
    assert tensor.dtype == np.float64
    assert tensor.reshape(-1)[63] == 63


def test_json_becomes_a_tensor_where_one_is_wanted() -> None:
    parameter = ParameterInfo(name="x", kind="tensor", dtype="int64")
    found = arguments(method(parameter), {"x": {"text": "[[1, 2], [3, 4]]"}}, [])
    assert found["x"].dtype == np.int64
    assert found["x"].shape == (2, 2)


@pytest.mark.parametrize("text", ["[1, 2", "[[1], [2, 3]]", '"a"'])
def test_what_is_no_tensor_is_refused_by_name(text: str) -> None:
    parameter = ParameterInfo(name="x", kind="tensor", dtype="float32", wants="float32 tensor")
    with pytest.raises(InvalidRequestError) as caught:
        arguments(method(parameter), {"x": {"text": text}}, [])
    assert caught.value.field == "x"


def test_text_that_is_no_json_is_text_where_anything_goes() -> None:
    parameter = ParameterInfo(name="x")
    assert arguments(method(parameter), {"x": {"text": "hello"}}, []) == {"x": "hello"}


def test_bytes_that_are_no_image_are_refused() -> None:
    parameter = ParameterInfo(name="x", kind="image")
    with pytest.raises(InvalidTensorError):
        arguments(method(parameter), {"x": {"buffer": 0, "as": "media"}}, [b"hello"])


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="y"):
        arguments(method(IMAGES), {"y": {"value": 1}}, [])
