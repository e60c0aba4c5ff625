from __future__ import annotations

import collections
import dataclasses
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nos_backend.executor.failures import NoWireFormError, RefusedError
from nos_backend.executor.messages import check_node
from nos_backend.executor.values import ANY, Inputs, Outputs, Want, want

CPU = torch.device("cpu")


def hop(value: Any, annotation: Any = Any) -> Any:
    """Write a value as a result is written, read it as an argument is read."""
    outputs = Outputs(value)
    check_node(outputs.node, outputs.size)
    block = memoryview(bytearray(outputs.size))
    outputs.copy_to(block)
    return Inputs(block, CPU).read(outputs.node, want(annotation), "x")


class Pair(NamedTuple):
    a: int
    b: int


@dataclasses.dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("annotation", "wanted"),
    [
        (torch.Tensor, Want("torch")),
        (Annotated[torch.Tensor, "float32", ("batch", 3)], Want("torch")),
        (torch.Tensor | None, Want("torch")),
        (str | np.ndarray, Want("numpy")),
        (npt.NDArray[np.uint8], Want("numpy")),
        (PIL.Image.Image, Want("image")),
        (list[torch.Tensor], Want("each", (Want("torch"),))),
        (tuple[torch.Tensor, ...], Want("each", (Want("torch"),))),
        (tuple[torch.Tensor, float], Want("each", (Want("torch"), Want("float")))),
        (dict[str, np.ndarray], Want("members", (Want("numpy"),))),
        (list, ANY),
        (str, ANY),
        (Any, ANY),
        ("anything", ANY),
    ],
)
def test_annotations_say_what_is_wanted(annotation: Any, wanted: Want) -> None:
    assert want(annotation) == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=20,
)


@given(json_values)
def test_structures_survive(value: Any) -> None:
    assert repr(hop(value)) == repr(value)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 4), (1,) * 8])
@pytest.mark.parametrize("name", ["bool", "uint16", "int64", "float16", "bfloat16", "complex128"])
def test_tensors_survive(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(getattr(torch, name))
    result = hop(tensor, torch.Tensor)
    assert result.dtype == tensor.dtype
    assert torch.equal(result, tensor)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4).T,
        np.arange(12)[::-2],
        np.arange(3, dtype=">i4"),
        np.float32(2.5),
        np.array([np.nan, np.inf]),
    ],
)
def test_arrays_of_any_layout_survive(array: Any) -> None:
    np.testing.assert_array_equal(hop(array), array)


def test_bytes_survive() -> None:
    assert hop(b"\x00raw") == b"\x00raw"
    assert hop(b"", bytes) == b""


def test_images_are_returned_as_pixels() -> None:
    assert hop(PIL.Image.new("RGB", (5, 3), (1, 2, 3))).shape == (3, 5, 3)
    assert hop(PIL.Image.new("1", (5, 3))).shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ("normalize()", 0, 1),
        ("normalize(mean=0.5, std=2)", 0.5, 2),
        ("normalize(std=(1, 2, 4), mean=0.25)", 0.25, [1, 2, 4]),
    ],
)
def test_pixels_are_normalized_as_their_annotation_says(said: str, mean: Any, std: Any) -> None:
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3) * 10
    found = hop(pixels, Annotated[torch.Tensor, "uint8[height, width, 3]", said])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (pixels / 255 - mean) / std, atol=1e-6)


def test_pixels_of_other_channels_than_their_means_are_refused() -> None:
    grey = np.zeros((2, 4, 1), np.uint8)
    with pytest.raises(RefusedError, match="wrong shape"):
        hop(grey, Annotated[torch.Tensor, "uint8", "normalize(mean=[0.1, 0.2])"])


def test_whole_numbers_become_floats_where_floats_are_wanted() -> None:
    assert isinstance(hop(3, float), float)
    assert hop(np.float64(3.5), float) == 3.5


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        Pair(1, 2),
        Point(1),
        {1: 2},
        2**63,
        "\ud800",
        np.array(["text"]),
        np.array([object()]),
        np.array(["2020-01-01"], "datetime64[D]"),
        torch.eye(2).to_sparse(),
        torch.zeros(1, dtype=torch.float8_e4m3fn),
        torch.zeros([1] * 9),
        [1, [2, {"a": {3}}]],
    ],
)
def test_what_has_no_wire_form_is_refused(value: Any) -> None:
    with pytest.raises(NoWireFormError, match="returned"):
        Outputs(value)


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NoWireFormError, match="nested"):
        Outputs(endless)


def test_too_many_numbers_outside_arrays_are_refused() -> None:
    with pytest.raises(RefusedError, match="LIMIT_EXCEEDED"):
        Outputs(list(range(300_000)))


def test_mappings_are_dicts() -> None:
    assert hop(collections.OrderedDict(a=1)) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("text", torch.Tensor),
        (1.5, np.ndarray),
        ([1, 2], torch.Tensor),
        (np.zeros((3, 4, 4), np.uint8), PIL.Image.Image),
        (np.zeros((3, 4)), PIL.Image.Image),
        ([np.zeros(3), "text"], list[torch.Tensor]),
    ],
)
def test_what_is_not_wanted_is_refused(value: Any, annotation: Any) -> None:
    with pytest.raises(RefusedError, match="INVALID_TENSOR"):
        hop(value, annotation)


def test_bools_that_are_none_are_refused() -> None:
    inputs = Inputs(memoryview(bytearray(b"\x00\x02")), CPU)
    with pytest.raises(RefusedError, match="bools"):
        inputs.read({"t": ["bool", [2], 0]}, ANY, "x")


def test_unaligned_arrays_are_read() -> None:
    block = memoryview(bytearray(3) + bytearray(np.arange(4.0).tobytes()))
    array = Inputs(block, CPU).read({"t": ["float64", [4], 3]}, ANY, "x")
    np.testing.assert_array_equal(array, np.arange(4.0))


@pytest.mark.parametrize("wanted", [Want("torch"), Want("numpy")])
def test_it_is_known_whether_a_view_is_kept(wanted: Want) -> None:
    inputs = Inputs(memoryview(bytearray(80)), CPU)
    value = inputs.read({"t": ["float64", [10], 0]}, wanted, "x")
    part = value[2:4]
    del value
    assert inputs.kept
    del part
    assert not inputs.kept
