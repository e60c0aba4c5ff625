"""What a process does to itself before it becomes an executor; `confinement.py` holds it."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_IMAGE_PIXELS: Final = 50_000_000
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

#: Opened before any fork: a child must not need the dynamic loader.
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """With what an executor starts."""

    name: str
    device: str
    """As torch writes it."""
    num_threads: int
    """Threads of one operation."""
    max_image_pixels: int
    """Of one encoded image."""
    socket_fd: int
    input_fd: int
    """The arena that the worker writes."""
    output_fd: int
    """The arena that the executor writes."""


def num_threads_now() -> int:
    """Count the threads of this process."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent died, so that none is overlooked."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_title(title: str) -> None:
    """Name this process for `ps` and `top`; the kernel keeps 15 characters."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(title.encode()[:15]), 0, 0, 0)


def trim_heap() -> None:
    """Return freed memory to the system; the C library keeps that of many small tensors."""
    trim = getattr(_libc, "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor of this process except the standard three and `keep`."""
    kept = sorted({0, 1, 2, *keep})
    last = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    for before, after in zip(kept, [*kept[1:], last + 1], strict=True):
        os.closerange(before + 1, after)


def redirect_output(fd: int) -> None:
    """Make `fd` this process's standard output and error, line by line, and close it."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(null)
    os.close(fd)


def flush_lines() -> None:
    """Hand on what models print at each line's end; report crashes of native code on stderr."""
    sys.stdout, sys.stderr = (
        # New objects: those of a forked process remember what their descriptors were before.
        os.fdopen(fd, "w", 1, "utf-8", "backslashreplace", closefd=False)
        for fd in (1, 2)
    )
    faulthandler.enable()
