"""Models that share a device too small for all of them."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from nos.errors import LoadError, ModelError, NosError, OutOfDeviceMemoryError
from nos_backend.definition import ModelDefinition
from nos_backend.worker.memory import MemoryOptions

from tests.accept import Accept
from tests.plane import Plane, definitions, running_plane
from tests.servers import start_server, wait_for

MB = 1 << 20
SOURCE = """
import os, time
import torch
from torch import nn
import nos

@nos.model(name="NAME"OPTIONS)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(NUMBER)
        EXTRA
        self.weight = nn.Parameter(torch.randn(ROWS, 256))

    def forward(self, x: torch.Tensor):
        return x @ self.weight.T[:, :64]

    def wait(self, s: float):
        time.sleep(s)
        return s

    def pid(self):
        return os.getpid()
"""


def model(
    name: str, mb: float, *, extra: str = "pass", owner: str = "ann", options: str = ""
) -> ModelDefinition:
    """A model whose weights take so many megabytes."""
    values = {
        "NAME": name,
        "NUMBER": str(len(name) + int(mb)),
        "ROWS": str(int(mb * 1024)),
        "EXTRA": extra,
        "OPTIONS": options,
    }
    source = re.sub("NAME|NUMBER|ROWS|EXTRA|OPTIONS", lambda found: values[found[0]], SOURCE)
    (found,) = definitions(source, f"{name}.py", owner=owner)
    return found


def on_device(plane: Plane) -> list[str]:
    return sorted(item["name"] for item in plane.status()["models"] if item["state"] == "device")


def call(plane: Plane, name: str) -> Any:
    return plane.run(f"{name}@v1", "", np.ones((1, 256), np.float32))


def options(**given: Any) -> MemoryOptions:
    return MemoryOptions(min_residency_s=0.0, **given)


class Sampler:
    """Looks at what is resident all the time."""

    def __init__(self, plane: Plane) -> None:
        self.most_bytes = self.num_samples = 0
        self._plane = plane
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._stop.is_set():
            status = self._plane.status()
            resident = sum(item["device_bytes"] for item in status["models"])
            self.most_bytes = max(self.most_bytes, resident, status["used_bytes"])
            self.num_samples += 1
            self._stop.wait(0.005)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.accept("B1")
def test_what_is_resident_never_exceeds_the_budget(accept: Accept) -> None:
    models = {name: model(name, mb) for name, mb in (("m20", 20), ("m30", 30), ("m40", 40))}
    with running_plane({}, memory=options(capacity_bytes=64 * MB)) as plane:
        with Sampler(plane) as sampler:
            plane.load(models["m20"])
            plane.load(models["m40"])
            assert on_device(plane) == ["m20", "m40"]
            plane.load(models["m30"])
            assert on_device(plane) == ["m30"] or on_device(plane) == ["m20", "m30"]
            expected = {name: call(plane, name) for name in models}
            for name in ["m20", "m40", "m30", "m40", "m20", "m30"] * 3:
                assert np.array_equal(call(plane, name), expected[name])
        assert sampler.num_samples > 10
        assert len({float(answer.sum()) for answer in expected.values()}) == 3
        accept.figure(sampler.most_bytes / (64 * MB), 1.0, "of the budget at most")


#: After loading a, b, c in this order and these calls, d comes: who leaves a device that holds three.
TRACE = ["a", "a", "b", "c", "c", "c", "a", "b"]
LEAVES = {"lru": "c", "fifo": "a", "lfu": "b", "gdsf": "b"}


@pytest.mark.accept("B1", "B2")
@pytest.mark.parametrize("policy", LEAVES)
def test_each_policy_keeps_its_own(policy: str) -> None:
    names = ["a", "b", "c", "d"]
    with running_plane(
        {name: model(name, 2) for name in names[:3]},
        memory=options(capacity_bytes=7 * MB, eviction=policy),
    ) as plane:
        for name in TRACE:
            call(plane, name)
        plane.load(model("d", 2))
        assert on_device(plane) == sorted(set(names) - {LEAVES[policy]})
        (reason,) = [move["reason"] for move in plane.model(f"{LEAVES[policy]}@v1")["history"]][-1:]
        assert reason == "room for d@v1"


@pytest.mark.accept("B2")
def test_a_pinned_model_stays_until_it_is_pinned_no_longer() -> None:
    a, b, c = (model(name, 2) for name in ("a", "b", "c"))
    given = options(capacity_bytes=5 * MB, idle_unload_s=0.05)
    with running_plane({}, memory=given) as plane:
        plane.pin(a)
        for name in (b, c, b, c):
            plane.load(name)
            assert "a" in on_device(plane)
        with pytest.raises(OutOfDeviceMemoryError, match=f"{2 * MB} of them pinned"):
            plane.load(model("large", 4))
        plane.pin(a, is_pinned=False)
        wait_for(
            lambda: on_device(plane) == [], "idle models leave, the pinned one no longer stays"
        )


def test_a_model_says_for_how_long_it_stays_without_use() -> None:
    brief = model("brief", 1, options=", idle_unload_s=0.1")
    lasting = model("lasting", 1, options=", idle_unload_s=0")
    with running_plane(
        {"brief": brief, "lasting": lasting}, memory=options(idle_unload_s=0.1)
    ) as plane:
        wait_for(lambda: plane.model("brief@v1")["state"] == "host", "it leaves")
        reason = plane.model("brief@v1")["history"][-1]["reason"]
        assert reason == "idle for 0.1 s"
        assert plane.model("lasting@v1")["state"] == "device"


def test_an_executor_with_nothing_on_the_device_ends_and_its_models_come_back() -> None:
    stays = model("stays", 1, owner="bob", options=", idle_unload_s=0")
    given = options(idle_unload_s=0.1, executor_idle_s=0.1)
    with running_plane({"stays": stays}, memory=given) as plane:
        plane.load(model("a", 1))
        plane.load(model("b", 1))
        before = call(plane, "a")
        wait_for(lambda: sorted(plane.executor_pids()) == ["bob"], "the idle executor ends")
        assert plane.model("a@v1")["state"] == "host"
        np.testing.assert_array_equal(call(plane, "a"), before)
        assert not [event for event in plane.events if event[0] == "executor-lost"]


@pytest.mark.accept("B2")
def test_max_models_evicts_by_policy() -> None:
    with running_plane(
        {name: model(name, 1) for name in ("a", "b")}, memory=options(max_models=2)
    ) as plane:
        call(plane, "a")
        plane.load(model("c", 1))
        assert on_device(plane) == ["a", "c"]
        call(plane, "b")
        assert on_device(plane) == ["b", "c"]


@pytest.mark.accept("B3")
def test_eviction_waits_for_the_call_that_runs() -> None:
    with running_plane({"a": model("a", 4)}, memory=options(capacity_bytes=6 * MB)) as plane:
        stream = plane.stream("a@v1")
        stream.send(1.0, method="wait")
        wait_for(lambda: plane.model("a@v1")["num_pending"] == 1, "the call runs")
        started = time.monotonic()
        plane.load(model("b", 4, owner="bob"))
        assert time.monotonic() - started > 0.3
        assert stream.result() == (1, 1.0)
        assert on_device(plane) == ["b"]
        stream.send(0.0, method="wait")
        assert stream.result() == (2, 0.0)
        assert on_device(plane) == ["a"]


@pytest.mark.accept("B4")
def test_evicting_and_reloading_moves_no_byte_and_takes_no_time(accept: Accept) -> None:
    big = {name: model(name, 100) for name in ("a", "b")}
    with running_plane(big, memory=options(capacity_bytes=150 * MB)) as plane:
        for _ in range(5):
            call(plane, "a")
            call(plane, "b")
        moves = [move for name in big for move in plane.model(f"{name}@v1")["history"]]
        evictions = [
            move for move in moves if (move["source"], move["target"]) == ("device", "host")
        ]
        reloads = [move for move in moves if (move["source"], move["target"]) == ("host", "device")]
        assert min(len(evictions), len(reloads)) >= 8
        assert {move["moved_bytes"] for move in moves} == {0}
        accept.figure(
            sorted(move["took_s"] for move in evictions)[4] * 1e3, 1.0, "ms to evict 100 MB"
        )
        accept.figure(
            sorted(move["took_s"] for move in reloads)[4] * 1e3, 1.0, "ms to reload 100 MB"
        )


@pytest.mark.accept("B5")
def test_answers_under_load_are_bit_equal_over_swaps() -> None:
    models = {name: model(name, 3, owner=name) for name in ("a", "b", "c")}
    with running_plane(models, memory=options(capacity_bytes=7 * MB)) as plane:
        expected = {name: call(plane, name) for name in models}
        wrong: list[object] = []

        def ask(name: str) -> None:
            for _ in range(70):
                try:
                    if not np.array_equal(call(plane, name), expected[name]):
                        wrong.append(name)
                except NosError as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        num_evictions = sum(event[0] == "evicted" for event in plane.events)
        assert num_evictions > 20


def test_a_model_larger_than_the_device_is_refused_with_both_figures() -> None:
    with running_plane({"a": model("a", 2)}, memory=options(capacity_bytes=8 * MB)) as plane:
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            plane.load(model("huge", 16))
        assert str(8 * MB) in str(caught.value)
        assert str(16 * MB) in str(caught.value)
        assert plane.model("huge@v1")["state"] == "failed"
        assert plane.status()["host_bytes"] < 3 * MB
        assert call(plane, "a").shape == (1, 64)


def test_a_model_larger_than_host_memory_is_refused() -> None:
    with running_plane({"a": model("a", 2)}, memory=options(host_bytes=8 * MB)) as plane:
        with pytest.raises(OutOfDeviceMemoryError, match="does not fit into host memory") as caught:
            plane.load(model("huge", 16))
        assert f"at most {8 * MB} bytes" in str(caught.value)
        assert str(16 * MB)[:4] in str(caught.value)
        with pytest.raises(OutOfDeviceMemoryError, match="host memory is full") as caught:
            plane.load(model("large", 7))
        assert f"at most {8 * MB} bytes" in str(caught.value)
        assert "Unload a@v1" in str(caught.value)
        assert call(plane, "a").shape == (1, 64)


def test_what_exceeds_host_memory_waits_in_files_and_comes_back(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    given = options(capacity_bytes=5 * MB, host_bytes=9 * MB, folder=tmp_path)
    with running_plane({}, memory=given) as plane:
        expected = {}
        for name in names:
            plane.load(model(name, 4))
            expected[name] = call(plane, name)
        assert plane.model("a@v1")["state"] == "disk"
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) >= 4 * MB
        for name in names * 2:
            assert np.array_equal(call(plane, name), expected[name])
        assert plane.status()["host_bytes"] <= 9 * MB
        moves = [(move["source"], move["target"]) for move in plane.model("a@v1")["history"]]
        assert ("host", "disk") in moves
        assert ("disk", "device") in moves
        for name in names:
            plane.unload(f"{name}@v1")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.accept("B10")
def test_a_damaged_file_fails_its_model_and_no_other(tmp_path: Path) -> None:
    given = options(capacity_bytes=5 * MB, host_bytes=9 * MB, folder=tmp_path)
    with running_plane({}, memory=given) as plane:
        for name in ("a", "b", "c"):
            plane.load(model(name, 4, owner="local"))
        (path,) = tmp_path.iterdir()
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(LoadError, match="damaged"):
            call(plane, "a")
        assert plane.model("a@v1")["state"] == "failed"
        assert call(plane, "b").shape == call(plane, "c").shape == (1, 64)


def test_an_idle_model_leaves_and_comes_back_when_it_is_called() -> None:
    given = options(idle_unload_s=0.1)
    with running_plane({"a": model("a", 1)}, memory=given) as plane:
        wait_for(lambda: plane.model("a@v1")["state"] == "host", "it leaves")
        assert plane.status()["used_bytes"] == 0
        assert call(plane, "a").shape == (1, 64)


def test_what_cannot_be_moved_runs_where_it_was_made_and_says_so() -> None:
    fixed = model("fixed", 4, extra="self.later = lambda x: x")
    with running_plane(
        {"a": model("a", 4), "fixed": fixed}, memory=options(capacity_bytes=6 * MB)
    ) as plane:
        assert "own executor: its object cannot be moved" in plane.model("fixed@v1")["note"]
        assert plane.model("a@v1")["note"] == ""
        pids = {plane.run(f"{name}@v1", "pid") for name in ("a", "fixed", "a", "fixed")}
        assert len(pids) == 2
        assert call(plane, "fixed").shape == (1, 64)


@pytest.mark.accept("A5")
def test_a_slow_constructor_does_not_hold_up_its_own_executor() -> None:
    with running_plane({"a": model("a", 1)}) as plane:
        slow = model("slow", 1, extra="time.sleep(2)")
        loading = threading.Thread(target=plane.load, args=(slow,))
        loading.start()
        wait_for(lambda: len(plane.status()["models"]) == 2, "the load")
        num_calls = 0
        while plane.model("slow@v1")["state"] == "loading":
            call(plane, "a")
            num_calls += 1
        loading.join()
        assert num_calls > 50
        assert plane.run("slow@v1", "pid") == plane.run("a@v1", "pid")


@pytest.mark.parametrize("extra", ["os._exit(3)", "os.fork()", "print('x' * 3_000_000)", "1 / 0"])
def test_a_constructor_that_misbehaves_harms_nobody(extra: str) -> None:
    with running_plane({"a": model("a", 1)}) as plane:
        pid = plane.run("a@v1", "pid")
        try:
            plane.load(model("bad", 1, extra=extra))
        except (LoadError, ModelError):
            assert plane.model("bad@v1")["state"] == "failed"
        assert plane.run("a@v1", "pid") == pid


@pytest.mark.accept("B1", "B2", "B4")
def test_a_real_server_swaps_and_tells_the_history(tmp_path: Path) -> None:
    import nos

    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("m20", "m30", "m40"):
        (folder / f"{name}.py").write_text(model(name, int(name[1:])).source)
    server = start_server(
        tmp_path, "--capacity-bytes", "64MiB", "--eviction", "lru", "--models", str(folder)
    )
    try:
        with nos.connect(server.address, token_file=str(server.token_file)) as client:
            x = np.ones((1, 256), np.float32)
            expected = {name: client.model(name)(x) for name in ("m20", "m30", "m40")}
            for name in ("m20", "m40", "m30", "m20"):
                assert np.array_equal(client.model(name)(x), expected[name])
                used = sum(worker.device.used_bytes for worker in client.status().workers)
                assert used <= 64 * MB

            def moves(name: str) -> list[tuple[str, str]]:
                return [(move.source, move.target) for move in client.info(name).history]

            wait_for(lambda: ("host", "device") in moves("m20"), "the gateway hears of it")
            assert moves("m20")[0] == ("none", "device")
            wait_for(lambda: client.info("m40").state == "host", "the gateway hears of it")
            assert "m20" in str(client.info("m20"))
            assert client.load("m20", pin=True).spec.is_pinned
            for name in ("m30", "m40", "m30"):
                assert np.array_equal(client.model(name)(x), expected[name])
            client.register(model("m50", 50).source)
            with pytest.raises(OutOfDeviceMemoryError, match="pinned"):
                client.load("m50")
            assert client.info("m20").state == "device"
            assert "pinned" in str(client.info("m20"))
            assert not client.load("m20", pin=False).spec.is_pinned
            assert client.load("m50").state == "device"
            client.unregister("m50")
            memory = client.memory()
            assert 20 * MB <= memory.total_bytes(tier="device") <= 64 * MB
            assert memory.total_bytes(tier="host") >= 90 * MB
            assert memory.total_bytes(owner="local") == memory.total_bytes()
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _no_processes_left() -> Iterator[None]:
    before = executors()
    yield
    assert not executors() - before


def executors() -> set[int]:
    """Executors below this process: those of a server of the whole run are there before and after."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("nos:"):
                found.add(child.pid)
    return found
