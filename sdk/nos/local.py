"""The backend of this user on this machine: joining it, starting it, ending it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nos.client import Client, connect
from nos.errors import ConfigError, NosError, UnavailableError
from nos.wire import local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nos.wire.local import BackendRecord

INSTALL_HINT: Final = 'pip install "nos-inference[backend]"'

#: A first start on a cold disk; a warm one takes seconds.
START_TIMEOUT_S: Final = 120.0

#: A backend that nobody uses ends by itself after so long.
IDLE_SHUTDOWN_S: Final = 600.0

_POLL_S: Final = 0.1


def start(
    *,
    owned: bool = False,
    idle_shutdown_s: float = IDLE_SHUTDOWN_S,
    state_dir: str | Path | None = None,
    progress: bool = True,
    timeout_s: float = START_TIMEOUT_S,
    **serve_options: Any,
) -> Client:
    """Join this user's running backend, or start one that outlives this process.

    Args:
        owned: A backend that is started ends with this process.
        idle_shutdown_s: One that is started ends after so many seconds without clients; 0 for never.
        state_dir: Where it keeps its state; by default `NOS_STATE_DIR`, or the user's own folder.
        progress: Whether to say on standard error that it starts.
        timeout_s: How long that may take.
        **serve_options: Flags of `nos serve`, for instance `models=["./my_models"]`, `device="cpu"`; they
            count only where one is started.

    Raises:
        UnavailableError: If it cannot be started; says why, in its own words.
        ConfigError: If the backend is not installed, or refuses an option.
    """
    folder = Path(state_dir).expanduser().absolute() if state_dir else local.state_dir()
    try:
        with local.lock(folder):
            record = local.read_backend(folder)
            if record is None:
                # Any free port: the record says which, and machines are shared.
                flags = {"port": 0, "idle_shutdown_s": idle_shutdown_s, **serve_options}
                if owned:
                    flags["owner_pid"] = os.getpid()
                record = _launch(folder, flags, progress, timeout_s)
    except NosError:  # some of them are OSErrors too
        raise
    except OSError as error:
        raise ConfigError(
            "the state folder cannot be used",
            "state_dir",
            "a folder that this user may write",
            f"{folder}: {error}",
            "Set NOS_STATE_DIR to another",
        ) from error
    return connect(record.address, token_file=record.token_file)


def stop(*, state_dir: str | Path | None = None) -> bool:
    """End this user's running backend, in order; return False if none ran.

    Raises:
        UnavailableError: If it does not end.
    """
    folder = Path(state_dir).expanduser().absolute() if state_dir else local.state_dir()
    try:
        return local.stop_backend(folder) is not None
    except (TimeoutError, PermissionError) as error:
        raise UnavailableError("the backend does not end", "pid", got=str(error)) from error


def to_flags(options: Mapping[str, Any]) -> list[str]:
    """Return options of `nos serve` as its command line takes them."""
    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif isinstance(value, list | tuple):
            for item in value:
                flags += [flag, str(item)]
        elif value is not None and value is not False:
            flags += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return flags


def check_installed() -> None:
    """Return if the server's part of the distribution is there.

    Raises:
        ConfigError: If it is not; says how to install it.
    """
    if importlib.util.find_spec("nos_backend") is None or not importlib.util.find_spec(
        "distributed"
    ):
        raise ConfigError("the backend is not installed here", hint=f"Install it: {INSTALL_HINT}")


def _launch(
    folder: Path, options: Mapping[str, Any], progress: bool, timeout_s: float
) -> BackendRecord:
    check_installed()
    _wait_for_the_last(folder, timeout_s)
    command = [sys.executable, "-m", "nos_backend", "serve", "--detach", "--json"]
    command += ["--state-dir", str(folder), *to_flags(options)]
    # Not a pipe: what the backend's processes inherit of it would keep its end open.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        _Progress(progress),
    ):
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                "the backend did not start in time",
                "timeout_s",
                f"ready within {timeout_s:g} s",
                hint=f"See the logs in {folder / local.LOG_FOLDER_NAME}",
            ) from error
        record = local.read_backend(folder)
        if code or record is None:
            said.seek(0)
            lines = [line.strip() for line in said if line.strip()]
            raise UnavailableError(
                "the backend did not start",
                got=lines[-1].removeprefix("nos serve: ")[:400] if lines else f"exit code {code}",
                hint=f"See the logs in {folder / local.LOG_FOLDER_NAME}, or run `nos serve`",
            )
    return record


def _wait_for_the_last(folder: Path, timeout_s: float) -> None:
    """Wait while a backend that no longer answers is still ending."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with local.lock(folder, "serve", wait=False):
                return
        except BlockingIOError:
            if time.monotonic() > deadline:
                return  # `nos serve` says it better
            time.sleep(_POLL_S)


class _Progress:
    """Says on standard error what takes so long, and how long it took."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._begun_s = time.monotonic()
        self._is_over = threading.Event()

    def __enter__(self) -> None:
        if self._is_shown:
            threading.Thread(target=self._tick, daemon=True).start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._is_over.set()
        if self._is_shown:
            end = f"ready after {self._elapsed_s():.1f} s" if kind is None else "failed"
            sys.stderr.write(f"\rStarting the NOS backend: {end}\n")
            sys.stderr.flush()

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begun_s

    def _tick(self) -> None:
        while not self._is_over.wait(0.5):
            sys.stderr.write(f"\rStarting the NOS backend: {self._elapsed_s():.0f} s")
            sys.stderr.flush()
