"""Live frames between a page and a stream: one binary form for websockets and comms.

A message is a little-endian u32, the length of the header; the header, JSON; and the payload. From the page
the header is `{"seq"}` and the payload a JPEG or PNG. Back come `{"seq", "view", "compute_s", "server_s"}`
with what `nos_jupyter.rendering` makes of the result, `{"seq", "dropped": true}`, or `{"seq", "failure"}`.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from nos.errors import InvalidRequestError, OverloadedError

from nos_jupyter.rendering import describe, render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nos import Result
    from nos.errors import NosError
    from nos.types import MethodInfo, ModelSpec

MAX_FRAME_BYTES = 4 << 20
_LENGTH = struct.Struct("<I")


def pack(header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """Join header and payload."""
    text = json.dumps(header).encode()
    return _LENGTH.pack(len(text)) + text + payload


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a message into header and payload.

    Raises:
        InvalidRequestError: If it is not of that form.
    """
    if len(message) < _LENGTH.size:
        raise InvalidRequestError(
            "the frame is cut off", "frame", "a header", f"{len(message)} bytes"
        )
    end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    try:
        header = json.loads(message[_LENGTH.size : end])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or end > len(message):
        raise InvalidRequestError(
            "the frame has no header", "frame", "a JSON object", "other bytes"
        )
    return header, message[end:]


def answer(result: Result, seq: Any) -> tuple[dict[str, Any], bytes]:
    """Return what a page is told of a frame's end: header and payload."""
    if isinstance(result.error, OverloadedError):
        return {"seq": seq, "dropped": True}, b""
    if result.error is not None:
        return failure(result.error, seq)
    rendered = render(result.value)
    timings = result.timings
    header = {
        "seq": seq,
        "view": rendered.view,
        "compute_s": timings.compute_s,
        "server_s": timings.server_s,
    }
    return header, rendered.data


def failure(error: NosError, seq: Any = None) -> tuple[dict[str, Any], bytes]:
    """Return what a page is told of a frame that failed, or of the stream where `seq` is None."""
    return {"seq": seq, "failure": describe(error)}, b""


def image_parameter(spec: ModelSpec, method: MethodInfo) -> str:
    """Return the parameter that takes the frames.

    Raises:
        InvalidRequestError: If the method takes no image, or yields more than one answer.
    """
    if method.is_generator:
        raise InvalidRequestError(
            f"{method.name} of {spec.name} is a generator", "method", "one answer per frame", "many"
        )
    for parameter in method.parameters:
        if parameter.kind == "image":
            return parameter.name
    raise InvalidRequestError(
        f"{method.name} of {spec.name} takes no image", "method", "an image parameter", str(method)
    )
