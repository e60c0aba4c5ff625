"""What goes wrong in an executor, as plain data for the worker."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from types import TracebackType

_TEXT_CHARS: Final = 4096
_TRACEBACK_CHARS: Final = 64 << 10


class RefusedError(Exception):
    """A call or load that is refused; becomes the error of the same reason at the worker."""

    def __init__(
        self,
        reason: str,
        message: str,
        field: str = "",
        expected: str = "",
        got: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(reason, message, field, expected, got, hint)
        self.facts = {
            "reason": reason,
            "message": message,
            "field": field,
            "expected": expected,
            "got": got,
            "hint": hint,
        }


class NoWireFormError(Exception):
    """A model returned what cannot be sent."""


def raised(
    error: BaseException,
    source_name: str,
    *,
    out_of_memory: bool = False,
    room_bytes: int | None = None,
) -> dict[str, Any]:
    """Describe what the model's code raised: from the first frame of its own source on.

    Args:
        error: What was raised.
        source_name: The file name under which the model's source was compiled.
        out_of_memory: Whether it says that the device's memory is used up.
        room_bytes: What the device has free now, where that is known and matters.
    """
    type_name, text = type(error).__name__, _text(error)
    return {
        "expected": "" if room_bytes is None else f"at most {room_bytes} bytes, which are free",
        "reason": "OUT_OF_MEMORY" if out_of_memory else "MODEL_RAISED",
        "message": f"{type_name}: {text}" if text else type_name,
        "type_name": type_name,
        "text": text,
        "traceback": _format(error, source_name)[-_TRACEBACK_CHARS:],
    }


def no_wire_form(error: NoWireFormError) -> dict[str, Any]:
    """Describe a result that cannot be sent."""
    return {
        "reason": "MODEL_RAISED",
        "message": str(error),
        "type_name": "TypeError",
        "text": str(error),
        "traceback": "",
    }


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_TEXT_CHARS]
    except Exception:  # noqa: BLE001 - a model's exception may fail at anything, even at its text
        return "(its text cannot be had)"


def _format(error: BaseException, source_name: str) -> str:
    first: TracebackType | None = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename != source_name:
        first = first.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, first))
    except Exception:  # noqa: BLE001 - as above
        return f"{type(error).__name__}\n"
