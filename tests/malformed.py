"""What strangers may send: messages with harm in every field, and real ones that were changed on the way."""

from __future__ import annotations

import sys
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

HOSTILE_TEXT = (
    "",
    "../../etc/passwd",
    "a\0b",
    "x" * 300,
    "😀" * 80,
    "double@v-1",
    "nos/../x",
    "%s%n",
)
HOSTILE_NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
RANGES = {
    **dict.fromkeys((5, 15, 17), (-(2**31), 2**31 - 1)),
    **dict.fromkeys((3, 16, 18), (-(2**63), 2**63 - 1)),
    **dict.fromkeys((13, 7), (0, 2**32 - 1)),
    **dict.fromkeys((4, 6), (0, 2**64 - 1)),
}
MAX_DEPTH = 4
#: How many times as many examples `make accept` tries.
_STRICTER = 10 if any(argument.startswith("--accept") for argument in sys.argv) else 1
_MAX_EDITS = 4


def examples(count: int) -> settings:
    """Try so many examples, and more where bounds are strict."""
    return settings(
        max_examples=count * _STRICTER, database=None, suppress_health_check=[*HealthCheck]
    )


def values(field: FieldDescriptor, depth: int, extra: bytes) -> st.SearchStrategy[Any]:
    """Make values of a field."""
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return st.sampled_from(HOSTILE_TEXT) | st.text(max_size=40)
        case FieldDescriptor.TYPE_BYTES:
            return st.just(extra) | st.binary(max_size=100)
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return st.floats(width=32)
        case FieldDescriptor.TYPE_ENUM:
            return st.integers(0, 20) | st.integers(0, 2**31 - 1)
        case FieldDescriptor.TYPE_MESSAGE:
            return messages(field.message_type, depth + 1, extra)
        case _:
            low, high = RANGES[field.type]
            hostile = st.sampled_from([it for it in HOSTILE_NUMBERS if low <= it <= high])
            return st.integers(0, 70) | hostile


def messages(kind: Any, depth: int = 0, extra: bytes = b"") -> st.SearchStrategy[Any]:
    """Make messages of a kind, with values that mean harm in every field."""
    cls = message_factory.GetMessageClass(kind)
    fields = [it for it in kind.fields if depth < MAX_DEPTH or it.message_type is None]

    def fill(given_values: dict[str, Any]) -> Any:
        message = cls()
        for name, value in given_values.items():
            field = kind.fields_by_name[name]
            target = getattr(message, name)
            if field.message_type and field.message_type.GetOptions().map_entry:
                continue
            if field.is_repeated and field.message_type:
                target.add().CopyFrom(value)
            elif field.is_repeated:
                target.append(value)
            elif field.message_type:
                target.CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    return st.fixed_dictionaries(
        {}, optional={it.name: values(it, depth, extra) for it in fields}
    ).map(fill)


@st.composite
def changed(draw: st.DrawFn, samples: st.SearchStrategy[bytes]) -> bytes:
    """Make what becomes of real bytes: some are others, missing, twice or more."""
    raw = bytearray(draw(samples))
    for _ in range(draw(st.integers(0, _MAX_EDITS))):
        at = draw(st.integers(0, len(raw)))
        until = draw(st.integers(at, min(len(raw), at + 20)))
        match draw(st.sampled_from(("flip", "replace", "drop", "repeat", "cut"))):
            case "flip" if at < len(raw):
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "replace":
                raw[at:until] = draw(st.binary(max_size=20))
            case "drop":
                del raw[at:until]
            case "repeat":
                raw[at:at] = raw[at:until]
            case "cut":
                del raw[at:]
    return bytes(raw)


def bytes_like(*samples: bytes) -> st.SearchStrategy[bytes]:
    """Make any bytes, most of them close to these."""
    near = changed(st.sampled_from(samples))
    return near | near | st.binary(max_size=200)
