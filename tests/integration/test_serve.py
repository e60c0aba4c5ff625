"""`nos serve` with all its processes: start, bad input, kills, the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nos
import numpy as np
import psutil
import pytest
from nos.wire.local import read_backend, stop_backend

from tests.servers import Server, start_server, wait_for

pytestmark = pytest.mark.timeout(90)

START_S = 10.0
IDLE_BYTES = 900e6
IDLE_CPU = 0.03


def serve(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `nos serve` where it ends by itself."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOS_")}
    return subprocess.run(
        [sys.executable, "-m", "nos_backend", "serve", *flags],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may harm."""
    server = start_server(tmp_path)
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def hardy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests harm and that has to live on."""
    server = start_server(tmp_path_factory.mktemp("hardy"), "--workers", "2")
    yield server
    server.stop()


def process(server: Server, part: str) -> psutil.Process:
    """Return the process of the server whose command line contains `part`."""
    found = [each for each in server.processes() if part in " ".join(each.cmdline())]
    assert found, server.log()
    return found[0]


def worker_process(server: Server) -> psutil.Process:
    """Return the Dask worker: the nanny's child that is no resource tracker."""
    nanny = process(server, "dask_worker")
    return next(each for each in nanny.children() if "spawn_main" in " ".join(each.cmdline()))


def gone(processes: list[psutil.Process]) -> bool:
    return not [each for each in processes if each.is_running() and each.status() != "zombie"]


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.accept("A1", "A3")
def test_server_starts_quickly_answers_soon_and_leaves_nothing(tmp_path, accept):
    start = time.monotonic()
    server = start_server(tmp_path)
    try:
        ready_s = time.monotonic() - start
        with nos.connect(server.address, token_file=str(server.token_file)) as client:
            answer = client.model("nos/digits").labels(np.zeros((8, 8), np.float32))
        answered_s = time.monotonic() - start
        assert answer.shape == ()
        accept.figure(ready_s, START_S, "s until ready")
        accept.figure(answered_s - ready_s, 3.0, "s more until the first answer")
        assert answers(server.address)
        assert answers(server.dashboard_url.removeprefix("http://").partition("/")[0])
        wait_for(lambda: server.token in server.log_path.read_text(), "the token is printed")
        assert server.token_file.stat().st_mode & 0o777 == 0o600
        assert server.log_path.read_text().count(server.token) == 1
        logs = (server.state_dir / "logs").glob("*.log")
        assert not [log for log in logs if server.token in log.read_text()]
    finally:
        server.stop()
    assert server.process.returncode == 0
    assert {path.name for path in server.state_dir.iterdir()} <= {
        "logs",
        "blobs",
        "environments",
        "files",
        "folders",
        "homes",
        "registry.db",
        "serve.lock",
        "start.lock",
    }


@pytest.mark.long
def test_idle_server_needs_little(own_server, accept):
    time.sleep(3)  # what the start left to do
    processes = own_server.processes()
    before = {each: sum(each.cpu_times()[:2]) for each in processes}
    time.sleep(5)
    used_s = sum(sum(each.cpu_times()[:2]) - before[each] for each in processes)
    accept.figure(used_s / 5, IDLE_CPU, "cores")
    pss_bytes = sum(each.memory_full_info().pss for each in processes)
    accept.figure(pss_bytes / 1e6, IDLE_BYTES / 1e6, "MB")


def test_second_server_of_a_state_folder_is_refused(server):
    done = serve("--state-dir", str(server.state_dir), "--port", "0")
    assert done.returncode == 1
    assert f"already runs at {server.address} (pid {server.process.pid})" in done.stderr
    assert "nos stop" in done.stderr
    assert done.stderr.count("\n") == 1
    assert read_backend(server.state_dir) is not None


def test_port_in_use_is_one_sentence_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve("--state-dir", str(tmp_path), "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"nos serve: cannot listen on 127.0.0.1 port {port}: address already in use. "
        "Choose another with --port, or 0 for any free one\n"
    )
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("flags", "variables", "sentence", "code"),
    [
        (["--prot", "1"], {}, "unknown argument --prot. Did you mean --port?", 2),
        (["--port"], {}, "expected one argument", 2),
        (["--port", "x"], {}, "bad --port: expected a valid integer", 1),
        (["--device", "cuda:9"], {}, "no such device: expected auto or one of cpu", 1),
        (["--state-dir", "/proc/nos"], {}, "cannot write the state folder", 1),
        (["--owner-pid", "4194304"], {}, "no such owner", 1),
        ([], {"NOS_PORT": "x"}, "bad NOS_PORT", 1),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, flags, variables, sentence, code):
    start = ["--state-dir", str(tmp_path)] if "--state-dir" not in flags else []
    done = serve(*start, *flags, **variables)
    assert done.returncode == code
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not [
        path for path in tmp_path.rglob("*") if path.name in {"backend.json", "token", "run"}
    ]


def test_misspelt_variable_is_reported(server):
    done = serve("--state-dir", str(server.state_dir), NOS_PROT="1", NOS_PORT="0")
    assert "unknown variable NOS_PROT is ignored. Did you mean NOS_PORT?" in done.stderr


def test_second_signal_ends_at_once(own_server):
    processes = own_server.processes()
    gateway = process(own_server, "nos_backend.app")
    gateway.suspend()  # it will not drain
    own_server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: read_backend(own_server.state_dir) is None, "it is ending")
    own_server.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    own_server.process.wait(30)
    assert time.monotonic() - start < 8
    wait_for(lambda: gone(processes), "all its processes end")


@pytest.mark.accept("A6")
def test_killed_supervisor_takes_everything_with_it_and_is_started_again(
    own_server, tmp_path, accept
):
    processes = own_server.processes()
    assert len(processes) >= 5
    os.kill(own_server.process.pid, signal.SIGKILL)
    start = time.monotonic()
    own_server.process.wait()
    wait_for(lambda: gone(processes), "all its processes end")
    accept.figure(time.monotonic() - start, 5.0, "s")
    assert read_backend(own_server.state_dir) is None
    start_server(tmp_path).stop()


@pytest.mark.accept("A6")
@pytest.mark.parametrize("part", ["worker", "dask_worker", "nos_backend.app", "dask_scheduler"])
def test_killed_process_is_replaced(hardy_server, part, accept):
    def ready_files() -> set[str]:
        """Those written after the kill; they are what the supervisor itself waits for."""
        found = (hardy_server.state_dir / "run").glob("*.ready")
        return {path.name for path in found if path.stat().st_mtime >= killed_s}

    victim = worker_process(hardy_server) if part == "worker" else process(hardy_server, part)
    name = victim.environ().get("NOS_WORKER_READY_FILE", "gateway.ready").rpartition("/")[2]
    wanted = {"cpu-0.ready", "cpu-1.ready"} if part == "dask_scheduler" else {name}
    killed_s = time.time()
    victim.kill()
    wait_for(lambda: ready_files() >= wanted, f"{part} is replaced")
    accept.figure(time.time() - killed_s, 10.0, "s")
    assert hardy_server.process.poll() is None
    assert len(hardy_server.processes()) >= 8


def test_detached_server_says_the_same_and_stops_on_request(tmp_path):
    state_dir = tmp_path / "state"
    done = serve("--detach", "--json", "--port", "0", "--state-dir", str(state_dir))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    record = read_backend(state_dir)
    assert record is not None
    assert said["address"] == record.address
    assert "token" not in said
    processes = psutil.Process(record.pid).children(recursive=True)
    assert stop_backend(state_dir) == record
    wait_for(lambda: gone(processes), "all its processes end")
    assert stop_backend(state_dir) is None


def test_detached_server_that_cannot_start_says_why(server):
    flags = ["--detach", "--json", "--port", "0", "--state-dir", str(server.state_dir)]
    done = serve(*flags)
    assert done.returncode == 1
    assert "already runs" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.long  # `nos.start()` does the same in test_start.py
def test_server_ends_with_its_owner(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    server = start_server(tmp_path, "--owner-pid", str(owner.pid))
    owner.kill()
    owner.wait()
    assert server.process.wait(20) == 0


def test_unused_server_ends_by_itself(tmp_path):
    server = start_server(tmp_path, "--idle-shutdown-s", "5")
    processes = server.processes()
    assert server.process.wait(20) == 0
    wait_for(lambda: gone(processes), "all its processes end")
