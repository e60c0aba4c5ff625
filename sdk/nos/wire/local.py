"""Where a backend on this machine leaves word: read by the SDK, written by `nos serve`.

One state folder holds one backend::

    <state>/backend.json   how to reach it (0600; written by rename)
    <state>/token          its generated token (0600)
    <state>/logs/*.log     what its processes say
    <state>/start.lock     held by whoever starts a backend, while it starts
    <state>/serve.lock     held by the backend as long as it lives

Standard library only. Reading works on every platform; locks and liveness need POSIX.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

try:
    import fcntl
except ImportError:  # Windows: a backend never runs there.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD_NAME: Final = "backend.json"
TOKEN_NAME: Final = "token"  # noqa: S105 - a file's name
LOG_FOLDER_NAME: Final = "logs"

#: How addresses of servers that encrypt begin.
TLS_SCHEME: Final = "tls://"
#: What the certificate that a server made for itself is for, whatever its address.
OWN_NAME: Final = "nos-server"
#: What the certificates of workers are for, whatever their addresses.
WORKER_NAME: Final = "nos-internal"

_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """How to reach the backend of a state folder."""

    address: str
    """Where its gateway listens, as `nos.connect` takes it on this machine."""
    pid: int
    """The supervisor's process id."""
    token_file: str
    """Absolute path of the file that holds the token."""
    remote_address: str = ""
    """The same for other machines; empty if they cannot reach it."""
    dashboard_url: str = ""
    """Where the Dask dashboard listens; empty if there is none."""
    version: str = ""
    """Version of the program."""
    started_s: float = 0.0
    """When it became ready, in seconds since 1970."""
    start_ticks: int = 0
    """The supervisor's start time as `/proc` gives it, so that a reused pid is another; 0 if unknown."""

    def read_token(self) -> str:
        """Return the token.

        Raises:
            OSError: If the file cannot be read.
        """
        return Path(self.token_file).read_text(encoding="utf-8").strip()


def state_dir() -> Path:
    """Return `$NOS_STATE_DIR`, else `$XDG_STATE_HOME/nos`, else `~/.local/state/nos`; it need not exist."""
    if given := os.environ.get("NOS_STATE_DIR"):
        return Path(given).expanduser().absolute()
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given).expanduser().absolute() / "nos"
    return Path.home() / ".local" / "state" / "nos"


def write_backend(folder: Path, record: BackendRecord) -> None:
    """Leave word in `folder`, at once and whole.

    Raises:
        OSError: If it cannot be written.
    """
    temporary = folder / f".{RECORD_NAME}.{os.getpid()}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file, indent=2)
        temporary.replace(folder / RECORD_NAME)
    finally:
        temporary.unlink(missing_ok=True)


def remove_backend(folder: Path, pid: int) -> None:
    """Take back the word of process `pid`; another's is left alone."""
    record = _read_record(folder)
    if record is not None and record.pid == pid:
        (folder / RECORD_NAME).unlink(missing_ok=True)


def read_backend(folder: Path) -> BackendRecord | None:
    """Return the record of the backend that lives in `folder`; None if there is none, or it is dead."""
    record = _read_record(folder)
    if record is None or not is_alive(record.pid, record.start_ticks):
        return None
    return record


def _read_record(folder: Path) -> BackendRecord | None:
    try:
        found = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        known = {field.name: str(field.type) for field in fields(BackendRecord)}
        # A float without decimals may come back as an int.
        kinds = {"str": str, "int": int, "float": int | float}
        if not all(isinstance(found[name], kinds[known[name]]) for name in found.keys() & known):
            return None
        return BackendRecord(**{name: found[name] for name in found if name in known})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def start_ticks(pid: int) -> int:
    """Return when process `pid` started, in the kernel's ticks since boot; 0 if it is gone or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The command, in parentheses, may hold spaces: fields count from behind it.
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(rest[18])


def is_alive(pid: int, started_ticks: int = 0) -> bool:
    """Tell whether process `pid` runs; a zombie does not, nor another process under its old number.

    Args:
        pid: Its number.
        started_ticks: What `start_ticks` gave when it was known to be the right one; 0 if unknown.
    """
    if Path("/proc/self/stat").exists():
        ticks = start_ticks(pid)
        return ticks != 0 and started_ticks in (0, ticks)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def stop_backend(folder: Path, timeout_s: float = 45.0) -> BackendRecord | None:
    """End the backend of `folder` in order and wait until it is gone.

    Returns:
        The record of the backend that ended; None if none ran.

    Raises:
        TimeoutError: If it runs on after `timeout_s`, though a second signal ends it at once.
        PermissionError: If it belongs to somebody else.
    """
    record = read_backend(folder)
    if record is None:
        return None
    deadline = time.monotonic() + timeout_s
    for patience_s in (timeout_s - 5.0, 5.0):
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
        limit = min(deadline, time.monotonic() + max(patience_s, _POLL_S))
        while time.monotonic() < limit:
            if not is_alive(record.pid, record.start_ticks):
                return record
            time.sleep(_POLL_S)
    raise TimeoutError(f"the backend (pid {record.pid}) still runs after {timeout_s:.0f} s")


def log_files(folder: Path) -> list[Path]:
    """Return the log files of the backend's processes, in order of names; rotated ones end `.log.1`."""
    return sorted((folder / LOG_FOLDER_NAME).glob("*.log"))


@contextlib.contextmanager
def lock(folder: Path, name: str = "start", *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `name` of a state folder; it ends with the process at the latest. POSIX only.

    Args:
        folder: The state folder; made (0700) if missing.
        name: `start` while a backend is being started, `serve` as long as one lives.
        wait: False raises at once where somebody else holds it.

    Raises:
        BlockingIOError: If somebody else holds it and `wait` is False.
        OSError: If the folder cannot be written, or the platform has no such locks.
    """
    if fcntl is None:
        raise OSError("no file locks on this platform: a backend needs Linux")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
