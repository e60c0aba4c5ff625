"""Removing what no model needs any more: blobs and folders of versions that were deleted or never came."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from typing import TYPE_CHECKING, Final

from nos.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nos_backend.control.registry import Registry

_logger = logging.getLogger(__name__)

#: What is younger may belong to a registration that is on its way.
_MIN_AGE_S: Final = 24 * 3600.0


def sweep(registry: Registry, blobs: Path, folders: Path, min_age_s: float = _MIN_AGE_S) -> int:
    """Remove blobs and folders that no version names; returns how many. For the start.

    Args:
        registry: Knows the versions.
        blobs: The blob store's folder.
        folders: The folder of models' folders.
        min_age_s: What was changed later than that stays.
    """
    try:
        kept_blobs, kept_folders = registry.references()
    except LoadError as error:
        _logger.warning("nothing is removed: %s", error)
        return 0
    limit_s = time.time() - min_age_s
    num_removed = 0
    for path in _entries(blobs, depth=2):
        if path.name not in kept_blobs and _is_older(path, limit_s):
            with contextlib.suppress(OSError):
                path.unlink()
                num_removed += 1
    for path in _entries(folders, depth=1):
        if str(path) not in kept_folders and _is_older(path, limit_s):
            shutil.rmtree(path, ignore_errors=True)
            num_removed += 1
    return num_removed


def _entries(folder: Path, *, depth: int) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from folder.glob("/".join("*" * depth))


def _is_older(path: Path, limit_s: float) -> bool:
    try:
        return path.stat().st_mtime < limit_s
    except FileNotFoundError:
        return False
