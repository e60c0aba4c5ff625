"""Folders of registered models: their files, put together from blobs, named by their content.

Executors on this host import and read from them, so they are copies: a blob is never reached through one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from nos.errors import InvalidRequestError, LimitExceededError, LoadError
from nos.wire.v1 import models_pb2

from nos_backend.control.blobs import MAX_BLOB_BYTES, check_sha256, sync_folder
from nos_backend.definition import folder_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nos_backend.control.blobs import BlobStore

MAX_FILES: Final = 1000

_MAX_PATH_BYTES: Final = 1024
_MAX_NAME_BYTES: Final = 255
_PIECE_BYTES: Final = 1 << 20


class FolderStore:
    """Makes folders of blobs. Its methods touch the disk: call them where that may take its time."""

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        """Use `root`, which is made when first written to."""
        self._root = root
        self._blobs = blobs

    def make(self, files: Sequence[models_pb2.ModelFile]) -> Path:
        """Return a folder that has these files and no others; the same files give the same folder.

        Raises:
            InvalidRequestError: If a path leads out of the folder or is there twice, or a size is wrong.
            LimitExceededError: If there are too many, or they are too large.
            ModelNotFoundError: If a blob was not uploaded.
            LoadError: If a blob was changed on the disk.
            OSError: If the disk is full or fails; then nothing is kept.
        """
        by_path = check_files(files, self._blobs.max_bytes)
        folder = self._root / folder_name({path: file.sha256 for path, file in by_path.items()})
        if folder.is_dir():
            return folder
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self._root, prefix="."))
        try:
            for path, file in by_path.items():
                target = temporary / path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._copy(file, target)
            temporary.chmod(
                0o755
            )  # executors may be other users; the folder's name has to be known
            for parent in {temporary, *(path for path in temporary.rglob("*") if path.is_dir())}:
                sync_folder(parent)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if folder.is_dir():  # another registration made it meanwhile
                return folder
            raise
        sync_folder(self._root)
        return folder

    def keep(self, path: str, data: bytes) -> models_pb2.ModelFile:
        """Keep bytes as a file that a folder can be made of.

        Raises:
            OSError: If the disk is full or fails.
        """
        return models_pb2.ModelFile(path=path, sha256=self._blobs.put(data), size_bytes=len(data))

    def _copy(self, file: models_pb2.ModelFile, target: Path) -> None:
        blob, size_bytes = self._blobs.read(file.sha256, 0)
        with blob:
            if size_bytes != file.size_bytes:
                raise InvalidRequestError(
                    f"the size of {file.path} is wrong",
                    "files",
                    f"{size_bytes} bytes",
                    str(file.size_bytes),
                )
            digest = hashlib.sha256()
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            with os.fdopen(descriptor, "wb") as copy:
                while piece := blob.read(_PIECE_BYTES):
                    digest.update(piece)
                    copy.write(piece)
                copy.flush()
                os.fsync(descriptor)
        if digest.hexdigest() != file.sha256:
            raise LoadError("a blob was changed on the disk", "files", file.sha256, file.path)


def check_files(
    files: Iterable[models_pb2.ModelFile], max_bytes: int = MAX_BLOB_BYTES
) -> dict[str, models_pb2.ModelFile]:
    """Return files by path, if a folder of its own can have them all; of at most `max_bytes` together.

    Raises:
        InvalidRequestError: If a path leads out of the folder, or meets another.
        LimitExceededError: If there are too many, or they are too large.
    """
    found: dict[str, models_pb2.ModelFile] = {}
    for file in files:
        check_sha256(file.sha256)
        path = check_path(file.path)
        if path in found:
            raise InvalidRequestError("a file is there twice", "files", "each path once", path)
        found[path] = file
    for path in found:
        for parent in PurePosixPath(path).parents:
            if str(parent) in found:
                raise InvalidRequestError(
                    "a file is also a folder", "files", "one of the two", f"{parent} and {path}"
                )
    size_bytes = sum(file.size_bytes for file in found.values())
    if len(found) > MAX_FILES or size_bytes > max_bytes:
        raise LimitExceededError(
            "the model has too many files, or too large ones",
            "files",
            f"at most {MAX_FILES} files of {max_bytes} bytes together",
            f"{len(found)} of {size_bytes} bytes",
        )
    return found


def check_path(path: str) -> str:
    """Return a file's path, if it stays in the folder that it is relative to.

    Raises:
        InvalidRequestError: If it does not, or no file can be named so.
    """
    parts = path.split("/")
    fits = (
        path.isprintable()
        and "\\" not in path
        and len(path.encode()) <= _MAX_PATH_BYTES
        and all(
            part not in {"", ".", ".."} and len(part.encode()) <= _MAX_NAME_BYTES for part in parts
        )
    )
    if not fits:
        raise InvalidRequestError(
            "this cannot be a file's path",
            "files",
            "a path relative to the model's folder, with '/' between parts and without '..'",
            repr(path[:80]),
        )
    return path
