"""Arguments from a command line, and results to one."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos.errors import InvalidRequestError, InvalidTensorError
from nos.types import Media

if TYPE_CHECKING:
    from nos.types import MethodInfo

_MAX_SHOWN: Final = 200
_TEXTS: Final = frozenset({"text", "text or None"})
_TEXT_LISTS: Final = frozenset({"list of text", "list of text or None"})


def parse_input(text: str, method: MethodInfo) -> Any:
    """Return the argument that `text` stands for: `-`, a file's path, or the text itself.

    Raises:
        OSError: If the file cannot be read.
        InvalidRequestError: If its content is not what its name says.
    """
    wants = method.parameters[0].wants if method.parameters else "anything"
    if text == "-":
        return _fit(sys.stdin.buffer.read(), wants)
    path = Path(text)
    looks_like_a_path = wants not in _TEXTS | _TEXT_LISTS and path.suffix and " " not in text
    if looks_like_a_path or path.is_file():
        return _fit(path.read_bytes(), wants, path.suffix)
    return [text] if wants in _TEXT_LISTS else _from_json(text, wants)


def parse_argument(text: str, method: MethodInfo) -> tuple[str, Any]:
    """Return name and value of `name=value`; the value is JSON, text, or a file's content by `@FILE`.

    Raises:
        OSError: If the file cannot be read.
        InvalidRequestError: If it is not of that form.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InvalidRequestError("the argument is wrong", "--input", "name=value", repr(text)[:80])
    wants = next((it.wants for it in method.parameters if it.name == name), "anything")
    if value.startswith("@"):
        path = Path(value[1:])
        return name, _fit(path.read_bytes(), wants, path.suffix)
    return name, _from_json(value, wants)


def _from_json(text: str, wants: str) -> Any:
    if wants in _TEXTS:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if "tensor" not in wants or not isinstance(value, list | int | float):
        return value
    array = np.asarray(value)
    dtype = wants.partition(" ")[0]
    return array.astype(dtype) if dtype in np.sctypeDict else array


def _fit(data: bytes, wants: str, suffix: str = "") -> Any:
    """Return a file's content as what the parameter wants."""
    if suffix == ".npy" or data.startswith(b"\x93NUMPY"):
        return _load_array(data)
    if wants == "bytes":
        return data
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG")) or wants.startswith("image"):
        return Media.from_bytes(data)
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        return data
    if wants in _TEXT_LISTS:
        return text.splitlines()
    return text if wants in _TEXTS else _from_json(text, wants)


def _load_array(data: bytes) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InvalidTensorError(
            "not an array file", "input", "a .npy file of numbers", str(error)[:120]
        ) from error
    return array


def to_json(value: Any) -> Any:
    """Return a result as JSON has it; arrays as nested lists, bytes by their number."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "c":
            return [to_json(item) for item in value.tolist()] if value.ndim else str(value)
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Media):
        return {"mime_type": value.mime_type, "size_bytes": len(value.data)}
    if isinstance(value, bytes):
        return {"size_bytes": len(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, complex):
        return str(value)
    return value


def to_line(value: Any) -> str:
    """Return a result for a person, on one line where it is short."""
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        text = np.array2string(value, threshold=32, edgeitems=3, precision=4)
        return f"{value.dtype} {value.shape}: {' '.join(text.split())}"
    if isinstance(value, Media):
        return f"{value.mime_type}, {len(value.data)} bytes"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {to_line(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        text = ", ".join(to_line(item) for item in value[:_MAX_SHOWN])
        return f"[{text}, ...]" if len(value) > _MAX_SHOWN else f"[{text}]"
    return str(value)
