"""Row E6: a cluster of three machines, put together by hand as docs/cluster.md says; TLS everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nos
import pytest
import torch

from tests.faults.streaming import Sender, flows
from tests.network import Host
from tests.servers import FAKE_MODELS, ROOT, start_server, wait_for

MODEL = "fake/slow"
PROGRAMS = Path(sys.executable).parent
PATIENCE_S = 90.0


def hiding(folder):
    """Begin a command line in whose mounts a folder is empty; it has mounts of its own already."""
    return "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder


class Machines:
    """This machine with scheduler and gateway, and two others with a worker each."""

    def __init__(self, stack, folder, state_dir):
        self.stack, self.folder = stack, folder
        #: The gateway's, which the other machines do not see.
        self.state_dir = state_dir
        self.hosts = [Host(stack), Host(stack)]
        self.certs = folder / "certs"
        subprocess.run([PROGRAMS / "nos", "cluster", "certs", self.certs], check=True)
        place = folder / "scheduler.json"
        self.start(
            "scheduler",
            *(PROGRAMS / "dask", "scheduler", "--preload", "nos_backend.cluster.preload"),
            *("--protocol", "tls", "--host", self.hosts[0].gateway, "--port", "0"),
            *("--no-dashboard", "--scheduler-file", place, *self.flags("scheduler")),
        )
        wait_for(place.exists, "the scheduler listens")
        self.scheduler = json.loads(place.read_text())["address"]
        for number, host in enumerate(self.hosts):
            self.start_worker(f"far-{number}", host)

    def flags(self, role):
        files = {"ca-file": "ca", "cert": "cert", "key": "key"}
        return [f"--tls-{flag}={self.certs / role / name}.pem" for flag, name in files.items()]

    def start_worker(self, name, host, *, role="worker", kind="nos_backend.cluster.ServingWorker"):
        return self.start(
            name,
            *(*host.inside, *hiding(self.state_dir)),
            *(PROGRAMS / "dask", "worker", self.scheduler, "--worker-class", kind),
            *("--name", name, "--nworkers", "1", "--nthreads", "2", "--memory-limit", "0"),
            *("--no-dashboard", "--local-directory", self.folder / "dask", *self.flags(role)),
        )

    def start(self, name, *command):
        inherited = {key: it for key, it in os.environ.items() if not key.startswith("NOS_")}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                env={**inherited, "NOS_WORKER_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.stack.callback(self.end, process)
        return process

    @staticmethod
    def end(process):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        state_dir = tmp_path_factory.mktemp("gateway")
        yield Machines(stack, tmp_path_factory.mktemp("machines"), state_dir)


@pytest.fixture(scope="module")
def server(machines):
    running = start_server(
        machines.state_dir,
        *("--scheduler", machines.scheduler, "--tls-dir", str(machines.certs / "client")),
        *("--device", "none", "--models", str(FAKE_MODELS), "--idle-shutdown-s", "0"),
    )
    yield running
    running.stop()


@pytest.fixture
def control(server):
    """A client that is not under test, once both workers serve the model."""
    with nos.connect(server.address, token_file=server.token_file) as client:
        wait_for(lambda: len(ready(client)) == 2, "two workers", PATIENCE_S)
        client.scale(MODEL, replicas=2)
        wait_for(lambda: serving(client) == {"far-0", "far-1"}, "both serve", PATIENCE_S)
        yield client


def ready(client):
    return [worker for worker in client.status().workers if not worker.note]


def serving(client, model=MODEL):
    return {replica.worker for replica in client.info(model).replicas if replica.phase == "serving"}


@pytest.mark.accept("E6")
@pytest.mark.parametrize("via", ["direct", "relay"])
def test_both_machines_answer_over_tls(machines, server, control, via):
    hosts = {host.address for host in machines.hosts}
    assert {it.address.rpartition(":")[0] for it in control.status().workers} == hosts
    with nos.connect(server.address, token_file=server.token_file, via=via) as client:
        model = client.model(MODEL)
        pids = set()
        wait_for(lambda: len(pids.add(model.pid()) or pids) == 2, "both answer", PATIENCE_S)
        assert all(route.startswith(via) for route in client._engine.routes().values())


@pytest.mark.accept("E6")
@pytest.mark.long
def test_weights_of_a_notebook_reach_machines_that_do_not_see_the_gateways_files(
    machines, server, control
):
    network = torch.nn.Linear(512, 512)
    control.register(network, name="sent", init={"in_features": 512, "out_features": 512})
    control.scale("sent", replicas=2)
    wait_for(lambda: len(serving(control, "sent")) == 2, "both serve it", PATIENCE_S)
    rows = torch.ones(3, 512)
    model = control.model("sent")
    for _ in range(8):
        assert torch.allclose(torch.as_tensor(model(rows)), network(rows))
    kept = list((machines.folder / "dask").glob("**/files/*/.nos/weights.safetensors"))
    assert len(kept) == 2
    control.unregister("sent")


@pytest.mark.accept("E6", "A6")
@pytest.mark.long
def test_a_machine_that_is_cut_off_and_back_costs_only_frames_on_their_way(
    machines, server, control, accept
):
    with contextlib.ExitStack() as stack:
        senders = []
        for via in ("direct", "direct", "relay", "relay"):
            client = nos.connect(server.address, token_file=server.token_file, via=via)
            senders.append(Sender(stack.enter_context(client), MODEL))
        try:
            flows(senders, PATIENCE_S)
            machines.hosts[1].cut()
            cut_s = time.monotonic()
            wait_for(lambda: serving(control) == {"far-0"}, "it is given up", PATIENCE_S)
            flows(senders, PATIENCE_S)
            accept.figure(time.monotonic() - cut_s, 20.0, "s until every stream flows again")
            machines.hosts[1].mend()
            wait_for(lambda: len(serving(control)) == 2, "it serves again", PATIENCE_S)
            flows(senders, PATIENCE_S)
        finally:
            for sender in senders:
                sender.stop()
    num_lost = [sender.check(num_faults=1) for sender in senders]
    assert sum(num_lost) > 0


@pytest.mark.long
def test_a_worker_of_another_version_is_given_nothing_and_status_says_so(machines, control):
    kind = "tests.fakes.old_worker.OldWorker"
    process = machines.start_worker("old", machines.hosts[0], kind=kind)
    try:
        wait_for(lambda: "old" in {it.name for it in control.status().workers}, "it connects")
        (old,) = (it for it in control.status().workers if it.name == "old")
        assert old.note.startswith("it runs nos-inference 0.0.1, and this scheduler ")
        assert "gets no models: it runs nos-inference 0.0.1" in str(control.status())
        control.scale(MODEL, replicas=3)
        wait_for(lambda: control.info(MODEL).scaling.pending, "the third is pending")
        assert serving(control) == {"far-0", "far-1"}
    finally:
        machines.end(process)
        control.scale(MODEL, replicas=2)


@pytest.mark.accept("E6")
@pytest.mark.long
def test_a_worker_with_a_certificate_for_clients_does_not_start(machines, control):
    process = machines.start_worker("wrong", machines.hosts[0], role="client")
    assert process.wait(PATIENCE_S) != 0
    assert "one for clients only" in machines.log("wrong")
    assert len(control.status().workers) == 2
