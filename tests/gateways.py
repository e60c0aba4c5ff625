"""A gateway as the supervisor runs it: a process of its own, beside a real scheduler without workers."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import wait_for

TOKEN = "nos_" + "t" * 40
START_S = 30.0

Flags = dict[str, str]
Start = Callable[[Flags], "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Dask scheduler with the plane, without workers and TLS."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("scheduler") / "log").open("wb")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--preload", "nos_backend.cluster.preload"),
        ],
        stdout=log,
        stderr=log,
    )
    yield f"tcp://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)
    log.close()


@pytest.fixture
def flags(tmp_path: Path, scheduler: str) -> Flags:
    """The flags of a gateway with a state folder of its own."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    return {
        "--port": "0",
        "--scheduler": scheduler,
        "--state-dir": str(tmp_path / "state"),
        "--run-dir": str(tmp_path / "run"),
        "--token-file": str(tmp_path / "token"),
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a gateway; one that still runs after the test is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(flags: Flags) -> subprocess.Popen[bytes]:
        arguments = [item for pair in flags.items() for item in pair]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nos_backend.app", *arguments], stdout=log, stderr=log
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def ready(flags: Flags, process: subprocess.Popen[bytes]) -> str:
    """Wait until a gateway serves, and return its address."""
    file = Path(flags["--run-dir"]) / "gateway.ready"
    wait_for(lambda: file.exists() or process.poll() is not None, "the gateway is ready", START_S)
    return file.read_text()


def log_of(flags: Flags) -> str:
    """Return what the gateway that was started last wrote."""
    return (Path(flags["--run-dir"]).parent / "log").read_text()
