"""Encoded images to pixels, within limits: a small file can hold an image of any size."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos_backend.executor.failures import RefusedError
from nos_backend.executor.process import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    import PIL.Image

MAX_SIDE: Final = 16_384
MAX_RATIO: Final = 100
#: Images that decode to less are not measured by their ratio: a plain one-colour picture is no attack.
RATIO_FROM_BYTES: Final = 64 << 20
_RGB_BYTES: Final = 3
_SIXTEEN_BITS: Final = 65_535

_BROKEN: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)


def decode(data: bytes, where: str, max_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image:
    """Return the decoded image, its first frame if it moves; its header is checked first.

    Raises:
        RefusedError: INVALID_TENSOR if it is no JPEG or PNG, truncated or broken; LIMIT_EXCEEDED if it is
            over `max_pixels`, 16384 pixels a side, or decodes to over 100 times its size.
    """
    from PIL import Image, UnidentifiedImageError  # only models that take images pay for it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG"])
            _check_size(image.width, image.height, len(data), where, max_pixels)
            image.load()
    except UnidentifiedImageError as error:
        raise RefusedError(
            "INVALID_TENSOR", "not an image", where, "JPEG or PNG", f"bytes starting {data[:8]!r}"
        ) from error
    except Image.DecompressionBombError as error:
        raise RefusedError(
            "LIMIT_EXCEEDED", "the image is too large", where, f"at most {max_pixels} pixels"
        ) from error
    except _BROKEN as error:
        raise RefusedError(
            "INVALID_TENSOR", "the image is truncated or broken", where, got=str(error)[:200]
        ) from error
    return image


def pixels(image: PIL.Image.Image) -> np.ndarray[Any, Any]:
    """Return uint8 (height, width, 3), writable; 16-bit grey is scaled, transparency dropped."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, _SIXTEEN_BITS) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], _RGB_BYTES, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(
    width: int, height: int, encoded_bytes: int, where: str, max_pixels: int = MAX_IMAGE_PIXELS
) -> None:
    got = f"{width} x {height}"
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise RefusedError(
            "LIMIT_EXCEEDED",
            "the image is too large",
            where,
            f"at most {max_pixels} pixels and {MAX_SIDE} a side",
            got,
        )
    decoded = width * height * _RGB_BYTES
    if decoded > RATIO_FROM_BYTES and decoded > MAX_RATIO * encoded_bytes:
        raise RefusedError(
            "LIMIT_EXCEEDED",
            "the image decodes to too many bytes for its size",
            where,
            f"at most {MAX_RATIO} times its {encoded_bytes} bytes",
            f"{got}: {decoded} bytes",
        )
