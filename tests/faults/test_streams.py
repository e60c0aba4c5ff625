"""Row D7: a stream outlives what it runs on; only frames in flight are lost, and each says so."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nos
import numpy as np
import psutil
import pytest
from nos import _control
from nos._session import Session
from nos.errors import NosError

from tests.faults.streaming import WINDOW, Sender, flows
from tests.network import Host
from tests.servers import FAKE_MODELS, ROOT, start_server, wait_for

NUM_STREAMS = 8


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
        executor = psutil.Process(client.model(model).pid())
    ancestors = {process.pid for process in executor.parents()}
    (pid,) = ancestors & set(both_workers(server))
    return pid


@pytest.mark.accept("D7", "A6")
@pytest.mark.parametrize(
    "via", [*(pytest.param(via, marks=pytest.mark.long) for via in ("local", "direct")), "relay"]
)
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
@pytest.mark.parametrize("via", ["local", pytest.param("relay", marks=pytest.mark.long)])
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
@pytest.mark.parametrize("via", [pytest.param("local", marks=pytest.mark.long), "relay"])
def test_streams_continue_when_the_gateway_is_restarted(server, via, accept):
    with traffic(server, via) as senders:
        (gateway,) = find(server, "nos_backend.app")
        gateway.send_signal(signal.SIGKILL)
        gateway.wait(30)
        listens_s = wait_for(lambda: is_reachable(server) and time.monotonic(), "it is back", 60)
        flows(senders)
        back_s = time.monotonic()
    num_lost = sum(sender.check(num_faults=1) for sender in senders)
    # None, but those of a stream that loses its connection once more while it finds the new one.
    assert num_lost <= (WINDOW if via == "relay" else 0)
    if via == "relay":
        accept.figure(back_s - listens_s, 2.0, "s until every relayed stream flows again")


def is_reachable(server):
    try:
        connect(server).close()
    except NosError:
        return False
    return True


@pytest.mark.accept("D7", "A6")
def test_a_worker_that_is_asked_to_end_loses_no_frame(server):
    both_workers(server)
    pid = holder(server, "fake/slow")
    with (
        traffic(server, "local", num_streams=2) as near,
        traffic(server, "relay", num_streams=2) as far,
    ):
        psutil.Process(pid).parent().send_signal(signal.SIGTERM)
        wait_for(lambda: not psutil.pid_exists(pid), "the worker has ended", 60)
        flows([*near, *far])
    assert [sender.check(num_faults=0) for sender in (*near, *far)] == [0] * 4


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


class Client:
    """A client that streams in a process of its own."""

    def __init__(self, stack, server, via, address="", prefix=()):
        program = [sys.executable, "-m", "tests.faults.streaming"]
        place = [address or server.address, str(server.token_file), via, "fake/slow"]
        self.process = stack.enter_context(
            subprocess.Popen(
                [*prefix, *program, *place],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
        stack.callback(self.process.kill)

    def flows(self):
        before = self.num_results()
        wait_for(lambda: self.num_results() > before + 3, "the client's stream flows", 60)

    def num_results(self):
        self.process.stdin.write("results\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def stop(self):
        """End it; return how many frames it lost, after its own check of row A6."""
        self.process.stdin.close()
        said = self.process.stdout.readline()
        assert self.process.wait(60) == 0
        return json.loads(said)["lost"]


@pytest.mark.accept("D2", "A6")
@pytest.mark.long
def test_stuck_clients_are_cut_and_others_are_served(server, accept):
    """Two that never read and three that are stopped."""
    item = np.zeros(4 << 20, np.uint8)
    with traffic(server, "auto", num_streams=2) as senders, contextlib.ExitStack() as stack:
        stopped = [Client(stack, server, via) for via in ("local", "direct", "relay")]
        for client in stopped:
            client.flows()
        num_good = len(senders)
        wait_for(lambda: num_streams(server) == num_good + 3, "nobody else is there", 60)
        bytes_before = own_bytes(server)
        # First this one: what it asks for would wait behind a generator that nobody reads.
        stack.enter_context(unread_stream(server, "relay", "__call__", (item,), WINDOW))
        stack.enter_context(unread_stream(server, "local", "repeat", (item, 1000), 1))
        wait_for(lambda: num_streams(server) == num_good + 5, "all are there", 60)
        since_s = time.monotonic()
        for client in stopped:
            client.process.send_signal(signal.SIGSTOP)
        flows(senders)
        wait_for(lambda: num_streams(server) == num_good, "the stuck are cut", 60)
        accept.figure(time.monotonic() - since_s, 16.5, "s until stuck clients are cut")
        assert own_bytes(server) - bytes_before < 6 * WINDOW * item.nbytes
        flows(senders)
        for client in stopped:
            client.process.send_signal(signal.SIGCONT)
            client.flows()
        for client in stopped:
            client.stop()
    assert [sender.check(num_faults=0) for sender in senders] == [0, 0]


@contextlib.contextmanager
def unread_stream(server, via, method, arguments, num_frames):
    """Send frames to `nos/echo` over a bare stream, and read nothing but the welcome."""
    with connect(server, via) as client:
        client._engine.wait(_control.load("nos/echo"))
        duplex = client._engine._find_route("nos/echo", None, "").open()
        session = Session(duplex.pack)
        duplex.put(duplex.wrap(session.hello("test")))
        messages = duplex.messages()
        while not session.is_welcomed:
            session.take(*next(messages))
        for _ in range(num_frames):
            call = client.model("nos/echo").method(method)._prepare(arguments, {}, None)
            for message in session.send(call.frame)[1]:
                duplex.put(message)
        try:
            yield
        finally:
            duplex.put(None)
            duplex.cancel()


class Port:
    """A port of this machine on the way to another one, which leads to the server."""

    def __init__(self, stack, host, server):
        place, _, port = server.address.rpartition(":")
        self.target = place, int(port)
        self.listener = stack.enter_context(socket.create_server((host.gateway, 0)))
        self.address = f"{host.gateway}:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], socket.create_connection(self.target)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.forward, args=pair, daemon=True).start()

    @staticmethod
    def forward(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.accept("D7", "A6")
@pytest.mark.long
def test_a_link_that_swallows_everything_is_noticed_by_both_ends(server, accept):
    with traffic(server, "auto", num_streams=1) as senders, contextlib.ExitStack() as stack:
        host = Host(stack)
        port = Port(stack, host, server)
        client = Client(stack, server, "auto", port.address, host.inside)
        client.flows()
        wait_for(lambda: num_streams(server) == 2, "nobody else is there", 60)
        since_s = time.monotonic()
        host.cut()
        wait_for(lambda: num_streams(server) == 1, "the server notices", 60)
        accept.figure(time.monotonic() - since_s, 16.0, "s until the server notices")
        flows(senders)
        host.mend()
        client.flows()
        assert client.stop() <= WINDOW
    assert senders[0].check(num_faults=0) == 0


def num_streams(server):
    return sum(worker.num_streams for worker in workers(server).values())


def own_bytes(server):
    """Return the memory of the server's processes that is nobody else's."""
    total = 0
    for process in server.processes():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(status.partition("RssAnon:")[2].split()[0]) << 10
    return total
