"""What packages of conda a model may ask for: names and versions, from channels that review what they have.

Packages of conda may run scripts while they are installed, outside of any executor. So an author does not
choose freely whose they are.
"""

from __future__ import annotations

import re
import reprlib
import sys
from typing import Any, Final

import yaml  # type: ignore[import-untyped]
from nos.errors import InvalidRequestError
from nos.wire.environment import CONDA_CHANNEL, CONDA_PACKAGE
from packaging.specifiers import InvalidSpecifier, SpecifierSet

CHANNELS: Final = ("bioconda", "conda-forge", "nvidia")
#: Where packages come from if a file does not say.
DEFAULT_CHANNEL: Final = "conda-forge"
MAX_FILE_CHARACTERS: Final = 32_768
#: Lists and mappings in brackets.
_MAX_FLOW: Final = 100
_KEYS: Final = ("name", "channels", "dependencies", "prefix")
#: Says in a file that conda's own channels are not wanted; here they never are.
_NO_DEFAULTS: Final = "nodefaults"
#: `channel::name`, then versions and a build, with `=` or a space between them.
_PACKAGE: Final = re.compile(
    r"(?:(?P<channel>[^:\s]+)::)?(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)"
    r"(?P<versions>[ =<>!~][A-Za-z0-9._*+!<>=,|~ -]*)?"
)
#: One version of Python, or all that start so, and perhaps a build.
_ONE_PYTHON: Final = re.compile(r"={0,2}\s*([0-9]+(?:\.[0-9]+)*)(?:\.?\*)?(?:[= ][^,|]*)?")
_MAX_PATCH: Final = 50


def read_file(text: str) -> list[str]:
    """Return the texts that an `environment.yml` comes down to; they are not checked yet.

    Raises:
        InvalidRequestError: If it is none, or has what this server does not take from one.
    """
    if len(text) > MAX_FILE_CHARACTERS:
        expected = f"at most {MAX_FILE_CHARACTERS} characters"
        raise _wrong("the file of conda is too large", "env", expected, f"{len(text)}")
    if sum(map(text.count, "[{")) > _MAX_FLOW:  # each costs as much as all before it
        raise _wrong("the file of conda is nested too deeply", "env")
    try:
        # Makes texts, lists and mappings only; a number stays the text that it is, as in `python=3.10`.
        content = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise _wrong(f"the file of conda is no YAML{line}", "env", got=str(problem)[:80]) from error
    except RecursionError as error:
        raise _wrong("the file of conda is nested too deeply", "env") from error
    if not isinstance(content, dict):
        expected = "a mapping with dependencies"
        raise _wrong("the file of conda is wrong", "env", expected, reprlib.repr(content))
    for key in content:
        if key not in _KEYS:
            expected = f"one of {', '.join(_KEYS)}"
            raise _wrong("the file of conda has another key", "env", expected, reprlib.repr(key))
    channels = _texts(content.get("channels") or [], "env.channels")
    listed = content.get("dependencies")
    if not isinstance(listed, list) or not listed:
        expected = "a list of packages"
        raise _wrong("the file's packages are missing", "env.dependencies", expected, _said(listed))
    packages: list[str] = []
    of_pip: list[str] = []
    for item in listed:
        if isinstance(item, dict) and list(item) == ["pip"]:
            of_pip += _texts(item["pip"], "env.dependencies.pip")
        else:
            packages += _texts([item], "env.dependencies")
    return [
        *(f"{CONDA_CHANNEL}{channel}" for channel in channels or [DEFAULT_CHANNEL]),
        *(f"{CONDA_PACKAGE}{package}" for package in packages),
        *of_pip,
    ]


def check_channel(name: str) -> str:
    """Return a channel's text, empty for `nodefaults`.

    Raises:
        InvalidRequestError: If the server takes nothing from it.
    """
    if name == _NO_DEFAULTS:
        return ""
    if name not in CHANNELS:
        message = "nothing is installed from this channel of conda"
        raise _wrong(message, "env.channels", f"one of {', '.join(CHANNELS)}", reprlib.repr(name))
    return f"{CONDA_CHANNEL}{name}"


def check_package(text: str) -> str:
    """Return a package's text in one way of writing.

    Raises:
        InvalidRequestError: If it is not a name and versions, or a Python that the server has not.
    """
    found = _PACKAGE.fullmatch(" ".join(text.split()))
    if found is None:
        expected = 'a name and versions, as in "gdal=3.9" or "gdal >=3.8,<4"'
        raise _wrong("a package of conda is wrong", "env.dependencies", expected, text[:80])
    channel, name, versions = found["channel"], found["name"].lower(), found["versions"] or ""
    if channel:
        check_channel(channel)
    if name == "python" and not _takes_ours(versions.strip()):
        ours = f"{sys.version_info.major}.{sys.version_info.minor}"
        message = "an environment has the Python of the server"
        raise _wrong(message, "env.dependencies", f"python={ours}", reprlib.repr(text))
    return f"{CONDA_PACKAGE}{f'{channel}::' if channel else ''}{name}{versions}"


def _takes_ours(versions: str) -> bool:
    """Tell whether some release of the server's minor version of Python is among these."""
    one = _ONE_PYTHON.fullmatch(versions)
    try:
        wanted = SpecifierSet(f"=={one[1]}.*" if one else versions.replace("*", "").strip())
    except InvalidSpecifier:
        return False
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    return any(wanted.contains(f"{minor}.{patch}") for patch in range(_MAX_PATCH))


def _texts(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong("the file of conda is wrong", field, "a list of texts", _said(value))
    return value


def _said(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)


def _wrong(message: str, field: str, expected: str = "", got: str = "") -> InvalidRequestError:
    return InvalidRequestError(message, field, expected, got)
