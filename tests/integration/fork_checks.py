"""A fork of the user's process: the child calls models, and the parent's live stream goes on.

Collected by `test_fork.py` alone, in a process of its own.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings

import nos
import pytest
from nos import errors

from tests.fakes.server import NAME, TOKEN
from tests.servers import ROOT, wait_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

#: The server has a process of its own: this one must be like a user's, with clients only.
SERVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.fakes.server import FakeServer
server = FakeServer()
print(server.address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture
def address():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.stdout.close()
    process.wait(20)


class Busy:
    """A live stream in this process: frames in flight all the time."""

    def __init__(self, client):
        self.stream = client.model(NAME).stream()
        self.num_results = 0
        self.longest_gap_s = 0.0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self.threads:
            thread.start()

    def _send(self):
        while not self.stop.is_set():
            self.stream.send(b"x" * 1000)
        self.stream.finish()

    def _receive(self):
        last_s = time.monotonic()
        for result in self.stream:
            assert result.error is None
            now_s = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
            last_s = now_s
            self.num_results += 1

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        self.stream.close()


@pytest.fixture
def client(address):
    with nos.connect(address, token=TOKEN) as connected:
        yield connected


@pytest.fixture
def busy(client):
    running = Busy(client)
    wait_for(lambda: running.num_results > 20, "the stream is live")
    yield running
    running.end()


def run_in_fork(work):
    """Run `work` in a forked child; return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            gc.collect()
            code = 0
        except BaseException as error:  # noqa: BLE001 - the child ends here
            sys.stderr.write(f"in the child: {error!r}\n")
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hung"


def test_forked_children_call_while_the_parents_stream_is_live(client, busy):
    model = client.model(NAME)

    def work():
        assert model.add(1, b=2) == 3
        assert list(model.count(3)) == [0, 1, 2]
        with model.stream() as stream:
            for value in range(30):
                stream.send(value)
            assert [result.value for result in stream] == list(range(30))
        assert client.status().state == "ready"

    for _ in range(4):
        before = busy.num_results
        assert run_in_fork(work) == 0
        wait_for(lambda before=before: busy.num_results > before, "the parent's stream goes on")
    assert model.add(1) == 3


def test_a_fork_costs_the_parents_stream_no_second(client, busy):
    for _ in range(10):
        assert run_in_fork(lambda: None) == 0
    assert busy.longest_gap_s < 5.0


def test_errors_are_the_same_in_a_forked_child(client, busy):
    model = client.model(NAME)

    def work():
        with pytest.raises(errors.ModelError, match="boo"):
            model.fail("boo")
        with pytest.raises(errors.ModelNotFoundError):
            client.model("no/such")

    assert run_in_fork(work) == 0


def test_streams_and_calls_of_the_parent_say_that_they_are_stale(client, busy):
    model = client.model(NAME)
    stream, call = model.stream(), model.wait.submit(0.5)

    def work():
        with pytest.raises(errors.StreamClosedError, match="forked"):
            stream.send(1)
        with pytest.raises(errors.UnavailableError, match="forked"):
            call.result()

    assert run_in_fork(work) == 0
    stream.close()


def test_a_fork_of_a_fork_calls_too(client, busy):
    model = client.model(NAME)

    def work():
        assert model.add(1) == 3
        assert run_in_fork(lambda: model.add(1)) == 0

    assert run_in_fork(work) == 0


class _Shared:
    model = None


def _add_two(value):
    return _Shared.model.add(value)


def test_pool_of_forked_processes_shares_the_model(client, busy):
    _Shared.model = client.model(NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_add_two, range(20)) == [value + 2 for value in range(20)]
            pool.close()
            pool.join()


def test_data_loader_workers_call_the_model(client, busy):
    torch_data = pytest.importorskip("torch.utils.data")

    class Embedded(torch_data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return model.add(index)

    model = client.model(NAME)
    loader = torch_data.DataLoader(Embedded(), batch_size=2, num_workers=2)
    assert [value for batch in loader for value in batch.tolist()] == list(range(2, 10))


def test_a_child_that_never_used_grpc_needs_no_helper(address):
    """A client made in the child, of a parent without one, runs gRPC itself."""
    code = f"""
import os, sys
import nos
import nos.client
pid = os.fork()
if pid == 0:
    client = nos.connect({address!r}, token={TOKEN!r})
    assert client.model({NAME!r}).add(1) == 3
    from nos import _fork
    assert not _fork.is_tainted()
    client.close()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
