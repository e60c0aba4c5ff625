"""What packages a model may ask for: names and versions, as PEP 508 writes them; nothing that runs code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nos.errors import InvalidRequestError
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_REQUIREMENTS: Final = 100
_MAX_CHARACTERS: Final = 200


def normalize(requirements: Iterable[str]) -> list[str]:
    """Return requirements in one way of writing and one order, so that the same ones are equal.

    Comments and empty lines of a requirements file are left out.

    Raises:
        InvalidRequestError: If one is no requirement, names a place to fetch it from, or is an option of
            an installer: from where packages come is the server's to say.
    """
    found: dict[str, str] = {}
    for line in requirements:
        text = line.partition(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        if len(text) > _MAX_CHARACTERS:
            raise _wrong(text, f"at most {_MAX_CHARACTERS} characters")
        if text.startswith("-"):
            raise _wrong(text, "a package, and no option of an installer")
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise _wrong(text, 'a package as in "opencv-python-headless==4.*"') from error
        if requirement.url is not None:
            raise _wrong(text, "a name and versions; the server knows where packages come from")
        requirement.name = canonicalize_name(requirement.name)
        found[str(requirement)] = requirement.name
    if len(found) > MAX_REQUIREMENTS:
        raise InvalidRequestError(
            "the environment is too large",
            "env",
            f"at most {MAX_REQUIREMENTS} packages",
            str(len(found)),
        )
    return sorted(found)


def _wrong(text: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError("an environment's package is wrong", "env", expected, text[:80])
