"""Files that came with a model are what was registered: their folder is named by their content."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nos.errors import LoadError

from nos_backend.definition import folder_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMED: Final = re.compile(r"[0-9a-f]{64}")
#: What Python itself leaves beside the sources that it imports.
_CACHE: Final = "__pycache__"


def is_content_name(name: str) -> bool:
    """Say whether a folder of this name is named by its content."""
    return _NAMED.fullmatch(name) is not None


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a model's folder, in any order."""
    for path in folder.rglob("*"):
        if path.is_file() and _CACHE not in path.parts:
            yield path


def content_name(folder: Path) -> str:
    """Return what a folder with such files is named; hashes them all.

    Raises:
        OSError: If one cannot be read.
    """
    digests = {}
    for path in files_of(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        digests[path.relative_to(folder).as_posix()] = digest
    return folder_name(digests)


def check_folder(folder: str) -> None:
    """Hash all files of a registered model's folder; others, for instance an author's own, are not checked.

    Touches the disk for as long as its files are large.

    Raises:
        LoadError: If a file was changed, added or taken away, or cannot be read.
    """
    root = Path(folder)
    if not is_content_name(root.name):
        return
    try:
        found = content_name(root)
    except OSError as error:
        raise LoadError("the model's files cannot be read", "files", got=str(error)) from error
    if found != root.name:
        raise LoadError(
            "the model's files are damaged",
            "files",
            f"files of sha256 {root.name}",
            found,
            "Register the model again",
        )
