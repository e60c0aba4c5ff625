from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from nos_backend.executor import images
from nos_backend.executor.failures import RefusedError


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG of that size, all of it black."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(64))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = PIL.Image.new("RGB", (4, 2), (255, 255, 255)).convert(mode)
    array = images.pixels(images.decode(encoded(image), "x"))
    assert array.shape == (2, 4, 3)
    assert array.dtype == np.uint8
    assert (array == 255).all()


def test_sixteen_bit_grey_is_scaled() -> None:
    image = PIL.Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    array = images.pixels(images.decode(encoded(image), "x"))
    assert array[0, :, 0].tolist() == [0, 0x80, 0xFF]


def test_cmyk_jpeg_is_decoded() -> None:
    image = PIL.Image.new("CMYK", (8, 8))
    assert images.pixels(images.decode(encoded(image, "JPEG"), "x")).shape == (8, 8, 3)


@pytest.mark.accept("F7")
@pytest.mark.parametrize(
    ("width", "height"),
    [(16_385, 1), (1, 16_385), (10_000, 5_001), (16_000, 16_000), (7_000, 7_000)],
)
def test_an_image_that_grows_too_much_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(RefusedError, match="LIMIT_EXCEEDED"):
        images.decode(bomb(width, height), "x")


@pytest.mark.accept("F7")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"\x89PNG\r\n\x1a\n",
        bomb(100, 100),
        encoded(PIL.Image.effect_noise((99, 99), 50))[:2000],
        encoded(PIL.Image.effect_noise((99, 99), 50).convert("RGB"), "JPEG")[:1000],
        encoded(PIL.Image.new("RGB", (4, 4)), "BMP"),
        encoded(PIL.Image.new("RGB", (4, 4)), "GIF"),
    ],
)
def test_what_is_no_whole_image_is_refused(data: bytes) -> None:
    with pytest.raises(RefusedError, match="INVALID_TENSOR"):
        images.decode(data, "x")
