"""What packages a model may ask for: names and versions, as PEP 508 or conda writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nos.errors import InvalidRequestError
from nos.wire.environment import CONDA_CHANNEL, CONDA_FILE, CONDA_PACKAGE
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nos_backend.control import conda

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_REQUIREMENTS: Final = 100
_MAX_CHARACTERS: Final = 200


def normalize(requirements: Iterable[str]) -> list[str]:
    """Return requirements in one way of writing and one order, so that the same ones are equal.

    Comments and empty lines of a requirements file are left out. What is of conda comes first: channels, the
    first being preferred, then packages.

    Raises:
        InvalidRequestError: If one is no requirement, names a place to fetch it from, or is an option of
            an installer: from where packages come is the server's to say.
    """
    channels: dict[str, None] = {}
    of_conda: set[str] = set()
    of_pypi: set[str] = set()
    for line in _lines(requirements):
        text = line.partition(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        if len(text) > _MAX_CHARACTERS:
            raise _wrong(text, f"at most {_MAX_CHARACTERS} characters")
        if text.startswith(CONDA_CHANNEL):
            channels[conda.check_channel(text.removeprefix(CONDA_CHANNEL))] = None
        elif text.startswith(CONDA_PACKAGE):
            of_conda.add(conda.check_package(text.removeprefix(CONDA_PACKAGE)))
        else:
            of_pypi.add(_requirement(text))
    channels.pop("", None)
    if of_conda and not channels:
        channels[conda.check_channel(conda.DEFAULT_CHANNEL)] = None
    count = len(of_conda) + len(of_pypi)
    if count > MAX_REQUIREMENTS:
        raise InvalidRequestError(
            "the environment is too large",
            "env",
            f"at most {MAX_REQUIREMENTS} packages",
            str(count),
        )
    return [*channels, *sorted(of_conda), *sorted(of_pypi)]


def _lines(requirements: Iterable[str]) -> Iterator[str]:
    """Yield them, with what a file of conda comes down to in its place."""
    for line in requirements:
        if line.startswith(CONDA_FILE):
            yield from conda.read_file(line.removeprefix(CONDA_FILE))
        else:
            yield line


def _requirement(text: str) -> str:
    """Return a package of PyPI in one way of writing."""
    if text.startswith("-"):
        raise _wrong(text, "a package, and no option of an installer")
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise _wrong(text, 'a package as in "opencv-python-headless==4.*"') from error
    if requirement.url is not None:
        raise _wrong(text, "a name and versions; the server knows where packages come from")
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement)


def _wrong(text: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError("an environment's package is wrong", "env", expected, text[:80])
