"""Files that came with a model are what was registered: their folder is named by their content."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from nos.errors import LoadError

from nos_backend.definition import folder_name

_NAMED: Final = re.compile(r"[0-9a-f]{64}")
#: What Python itself leaves beside the sources that it imports.
_CACHE: Final = "__pycache__"


def check_folder(folder: str) -> None:
    """Hash all files of a registered model's folder; others, for instance an author's own, are not checked.

    Touches the disk for as long as its files are large.

    Raises:
        LoadError: If a file was changed, added or taken away, or cannot be read.
    """
    root = Path(folder)
    if not _NAMED.fullmatch(root.name):
        return
    digests = {}
    try:
        for path in root.rglob("*"):
            if path.is_file() and _CACHE not in path.parts:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                digests[path.relative_to(root).as_posix()] = digest
    except OSError as error:
        raise LoadError("the model's files cannot be read", "files", got=str(error)) from error
    found = folder_name(digests)
    if found != root.name:
        raise LoadError(
            "the model's files are damaged",
            "files",
            f"files of sha256 {root.name}",
            found,
            "Register the model again",
        )
