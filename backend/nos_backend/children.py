"""A child process of the supervisor: started so that it cannot outlive it, restarted with a pause."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

_LOG_BYTES: Final = 10 << 20
#: A child that lived this long starts again without a pause.
_STEADY_S: Final = 60.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 30.0

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent died, so that none is overlooked."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a forked child runs, so that it ends with the thread that forked it: our main one."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def pause_s(num_failures: int) -> float:
    """Return how long to wait before the next start after so many quick ends: 0.1 s, 0.2 s, ... 30 s."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** max(0, num_failures - 1))


@dataclass(slots=True, kw_only=True)
class Child:
    """One process, over all its starts."""

    name: str
    arguments: list[str]
    environ: dict[str, str]
    log_path: Path
    ready_file: Path | None = None
    """Written by the child when it serves; removed before each start."""
    #: Whether it is not started again when it ends.
    is_leaving: bool = False
    #: None before the first start and between starts.
    process: subprocess.Popen[bytes] | None = None
    #: Exit code of the last run; None before its end.
    exit_code: int | None = None
    #: Ends within `_STEADY_S` of their start, in a row.
    num_failures: int = 0
    #: When to start again, monotonic; infinite unless it is waiting for that.
    start_at_s: float = float("inf")
    started_s: float = field(default=0.0)

    @property
    def is_running(self) -> bool:
        """Whether there is a process that was not reaped."""
        return self.process is not None

    def start(self) -> None:
        """Start it; call from the main thread, whose end is the child's.

        Raises:
            OSError: If the program cannot be started or the log cannot be written.
        """
        if self.ready_file is not None:
            self.ready_file.unlink(missing_ok=True)
        self.start_at_s, self.exit_code = float("inf"), None
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.arguments,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - the supervisor has one thread
            )
        self.started_s = time.monotonic()

    def reap(self) -> bool:
        """Take note of its end; returns whether it ended now. Its own children are ended too."""
        if self.process is None or self.process.poll() is None:
            return False
        self.exit_code = self.process.returncode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None
        steady = time.monotonic() - self.started_s >= _STEADY_S
        self.num_failures = 0 if steady else self.num_failures + 1
        if not self.is_leaving:
            pause = 0.0 if steady else pause_s(self.num_failures)
            self.start_at_s = time.monotonic() + pause
        return True

    def send(self, number: signal.Signals) -> None:
        """Signal the process, or with SIGKILL its whole group; nothing happens if there is none."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                os.kill(self.process.pid, number)

    def rotate_log(self) -> None:
        """Keep the log under its limit: its content moves to `.log.1`, the open file goes on from empty."""
        with contextlib.suppress(OSError):
            if self.log_path.stat().st_size > _LOG_BYTES:
                self.log_path.with_name(f"{self.log_path.name}.1").write_bytes(
                    self.log_path.read_bytes()
                )
                os.truncate(self.log_path, 0)

    def last_words(self) -> str:
        """Return the last line of its log that is not empty."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - 4096))
                lines = log.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def kill_orphans() -> None:
    """End and reap every process that is a child of this one by adoption; call when no `Child` runs."""
    while True:
        for pid in _children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def reap_orphans(known: set[int]) -> None:
    """Reap adopted processes that ended.

    Args:
        known: Process ids of `Child`ren, which reap themselves.
    """
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in known:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(found.si_pid, os.WNOHANG)


def _children_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found
