"""Replicas of a model: calls spread over them, and none is lost while their number changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nos
import numpy as np
import psutil
import pytest

from tests.servers import Server, start_server, wait_for

NUM_WORKERS = 3
DIGEST = '''
import hashlib
import os

import torch


class Digest:
    """Says what it was given, and where."""

    def __call__(self, x: torch.Tensor) -> dict:
        return {"digest": hashlib.sha256(x.numpy().tobytes()).hexdigest(), "pid": os.getpid()}
'''


BUSY = """
import hashlib
import os


class Busy:
    def __call__(self) -> int:
        digest = hashlib.sha256()
        for _ in range(24):
            digest.update(bytes(1 << 20))
        return os.getpid()
"""

SLOW = """
import time


class Slow:
    def __call__(self, x: int) -> int:
        time.sleep(0.2)
        return x
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(
        tmp_path_factory.mktemp("replicas"),
        *("--workers", str(NUM_WORKERS), "--device", "cpu"),
        environment={"NOS_SCALE_DOWN_S": "3"},
    )
    yield running
    running.stop()


@pytest.fixture(params=["auto", pytest.param("relay", marks=pytest.mark.long)])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[nos.Client]:
    token_file = str(server.token_file)
    with nos.connect(server.address, token_file=token_file, via=request.param) as connected:
        connected.register(DIGEST, name="digest")
        yield connected
        connected.unregister("digest")


def phases(client: nos.Client, name: str) -> list[str]:
    return [replica.phase for replica in client.info(name).replicas]


def serving(client: nos.Client, count: int, name: str = "digest") -> None:
    """Wait until so many replicas serve, and no other is left."""
    wait_for(lambda: phases(client, name) == ["serving"] * count, f"{count} replicas of {name}")


class Traffic:
    """Threads that call without a pause, check each answer, and count."""

    def __init__(self, model: Any, num_threads: int) -> None:
        self._model, self._num_threads = model, num_threads
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.num_sent = self.num_answered = 0
        self.pids: set[int] = set()
        self.errors: list[BaseException] = []

    def __enter__(self) -> Traffic:
        self._pool = ThreadPoolExecutor(self._num_threads)
        for number in range(self._num_threads):
            self._pool.submit(self._run, number)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown()

    def _run(self, number: int) -> None:
        import hashlib

        random = np.random.default_rng(number)
        while not self._is_over.is_set():
            x = random.random(16, dtype=np.float32)
            with self._lock:
                self.num_sent += 1
            try:
                answer = self._model(x)
                assert answer["digest"] == hashlib.sha256(x.tobytes()).hexdigest()
            except BaseException as error:  # noqa: BLE001 - counted, and shown by the test
                with self._lock:
                    self.errors.append(error)
            else:
                with self._lock:
                    self.num_answered += 1
                    self.pids.add(answer["pid"])

    def more(self, count: int) -> None:
        """Wait for so many more answers."""
        goal = self.num_answered + count
        wait_for(lambda: self.num_answered >= goal or self.errors, f"{count} more answers")


@pytest.mark.accept("E1")
def test_calls_go_to_all_replicas_and_each_gets_its_own_answer(client, accept):
    client.scale("digest", replicas=NUM_WORKERS)
    serving(client, NUM_WORKERS)
    with Traffic(client.model("digest"), num_threads=32) as traffic:
        wait_for(lambda: len(traffic.pids) == NUM_WORKERS or traffic.errors, "all replicas answer")
        traffic.more(5000 if accept.strict else 300)
    assert traffic.errors == []
    assert traffic.num_answered == traffic.num_sent


@pytest.fixture
def four_workers(server: Server) -> Iterator[nos.Client]:
    with nos.connect(server.address, token_file=str(server.token_file)) as client:
        client.scale_workers(4)
        wait_for(lambda: len(client.status().workers) == 4, "four workers")
        yield client
        for name in ("digest", "busy"):
            client.unregister(name)
        client.scale_workers(NUM_WORKERS)
        wait_for(lambda: len(client.status().workers) == NUM_WORKERS, "as many as before")


@pytest.mark.accept("E1")
@pytest.mark.long
def test_two_and_four_replicas_and_thirty_two_threads(four_workers, accept):
    four_workers.register(DIGEST, name="digest")
    four_workers.register(BUSY, name="busy")
    for count in (2, 4):
        four_workers.scale("digest", replicas=count)
        serving(four_workers, count)
        with Traffic(four_workers.model("digest"), num_threads=32) as traffic:
            wait_for(lambda t=traffic, n=count: len(t.pids) == n or t.errors, "all answer")
            traffic.more(5000 if accept.strict else 300)
        assert traffic.errors == []
        assert traffic.num_answered == traffic.num_sent
    rates = {count: busy_calls_per_s(four_workers, count) for count in (1, 2)}
    if len(os.sched_getaffinity(0)) > 1:
        accept.figure(rates[2] / rates[1], 1.7, "times the calls of one replica", at_least=True)


def busy_calls_per_s(client: nos.Client, count: int) -> float:
    """Return the rate of a model that computes, each of its replicas on a core of its own."""
    client.scale("busy", replicas=count)
    serving(client, count, "busy")
    names = [replica.worker for replica in client.info("busy").replicas]
    pids = {worker.name: worker.pid for worker in client.status().workers}
    cores = sorted(os.sched_getaffinity(0))
    for number, name in enumerate(names):
        root = psutil.Process(pids[name])
        for process in (root, *root.children(recursive=True)):
            process.cpu_affinity([cores[number % len(cores)]])
    model, seen = client.model("busy"), set()
    wait_for(lambda: len(seen.add(model()) or seen) == count, "all answer")
    with ThreadPoolExecutor(4 * count) as pool:
        start_s = time.perf_counter()
        answered = list(pool.map(lambda _: model(), range(60 * count)))
        took_s = time.perf_counter() - start_s
    assert len(set(answered)) == count
    return len(answered) / took_s


@pytest.mark.accept("E2", "E9")
def test_no_answer_is_lost_while_replicas_come_and_go(client):
    client.scale("digest", replicas=1)
    serving(client, 1)
    with Traffic(client.model("digest"), num_threads=8) as traffic:
        traffic.more(50)
        client.scale("digest", replicas=NUM_WORKERS)
        serving(client, NUM_WORKERS)
        wait_for(lambda: len(traffic.pids) >= NUM_WORKERS or traffic.errors, "all replicas answer")
        client.scale("digest", replicas=1)
        serving(client, 1)
        traffic.more(50)
    assert traffic.errors == []
    assert traffic.num_answered == traffic.num_sent


@pytest.mark.accept("E9")
def test_a_stream_moves_on_when_its_replica_leaves(client):
    client.scale("digest", replicas=2)
    serving(client, 2)
    model = client.model("digest")
    with model.stream() as stream:
        for _ in range(3):
            stream.send(np.zeros(4, np.float32))
        first = {next(stream).value["pid"] for _ in range(3)}
        client.scale("digest", replicas=1)
        serving(client, 1)
        pids = []
        for _ in range(20):
            stream.send(np.zeros(4, np.float32))
            pids.append(next(stream).value["pid"])
    assert len(first) == 1
    assert len(pids) == 20


def test_what_cannot_be_placed_is_pending_and_says_why(client):
    info = client.scale("digest", replicas=NUM_WORKERS + 1)
    serving(client, NUM_WORKERS)
    info = client.info("digest")
    assert info.scaling.target_replicas == NUM_WORKERS + 1
    assert info.scaling.pending == "every worker that could has a replica already"
    assert "some are missing" in str(info)


def test_constraints_that_nobody_meets_leave_it_pending_with_the_reason(client):
    client.scale("digest", replicas=1, device="cuda")
    assert client.info("digest").scaling.pending == "no worker has such a device: cuda"
    with pytest.raises(nos.errors.LoadError, match="no worker has such a device"):
        client.model("digest")(np.zeros(4, np.float32))
    info = client.scale("digest", replicas=1, device="cpu", memory_bytes=1, placement="pack")
    assert (info.spec.memory_bytes, info.spec.placement) == (1, "pack")
    serving(client, 1)
    for options in ({"device": "tpu"}, {"placement": "heap"}, {"memory_bytes": -1}):
        with pytest.raises(nos.errors.InvalidRequestError, match=next(iter(options))):
            client.scale("digest", replicas=1, **options)


@pytest.mark.accept("E3")
def test_load_brings_replicas_and_rest_takes_them_away(server, client):
    client.register(SLOW, name="slow")
    client.scale("slow", min=0, max=2)
    assert client.info("slow").replicas == ()
    heard: list[str] = []
    feed = client.events()
    listener = threading.Thread(
        target=lambda: heard.extend(
            f"{event.kind} {event.message}" for event in feed if event.model.startswith("slow")
        )
    )
    listener.start()
    model = client.model("slow")
    with ThreadPoolExecutor(8) as pool:
        deadline = time.monotonic() + 60
        while phases(client, "slow") != ["serving"] * 2 and time.monotonic() < deadline:
            assert list(pool.map(model, range(16))) == list(range(16))
    assert any("calls waited" in line for line in heard)
    serving(client, 0, "slow")
    assert model(3) == 3
    wait_for(lambda: any("no call for 3 s" in line for line in heard), "the reason of the last")
    feed.close()
    listener.join()
    client.unregister("slow")


def test_scale_from_the_command_line(server, client):
    command = [sys.executable, "-m", "nos.cli", "--address", server.address]
    command += ["--token-file", str(server.token_file), "scale", "digest", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["scaling"]["target_replicas"] == 2
    wrong = subprocess.run(
        [*command[:-2], "--min", "3", "--max", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert wrong.returncode != 0
    assert "3 to 2" in wrong.stderr + wrong.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "how many"),
        ({"replicas": 0}, "0 to 0"),
        ({"min": 3, "max": 2}, "3 to 2"),
        ({"replicas": 2, "max": 3}, "how many"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(client, options, said):
    with pytest.raises(nos.errors.InvalidRequestError, match=said):
        client.scale("digest", **options)
    with pytest.raises(nos.errors.ModelNotFoundError):
        client.scale("nobody", replicas=1)
