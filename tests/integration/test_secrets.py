"""Row F6: no secret of a server's is where others look, and no public port is without TLS."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import nos
import pytest
from nbclient import NotebookClient
from nos.errors import ModelError, NosError

from tests.servers import Server, start_server

pytestmark = pytest.mark.accept("F6")

CANARY = "canary-51c0"
#: As a user's shell has them; the supervisor, the gateway and the workers inherit them, executors must not.
VARIABLES = {
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "HF_TOKEN": CANARY,
    "CUDA_CANARY_KEY": CANARY,
    "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
    "NO_PROXY": "*",
}
SOURCE = """
class Fails:
    def __call__(self, x: int) -> int:
        print("asked for", x)
        raise ValueError(f"no {x}")
"""
NOTEBOOK = (
    "import nos\nclient = nos.connect()\nclient",
    "client.status()",
    "client.models()",
    "print(repr(client), client.status(), client.info('me/fails'))",
    "client.model('me/fails')",
    "client.model('me/fails')(3)",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server at the level that says most, with secrets planted in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--log-level", "debug", "--metrics-port", str(port), "--idle-shutdown-s", "0")
    folder = tmp_path_factory.mktemp("secrets")
    running = start_server(folder, *flags, environment=VARIABLES)
    running.metrics_url = f"http://127.0.0.1:{port}/metrics"  # type: ignore[attr-defined]
    yield running
    running.stop()


@pytest.fixture(scope="module")
def secrets(server: Server) -> dict[str, bytes]:
    """What must be nowhere: tokens, the body of a private key, and the planted variables."""
    key = (server.state_dir / "run" / "tls" / "key.pem").read_text()
    body = max(key.splitlines(), key=len)
    with nos.connect(server.address, token_file=server.token_file) as client:
        ann = client.create_token("ann", role="author").secret
    found = {"token": server.token, "token of ann": ann, "TLS key": body, "variable": CANARY}
    return {name: text.encode() for name, text in found.items()}


@pytest.fixture(scope="module")
def told(server: Server, secrets: dict[str, bytes]) -> str:
    """All that an author is told while a server is used, rightly and wrongly."""
    said = []
    with nos.connect(server.address, token=secrets["token of ann"].decode()) as client:
        client.register(SOURCE, name="me/fails")
        with pytest.raises(ModelError) as failed:
            client.model("me/fails")(3)
        said += [
            str(failed.value),
            failed.value.remote_traceback,
            repr(client),
            str(client.status()),
        ]
        said += [json.dumps(client.status().to_dict(), default=str), str(client.logs("me/fails"))]
        with pytest.raises(NosError) as refused:
            client.create_token("eve")
        said.append(str(refused.value))
    for wrong in ("nos_wrong", secrets["token"].decode() + "x"):
        with pytest.raises(NosError) as unknown:
            nos.connect(server.address, token=wrong).status()
        said.append(str(unknown.value))
    return "\n".join(map(str, said))


def found_in(secrets: dict[str, bytes], data: bytes) -> list[str]:
    return [
        name
        for name, secret in secrets.items()
        if secret in data or base64.b64encode(secret) in data or secret.hex().encode() in data
    ]


def test_answers_and_tracebacks_have_none(secrets, told):
    assert found_in(secrets, told.encode()) == []


def test_logs_have_none(server, secrets, told):
    logs = sorted((server.state_dir / "logs").glob("*.log"))
    assert len(logs) >= 3
    assert {log.name: found_in(secrets, log.read_bytes()) for log in logs} == {
        log.name: [] for log in logs
    }


def test_metrics_have_none(server, secrets, told):
    with urllib.request.urlopen(server.metrics_url, timeout=30) as answer:
        metrics = answer.read()
    assert b"nos_" in metrics
    assert found_in(secrets, metrics) == []


def test_the_registry_and_what_is_beside_it_have_none(server, secrets, told):
    files = [
        path
        for path in server.state_dir.rglob("*")
        if path.is_file() and path.name != "token" and "tls" not in path.parts
    ]
    assert any(path.name == "registry.db" for path in files)
    assert {path: names for path in files if (names := found_in(secrets, path.read_bytes()))} == {}


def test_executors_and_their_fork_server_know_no_secret(server, secrets, told):
    environments = {
        process.pid: Path(f"/proc/{process.pid}/environ").read_bytes()
        for process in server.processes()
        if process.name().startswith("nos:")
    }
    assert len(environments) >= 2
    assert all(environments.values())
    assert [found_in(secrets, each) for each in environments.values()] == [[]] * len(environments)
    if os.geteuid() == 0:  # nobody else may look
        assert CANARY in Path(f"/proc/{server.process.pid}/environ").read_text()


def test_an_executed_notebook_has_none(server, secrets, told, tmp_path):
    cells = [nbformat.v4.new_code_cell(code) for code in NOTEBOOK]
    cells[-1].metadata["tags"] = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    place = {"NOS_ADDRESS": server.address, "NOS_TOKEN_FILE": str(server.token_file)}
    runner = NotebookClient(notebook, timeout=90, kernel_name="python3")
    runner.execute(env={**VARIABLES, **place, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    written = nbformat.writes(notebook)
    assert "ValueError" in written
    assert found_in(secrets, written.encode()) == []


def test_the_sdk_logs_none(server, secrets, told, caplog):
    connected = nos.connect(server.address, token_file=server.token_file)
    with caplog.at_level(logging.DEBUG), connected as client:
        assert client.model("nos/echo")(1) == 1
        client.status()
    assert found_in(secrets, caplog.text.encode()) == []


def test_a_gateway_without_tls_refuses_a_public_address(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("nos_" + "t" * 40)
    command = [sys.executable, "-m", "nos_backend.app", "--host", "0.0.0.0", "--port", "0"]
    flags = ("--scheduler", "tcp://127.0.0.1:1", "--state-dir", str(tmp_path / "state"))
    folders = ("--run-dir", str(tmp_path / "run"), "--token-file", str(tmp_path / "token"))
    done = subprocess.run(
        [*command, *flags, *folders], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "a public address needs TLS" in done.stderr
