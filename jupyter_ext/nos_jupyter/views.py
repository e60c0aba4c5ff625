"""What the magics show: plain values with an HTML and a text form; they survive saving and dead kernels.

Everything that came from a server or a user is escaped: a model's name is not markup.
"""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

if TYPE_CHECKING:
    from nos.types import Device, Worker

MIN_IMAGE_SIDE, MAX_IMAGE_SIDE = 8, 2048
_KIB = 1024
_SHOWN_RESULTS = 10
_BRIEF_TEXT = 100
_PLANE = 2
#: Sound that a saved notebook holds.
_MAX_SOUND_BYTES = 2 << 20
#: First bytes of files of sound; those of RIFF say further on what they are.
_SOUNDS = {b"OggS": "audio/ogg", b"fLaC": "audio/flac", b"ID3": "audio/mpeg"}
#: PNG's colour type by number of channels.
_COLOR_TYPES = {1: 0, 3: 2, 4: 6}
#: What uses a device beside the models' weights.
OTHER = "contexts, activations"
_CELL = "padding:2px 12px 2px 0;text-align:left;border:0;vertical-align:top"

MimeBundle = dict[str, Any]


def format_bytes(count: float) -> str:
    """Return a number of bytes for a person, in powers of 1024."""
    if count < _KIB:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= _KIB
        if count < _KIB:
            return f"{count:.1f} {unit}"
    return f"{count / _KIB:.1f} TiB"


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML; the cells are text and get escaped."""
    head = "".join(f'<th style="{_CELL};opacity:.7">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<table style="border-collapse:collapse;margin:0"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in aligned columns."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


@dataclass(frozen=True, slots=True)
class Message:
    """A sentence."""

    text: str

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        return {"text/plain": self.text, "text/html": f"<span>{escape(self.text)}</span>"}


@dataclass(frozen=True, slots=True)
class Link:
    """The address of a page."""

    url: str

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        if urlsplit(self.url).scheme not in ("http", "https"):
            return Message(self.url)._repr_mimebundle_()
        url = escape(self.url, quote=True)
        html = f'<a href="{url}" target="_blank" rel="noopener noreferrer">{url}</a>'
        return {"text/plain": self.url, "text/html": html}


@dataclass(frozen=True, slots=True)
class Preformatted:
    """Lines of text whose spaces count."""

    text: str

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        return {"text/plain": self.text, "text/html": f"<pre>{escape(self.text)}</pre>"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        text = table_text(self.header, self.rows)
        html = table_html(self.header, self.rows)
        if self.caption:
            text = f"{self.caption}\n{text}"
            html = f'<div style="margin-bottom:4px">{escape(self.caption)}</div>{html}'
        return {"text/plain": text, "text/html": html}


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory by model, at one moment."""

    workers: tuple[Worker, ...]

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        for device in (worker.device for worker in self.workers):
            total = f"{format_bytes(device.used_bytes)} of {format_bytes(device.capacity_bytes)}"
            yield device.name, total, device.product
            for part in device.models:
                if part.device_bytes:
                    yield "", format_bytes(part.device_bytes), part.model
            if other_bytes(device):
                yield "", format_bytes(other_bytes(device)), OTHER

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        if not self.workers:
            return Message("no device: no worker has joined yet")._repr_mimebundle_()
        table = Table(("device", "memory", ""), tuple(self._rows()))
        return table._repr_mimebundle_()


def other_bytes(device: Device) -> int:
    """Return the bytes in use that are no model's weights."""
    return max(0, device.used_bytes - sum(part.device_bytes for part in device.models))


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a model gave, and how long that took."""

    model: str
    value: Any
    total_s: float
    """From the call until the value was here."""

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        note = f"{self.model}: {self.total_s * 1e3:.1f} ms"
        bundle = dict(value_bundle(self.value))
        html = bundle.get("text/html") or f"<pre>{escape(bundle['text/plain'])}</pre>"
        for mime_type in ("image/png", "image/jpeg"):
            if mime_type in bundle:
                # Inside the HTML, so that the note stands under the picture.
                content = b64encode(bundle[mime_type]).decode()
                html = f'<img alt="result" src="data:{mime_type};base64,{content}">'
        small = f'<div style="opacity:.7;font-size:smaller">{escape(note)}</div>'
        return {"text/plain": f"{bundle['text/plain']}\n{note}", "text/html": html + small}


@dataclass(frozen=True, slots=True)
class MapResult:
    """What a model gave for each item, and how long that took."""

    model: str
    values: list[Any]
    total_s: float
    """From the first call until the last value was here."""

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        rate = len(self.values) / max(self.total_s, 1e-9)
        note = f"{self.model}: {len(self.values)} results in {self.total_s:.2f} s, {rate:.0f} per s"
        rows = [
            (str(index), _brief(value)) for index, value in enumerate(self.values[:_SHOWN_RESULTS])
        ]
        more = len(self.values) - len(rows)
        if more:
            rows.append(("", f"and {more} more"))
        return Table(("", "result"), tuple(rows), note)._repr_mimebundle_()


def value_bundle(value: Any) -> MimeBundle:
    """Return a value's forms: images and sound as such, named numbers as a table, arrays with their shape."""
    if hasattr(value, "_repr_mimebundle_"):
        return dict(value._repr_mimebundle_())
    if isinstance(value, np.ndarray):
        return _array_bundle(value)
    if isinstance(value, Mapping) and value and all(_is_plain(item) for item in value.values()):
        table = Table(("name", "value"), tuple((str(k), _short(v)) for k, v in value.items()))
        return table._repr_mimebundle_()
    if isinstance(value, bytes) and len(value) > _BRIEF_TEXT:
        return _bytes_bundle(value)
    return {"text/plain": value if isinstance(value, str) else repr(value)}


def sound_type(data: bytes) -> str:
    """Return the type of a file of sound; nothing for other bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "audio/wav"
    return next((kind for magic, kind in _SOUNDS.items() if data.startswith(magic)), "")


def _bytes_bundle(data: bytes) -> MimeBundle:
    kind = sound_type(data)
    text = ", ".join(filter(None, (kind, f"{len(data)} bytes")))
    bundle: MimeBundle = {"text/plain": text}
    if kind and len(data) <= _MAX_SOUND_BYTES:
        source = f"data:{kind};base64,{b64encode(data).decode()}"
        bundle["text/html"] = f'<audio controls src="{source}"></audio><div>{escape(text)}</div>'
    return bundle


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) or value is None


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size > 1:
        return f"{value.dtype} array {value.shape}"
    text = repr(value.item() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= _BRIEF_TEXT else f"{text[:_BRIEF_TEXT]}…"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _array_bundle(array: np.ndarray[Any, Any]) -> MimeBundle:
    preview = np.array2string(array, threshold=20, edgeitems=3, precision=4)
    bundle: MimeBundle = {"text/plain": f"{array.dtype} {array.shape}\n{preview}"}
    if is_image(array):
        bundle["image/png"] = encode_png(array)
    return bundle


def is_image(array: np.ndarray[Any, Any], most: int = MAX_IMAGE_SIDE) -> bool:
    """Say whether an array is shown as a picture: uint8, (height, width) or with 1, 3 or 4 channels.

    Args:
        array: What may be one.
        most: Its longest side.
    """
    if array.dtype != np.uint8 or array.ndim < _PLANE:
        return False
    is_pixels = array.shape[2:] == () or array.shape[2:] in {(n,) for n in _COLOR_TYPES}
    return is_pixels and MIN_IMAGE_SIDE <= min(array.shape[:2]) <= max(array.shape[:2]) <= most


def without_traceback(text: str) -> str:
    """Return a message without the traceback in it: how it begins, and what was raised."""
    first, *others = text.strip().rstrip(".").splitlines()
    return f"{first.partition(':')[0]}: {others[-1].strip()}" if others else first


def encode_png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Encode pixels, uint8 and (height, width) or (height, width, 1 | 3 | 4), without an image library."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == _PLANE else pixels.shape[2]
    rows = np.ascontiguousarray(pixels).reshape(height, width * channels)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), 6)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", body)
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
