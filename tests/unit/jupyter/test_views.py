"""What results look like, in HTML and in text."""

from __future__ import annotations

import io

import numpy as np
import pytest
from nos.types import Device, ModelMemory, Worker
from nos_jupyter import views
from PIL import Image

NASTY = "<script>alert('x')</script>"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes_are_told_in_powers_of_1024(count: int, text: str) -> None:
    assert views.format_bytes(count) == text


@pytest.mark.parametrize(
    "view",
    [
        views.Message(NASTY),
        views.Preformatted(NASTY),
        views.Table((NASTY,), ((NASTY,),), NASTY),
        views.RunResult(NASTY, NASTY, 0.1),
        views.RunResult("m", {NASTY: NASTY}, 0.1),
        views.Memory(
            (Worker(name=NASTY, address=NASTY, pid=1, device=Device(name=NASTY, product=NASTY)),)
        ),
    ],
)
def test_no_text_becomes_markup(view: views.Message) -> None:
    assert "<script" not in view._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("shape", [(9, 11), (9, 11, 1), (9, 11, 3), (9, 11, 4)])
def test_pixels_are_shown_as_the_same_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    shown = np.asarray(Image.open(io.BytesIO(views.value_bundle(pixels)["image/png"])))
    np.testing.assert_array_equal(shown.reshape(shape), pixels)


def test_an_array_says_its_type_and_shape() -> None:
    text = views.value_bundle(np.zeros((2, 300), np.float32))["text/plain"]
    assert text.startswith("float32 (2, 300)\n")
    assert len(text) < 200


def test_numbers_by_name_are_a_table() -> None:
    text = views.value_bundle({"seven": 0.987654321, "nine": 0.01})["text/plain"]
    assert text.splitlines() == ["name   value", "seven  0.987654", "nine   0.01"]


def test_sound_is_a_player_and_other_bytes_are_counted() -> None:
    sound = views.value_bundle(b"RIFF\x24\0\0\0WAVEfmt " + bytes(200))
    assert sound["text/plain"] == "audio/wav, 216 bytes"
    assert sound["text/html"].startswith('<audio controls src="data:audio/wav;base64,')
    assert views.value_bundle(bytes(3 << 20)) == {"text/plain": "3145728 bytes"}
    assert views.value_bundle(b"abc") == {"text/plain": "b'abc'"}


def test_a_result_says_how_long_it_took() -> None:
    bundle = views.RunResult("nos/echo", "hello", 0.0123)._repr_mimebundle_()
    assert bundle["text/plain"] == "hello\nnos/echo: 12.3 ms"


def test_memory_says_what_no_model_explains() -> None:
    device = Device(
        name="cpu",
        product="a chip",
        capacity_bytes=1024,
        used_bytes=100,
        models=(ModelMemory(model="a", device_bytes=30),),
    )
    memory = views.Memory((Worker(name="w0", address="127.0.0.1:1", pid=1, device=device),))
    assert memory._repr_mimebundle_()["text/plain"].splitlines() == [
        "device  memory",
        "cpu     100 B of 1.0 KiB  a chip",
        "        30 B              a",
        "        70 B              contexts, activations",
    ]
