"""Executors killed, crashing and hanging: every frame has one end, and neighbours do not notice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from nos.errors import (
    DeadlineExceededError,
    ExecutorLostError,
    LoadError,
    ModelError,
    NosError,
    QuarantinedError,
)

from tests.accept import Accept
from tests.plane import Plane, definitions, fake_models, running_plane
from tests.servers import wait_for

CRASH = "fake/crash@v1"
ECHO = """
import nos
import time

@nos.model(name="echo")
class Echo:
    def __call__(self, x, s: float = 0.0):
        time.sleep(s)
        return x
"""

FRAGILE = """
import nos
import os

@nos.model(name="fragile")
class Fragile:
    def __call__(self, x):
        if not x.any():
            os._exit(3)
        return x
"""


@pytest.fixture(scope="module")
def shared_plane() -> Iterator[Plane]:
    with running_plane({}) as running:
        yield running


@pytest.fixture
def plane(shared_plane: Plane) -> Iterator[Plane]:
    """Models as new: unloading one forgets its crashes."""
    models = fake_models("crashing", "slow")
    (models["echo"],) = definitions(ECHO, "echo.py", owner="ada")
    del models["fake/slow-load"], models["fake/slow-alone"]
    for definition in models.values():
        shared_plane.load(definition)
    yield shared_plane
    for item in shared_plane.status()["models"]:
        shared_plane.unload(item["key"])


class Neighbour:
    """Calls a model of another owner all the time, and keeps its errors and its slowest answer."""

    def __init__(self, plane: Plane) -> None:
        self.num_calls = 0
        self.slowest_s = 0.0
        self.wrong: list[object] = []
        self._plane = plane
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._call)

    def _call(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                value = self._plane.run("echo@v1", "", self.num_calls)
                if value != self.num_calls:
                    self.wrong.append(value)
            except NosError as error:
                self.wrong.append(error)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            self.num_calls += 1
            self._stop.wait(0.01)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def assert_one_end_each(found: dict[int, Any], num_sent: int) -> tuple[int, int]:
    """Return how many frames succeeded and how many were lost with their executor."""
    assert sorted(found) == list(range(1, num_sent + 1))
    lost = [value for value in found.values() if isinstance(value, ExecutorLostError)]
    right = [seq for seq, value in found.items() if value == seq]
    assert len(lost) + len(right) == num_sent, found
    return len(right), len(lost)


@pytest.mark.accept("A6", "B9")
def test_every_frame_has_one_end_when_executors_are_killed_under_eight_streams(
    accept: Accept,
) -> None:
    """Several models, so that no single one is killed three times within the window."""
    models = {}
    for index in range(8):
        source = ECHO.replace('"echo"', f'"echo{index}"')
        (models[str(index)],) = definitions(source, "echo.py", owner=f"owner{index}")
    chance = random.Random(1)
    num_kills = num_right = num_lost = 0
    with running_plane(models) as plane:
        streams = [plane.stream(f"echo{index}@v1") for index in range(8)]
        for _ in range(16):
            for stream in streams:
                stream.send(stream._last_seq + 1, 0.02)
        for index in chance.sample(range(8), 6):
            os.kill(plane.executor_pids()[f"owner{index}"], signal.SIGKILL)
            num_kills += 1
            time.sleep(chance.uniform(0, 0.05))
        for stream in streams:
            right, lost = assert_one_end_each(stream.results(), 16)
            num_right, num_lost = num_right + right, num_lost + lost
        for index in range(8):
            assert plane.run(f"echo{index}@v1", "", index) == index
    assert num_kills == 6
    assert num_right + num_lost == 128
    accept.figure(num_lost / num_kills, 1, "frames lost per kill")


@pytest.mark.accept("B9")
def test_a_killed_executor_serves_again_within_a_second(plane: Plane, accept: Accept) -> None:
    slowest_s = 0.0
    with Neighbour(plane) as neighbour:
        for _ in range(2):
            pid = plane.run(CRASH, "pid")
            os.kill(pid, signal.SIGKILL)
            started = time.monotonic()
            wait_for(lambda: answers(plane), "it answers again")
            slowest_s = max(slowest_s, time.monotonic() - started)
            assert plane.run(CRASH, "pid") != pid
    assert neighbour.wrong == []
    assert neighbour.num_calls > 0
    accept.figure(slowest_s, 1.0, "s until it serves again")


def answers(plane: Plane) -> bool:
    try:
        return bool(plane.run(CRASH, "", 7) == 7)
    except ExecutorLostError:
        return False


@pytest.mark.accept("B9", "A6")
@pytest.mark.parametrize("method", ["exit", "segfault", "kill"])
def test_a_crash_fails_the_call_that_ran_and_not_those_that_waited(
    plane: Plane, method: str
) -> None:
    stream = plane.stream(CRASH)
    stream.send(1)
    stream.send(method=method)
    stream.send(3)
    found = stream.results()
    assert (found[1], found[3]) == (1, 3)
    assert isinstance(found[2], ExecutorLostError)


@pytest.mark.accept("B9", "A6")
def test_calls_sent_ahead_of_a_crash_are_made_again_with_their_own_bytes(plane: Plane) -> None:
    (fragile,) = definitions(FRAGILE, "fragile.py", owner="eve")
    plane.load(fragile)
    stream = plane.stream("fragile@v1")
    for number in range(40):  # from then on it is known to be quick
        stream.send(np.full(4096, 1 + number))
        stream.result()
    for number in range(16):
        stream.send(np.full(4096, number - 8))
    found = stream.results()
    assert isinstance(found.pop(49), ExecutorLostError)
    assert {seq: set(value) for seq, value in found.items()} == {
        seq: {seq - 49} for seq in range(41, 57) if seq != 49
    }


@pytest.mark.accept("B9")
def test_the_third_crash_quarantines_that_model_only(plane: Plane) -> None:
    plane.load(fake_models("slow")["fake/slow-alone"])
    with Neighbour(plane) as neighbour:
        for _ in range(3):
            with pytest.raises(ExecutorLostError):
                plane.run(CRASH, "exit")
        with pytest.raises(QuarantinedError, match="3 times within 60 s"):
            plane.run(CRASH, "", 1)
        with pytest.raises(QuarantinedError):
            plane.load(fake_models("crashing")["fake/crash"])
        assert plane.run("fake/slow@v1", "", 0.0) == 0.0
        assert plane.run("fake/slow-alone@v1", "", 0.0) == 0.0
    assert neighbour.wrong == []
    assert plane.model(CRASH)["state"] == "failed"
    assert ("quarantined", CRASH) in {event[:2] for event in plane.events}


def test_unloading_a_quarantined_model_gives_it_another_chance(plane: Plane) -> None:
    for _ in range(3):
        with pytest.raises(ExecutorLostError):
            plane.run(CRASH, "exit")
    plane.unload(CRASH)
    plane.load(fake_models("crashing")["fake/crash"])
    assert plane.run(CRASH, "", 1) == 1


def test_a_model_that_crashes_beside_others_is_moved_away_from_them() -> None:
    source = ECHO + "    def die(self):\n        import os\n        os._exit(1)\n"
    (bad,), (good,) = (
        definitions(source, "bad.py"),
        definitions(ECHO.replace('"echo"', '"good"'), "good.py"),
    )
    with running_plane({"bad": bad, "good": good}) as plane:
        assert list(plane.executor_pids()) == ["local"]
        for _ in range(2):
            with pytest.raises(ExecutorLostError):
                plane.run("echo@v1", "die")
        assert plane.run("echo@v1", "", 1) == 1
        assert sorted(plane.executor_pids()) == ["local", "local/echo@v1"]
        pid = plane.executor_pids()["local"]
        with pytest.raises(ExecutorLostError):
            plane.run("echo@v1", "die")
        assert plane.run("good@v1", "", 1) == 1
        assert plane.executor_pids() == {"local": pid}


@pytest.mark.accept("B9")
def test_a_call_over_its_time_ends_its_executor_and_the_next_is_served(
    plane: Plane, accept: Accept
) -> None:
    stream = plane.stream("fake/impatient@v1")
    stream.send(30.0)
    stream.send(0.0)
    started = time.monotonic()
    with Neighbour(plane) as neighbour:
        found = stream.results()
    assert isinstance(found[1], DeadlineExceededError)
    assert found[2] == 0.0
    assert neighbour.wrong == []
    accept.figure(time.monotonic() - started - 1.0, 1.0, "s beyond the limit until it serves again")


def test_sys_exit_in_a_model_is_an_error_of_its_call(plane: Plane) -> None:
    pid = plane.run(CRASH, "pid")
    with pytest.raises(ModelError) as caught:
        plane.run(CRASH, "leave")
    assert caught.value.type_name == "SystemExit"
    assert plane.run(CRASH, "pid") == pid


def test_a_stopped_executor_is_ended_by_its_calls_time_limit(plane: Plane) -> None:
    impatient = "fake/impatient@v1"
    plane.run(impatient, "", 0.0)
    os.kill(plane.executor_pids()["local/" + impatient], signal.SIGSTOP)
    with pytest.raises(DeadlineExceededError):
        plane.run(impatient, "", 0.0)
    assert plane.run(impatient, "", 0.0) == 0.0


LOADS = {
    "raises": ("raise OSError('no weights')", "no weights"),
    "exits": ("import os; os._exit(3)", "ended its executor while loading"),
    "syntax": ("import nothing_of_that_name", "nothing_of_that_name"),
}


@pytest.mark.parametrize("how", LOADS)
def test_a_model_that_fails_to_load_leaves_its_neighbours_alone(plane: Plane, how: str) -> None:
    line, text = LOADS[how]
    source = ECHO.replace('"echo"', '"bad"') + f"    def __init__(self):\n        {line}\n"
    (bad,) = definitions(source, "bad.py", owner="ada")
    with pytest.raises(LoadError, match=text):
        plane.load(bad)
    assert plane.model("bad@v1")["state"] == "failed"
    assert plane.run("echo@v1", "", 5) == 5


def test_without_a_fork_server_a_crash_is_survived_too() -> None:
    models = {"crash": fake_models("crashing")["fake/crash"]}
    with running_plane(models, use_forkserver=False) as plane:
        with pytest.raises(ExecutorLostError):
            plane.run(CRASH, "segfault")
        assert plane.run(CRASH, "", 1) == 1


@pytest.mark.accept("A6")
def test_killing_the_fork_server_loses_running_frames_and_nothing_more(plane: Plane) -> None:
    import psutil

    servers = [
        child
        for child in psutil.Process().children()
        if "nos_backend.executor.forkserver" in child.cmdline()
    ]
    assert len(servers) == 1
    stream = plane.stream("echo@v1")
    for index in range(1, 9):
        stream.send(index, 0.05)
    servers[0].kill()
    right, lost = assert_one_end_each(stream.results(), 8)
    assert lost <= 1
    assert right >= 7
    assert plane.run(CRASH, "", 1) == 1
