"""Real Jupyter servers on loopback, each with folders of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers import wait_for

TOKEN = "a-test-token"
START_S = 90.0


@dataclass(kw_only=True)
class Response:
    """What a server answered."""

    code: int
    headers: dict[str, str]
    cookies: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(kw_only=True)
class Jupyter:
    """A running Jupyter server."""

    process: subprocess.Popen[bytes]
    origin: str
    base_url: str
    log_path: Path

    def fetch(
        self,
        path: str,
        *,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Response:
        """Send one request, with the right token unless `headers` are given."""
        connection = http.client.HTTPConnection(urlsplit(self.origin).netloc, timeout=20)
        wanted = {"Authorization": f"token {TOKEN}"} if headers is None else headers
        try:
            connection.request(method, self.base_url + path, body=body, headers=wanted)
            answer = connection.getresponse()
            cookies = [line.split(";")[0] for line in answer.headers.get_all("Set-Cookie", [])]
            return Response(
                code=answer.status,
                headers=dict(answer.headers),
                cookies="; ".join(cookies),
                body=answer.read(),
            )
        finally:
            connection.close()

    def is_up(self) -> bool:
        """Whether it answers."""
        assert self.process.poll() is None, self.log_path.read_text()[-4000:]
        try:
            return self.fetch("api/status").code == 200
        except OSError:
            return False


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def isolated(folder: Path) -> dict[str, str]:
    """Return an environment in which Jupyter, IPython and NOS keep everything in `folder`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOS_")}
    names = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "NOS_STATE_DIR": "nos",
        "XDG_CONFIG_HOME": "xdg",
    }
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    return {
        **inherited,
        **{name: str(folder / sub) for name, sub in names.items()},
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


@contextmanager
def jupyter(
    folder: Path, *flags: str, app: str = "server", environment: dict[str, str] | None = None
) -> Iterator[Jupyter]:
    """Run a Jupyter server with its files in `folder`, and its notebooks in `folder/notebooks`.

    Args:
        folder: A fresh folder; on the server's import path.
        flags: Further flags.
        app: `server` or `lab`.
        environment: Added to the isolated one.
    """
    notebooks = folder / "notebooks"
    notebooks.mkdir(exist_ok=True)
    log_path = folder / "jupyter.log"
    port = free_port()
    base_url = "/a%40b/"
    command = [
        sys.executable,
        "-m",
        "jupyter",
        app,
        "--no-browser",
        "--ip=127.0.0.1",
        "--allow-root",
    ]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.base_url={base_url}"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={notebooks}"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, *flags],
            env={**isolated(folder), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Jupyter(
        process=process, origin=f"http://127.0.0.1:{port}", base_url=base_url, log_path=log_path
    )
    try:
        wait_for(running.is_up, "the Jupyter server answers", START_S)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
