"""A server that is not root's: it serves, and holds its models as well as its user can."""

from __future__ import annotations

import os
import shutil
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


#: Becomes a program of that user, in whose view of the machine nobody is kept out of Python's folder.
ENTER = """
set -e
closed=$1 inside=$2 aside=$3
shift 3
if [ -n "$closed" ]; then
  mount --bind "$inside" "$aside"
  mount -t tmpfs -o mode=755 tmpfs "$closed"
  mkdir -p "$inside"
  mount --bind "$aside" "$inside"
fi
exec setpriv --reuid={user} --regid={user} --clear-groups --inh-caps=-all --bounding-set=-all "$@"
""".replace("{user}", str(USER))


def closed_folder(path: Path) -> str:
    """Return the topmost folder above a path that others may not enter; empty if there is none."""
    parents = [*reversed(path.parents), path]
    return next((str(each) for each in parents if not each.stat().st_mode & 0o001), "")


def entering(folder: Path) -> list[str]:
    """Return what starts a program as that user."""
    python = Path(sys.base_prefix).resolve()
    closed, aside = closed_folder(python), folder / "aside"
    aside.mkdir()
    arguments = (closed, str(python), str(aside))
    return ["unshare", "--mount", "sh", "-c", ENTER, "sh", *arguments]


@pytest.fixture
def server() -> Iterator[Server]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv"))):
        pytest.skip("only root starts processes of other users")
    with tempfile.TemporaryDirectory(prefix="nos-user-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for owned in (folder / "state", folder / "home"):
            owned.mkdir()
            os.chown(owned, USER, USER)
        through = entering(folder)
        tried = subprocess.run(
            [*through, sys.executable, "-c", "import nos_backend.supervisor"],
            cwd="/",
            check=False,
            capture_output=True,
        )
        if tried.returncode:
            pytest.skip(f"other users cannot run this: {tried.stderr.decode()[-200:]}")
        home = {"HOME": str(folder / "home"), "TMPDIR": "/tmp"}
        running = start_server(folder, "--idle-shutdown-s", "0", environment=home, through=through)
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
