"""Workers come and go at a word, or as the models need them; whoever leaves is drained first."""

from __future__ import annotations

import json
import subprocess
import sys

import nos
import pytest

from tests.integration.test_replicas import DIGEST, Traffic, serving
from tests.servers import start_server, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = ("--workers", "1", "--device", "cpu", "--scale-down-s", "2")
    running = start_server(tmp_path_factory.mktemp("crew"), *flags)
    yield running
    running.stop()


@pytest.fixture
def client(server):
    with nos.connect(server.address, token_file=str(server.token_file)) as connected:
        connected.register(DIGEST, name="digest")
        yield connected


def workers(client, count):
    wait_for(lambda: len(client.status().workers) == count, f"{count} workers", 90)


@pytest.mark.accept("E9", "E2")
def test_a_worker_that_is_let_go_loses_no_answer(client):
    assert client.scale_workers(2) == ["cpu-0", "cpu-1"]
    workers(client, 2)
    client.scale("digest", replicas=2)
    serving(client, 2)
    with Traffic(client.model("digest"), num_threads=4) as traffic:
        wait_for(lambda: len(traffic.pids) == 2 or traffic.errors, "both replicas answer")
        with pytest.raises(nos.errors.InvalidRequestError, match="must have 2 replicas"):
            client.scale_workers(1)
        client.scale("digest", replicas=1)
        assert client.scale_workers(1) == ["cpu-0"]
        workers(client, 1)
        traffic.more(20)
    assert traffic.errors == []
    assert traffic.num_answered == traffic.num_sent


@pytest.mark.accept("E3")
def test_workers_follow_what_models_need(client):
    client.scale("digest", replicas=1)
    client.scale_workers(min=1, max=2)
    workers(client, 1)
    client.scale("digest", replicas=2)
    serving(client, 2)
    client.scale("digest", replicas=1)
    workers(client, 1)
    client.scale_workers(1)


def test_numbers_of_workers_that_make_no_sense_are_refused(client):
    for numbers in ((0, 1), (2, 1), (1, 1000)):
        with pytest.raises(nos.errors.InvalidRequestError, match=f"{numbers[0]} to {numbers[1]}"):
            client.scale_workers(min=numbers[0], max=numbers[1])


def test_workers_from_the_command_line(server, client):
    command = [sys.executable, "-m", "nos.cli", "--address", server.address]
    command += ["--token-file", str(server.token_file), "cluster", "scale", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {"workers": ["cpu-0"]}
