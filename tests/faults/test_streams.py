"""Row D7: a stream outlives what it runs on; only frames in flight are lost, and each says so."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import nos
import psutil
import pytest
from nos.errors import NosError, UnavailableError

from tests.servers import FAKE_MODELS, start_server, wait_for

NUM_STREAMS = 8
#: What each frame asks the model to sleep, and what it answers.
FRAME_S = 0.005
#: The server's window.
WINDOW = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of this module's own, with two workers."""
    folder = tmp_path_factory.mktemp("streams")
    flags = ("--models", str(FAKE_MODELS), "--idle-shutdown-s", "0", "--device", "cpu")
    running = start_server(folder, *flags, "--workers", "2")
    yield running
    running.stop()


def connect(server, via="auto"):
    return nos.connect(server.address, token_file=server.token_file, via=via)


class Sender:
    """One stream for the whole fault, a thread that sends, and one that counts the ends."""

    def __init__(self, client, model):
        self.stream = client.model(model).stream(max_pending=WINDOW)
        self.num_sent = 0
        #: By frame: its value or its error; a second end would be seen here.
        self.ends = {}
        self.doubled = []
        self.broken = None
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=run) for run in (self.send, self.receive)]
        for thread in self.threads:
            thread.start()

    def send(self):
        while not self.stopping.is_set():
            try:
                self.stream.send(FRAME_S)
            except NosError as error:
                self.broken = error
                break
            self.num_sent += 1
        self.stream.finish()

    def receive(self):
        for result in self.stream:
            if result.seq in self.ends:
                self.doubled.append(result.seq)
            self.ends[result.seq] = result.error or result.value

    @property
    def num_results(self):
        return sum(not isinstance(end, NosError) for end in list(self.ends.values()))

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        self.stream.close()

    def check(self, num_faults):
        """Row A6 for this stream: every frame has one end, in order, and few are errors."""
        assert self.broken is None
        assert self.doubled == []
        assert list(self.ends) == list(range(1, self.num_sent + 1))
        errors = [end for end in self.ends.values() if isinstance(end, NosError)]
        assert all(isinstance(error, UnavailableError) for error in errors), errors
        assert all(error.retryable for error in errors)
        assert len(errors) <= num_faults * WINDOW
        assert self.num_results + len(errors) == self.num_sent
        return len(errors)


@contextlib.contextmanager
def traffic(server, via, model="fake/slow", num_streams=NUM_STREAMS):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server, via)) for _ in range(num_streams)]
        senders = [Sender(client, model) for client in clients]
        try:
            flows(senders)
            yield senders
        finally:
            for sender in senders:
                sender.stop()


def flows(senders):
    """Wait until each stream has brought a few results more."""
    before = [sender.num_results for sender in senders]
    wait_for(
        lambda: all(
            sender.num_results > num + 3 for sender, num in zip(senders, before, strict=True)
        ),
        "every stream flows",
        60,
    )


def workers(server):
    with connect(server) as client:
        return {worker.pid: worker for worker in client.status().workers}


def both_workers(server):
    return wait_for(lambda: (it := workers(server)) and len(it) == 2 and it, "two workers", 60)


def find(server, *words):
    """Return the server's processes whose command line has all the words."""
    found = []
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if all(word in line for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def holder(server, model):
    """Return the process id of the worker that has the model on its device."""
    with connect(server) as client:
        executor = client.model(model).pid()
    for pid in both_workers(server):
        if any(process.pid == executor for process in find(server) if pid in ancestors(process)):
            return pid
    raise AssertionError(f"no worker has {model}")


def ancestors(process):
    return {parent.pid for parent in process.parents()}


@pytest.mark.accept("D7", "A6")
@pytest.mark.parametrize("via", ["local", "direct", "relay"])
def test_streams_continue_on_another_worker_when_theirs_is_killed(server, via):
    both_workers(server)
    pid = holder(server, "fake/slow")
    with traffic(server, via) as senders:
        os.kill(pid, signal.SIGKILL)
        flows(senders)
        taken_over_by = holder(server, "fake/slow")
    num_lost = sum(sender.check(num_faults=1) for sender in senders)
    assert num_lost > 0
    assert taken_over_by != pid


@pytest.mark.accept("D7", "A6")
@pytest.mark.parametrize("via", ["local", "relay"])
def test_streams_continue_when_executors_are_killed(server, via):
    model = f"fake/slow{'-alone' if via == 'local' else ''}"
    killed = set()
    with traffic(server, via, model) as senders:
        for _ in range(2):  # a third one within a minute would quarantine the model
            with connect(server) as client:
                pid = client.model(model).pid()
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            flows(senders)
    assert len(killed) == 2
    assert sum(sender.check(num_faults=2) for sender in senders) > 0


@pytest.mark.accept("D7", "A6")
@pytest.mark.parametrize("via", ["local", "relay"])
def test_streams_continue_when_the_gateway_is_restarted(server, via, accept):
    with traffic(server, via) as senders:
        (gateway,) = find(server, "nos_backend.app")
        gateway.send_signal(signal.SIGKILL)
        gateway.wait(30)
        listens_s = wait_for(lambda: is_reachable(server) and time.monotonic(), "it is back", 60)
        flows(senders)
        back_s = time.monotonic()
    num_lost = sum(sender.check(num_faults=1) for sender in senders)
    if via == "relay":
        assert num_lost > 0
        accept.figure(back_s - listens_s, 2.0, "s until every relayed stream flows again")
    else:
        assert num_lost == 0


def is_reachable(server):
    try:
        connect(server).close()
    except NosError:
        return False
    return True


@pytest.mark.accept("A6", "D3")
def test_a_killed_client_leaves_no_work_behind(server):
    code = f"""
import nos
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
    wait_for(lambda: num_pending(server) == 0, "the client's frames are gone", 30)
    with connect(server) as client:
        assert client.model("fake/slow")(0.0) == 0.0


def num_pending(server):
    """Return how many frames wait or run at the workers."""
    return sum(worker.num_queued + worker.num_running for worker in workers(server).values())
