"""A server that is not root's: it serves, and holds its models as well as its user can."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nos
import pytest
from nos.errors import ModelError
from nos_backend.executor.confinement import landlock_version

from tests.servers import Server, start_server

#: `nobody`.
USER = 65534
SOURCE = """
import os

class Curious:
    def __call__(self, path: str) -> str:
        with open(path) as file:
            return file.read()

    def user(self) -> int:
        return os.getuid()
"""


def can_enter() -> bool:
    """Whether that user can run this environment's Python and what it imports."""
    command = [sys.executable, "-c", "import nos_backend.supervisor"]
    done = subprocess.run(
        command, user=USER, group=USER, extra_groups=[], cwd="/", check=False, capture_output=True
    )
    return done.returncode == 0


@pytest.fixture
def server() -> Iterator[Server]:
    if os.geteuid() != 0:
        pytest.skip("only root starts processes of other users")
    if not can_enter():
        pytest.skip("other users cannot enter this checkout")
    with tempfile.TemporaryDirectory(prefix="nos-user-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        home = folder / "home"
        (folder / "state").mkdir()
        home.mkdir()
        for owned in (folder / "state", home):
            os.chown(owned, USER, USER)
        running = start_server(
            folder, "--idle-shutdown-s", "0", environment={"HOME": str(home)}, user=USER
        )
        yield running
        running.stop()


@pytest.mark.accept("F6")
@pytest.mark.long
def test_a_server_of_an_ordinary_user_serves_and_keeps_its_secrets(server: Server) -> None:
    assert {process.uids().real for process in server.processes()} == {USER}
    with nos.connect(server.address, token_file=server.token_file) as client:
        client.register(SOURCE, name="me/curious")
        model = client.model("me/curious")
        assert model.user() == USER
        (worker,) = client.status().workers
        assert worker.confinement.tier == ("landlock" if landlock_version() else "own process")
        assert "root" in worker.confinement.lacks
        assert model("/etc/hostname")
        if landlock_version():
            for secret in (server.token_file, server.state_dir / "registry.db"):
                with pytest.raises(ModelError, match="PermissionError"):
                    model(str(secret))
