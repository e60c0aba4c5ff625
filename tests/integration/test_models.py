"""The built-in models on a real server."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from nos.errors import InvalidRequestError, InvalidTensorError
from nos.types import Media
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
REFERENCE = Path(__file__).parent.parent / "unit" / "hub" / "minilm_reference.npz"
DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128", ml_dtypes.bfloat16),
]
SHAPES = [(), (0,), (3, 0, 2), (5,), (2, 3, 4), (1, 2, 1, 2, 1, 2, 1, 2)]


def image_file(kind: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def test_built_in_models_are_listed(client):
    names = {info.name for info in client.models()}
    assert {"nos/digits", "nos/echo", "nos/edges", MINILM} <= names


def test_digits_reads_held_out_writing(client):
    digits = load_digits()
    images = digits.images.astype(np.float32)
    _, held_out, _, labels = train_test_split(images, digits.target, test_size=500, random_state=0)
    answers = client.model("nos/digits").labels(held_out)
    assert (answers == labels).mean() >= 0.97


def test_digits_takes_one_image_as_well_as_many(client):
    digits = client.model("nos/digits")
    images = load_digits().images[:3].astype(np.float32)
    assert digits(images[0]).shape == (10,)
    np.testing.assert_allclose(digits(images)[0], digits(images[0]), atol=1e-6)


@pytest.mark.accept("A11")
@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.zeros((8, 8)), ["images", "float32", "float64"]),
        (np.zeros((2, 8, 9), np.float32), ["images", "8", "9"]),
        (np.zeros(8, np.float32), ["images", "8"]),
        ("text", ["images", "text"]),
    ],
)
def test_digits_refuses_what_is_no_image(client, images, named):
    with pytest.raises(InvalidRequestError) as caught:
        client.model("nos/digits")(images)
    message = str(caught.value)
    assert all(word in message for word in named)
    assert len(message) < 500


def test_minilm_equals_the_reference_library(client):
    reference = np.load(REFERENCE)
    vectors = client.model(MINILM).encode([str(text) for text in reference["sentences"]])
    np.testing.assert_allclose(vectors, reference["vectors"], atol=1e-4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (31, 17), (640, 480)])
def test_edges_takes_files_of_any_size(client, kind, size):
    edges = client.model("nos/edges")(Media.from_bytes(image_file(kind, size)))
    assert edges.dtype == np.uint8
    assert edges.shape == (size[1], size[0])


def test_edges_of_an_array_are_those_of_its_file(client):
    edges = client.model("nos/edges")
    file = image_file("PNG", (64, 48))
    array = np.asarray(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(edges(array), edges(Media.from_bytes(file)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [20, 0.5, 0.99])
def test_edges_refuses_a_truncated_file(client, kind, keep):
    file = image_file(kind, (64, 48))
    part = file[: keep if keep > 1 else int(len(file) * keep)]
    with pytest.raises(InvalidTensorError):
        client.model("nos/edges")(Media.from_bytes(part))


@pytest.mark.accept("A8")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_equal(client, dtype):
    echo = client.model("nos/echo")
    for shape in SHAPES:
        sent = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        back = echo(sent)
        assert back.dtype == sent.dtype
        np.testing.assert_array_equal(back, sent)


@pytest.mark.accept("A8")
def test_other_layouts_come_back_equal(client):
    echo = client.model("nos/echo")
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    for sent in (base[::2, ::-1], base.T, base.astype(">i4"), np.broadcast_to(base[0], (3, 6))):
        back = echo(sent)
        np.testing.assert_array_equal(back, sent)
        assert back.flags.writeable


@pytest.mark.accept("A8")
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**62),
        0.1,
        float("inf"),
        "grüße 東京 \0",
        "",
        b"\0\xff" * 10,
        [1, [2.5, "x"], []],
        {"a": [None, {"b": b"c"}], "": 1},
    ],
    ids=repr,
)
def test_plain_values_come_back_equal(client, value):
    back = client.model("nos/echo")(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.accept("A8")
def test_arrays_inside_containers_come_back_equal(client):
    sent = {"left": np.eye(3), "right": [np.zeros(0, np.uint8), "text"]}
    back = client.model("nos/echo")(sent)
    np.testing.assert_array_equal(back["left"], sent["left"])
    np.testing.assert_array_equal(back["right"][0], sent["right"][0])
    assert back["right"][1] == "text"


@pytest.mark.accept("A7")
@pytest.mark.timeout(600)
def test_no_frame_gets_another_ones_answer(client, accept):
    """32 streams at once; the digest of each frame's own bytes comes back."""
    num_streams, num_frames = 32, 3125 if accept.strict else 25
    echo, wrong = client.model("nos/echo"), []

    def stream_frames(seed: int) -> None:
        random = np.random.default_rng(seed)
        frames = [random.bytes(int(size)) for size in random.integers(1, 5000, num_frames)]
        with echo.stream("digest") as stream:
            for frame in frames:
                stream.send(frame)
            answers = [result.value for result in stream]
        expected = [hashlib.sha256(frame).hexdigest() for frame in frames]
        wrong.append(sum(left != right for left, right in zip(answers, expected, strict=True)))

    threads = [threading.Thread(target=stream_frames, args=(seed,)) for seed in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == num_streams
    accept.figure(sum(wrong), 0, f"mismatches in {num_streams * num_frames} frames")


def test_a_model_that_was_unloaded_is_loaded_by_its_next_call(client):
    edges, image = client.model("nos/edges"), np.zeros((4, 6, 3), np.uint8)
    for _ in range(3):
        assert edges(image).shape == (4, 6)
        client.unload("nos/edges")


def test_echo_counts(client):
    assert list(client.model("nos/echo").count(5)) == [0, 1, 2, 3, 4]
