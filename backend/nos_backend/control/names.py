"""Names of models and references to their versions: `name`, `name@v3`, `name@latest`."""

from __future__ import annotations

import re
from typing import Final

from nos.errors import InvalidRequestError

MAX_NAME_LENGTH: Final = 200

_NAME: Final = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
_VERSION: Final = re.compile(r"v([1-9][0-9]{0,8})")
_LATEST: Final = "latest"


def check_name(name: str) -> str:
    """Return `name` if a model may be called that.

    Raises:
        InvalidRequestError: If it is empty, too long, or has other characters or empty parts.
    """
    fits = (
        len(name) <= MAX_NAME_LENGTH
        and _NAME.fullmatch(name)
        and all(part.strip(".") for part in name.split("/"))
    )
    if not fits:
        raise InvalidRequestError(
            "this cannot be a model's name",
            "name",
            f"letters, digits, '.', '_' and '-', with '/' between parts, at most {MAX_NAME_LENGTH}",
            repr(name[:80]) if name else "nothing",
        )
    return name


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Split a reference into the name and the version wanted; None is the newest.

    Raises:
        InvalidRequestError: If it is none.
    """
    name, at, version = reference.partition("@")
    if at and version != _LATEST:
        match = _VERSION.fullmatch(version)
        if match is None:
            raise InvalidRequestError(
                "this is no version of a model",
                "model",
                "name, name@v3 or name@latest",
                repr(reference[:100]),
            )
        return check_name(name), int(match[1])
    return check_name(name), None
