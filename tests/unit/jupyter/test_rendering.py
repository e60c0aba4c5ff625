"""How pages show values, and how live frames travel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nos import Result
from nos.errors import InvalidRequestError, LimitExceededError, ModelError, OverloadedError
from nos.types import Media, MethodInfo, ModelSpec, ParameterInfo
from nos_jupyter import desk, frames, page
from nos_jupyter.desk import Uploads
from nos_jupyter.rendering import render

PIXELS = np.zeros((12, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (PIXELS, "pixels"),
        (Media("image/png", b"x"), "image"),
        (np.array([0.25, 0.75], np.float32), "scores"),
        (np.array([[0.25, 0.75]], np.float32), "scores"),
        (np.array([0.25, 0.5], np.float32), "array"),
        (np.array([[0.5, 0.5], [0.5, 0.5]], np.float32), "array"),
        (np.array([np.nan, 1.0]), "array"),
        (np.array(3), "text"),
        (np.array([], np.float32), "array"),
        ({"cat": 0.9, "dog": 0.1}, "scores"),
        ({"cat": float("nan")}, "table"),
        ({"cat": 1, "name": "x"}, "table"),
        ([{"label": "cat", "score": 0.5}], "table"),
        ({"boxes": np.zeros(4)}, "json"),
        ("hello", "text"),
        ([1, [2]], "json"),
        (None, "json"),
        (b"abc", "json"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "audio"),
        (b"RIFF\x24\0\0\0AVI LIST", "json"),
        (b"OggS", "audio"),
        ({"boxes": np.zeros((2, 4)), "labels": ["a", "b"]}, "overlay"),
        ({"masks": np.zeros((2, 3, 4), bool), "scores": [0.5, 0.25]}, "overlay"),
        ({"boxes": np.zeros((2, 4)), "labels": ["a"]}, "json"),
        ({"boxes": np.full((1, 4), np.nan)}, "json"),
        ({"boxes": np.zeros((2, 4)), "masks": np.zeros((3, 3, 4), bool)}, "json"),
        ({"boxes": [[0, 0, 1, 1], [0]]}, "json"),
        ({"boxes": np.zeros((1000, 4))}, "json"),
        ({"boxes": []}, "overlay"),
        ([{"label": "cat", "box": {"xmin": 0, "ymin": 1, "xmax": 2, "ymax": 3}}], "overlay"),
        ([{"label": "cat", "box": {"xmin": "left", "ymin": 1, "xmax": 2, "ymax": 3}}], "json"),
    ],
)
def test_each_value_has_its_form(value: Any, kind: str) -> None:
    assert render(value).view["kind"] == kind


def test_pixels_travel_as_rows() -> None:
    rendered = render(PIXELS[:, ::-1])
    assert rendered.view["shape"] == [12, 16, 3]
    assert len(rendered.data) == 12 * 16 * 3


def test_what_was_found_travels_as_corners_names_and_pixels() -> None:
    masks = np.zeros((1, 2, 3), np.uint8)
    masks[0, 1, 2] = 200
    rendered = render({"boxes": [[1, 2, 3, 4]], "masks": masks, "labels": [7], "scores": [0.5]})
    assert rendered.view == {
        "kind": "overlay",
        "boxes": [[1.0, 2.0, 3.0, 4.0]],
        "masks": [1, 2, 3],
        "labels": ["7"],
        "scores": [0.5],
    }
    assert rendered.data == b"\0\0\0\0\0\1"


def test_a_frame_splits_as_it_was_joined() -> None:
    assert frames.unpack(frames.pack({"seq": 7}, b"abc")) == ({"seq": 7}, b"abc")


@pytest.mark.parametrize(
    "message", [b"", b"\1\0", b"\xff\xff\xff\xff{}", b"\2\0\0\0[]", b"\2\0\0\0no", b"\5\0\0\0{}"]
)
def test_what_is_no_frame_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        frames.unpack(message)


def test_a_frame_ends_in_a_result_a_drop_or_a_failure() -> None:
    good, payload = frames.answer(Result(seq=1, _value=PIXELS), 5)
    assert good["seq"] == 5
    assert len(payload) == PIXELS.nbytes
    assert frames.answer(Result(seq=1, error=OverloadedError("dropped")), 5)[0] == {
        "seq": 5,
        "dropped": True,
    }
    failed, _ = frames.answer(Result(seq=1, error=ModelError("it raised", "ValueError")), 5)
    assert failed["failure"]["name"] == "ModelError"


def test_only_methods_that_take_an_image_take_frames() -> None:
    spec = ModelSpec(name="a/b", version=1)
    text = ParameterInfo(name="text", kind="text")
    image = ParameterInfo(name="image", kind="image")
    good = MethodInfo(name="__call__", parameters=(text, image))
    assert frames.image_parameter(spec, good) == "image"
    for method in (
        MethodInfo(name="__call__", parameters=(text,)),
        MethodInfo(name="__call__", parameters=(image,), is_generator=True),
    ):
        with pytest.raises(InvalidRequestError):
            frames.image_parameter(spec, method)


def test_uploads_are_joined_in_order_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads()
    for piece in (b"ab", b"cd"):
        uploads.add("one", piece)
    assert uploads.take(["one", "none"]) == [b"abcd", b""]
    monkeypatch.setattr(desk, "MAX_UPLOAD_BYTES", 3)
    uploads.add("two", b"abc")
    with pytest.raises(LimitExceededError):
        uploads.add("three", b"d")
    assert uploads.take(["two"]) == [b""]


def test_a_page_gets_one_module_without_imports_and_with_one_export() -> None:
    code = page.script("page", "memory_profile")
    lines = code.splitlines()
    assert not [line for line in lines if line.startswith("import ")]
    assert [line for line in lines if line.startswith("export ")] == ["export default () => {"]
