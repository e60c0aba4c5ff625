"""Rows E4 and E5: workers and the scheduler die or stop under streams, and every frame has one end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask.array as da
import nos
import numpy as np
import psutil
import pytest
from nos.errors import NosError

from tests.faults.streaming import Sender, flows
from tests.servers import FAKE_MODELS, start_server, wait_for

MODEL = "fake/slow"
PATIENCE_S = 90.0
#: How long chaos goes on after one fault of each kind.
CHAOS_S = float(os.environ.get("CHAOS_S", "0"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of this module's own, with two workers."""
    folder = tmp_path_factory.mktemp("cluster-faults")
    flags = ("--models", str(FAKE_MODELS), "--device", "cpu", "--workers", "2")
    running = start_server(folder, *flags)
    yield running
    running.stop()


@pytest.fixture
def control(server):
    """A client that is not under test, once both workers are there."""
    with nos.connect(server.address, token_file=server.token_file) as client:
        await_workers(client)
        yield client
        client.scale(MODEL, replicas=1)


def await_workers(client, count=2):
    wait_for(lambda: num_workers(client) == count, f"{count} workers", PATIENCE_S)


def num_workers(client):
    try:
        return len(client.status().workers)
    except NosError:
        return -1


def replicas(client, model=MODEL):
    try:
        return [it.worker for it in client.info(model).replicas if it.phase == "serving"]
    except NosError:
        return []


def pid_of(client, name):
    return next(worker.pid for worker in client.status().workers if worker.name == name)


@contextlib.contextmanager
def traffic(server, vias):
    with contextlib.ExitStack() as stack:
        senders = []
        for via in vias:
            client = nos.connect(server.address, token_file=server.token_file, via=via)
            senders.append(Sender(stack.enter_context(client), MODEL))
        try:
            flows(senders, PATIENCE_S)
            yield senders
        finally:
            for sender in senders:
                sender.stop()


def scheduler_of(server):
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            if "distributed.cli.dask_scheduler" in process.cmdline():
                return process
    raise AssertionError("there is no scheduler")


@pytest.mark.accept("E5", "A6")
def test_streams_go_on_after_the_scheduler_was_killed(server, control, accept):
    with traffic(server, ["auto"] * 6 + ["relay"] * 2) as senders:
        scheduler = scheduler_of(server)
        killed_s = time.monotonic()
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait(30)
        # Its workers end with it; streams must not go on for the last frames of those.
        await_workers(control)
        flows(senders, PATIENCE_S)
        accept.figure(time.monotonic() - killed_s, 10.0, "s until every stream flows again")
    for sender in senders:
        sender.check(num_faults=2)
    assert scheduler_of(server).pid != scheduler.pid


@pytest.mark.accept("E4", "A6")
@pytest.mark.long
def test_a_stopped_worker_is_found_and_its_model_served_elsewhere(server, control, accept):
    control.load(MODEL)
    [name] = replicas(control)
    pid = pid_of(control, name)
    with traffic(server, ["direct", "relay"]) as senders:
        # Both may have been sent elsewhere only if there were more replicas than one.
        os.kill(pid, signal.SIGSTOP)
        try:
            stopped_s = time.monotonic()
            wait_for(
                lambda: (found := replicas(control)) and name not in found,
                "another worker serves",
                PATIENCE_S,
            )
            accept.figure(time.monotonic() - stopped_s, 15.0, "s until another worker serves")
            flows(senders, PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # by now it may have been replaced
                os.kill(pid, signal.SIGCONT)
    for sender in senders:
        sender.check(num_faults=2)


@pytest.mark.accept("E4")
def test_a_killed_workers_model_is_served_again_and_the_gateway_is_told_at_once(control, accept):
    control.load(MODEL)
    [name] = replicas(control)
    heard = []
    with control.events() as events:
        killed_s = time.monotonic()
        os.kill(pid_of(control, name), signal.SIGKILL)
        for event in events:
            heard.append((event.kind, event.worker))
            if heard[-1] == ("worker-lost", name):
                break
        accept.figure(time.monotonic() - killed_s, 0.1, "s until the gateway knew")
    wait_for(lambda: name not in replicas(control, MODEL) and replicas(control), "it is served")
    assert control.model(MODEL)(0.0) == 0.0


@pytest.mark.accept("A6", "E7")
@pytest.mark.long
def test_a_large_job_outlives_a_worker_with_each_row_once_and_in_its_place(control):
    control.scale(MODEL, replicas=2)
    wait_for(lambda: len(replicas(control)) == 2, "two replicas", PATIENCE_S)
    waits_s = np.linspace(0.008, 0.012, 1000)
    blocks = control.model(MODEL).map_blocks(da.from_array(waits_s, chunks=250))
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(blocks.compute, scheduler="threads", num_workers=2)
        answered = counted(control)
        wait_for(lambda: counted(control) >= answered + 60, "a part of the job", PATIENCE_S)
        assert not job.done()
        os.kill(pid_of(control, replicas(control)[0]), signal.SIGKILL)
        assert job.result(PATIENCE_S).tolist() == waits_s.tolist()


def counted(client):
    return sum(it.num_answered for it in client.info(MODEL).replicas)


class Jobs:
    """Large jobs, one after the other, behind everybody's calls; each result is checked."""

    def __init__(self, server):
        self._server = server
        self._is_over = threading.Event()
        self.num_done = 0
        #: Typed errors that ended a job.
        self.errors = []
        self.wrong = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        with nos.connect(self._server.address, token_file=self._server.token_file) as client:
            while not self._is_over.is_set():
                rows = np.linspace(1e-3, 2e-3, 64) + 1e-6 * (self.num_done % 500)
                try:
                    blocks = client.model(MODEL).map_blocks(da.from_array(rows, chunks=16))
                    found = blocks.compute(scheduler="threads", num_workers=2)
                except NosError as error:
                    self.errors.append(error)
                    self._is_over.wait(0.2)
                    continue
                if found.tolist() != rows.tolist():
                    self.wrong.append((rows, found))
                self.num_done += 1

    def stop(self):
        self._is_over.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


class Chaos:
    """Faults, one after the other, and how many there were."""

    def __init__(self, server, control, seed):
        self.server, self.control = server, control
        self.random = random.Random(seed)
        self.counts = {}
        self._executors_killed_s = []

    def strike(self, kind):
        """Do one thing of a kind."""
        if getattr(self, kind)():
            self.counts[kind] = self.counts.get(kind, 0) + 1

    def executor(self):
        # A third crash within a minute would quarantine the model.
        recent = [at for at in self._executors_killed_s if at > time.monotonic() - 60]
        if len(recent) >= 2:
            return False
        self._executors_killed_s = [*recent, time.monotonic()]
        os.kill(self.control.model(MODEL).pid(), signal.SIGKILL)
        return True

    def worker(self):
        await_workers(self.control)
        name = self.random.choice(replicas(self.control) or ["cpu-0"])
        os.kill(pid_of(self.control, name), signal.SIGKILL)
        return True

    def scheduler(self):
        scheduler_of(self.server).send_signal(signal.SIGKILL)
        await_workers(self.control)
        return True

    def scale(self):
        self.control.scale(MODEL, replicas=self.random.choice([1, 2]))
        return True


@pytest.mark.accept("A6", "E2", "E4", "E5", "E7")
@pytest.mark.long
@pytest.mark.timeout(CHAOS_S + 600)
def test_chaos(server, control):
    """Set CHAOS_S for longer than the one round of each that it has by default."""
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    start_s = time.monotonic()
    chaos = Chaos(server, control, seed)
    kinds = ["scale", "executor", "worker", "scale", "scheduler"]
    with traffic(server, ["auto", "auto", "direct", "relay"]) as senders:
        jobs = Jobs(server)
        try:
            for kind in kinds:
                chaos.strike(kind)
                flows(senders, PATIENCE_S)
            while time.monotonic() < start_s + CHAOS_S:
                chaos.strike(chaos.random.choice(kinds[:-1]))
                flows(senders, PATIENCE_S)
            before = jobs.num_done
            wait_for(lambda: jobs.num_done > before, "jobs go on", PATIENCE_S)
        finally:
            jobs.stop()
    num_faults = sum(chaos.counts.values())
    num_lost = sum(sender.check(num_faults) for sender in senders)
    num_sent = sum(sender.num_sent for sender in senders)
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(chaos.counts.items()))
    print(f"seed {seed}, {time.monotonic() - start_s:.0f} s, {num_faults} faults: {counts}")
    print(f"{num_lost} of {num_sent} frames ended in typed errors, every other one in its result")
    print(f"{jobs.num_done} jobs of 64 rows were right, {len(jobs.errors)} ended in typed errors")
    assert set(chaos.counts) == set(kinds)
    assert jobs.wrong == []
    assert all(error.retryable for error in jobs.errors), jobs.errors
