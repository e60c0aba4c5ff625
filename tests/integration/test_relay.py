"""The relayed path on the real road: gateway, worker, executor."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nos
import numpy as np
import psutil
import pytest
from nos.errors import ExecutorLostError, ModelError, UnavailableError

from tests.servers import FAKE_MODELS, start_server, wait_for


@pytest.fixture
def relayed(server):
    with nos.connect(server.address, token_file=str(server.token_file), via="relay") as client:
        yield client


def test_frames_of_any_size_come_back_as_they_went(relayed):
    echo = relayed.model("nos/echo")
    for size in (0, 1, 1 << 14, 1 << 20, 5_000_000):
        sent = np.random.default_rng(size).integers(0, 255, size, np.uint8)
        np.testing.assert_array_equal(echo(sent), sent)


def test_sixteen_threads_get_their_own_answers(relayed):
    digest, wrong = relayed.model("nos/echo").digest, []

    def work(seed):
        for index in range(20):
            array = np.full(1000, seed * 100 + index, np.int32)
            if digest(array) != digest(array.copy()):
                wrong.append((seed, index))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_items_of_a_generator_come_one_by_one(relayed):
    model = relayed.model("fake/stream")
    assert list(model.count(100)) == list(range(100))
    items = []
    with pytest.raises(ModelError, match="after 3"):
        items.extend(model.fail_after(3))


def test_closed_generator_ends_at_the_model(relayed):
    # Where the server is root, models are a user of their own and see nothing new around its state folder.
    with TemporaryDirectory(dir="/dev/shm") as folder:
        Path(folder).chmod(0o777)
        told = Path(folder) / "end"
        items = relayed.model("fake/stream").tell_end(str(told))
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        items.close()
        wait_for(told.exists, "the generator's finally ran", 30)


def test_lost_executor_costs_its_frame_and_the_stream_goes_on(relayed):
    model = relayed.model("fake/crash")
    assert model(1) == 1
    with pytest.raises(ExecutorLostError):
        model.kill()
    assert model(2) == 2


@pytest.mark.long  # streams over the relay outlive their worker in faults/test_streams.py
def test_lost_worker_is_a_typed_error_at_once_and_another_takes_over(tmp_path):
    server = start_server(tmp_path, "--models", str(FAKE_MODELS), "--idle-shutdown-s", "0")
    try:
        with nos.connect(server.address, token_file=str(server.token_file), via="relay") as client:
            slow = client.model("fake/slow")
            assert slow(0.0) == 0.0
            call = slow.submit(60.0)
            pid = client.status().workers[0].pid
            wait_for(lambda: client.status().workers[0].num_running, "the call runs")
            assert psutil.pid_exists(pid)
            os.kill(pid, signal.SIGKILL)
            start_s = time.monotonic()
            with pytest.raises(UnavailableError):
                call.result(30)
            assert time.monotonic() - start_s < 10

            def answers():
                try:
                    return slow(0.0) == 0.0
                except UnavailableError:
                    return False

            wait_for(answers, "another worker answers", 30)
    finally:
        server.stop()
