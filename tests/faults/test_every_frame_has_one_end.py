"""Row A6: whatever is killed, results and typed errors together are the frames that were accepted."""

import os
import signal
import subprocess
import sys
import threading
import time

import nos
import psutil
import pytest
from nos.errors import NosError

from tests.servers import FAKE_MODELS, start_server, wait_for

pytestmark = pytest.mark.accept("A6")

NUM_STREAMS = 8
#: What each frame asks the model to sleep, and what it answers.
FRAME_S = 0.005


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of this module's own: it is going to be hurt."""
    folder = tmp_path_factory.mktemp("killed")
    running = start_server(folder, "--models", str(FAKE_MODELS), "--idle-shutdown-s", "0")
    yield running
    running.stop()


class Traffic:
    """Streams that send until told to stop, and count what comes back."""

    def __init__(self, server, via="auto", model="fake/slow"):
        self.server, self.via, self.model = server, via, model
        self.sent = self.results = self.typed = self.wrong = 0
        self.other = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run) for _ in range(NUM_STREAMS)]

    def run(self):
        with nos.connect(
            self.server.address, token_file=self.server.token_file, via=self.via
        ) as client:
            model = client.model(self.model)
            while not self.stopping.is_set():
                self.run_stream(model)

    def count(self, result):
        with self.lock:
            if result.error is None:
                self.results += 1
                self.wrong += result.value != FRAME_S
            elif isinstance(result.error, NosError):
                self.typed += 1
            else:
                self.other.append(result.error)

    def run_stream(self, model):
        """One stream, until it breaks or all stop."""
        with model.stream(max_pending=8) as stream:

            def receive():
                try:
                    for result in stream:
                        self.count(result)
                except NosError:
                    pass  # it broke, and every frame has its end already

            receiver = threading.Thread(target=receive)
            receiver.start()
            try:
                while not self.stopping.is_set():
                    try:
                        stream.send(FRAME_S)
                    except NosError:
                        break  # not accepted: the caller was told at once
                    with self.lock:
                        self.sent += 1
            finally:
                stream.finish()
                receiver.join(30)
                assert not receiver.is_alive(), "a stream never ended"

    def __enter__(self):
        wait_for(lambda: reachable(self.server), "the gateway is back", 30)
        for thread in self.threads:
            thread.start()
        wait_for(lambda: self.results > 3 * NUM_STREAMS, "traffic flows", 30)
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)

    def flows_again(self):
        before = self.results
        wait_for(lambda: self.results > before + 3 * NUM_STREAMS, "traffic flows again", 30)

    def check(self):
        assert not [thread for thread in self.threads if thread.is_alive()]
        assert self.other == []
        assert self.wrong == 0
        assert self.results + self.typed == self.sent


def reachable(server):
    try:
        nos.connect(server.address, token_file=server.token_file).close()
    except NosError:
        return False
    return True


def find(server, *words):
    """Return the server's processes whose command line has all the words."""
    found = []
    for process in server.processes():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if all(word in line for word in words) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def executor_pid(server, model):
    with nos.connect(server.address, token_file=server.token_file) as client:
        return client.model(model).pid()


def worker_pid(server):
    with nos.connect(server.address, token_file=server.token_file) as client:
        (worker,) = client.status().workers
        return worker.pid


@pytest.mark.parametrize(("via", "model"), [("direct", "fake/slow"), ("relay", "fake/slow-alone")])
def test_executors_are_killed_under_streams(server, via, model):
    killed = set()
    with Traffic(server, via, model) as traffic:
        for _ in range(2):  # a third one within a minute would quarantine the model
            pid = executor_pid(server, model)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            traffic.flows_again()
    traffic.check()
    assert len(killed) == 2
    assert traffic.typed > 0


@pytest.mark.parametrize("via", ["local", "direct", "relay"])
def test_the_worker_is_killed_under_streams(server, via):
    with Traffic(server, via) as traffic:
        os.kill(worker_pid(server), signal.SIGKILL)
        traffic.flows_again()
    traffic.check()
    assert traffic.typed > 0


@pytest.mark.parametrize("via", ["local", "direct", "relay"])
def test_the_gateway_is_killed_under_streams(server, via):
    (gateway,) = find(server, "nos_backend.app")
    with Traffic(server, via) as traffic:
        gateway.send_signal(signal.SIGKILL)
        traffic.flows_again()
    traffic.check()


def test_a_killed_client_leaves_no_work_behind(server):
    code = f"""
import nos
from nos.errors import NosError
client = nos.connect({server.address!r}, token_file={str(server.token_file)!r})
model = client.model("fake/slow")
model(0.0)
calls = [model.submit(0.5) for _ in range(64)]
print("sent", flush=True)
calls[-1].result()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "sent\n"
        process.kill()
    with nos.connect(server.address, token_file=server.token_file) as client:

        def pending():
            (worker,) = client.status().workers
            return worker.num_queued + worker.num_running

        wait_for(lambda: pending() == 0, "the client's frames are gone", 10)
        start = time.monotonic()
        assert client.model("fake/slow")(0.0) == 0.0
        assert time.monotonic() - start < 10
