"""Forms made from a model's interface, and the arguments that a page filled them in with."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from nos.errors import InvalidRequestError
from nos.types import Media

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nos.types import MethodInfo, ModelInfo, ParameterInfo

#: A tensor whose last two sizes are at most this can be drawn by hand.
MAX_DRAWN_SIDE = 64
_PLANE = 2
_CONTROLS = {
    "image": "image",
    "text": "text",
    "bytes": "file",
    "integer": "integer",
    "real": "real",
    "flag": "flag",
}


def model_form(info: ModelInfo) -> dict[str, Any]:
    """Return a model, how it stands and its methods' forms, as pages read it."""
    return {
        "name": info.name,
        "version": info.version,
        "owner": info.spec.owner,
        "doc": info.spec.doc.partition("\n")[0],
        "state": info.state,
        "error": info.error,
        "device_bytes": info.device_bytes,
        "host_bytes": sum(replica.host_bytes for replica in info.replicas),
        "devices": sorted({f"{it.device} on {it.worker}" for it in info.replicas}),
        "methods": [method_form(method) for method in info.spec.methods],
    }


def method_form(method: MethodInfo) -> dict[str, Any]:
    """Return what a form for calls of a method shows."""
    return {
        "name": method.name,
        "doc": method.doc.partition("\n")[0],
        "signature": str(method),
        "is_generator": method.is_generator,
        "parameters": [
            _parameter_form(parameter, method.doc)
            for parameter in method.parameters
            if not (parameter.is_variadic or parameter.is_keywords)
        ],
    }


def _parameter_form(parameter: ParameterInfo, doc: str) -> dict[str, Any]:
    form: dict[str, Any] = {
        "name": parameter.name,
        "wants": parameter.wants,
        "is_required": not parameter.has_default,
        "default": parameter.default_text if parameter.has_default else "",
        "control": _control(parameter),
    }
    if parameter.choices:
        form["choices"] = list(parameter.choices)
    if form["control"] == "drawing":
        height, width = (parameter.shape or ())[-2:]
        default = 255.0 if parameter.dtype == "uint8" else 1.0
        paper, ink = _range(parameter.name, doc) or (0.0, default)
        form |= {"height": height, "width": width, "paper": paper, "ink": ink}
    return form


def _control(parameter: ParameterInfo) -> str:
    """Return which control fits: `json` where no other does."""
    if parameter.choices:
        return "choice"
    if parameter.kind == "list" and parameter.item_kind == "text":
        return "lines"
    if parameter.kind == "tensor" and parameter.shape is not None:
        *before, height, width = parameter.shape if len(parameter.shape) >= _PLANE else ("", "", "")
        is_small = all(
            isinstance(side, int) and 1 < side <= MAX_DRAWN_SIDE for side in (height, width)
        )
        if is_small and all(isinstance(size, str) or size == 1 for size in before):
            return "drawing"
    return _CONTROLS.get(parameter.kind, "json")


def _range(name: str, doc: str) -> tuple[float, float] | None:
    """Return the values of paper and ink where the docstring says `name: ... from A ... to B`."""
    number = r"(-?\d+(?:\.\d+)?)"
    found = re.search(rf"\b{re.escape(name)}: [^\n]*?\bfrom {number}\b[^\n]*? to {number}", doc)
    return (float(found[1]), float(found[2])) if found else None


def arguments(
    method: MethodInfo, filled: Mapping[str, Any], buffers: Sequence[memoryview | bytes]
) -> dict[str, Any]:
    """Return the arguments of a call from what a page filled in.

    Args:
        method: What is called.
        filled: By parameter: `{"value": JSON}`, `{"text": source of JSON}`, or `{"buffer": index,
            "as": form}`, where the form is `media`, `bytes` or `pixels` (float32, the last two sizes).
        buffers: What `buffer` counts in.

    Raises:
        InvalidRequestError: If something does not fit; names the parameter.
    """
    by_name = {parameter.name: parameter for parameter in method.parameters}
    found: dict[str, Any] = {}
    for name, entry in filled.items():
        if name not in by_name:
            raise InvalidRequestError(
                f"{method.name} has no such parameter", name, ", ".join(by_name), name
            )
        found[name] = _argument(by_name[name], entry, buffers)
    return found


def _argument(
    parameter: ParameterInfo, entry: Mapping[str, Any], buffers: Sequence[memoryview | bytes]
) -> Any:
    if "buffer" in entry:
        return _from_bytes(parameter, str(entry["as"]), bytes(buffers[entry["buffer"]]))
    value = entry.get("value")
    if "text" in entry:
        value = _from_text(parameter, str(entry["text"]))
    if parameter.kind == "tensor" and value is not None:
        try:
            return np.asarray(value, parameter.dtype if _is_known(parameter.dtype) else None)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequestError(
                str(error), parameter.name, parameter.wants, repr(value)[:80]
            ) from None
    return value


def _from_bytes(parameter: ParameterInfo, form: str, data: bytes) -> Any:
    if form == "media":
        return Media.from_bytes(data)
    if form == "bytes":
        return data
    *before, height, width = parameter.shape or (1, 1)
    # `*batch` and `...` stand for any number of sizes, so for none.
    fixed = [1 for size in before if not (isinstance(size, str) and size.startswith(("*", "...")))]
    pixels = np.frombuffer(data, np.float32).reshape(*fixed, int(height), int(width))
    return pixels.astype(parameter.dtype if _is_known(parameter.dtype) else np.float32)


def _from_text(parameter: ParameterInfo, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if parameter.kind == "anything":
            return text
        raise InvalidRequestError(
            f"not JSON: {error}", parameter.name, parameter.wants, repr(text)[:80]
        ) from None


def _is_known(dtype: str) -> bool:
    try:
        return bool(np.dtype(dtype or "object").kind in "biufc")
    except TypeError:
        return False
