"""nos.start() and nos.stop() with a real backend."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nos
import pytest
from nos import errors
from nos.local import to_flags
from nos.wire import local

from tests.servers import find_weights, wait_for


@pytest.fixture
def state(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    monkeypatch.setenv("NOS_STATE_DIR", str(folder))
    monkeypatch.setenv("NOS_WEIGHTS_DIR", str(find_weights(tmp_path / "weights")))
    monkeypatch.delenv("NOS_ADDRESS", raising=False)
    yield folder
    nos.stop()


def test_start_makes_one_backend_however_many_ask(state):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: nos.start(progress=False), range(2))
    assert first.address == second.address
    with nos.connect() as found:
        assert found.status().source == "this user's running backend"
        assert found.model("nos/echo").digest(b"abc").startswith("ba7816bf")
    first.close()
    second.close()
    assert nos.stop()
    assert not nos.stop()
    assert local.read_backend(state) is None


@pytest.mark.accept("A6")
@pytest.mark.long
def test_killed_worker_ends_calls_with_a_typed_error_and_the_next_ones_work(state, accept):
    client = nos.start(progress=False)
    client.register(
        "import time\nclass Slow:\n    def __call__(self, s: float) -> float:\n"
        "        time.sleep(s)\n        return s\n",
        name="test/slow",
        class_name="Slow",
    )
    model = client.model("test/slow")
    assert model(0.0) == 0.0
    calls = [model.submit(30.0) for _ in range(4)]
    [worker] = client.status().workers
    os.kill(worker.pid, signal.SIGKILL)
    begun_s = time.monotonic()
    for call in calls:
        with pytest.raises(errors.UnavailableError):
            call.result(20)
    accept.figure(time.monotonic() - begun_s, 2.0, "s until every frame had its error")

    def answers():
        try:
            return model(0.5) == 0.5
        except errors.NosError:
            return False

    wait_for(answers, "the model answers again", 30.0)
    client.close()


def test_owned_backend_ends_with_its_owner(state):
    code = "import nos; nos.start(owned=True, progress=False); print('ready')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=True
    )
    assert done.stdout == "ready\n"
    wait_for(lambda: local.read_backend(state) is None, "the backend ends")


def test_what_the_backend_refuses_is_told_in_its_words(state):
    with pytest.raises(errors.UnavailableError, match=r"did not start: got .*device"):
        nos.start(progress=False, device="tpu")


def test_state_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ConfigError, match="state folder cannot be used"):
        nos.start(state_dir=tmp_path / "file" / "state", progress=False)


def test_options_become_flags():
    options = {"idle_shutdown_s": 600.0, "models": ["a", "b"], "device": None, "quiet": True}
    assert to_flags(options) == [
        "--idle-shutdown-s",
        "600",
        "--models",
        "a",
        "--models",
        "b",
        "--quiet",
    ]
