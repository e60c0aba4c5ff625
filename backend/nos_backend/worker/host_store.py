"""Host copies of models: sealed memory that outlives executors, within a budget, and files beyond it.

A host copy is two memfds: the flat run of a model's weights and its skeleton (`nos_backend.executor`).
One that is not needed in memory now can be moved to a file named by its sha256, and comes back only if its
bytes still have that hash: they are hashed as they are copied, so that nothing can change in between.

All methods but `park` and `fetch` are quick; those two copy in a thread. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nos.errors import LoadError, OutOfDeviceMemoryError

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK_BYTES: Final = 8 << 20
_MODE: Final = 0o600


@dataclass(slots=True, eq=False)
class HostCopy:
    """One model's weights and skeleton. Its descriptors stay the store's."""

    key: str
    size_bytes: int
    """Of the flat run."""
    skeleton_bytes: int
    """Of the skeleton; 0 if there is none."""
    weights_fd: int = -1
    """-1 while it is in a file."""
    skeleton_fd: int = -1
    """As well."""
    sha256: str = ""
    """Of run and skeleton together; empty until it was in a file."""

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.size_bytes + self.skeleton_bytes

    @property
    def is_in_memory(self) -> bool:
        """Whether it can be mapped."""
        return self.weights_fd >= 0

    @property
    def weights(self) -> tuple[int, int]:
        """Descriptor and length of the run."""
        return self.weights_fd, self.size_bytes

    @property
    def skeleton(self) -> tuple[int, int]:
        """Descriptor and length of the skeleton."""
        return self.skeleton_fd, self.skeleton_bytes


class HostStore:
    """The host copies of one worker.

    Args:
        budget_bytes: The most that copies in memory may take together; None means no limit.
        folder: Where copies go that do not fit; None keeps all in memory.
    """

    def __init__(self, *, budget_bytes: int | None = None, folder: Path | None = None) -> None:
        if budget_bytes is not None and budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._folder = folder
        #: In the order in which they came; an object leaves with `release`.
        self._copies: list[HostCopy] = []

    @property
    def used_bytes(self) -> int:
        """What copies in memory take together."""
        return sum(copy.total_bytes for copy in self._copies if copy.is_in_memory)

    @property
    def has_folder(self) -> bool:
        """Whether copies can be parked."""
        return self._folder is not None

    def largest(self, size: int) -> str:
        """Return the models, by name, whose copies in memory take so many bytes; the largest first."""
        names, found = [], 0
        here = (copy for copy in self._copies if copy.is_in_memory)
        for copy in sorted(here, key=lambda copy: -copy.total_bytes):
            if found >= size:
                break
            names.append(copy.key)
            found += copy.total_bytes
        return ", ".join(names)

    def missing_bytes(self, size: int) -> int:
        """Return by how much `size` more bytes exceed the budget; 0 if they fit.

        Raises:
            OutOfDeviceMemoryError: If they would not fit alone.
        """
        if self.budget_bytes is None:
            return 0
        if size > self.budget_bytes:
            raise OutOfDeviceMemoryError(
                "the model does not fit into host memory",
                "host_bytes",
                expected=f"at most {self.budget_bytes} bytes",
                got=f"{size} bytes",
                hint="Raise --host-bytes, or use a smaller model",
            )
        return max(0, self.used_bytes + size - self.budget_bytes)

    def create(self, key: str, size_bytes: int, skeleton_bytes: int) -> HostCopy:
        """Return a copy to be filled: of exactly that size, which nobody can change.

        Raises:
            OSError: If the system has no descriptors left.
        """
        copy = HostCopy(key, size_bytes, skeleton_bytes)
        _open_memory(copy)
        self._copies.append(copy)
        return copy

    def seal(self, copy: HostCopy) -> None:
        """Make a filled copy unchangeable for everybody, for ever.

        Raises:
            LoadError: If its writer still has it mapped for writing.
        """
        try:
            for fd in (copy.weights_fd, copy.skeleton_fd):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise LoadError(f"{copy.key} keeps its packed weights open for writing") from error

    def release(self, copy: HostCopy) -> None:
        """Forget a copy; its memory goes when nobody maps it any more. Twice is once."""
        if copy in self._copies:
            self._copies.remove(copy)
            _close_memory(copy)
            self._unlink(copy)

    async def park(self, copy: HostCopy) -> None:
        """Move a copy from memory to its file; no executor may use it meanwhile or after.

        Raises:
            OSError: If the file cannot be written; the copy stays in memory.
        """
        if self._folder is None or not copy.is_in_memory:
            return
        # The thread has descriptors of its own: the copy may be released while it writes.
        own = replace(
            copy, weights_fd=os.dup(copy.weights_fd), skeleton_fd=os.dup(copy.skeleton_fd)
        )
        try:
            await asyncio.to_thread(_write_file, own, self._folder)
        finally:
            _close_memory(own)
        copy.sha256 = own.sha256
        if copy not in self._copies:
            self._unlink(copy)
        else:
            _close_memory(copy)

    async def fetch(self, copy: HostCopy) -> None:
        """Move a copy from its file to memory; at once if it is there.

        Raises:
            LoadError: If the file is gone, or does not hold what was written to it.
        """
        path = self._path(copy)
        if copy.is_in_memory or path is None:
            return
        fetched = HostCopy(copy.key, copy.size_bytes, copy.skeleton_bytes)
        _open_memory(fetched)
        try:
            digest = await asyncio.to_thread(_read_file, fetched, path)
        except OSError as error:
            _close_memory(fetched)
            raise LoadError(f"the packed weights of {copy.key} are gone", got=str(error)) from error
        except BaseException:
            _close_memory(fetched)
            raise
        if digest != copy.sha256:
            _close_memory(fetched)
            raise LoadError(
                f"the packed weights of {copy.key} are damaged",
                field=str(path),
                expected=f"sha256 {copy.sha256}",
                got=digest,
                hint="Unload the model and load it again",
            )
        self.seal(fetched)
        copy.weights_fd, copy.skeleton_fd = fetched.weights_fd, fetched.skeleton_fd

    def close(self) -> None:
        """Forget everything."""
        for copy in list(self._copies):
            self.release(copy)

    def _unlink(self, copy: HostCopy) -> None:
        path = self._path(copy)
        if path is not None and not any(item.sha256 == copy.sha256 for item in self._copies):
            path.unlink(missing_ok=True)

    def _path(self, copy: HostCopy) -> Path | None:
        if self._folder is None or not copy.sha256:
            return None
        return self._folder / f"{copy.sha256}.weights"


def _open_memory(copy: HostCopy) -> None:
    fds: list[int] = []
    try:
        for size in (copy.size_bytes, copy.skeleton_bytes):
            fds.append(os.memfd_create("nos-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(fds[-1], size)
            fcntl.fcntl(fds[-1], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    copy.weights_fd, copy.skeleton_fd = fds


def _close_memory(copy: HostCopy) -> None:
    if copy.is_in_memory:
        os.close(copy.weights_fd)
        os.close(copy.skeleton_fd)
        copy.weights_fd = copy.skeleton_fd = -1


def _write_file(copy: HostCopy, folder: Path) -> None:
    """Write a copy to the file that its hash names, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest = hashlib.sha256()
    temporary = folder / f"{os.getpid()}-{id(copy):x}.part"
    try:
        with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, _MODE)) as file:
            for fd, size in (copy.weights, copy.skeleton):
                for offset in range(0, size, _CHUNK_BYTES):
                    data = os.pread(fd, min(_CHUNK_BYTES, size - offset), offset)
                    digest.update(data)
                    file.write(data)
        copy.sha256 = digest.hexdigest()
        temporary.replace(folder / f"{copy.sha256}.weights")
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _read_file(copy: HostCopy, path: Path) -> str:
    """Fill a copy from a file, and return the hash of what was filled in."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for fd, size in (copy.weights, copy.skeleton):
            offset = 0
            while offset < size:
                data = file.read(min(_CHUNK_BYTES, size - offset))
                if not data:
                    raise OSError(f"{path} ends too early")
                digest.update(data)
                os.pwrite(fd, data, offset)
                offset += len(data)
    return digest.hexdigest()
