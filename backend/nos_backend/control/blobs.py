"""Blobs on disk: files named by the sha256 of their content, whole and verified or not there at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from nos.errors import (
    InvalidRequestError,
    LimitExceededError,
    LoadError,
    ModelNotFoundError,
    NosError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_BLOB_BYTES: Final = 20 << 30

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def check_sha256(sha256: str) -> str:
    """Return `sha256` if it is one.

    Raises:
        InvalidRequestError: If it is not 64 lower-case hexadecimal digits.
    """
    if not _SHA256.fullmatch(sha256):
        raise InvalidRequestError(
            "this is no sha256", "sha256", "64 lower-case hexadecimal digits", repr(sha256[:80])
        )
    return sha256


class BlobStore:
    """A folder of blobs. Its methods touch the disk: call them where that may take its time."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BLOB_BYTES) -> None:
        """Use `folder`, which is made when first written to, for blobs of at most `max_bytes`."""
        self.folder = folder
        self.max_bytes = max_bytes
        #: Blobs that an upload is writing to; guarded by the lock.
        self._writing: set[str] = set()
        self._lock = threading.Lock()

    def read(self, sha256: str, offset_bytes: int) -> tuple[BinaryIO, int]:
        """Open a whole blob at an offset; returns it and its size.

        Raises:
            InvalidRequestError: If `sha256` is malformed, or the offset is behind the end.
            ModelNotFoundError: If the blob is not here, or not whole.
        """
        try:
            file = self._whole(check_sha256(sha256)).open("rb")
        except FileNotFoundError:
            raise ModelNotFoundError(
                "the blob is not here", "sha256", "", sha256, "Upload it with BlobService.Upload"
            ) from None
        size_bytes = os.fstat(file.fileno()).st_size
        if offset_bytes > size_bytes:
            file.close()
            raise InvalidRequestError(
                "the offset is behind the blob's end",
                "offset_bytes",
                f"at most {size_bytes}",
                str(offset_bytes),
            )
        file.seek(offset_bytes)
        return file, size_bytes

    def stat(self, sha256: str) -> tuple[int, bool]:
        """Return how many bytes are here, and whether those are all and verified."""
        for path, is_complete in (
            (self._whole(check_sha256(sha256)), True),
            (self._partial(sha256), False),
        ):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_size, is_complete
        return 0, False

    def load(self, sha256: str) -> bytes:
        """Return a blob's bytes, which are those that were hashed just now.

        Raises:
            ModelNotFoundError: If the blob is not here, or not whole.
            LoadError: If its bytes are others by now.
            OSError: If the disk fails.
        """
        file, _ = self.read(sha256, 0)
        with file:
            data = file.read()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise LoadError("a blob was changed on the disk", "sha256", sha256, found)
        return data

    def put(self, data: bytes) -> str:
        """Keep `data` for good; returns its sha256. The same bytes again cost a look.

        Raises:
            OSError: If the disk is full or fails; then nothing is kept.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._whole(sha256)
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(self.folder)
        if not self._has(sha256, data):
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        sync_folder(path.parent)
        return sha256

    def _has(self, sha256: str, data: bytes) -> bool:
        with contextlib.suppress(ModelNotFoundError, LoadError):
            return self.load(sha256) == data
        return False

    def open(self, sha256: str, size_bytes: int, offset_bytes: int) -> BlobWriter:
        """Start or resume an upload.

        Args:
            sha256: The blob.
            size_bytes: Of the whole blob.
            offset_bytes: Where the upload goes on; must be what `stat` says.

        Raises:
            InvalidRequestError: If the offset is another, or over the size.
            LimitExceededError: If the blob is too large.
            UnavailableError: If another upload of it is under way.
        """
        received_bytes, is_complete = self.stat(sha256)
        if size_bytes > self.max_bytes:
            raise LimitExceededError(
                "the blob is too large", "size_bytes", f"at most {self.max_bytes}", str(size_bytes)
            )
        if not is_complete and received_bytes > size_bytes:
            self._partial(sha256).unlink(missing_ok=True)
            received_bytes = 0
        if offset_bytes != received_bytes:
            raise InvalidRequestError(
                "the upload starts at the wrong place",
                "offset_bytes",
                str(received_bytes),
                str(offset_bytes),
                "Ask BlobService.Stat where to go on",
            )
        with self._lock:
            if sha256 in self._writing:
                raise UnavailableError(
                    "another upload of this blob is under way", "sha256", retry_after_s=1.0
                )
            self._writing.add(sha256)
        try:
            return BlobWriter(
                sha256, size_bytes, self._partial(sha256), self._whole(sha256), self._release
            )
        except BaseException:
            self._release(sha256)
            raise

    def _release(self, sha256: str) -> None:
        with self._lock:
            self._writing.discard(sha256)

    def _whole(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _partial(self, sha256: str) -> Path:
        return self.folder / "partial" / sha256


class BlobWriter:
    """One upload. What it wrote stays for the next one, unless its hash is wrong."""

    def __init__(
        self,
        sha256: str,
        size_bytes: int,
        partial: Path,
        whole: Path,
        release: Callable[[str], None],
    ) -> None:
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._partial = partial
        self._whole = whole
        self._release = release
        #: Held while the file is in use: a cancelled upload closes while a thread still writes.
        self._lock = threading.Lock()
        partial.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "a+b", buffering=0)
        self._received_bytes = os.fstat(descriptor).st_size

    def close(self) -> None:
        """End the upload, whole or not."""
        with self._lock:
            self._file.close()
        self._release(self._sha256)

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            InvalidRequestError: If that is more than the blob's size.
            OSError: If the disk is full or fails.
        """
        self._received_bytes += len(data)
        if self._received_bytes > self._size_bytes:
            raise InvalidRequestError(
                "more bytes came than were announced",
                "data",
                f"{self._size_bytes} bytes",
                f"{self._received_bytes} or more",
            )
        with self._lock:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Verify, and put the blob in its place.

        Raises:
            InvalidRequestError: If bytes are missing, or the hash is another; then all are dropped.
            OSError: If the disk is full or fails.
        """
        if self._received_bytes < self._size_bytes:
            raise InvalidRequestError(
                "the upload ended early",
                "data",
                f"{self._size_bytes} bytes",
                str(self._received_bytes),
                "Ask BlobService.Stat where to go on",
            )
        # The descriptor that was written to, so that nobody changes the file in between.
        self._file.seek(0)
        found = hashlib.file_digest(self._file, "sha256").hexdigest()
        if found != self._sha256:
            self._partial.unlink(missing_ok=True)
            raise InvalidRequestError(
                "the bytes are not those of the blob", "sha256", self._sha256, found
            )
        os.fsync(self._file.fileno())
        self._partial.replace(self._whole)
        sync_folder(self._whole.parent)


def sync_folder(folder: Path) -> None:
    """Have a folder's new names survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(field: str) -> Iterator[None]:
    """Say in a typed error that `field` cannot be written to the disk.

    Raises:
        LimitExceededError: If the disk is full.
        UnavailableError: If it fails otherwise.
    """
    try:
        yield
    except NosError:  # some of them are OSErrors too
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise LimitExceededError(
                "the server's disk is full", field, hint="Free space in its state folder"
            ) from error
        raise UnavailableError(
            f"the server's disk fails: {error.strerror}",
            field,
            hint="Nothing was changed; look at the disk of its state folder",
        ) from error
