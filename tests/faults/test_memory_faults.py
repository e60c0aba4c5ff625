"""Executors that die with models in them: the weights survive in the worker, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from nos.errors import ExecutorLostError, OutOfDeviceMemoryError, QuarantinedError
from nos_backend.definition import ModelDefinition

from tests.accept import Accept
from tests.integration.test_memory import MB, call, model, on_device, options
from tests.plane import Plane, definitions, running_plane
from tests.servers import wait_for


def attempt(plane: Plane, name: str) -> Any:
    try:
        return call(plane, name)
    except ExecutorLostError:
        return None


@pytest.mark.accept("B9")
def test_a_killed_executor_gets_its_weights_back_without_the_constructor(accept: Accept) -> None:
    """The constructor takes two seconds; serving again must not."""
    slow = model("slow", 50, extra="time.sleep(2)")
    with running_plane({"slow": slow, "b": model("b", 10)}, memory=options()) as plane:
        expected = {name: call(plane, name) for name in ("slow", "b")}
        slowest_s = 0.0
        for _ in range(2):
            os.kill(plane.executor_pids()["ann"], signal.SIGKILL)
            started = time.monotonic()
            answer = wait_for(lambda: attempt(plane, "slow") is not None, "it answers again")
            slowest_s = max(slowest_s, time.monotonic() - started)
            assert answer
            for name, value in expected.items():
                assert np.array_equal(call(plane, name), value)
        accept.figure(slowest_s, 1.0, "s until it serves again")


@pytest.mark.accept("B9")
def test_an_evicted_model_survives_the_death_of_its_executor() -> None:
    models = {name: model(name, 4) for name in ("a", "b")}
    with running_plane(models, memory=options(capacity_bytes=6 * MB)) as plane:
        expected = {name: call(plane, name) for name in models}
        assert plane.model("a@v1")["state"] == "host"
        os.kill(plane.executor_pids()["ann"], signal.SIGKILL)
        for name in ("a", "b"):
            wait_for(lambda name=name: attempt(plane, name) is not None, "it answers")
            assert np.array_equal(call(plane, name), expected[name])


@pytest.mark.accept("B9")
def test_a_model_on_its_way_to_the_device_is_served_where_it_was_moved_to() -> None:
    """The second death of its executor gives a model one of its own, while a call waits for its weights."""
    idle = options(idle_unload_s=0.05)
    with running_plane({"a": model("a", 1), "b": model("b", 1)}, memory=idle) as plane:
        expected = call(plane, "a")
        for _ in range(2):
            wait_for(lambda: not on_device(plane), "all leave")
            pid = plane.executor_pids()["ann"]
            os.kill(pid, signal.SIGSTOP)  # it answers no reload
            stream = plane.stream("a@v1")
            stream.send(np.ones((1, 256), np.float32))
            wait_for(lambda: plane.model("a@v1")["state"] == "loading", "it is on its way")
            os.kill(pid, signal.SIGKILL)
            assert np.array_equal(stream.result()[1], expected)
        assert sorted(plane.executor_pids()) == ["ann/a@v1"]


def pid_of(plane: Plane, owner: str) -> int | None:
    """The executor of an owner's one model, alone or not."""
    pids = plane.executor_pids().items()
    return next((pid for name, pid in pids if name.partition("/")[0] == owner), None)


@pytest.mark.accept("B9")
def test_a_model_that_fails_on_its_way_to_the_device_leaves_the_room_to_others() -> None:
    models = {"a": model("a", 1), "b": model("b", 1, owner="bob")}
    tight = options(idle_unload_s=0.05, capacity_bytes=3 * MB // 2)
    with running_plane(models, memory=tight) as plane:
        outcomes = []
        for _ in range(3):
            wait_for(lambda: not on_device(plane), "all leave")
            pid = wait_for(lambda: pid_of(plane, "ann"), "its executor")
            os.kill(pid, signal.SIGSTOP)  # it answers no reload
            stream = plane.stream("a@v1")
            stream.send(np.ones((1, 256), np.float32))
            wait_for(lambda: plane.model("a@v1")["state"] == "loading", "it is on its way")
            os.kill(pid, signal.SIGKILL)
            outcomes.append(stream.result()[1])
        assert isinstance(outcomes[-1], QuarantinedError)
        assert call(plane, "b").shape == (1, 64)


@pytest.mark.accept("B9")
def test_what_cannot_be_moved_is_constructed_again() -> None:
    fixed = model("fixed", 2, extra="self.later = lambda x: x")
    with running_plane({"fixed": fixed}, memory=options()) as plane:
        expected = call(plane, "fixed")
        os.kill(plane.executor_pids()["ann/fixed@v1"], signal.SIGKILL)
        wait_for(lambda: attempt(plane, "fixed") is not None, "it answers")
        assert np.array_equal(call(plane, "fixed"), expected)


@pytest.mark.accept("B5", "B9")
def test_kills_under_swaps_give_right_answers_or_typed_errors() -> None:
    names = ["a", "b", "c", "d"]
    models = {name: model(name, 3, owner=f"owner-{name}") for name in names}
    chance = random.Random(5)
    num_kills = num_right = 0
    with running_plane(models, memory=options(capacity_bytes=7 * MB)) as plane:
        expected = {name: call(plane, name) for name in names}
        doomed = {10: "a", 25: "b", 40: "c", 55: "a"}
        for index in range(80):
            pid = plane.executor_pids().get(f"owner-{doomed.get(index, '')}")
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                num_kills += 1
            name = chance.choice(names)
            try:
                answer = call(plane, name)
            except ExecutorLostError:
                continue
            assert np.array_equal(answer, expected[name])
            num_right += 1
        for name in names:
            assert np.array_equal(call(plane, name), expected[name])
    assert num_kills == 4
    assert num_right >= 70


def usage() -> dict[str, float]:
    me = psutil.Process()
    links = []
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
        except OSError:
            continue
    return {
        "fds": me.num_fds(),
        "memfds": sum("memfd:nos-weights" in link for link in links),
        "threads": me.num_threads(),
        "executors": sum(child.name().startswith("nos:") for child in me.children(recursive=True)),
    }


@pytest.mark.long  # the soak does so beside other faults
@pytest.mark.accept("B8")
def test_loading_and_unloading_leaves_nothing_behind(accept: Accept) -> None:
    """30 models, 20 times; twice in ordinary runs. Their executors come and go with them."""
    num_rounds = 20 if accept.strict else 2
    models = [model(f"m{index}", 0.25, owner=f"o{index % 3}") for index in range(30)]
    keeper = model("keeper", 0.25, owner="keeper")
    with running_plane({"keeper": keeper}, memory=options()) as plane:

        def churn() -> None:
            for definition in models:
                plane.load(definition)
            for definition in models:
                call(plane, definition.name)
                plane.unload(definition.key)

        churn()
        wait_for(lambda: plane.status()["num_executors"] == 1, "executors end")
        gc.collect()
        before, rss_before = usage(), psutil.Process().memory_info().rss
        for _ in range(num_rounds):
            churn()
        wait_for(lambda: plane.status()["num_executors"] == 1, "executors end")
        gc.collect()
        wait_for(lambda: usage() == before or usage()["fds"] <= before["fds"], "descriptors go")
        after = usage()
        assert {key: after[key] for key in ("memfds", "executors")} == {
            "memfds": 2,
            "executors": before["executors"],
        }
        assert after["fds"] <= before["fds"] + 2
        assert after["threads"] <= before["threads"] + 1
        assert plane.status()["host_bytes"] < MB
        accept.figure(psutil.Process().memory_info().rss / rss_before, 1.05, "times the RSS before")


FAILS = """
import os, torch, nos

@nos.model(name="fails")
class Fails:
    def __init__(self):
        self.weight = torch.zeros(256, 256)
        self.num = 0

    def __setstate__(self, state):
        marker = "MARKER"
        left = int(open(marker).read())
        open(marker, "w").write(str(left - 1))
        if left > 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        self.__dict__.update(state)

    def __call__(self, times: int):
        self.num += 1
        if self.num <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.num

    def sticky(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def pid(self):
        return os.getpid()
"""


def failing(folder: Path, num_failed_loads: int) -> ModelDefinition:
    marker = folder / "marker"
    marker.write_text(str(num_failed_loads))
    (found,) = definitions(FAILS.replace("MARKER", str(marker)), "fails.py", owner="local")
    return found


@pytest.mark.accept("B7")
def test_no_room_at_load_takes_other_models_off_one_by_one(tmp_path: Path) -> None:
    with running_plane({name: model(name, 1) for name in "abc"}, memory=options()) as plane:
        call(plane, "a")
        plane.load(failing(tmp_path, 2))
        assert plane.model("fails@v1")["state"] == "device"
        assert [plane.model(f"{name}@v1")["state"] for name in "abc"] == ["device", "host", "host"]
        assert [call(plane, name).shape for name in "abc"] == [(1, 64)] * 3


@pytest.mark.accept("B7")
def test_no_room_at_load_although_all_have_left_fails_that_model_only(tmp_path: Path) -> None:
    with running_plane({"a": model("a", 1)}, memory=options(capacity_bytes=4 * MB)) as plane:
        with pytest.raises(OutOfDeviceMemoryError, match=f"at most {4 * MB} bytes"):
            plane.load(failing(tmp_path, 99))
        assert plane.model("fails@v1")["state"] == "failed"
        assert call(plane, "a").shape == (1, 64)


@pytest.mark.accept("B7")
def test_no_room_in_a_call_is_tried_once_more_and_then_fails_that_call_only(tmp_path: Path) -> None:
    with running_plane({"fails": failing(tmp_path, 0)}) as plane:
        pid = plane.run("fails@v1", "pid")
        assert plane.run("fails@v1", "", 1) == 2
        with pytest.raises(OutOfDeviceMemoryError, match=r"20\.00 MiB"):
            plane.run("fails@v1", "", 99)
        assert plane.run("fails@v1", "", 0) == 5
        assert plane.run("fails@v1", "pid") == pid


@pytest.mark.accept("B7")
def test_an_error_that_loses_the_device_ends_the_executor_and_not_the_worker(
    tmp_path: Path,
) -> None:
    with running_plane({"fails": failing(tmp_path, 0)}) as plane:
        pid = plane.run("fails@v1", "pid")
        stream = plane.stream("fails@v1")
        stream.send(method="sticky")
        stream.send(method="pid")
        found = stream.results()
        assert isinstance(found[1], ExecutorLostError)
        assert "illegal memory access" in str(found[1])
        assert found[2] != pid
