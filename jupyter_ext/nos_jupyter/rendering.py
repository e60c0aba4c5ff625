"""How pages show values: by type, as a small description and the bytes that it needs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nos.errors import ModelError, NosError
from nos.types import Media

from nos_jupyter import views

#: The most classes that a chart of scores has.
MAX_SCORES = 1000
MAX_TEXT = 20_000
#: What pages scale their own pictures to.
MAX_PIXELS_SIDE = 4096
#: Things found in one picture that a page draws, and the bytes of their masks.
MAX_FOUND = 300
MAX_MASK_BYTES = 32 << 20
_TOLERANCE = 1e-3
_PLANE = 2
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A value as a page shows it."""

    view: dict[str, Any]
    """`kind` is `image`, `pixels`, `overlay`, `audio`, `scores`, `table`, `text`, `json` or `array`."""
    data: bytes = b""
    """Of an image or sound its file, of pixels their bytes in rows, of masks 0 or 1 for each pixel."""


def render(value: Any) -> Rendered:
    """Return how to show a value; never raises, whatever a model gave."""
    if isinstance(value, Media):
        return Rendered({"kind": "image", "mime_type": value.mime_type}, value.data)
    if isinstance(value, np.ndarray):
        return _render_array(value)
    if isinstance(value, str):
        return Rendered({"kind": "text", "text": _clip(value)})
    if isinstance(value, bytes) and (mime_type := views.sound_type(value)):
        return Rendered({"kind": "audio", "mime_type": mime_type}, value)
    if (found := _render_found(value)) is not None:
        return found
    if isinstance(value, Mapping) and value:
        if all(isinstance(item, float) and math.isfinite(item) for item in value.values()):
            return _scores([str(key) for key in value], [float(item) for item in value.values()])
        if all(isinstance(item, str | int | float | None) for item in value.values()):
            rows = [[str(key), str(item)] for key, item in value.items()]
            return Rendered({"kind": "table", "header": ["name", "value"], "rows": rows})
    if _is_records(value):
        header = list(value[0])
        rows = [[str(record.get(name, "")) for name in header] for record in value]
        return Rendered({"kind": "table", "header": header, "rows": rows})
    text = json.dumps(value, indent=1, ensure_ascii=False, default=_brief)
    return Rendered({"kind": "json", "text": _clip(text)})


def describe(error: NosError) -> dict[str, str]:
    """Return an error as pages show it: its class, a sentence, and the model's traceback if there is one."""
    traceback = error.remote_traceback if isinstance(error, ModelError) else ""
    return {
        "name": type(error).__name__,
        "sentence": views.without_traceback(str(error)),
        "traceback": traceback.strip("\n"),
    }


def _render_array(array: np.ndarray[Any, Any]) -> Rendered:
    if views.is_image(array, MAX_PIXELS_SIDE):
        pixels = np.ascontiguousarray(array)
        return Rendered({"kind": "pixels", "shape": list(array.shape)}, pixels.tobytes())
    flat = array.reshape(-1) if array.ndim and array.shape[-1] == array.size else None
    if flat is not None and 1 < flat.size <= MAX_SCORES and flat.dtype.kind == "f":
        scores = flat.astype(np.float64)
        if scores.min() >= 0 and abs(float(scores.sum()) - 1) < _TOLERANCE:
            return _scores([str(index) for index in range(flat.size)], scores.tolist())
    if array.ndim == 0:
        return Rendered({"kind": "text", "text": str(array.item())})
    preview = np.array2string(array, threshold=60, edgeitems=4, precision=4)
    title = f"{array.dtype} ({', '.join(map(str, array.shape))})"
    return Rendered({"kind": "array", "title": title, "text": _clip(preview)})


def _render_found(value: Any) -> Rendered | None:
    """Return what draws the things found in a picture; None where the value is no such list.

    Either `{"boxes": (n, 4) as x0, y0, x1, y1 in pixels, "masks": (n, height, width), "labels": n names,
    "scores": n numbers}`, of which boxes or masks are enough; or records with a `box` of `xmin`, `ymin`,
    `xmax` and `ymax`, as pipelines of transformers give.
    """
    if _is_list_of_boxes(value):
        return _draw_found(
            {
                "boxes": [[record["box"][corner] for corner in _CORNERS] for record in value],
                "labels": [record.get("label", "") for record in value],
                "scores": [record.get("score") for record in value],
            }
        )
    return _draw_found(value) if isinstance(value, Mapping) else None


def _draw_found(value: Mapping[str, Any]) -> Rendered | None:
    if not value.keys() & {"boxes", "masks"}:
        return None
    try:
        boxes = np.asarray(value.get("boxes", ()), np.float64)
        masks = np.asarray(value.get("masks", ()))
        labels = [str(label) for label in value.get("labels", ())]
        scores = [None if it is None else float(it) for it in value.get("scores", ())]
    except (TypeError, ValueError):
        return None
    count = len(boxes) or len(masks)
    are_boxes = boxes.size == 0 or (boxes.shape == (count, 4) and bool(np.isfinite(boxes).all()))
    are_masks = masks.size == 0 or (
        masks.ndim == _PLANE + 1
        and len(masks) == count
        and masks.dtype.kind in "bui"
        and masks.size <= MAX_MASK_BYTES
    )
    fits = all(len(named) in (0, count) for named in (labels, scores))
    if not (are_boxes and are_masks and fits and count <= MAX_FOUND):
        return None
    view = {
        "kind": "overlay",
        "boxes": boxes.reshape(-1, 4).tolist(),
        "masks": list(masks.shape) if masks.size else [0, 0, 0],
        "labels": labels,
        "scores": scores,
    }
    return Rendered(view, (masks != 0).astype(np.uint8).tobytes() if masks.size else b"")


def _is_list_of_boxes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(record, Mapping)
            and isinstance(record.get("box"), Mapping)
            and record["box"].keys() >= set(_CORNERS)
            for record in value
        )
    )


def _scores(labels: list[str], values: list[float]) -> Rendered:
    return Rendered({"kind": "scores", "labels": labels, "values": values})


def _is_records(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(record, Mapping)
            and all(isinstance(item, str | int | float | None) for item in record.values())
            for record in value
        )
    )


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array {value.shape}"
    if isinstance(value, Media):
        return f"{value.mime_type}, {len(value.data)} bytes"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return str(value)


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text)} characters)"
