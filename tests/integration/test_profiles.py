"""What a model needs is measured beside it, once, and its batches keep to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nos.errors import OutOfDeviceMemoryError
from nos.wire.v1 import models_pb2
from nos_backend.worker.memory import MemoryOptions
from nos_backend.worker.profiles import ProfileOptions

from tests.accept import Accept
from tests.plane import Plane, Wire, definitions, fake_models, running_plane
from tests.servers import wait_for

SOURCE = '''
from typing import Annotated
import os, time
import nos, torch
from torch import nn

Rows = Annotated[torch.Tensor, "float32[batch, 256]"]
Scores = Annotated[torch.Tensor, "float32[batch, 10]"]

@nos.model(name="net")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 10)

    def forward(self, x: Rows) -> Scores:
        return self.down(torch.relu(self.up(x)))

@nos.model(name="open", batch=True)
class Open(Net):
    """Says no sizes."""
    def forward(self, x: Annotated[torch.Tensor, "float32[batch, width]"]) -> Scores:
        return super().forward(x)

@nos.model(name="words", batch=True)
class Words:
    def __call__(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]

@nos.model(name="limited", batch=4)
class Limited(Net):
    pass

@nos.model(name="plain")
class Plain(nn.Module):
    """Does not batch."""
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)
    def forward(self, x: Annotated[torch.Tensor, "float32[8]"]):
        return self.net(x)

@nos.model(name="sleepy")
class Sleepy:
    def nap(self, s: float):
        time.sleep(s)
        return s

@nos.model(name="deadly")
class Deadly(Net):
    def forward(self, x: Rows) -> Scores:
        if len(x) > 4:
            os._exit(3)
        return super().forward(x)

@nos.model(name="changing")
class Changing:
    """Takes as long as a file says: of each batch, and of each row."""
    def __call__(self, x: Rows) -> Rows:
        of_batch_s, of_row_s = map(float, open("MARKER").read().split())
        time.sleep(of_batch_s + of_row_s * len(x))
        return x

@nos.model(name="wide")
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(256, 16384)
    def forward(self, x: Rows) -> Annotated[torch.Tensor, "float32[batch]"]:
        return self.net(x)[:, 0]
'''


#: A busy machine is to finish what it measures, too.
OPTIONS = ProfileOptions("a test", budget_s=60.0)


def models() -> dict[str, Any]:
    return {item.name: item for item in definitions(SOURCE, "profiled.py")}


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    with running_plane({}, profiles=OPTIONS, max_concurrent_batches=1) as plane:
        yield plane


def state(plane: Plane, key: str) -> str:
    return str(_ask(plane, key)["state"])


def profile(plane: Plane, key: str) -> models_pb2.Profile:
    """Wait for a model's profile."""
    wait_for(lambda: state(plane, key) == "ready", 60)
    return models_pb2.Profile.FromString(_ask(plane, key)["profile"])


def _ask(plane: Plane, key: str) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        return plane.manager.profile(key)

    return plane.data_plane.submit_coroutine(ask).result(10)


def loaded(plane: Plane, name: str) -> models_pb2.Profile:
    plane.load(models()[name])
    return profile(plane, f"{name}@v1")


@pytest.mark.accept("B6")
def test_a_model_with_declared_sizes_is_profiled_without_a_call(
    plane: Plane, accept: Accept
) -> None:
    found = loaded(plane, "net")
    (method,) = found.methods
    assert method.sample == "signature"
    assert method.note == ""
    assert [point.rows for point in method.points] == [1, 2, 4, 8, 16, 32, 64]
    for point in method.points:
        assert point.flops == 2 * point.rows * (256 * 512 + 512 * 10)
        assert point.took_s > 0
    for point in method.points[2:]:
        wrong_bytes = abs(point.predicted_bytes - point.measured_bytes)
        assert wrong_bytes <= 0.05 * point.measured_bytes
        accept.figure(wrong_bytes / point.measured_bytes, 0.05, "of the peak predicted wrongly")
    uses = {use.path: use for use in method.modules}
    assert uses["up"].weight_bytes == (256 * 512 + 512) * 4
    assert uses["up"].activation_bytes == method.module_rows * 512 * 4
    assert found.weight_bytes == plane.model("net@v1")["device_bytes"]
    assert plane.model("net@v1")["note"] == ""
    assert ("profiled", "net@v1", "") in plane.events


def test_the_budget_counts_the_activations_of_the_batch_chosen(plane: Plane) -> None:
    found = loaded(plane, "net")
    (method,) = found.methods
    at_choice = next(it for it in method.points if it.rows == method.chosen_rows)
    assert found.activation_bytes == pytest.approx(at_choice.measured_bytes, rel=0.05)
    assert plane.status()["used_bytes"] >= found.weight_bytes + found.activation_bytes


def test_open_sizes_wait_for_the_first_call(plane: Plane) -> None:
    plane.load(models()["open"])
    assert state(plane, "open@v1") == "waits for a call"
    plane.run("open@v1", "", np.ones((3, 256), np.float32))
    (method,) = profile(plane, "open@v1").methods
    assert method.sample == "first call"
    assert [point.rows for point in method.points][:3] == [1, 2, 4]


def test_lists_are_profiled_with_a_real_text(plane: Plane) -> None:
    plane.load(models()["words"])
    assert plane.run("words@v1", "", ["one", "three"]) == [3, 5]
    (method,) = profile(plane, "words@v1").methods
    assert len(method.points) == 7


def test_the_authors_limit_wins(plane: Plane) -> None:
    (method,) = loaded(plane, "limited").methods
    assert [point.rows for point in method.points] == [1, 2, 4]
    assert method.chosen_rows == 4
    assert method.why.startswith("its author's limit")


def test_what_does_not_batch_gets_one_point(plane: Plane) -> None:
    (method,) = loaded(plane, "plain").methods
    (point,) = method.points
    assert point.rows == 1
    assert point.flops == 2 * 8 * 8
    assert method.chosen_rows == 0


def test_a_profile_that_ends_its_process_harms_nobody_and_is_told(plane: Plane) -> None:
    pids = plane.executor_pids()
    (method,) = loaded(plane, "deadly").methods
    assert [point.rows for point in method.points] == [1, 2, 4]
    assert "failed with 8 rows" in method.note
    assert "failed with 8 rows" in plane.model("deadly@v1")["note"]
    assert plane.run("deadly@v1", "", np.ones((2, 256), np.float32)).shape == (2, 10)
    assert pids.items() <= plane.executor_pids().items()


def test_sizes_without_room_are_predicted_and_not_run() -> None:
    definition = models()["wide"]
    weight_bytes = (256 * 16384 + 16384) * 4
    memory = MemoryOptions(capacity_bytes=weight_bytes + (3 << 19))
    with running_plane({"wide": definition}, profiles=OPTIONS, memory=memory) as plane:
        (method,) = profile(plane, "wide@v1").methods
        measured = [point.rows for point in method.points if point.measured_bytes]
        predicted = [point for point in method.points if not point.measured_bytes]
        assert measured == [1, 2, 4, 8, 16]
        assert [point.rows for point in predicted] == [32, 64]
        for point in predicted:
            assert point.predicted_bytes == pytest.approx(point.rows * 16384 * 4, rel=0.01)
        assert method.chosen_rows <= 16
        assert "failed with 32 rows" in plane.model("wide@v1")["note"]


@pytest.mark.long
def test_the_budget_counts_what_is_predicted_before_the_model_is_on_the_device() -> None:
    definition = models()["wide"]
    weight_bytes, row_bytes = (256 * 16384 + 16384) * 4, 16384 * 4
    memory = MemoryOptions(capacity_bytes=weight_bytes + (3 << 19))
    with running_plane({}, profiles=OPTIONS, memory=memory, max_concurrent_batches=1) as plane:
        plane.load(replace(models()["sleepy"], owner="bob"))
        stream = plane.stream("sleepy@v1")
        stream.hello()
        stream.send(30.0, method="nap")
        plane.load(definition)
        assert state(plane, "wide@v1") == "pending", "nothing was measured"
        most_rows = (3 << 19) // (row_bytes + 512)
        used_bytes = plane.status()["used_bytes"] - weight_bytes
        assert used_bytes == pytest.approx(most_rows * row_bytes, rel=0.1)
        os.kill(plane.executor_pids()["bob"], signal.SIGKILL)


@pytest.mark.long
def test_a_model_that_can_never_run_is_refused_before_it_is_on_the_device() -> None:
    definition = models()["wide"]
    weight_bytes = (256 * 16384 + 16384) * 4
    memory = MemoryOptions(capacity_bytes=weight_bytes + (1 << 14))
    with (
        running_plane({}, profiles=OPTIONS, memory=memory) as plane,
        pytest.raises(OutOfDeviceMemoryError, match=f"at most {weight_bytes + (1 << 14)}"),
    ):
        plane.load(definition)


@pytest.mark.long
def test_a_model_whose_batches_take_longer_than_its_profile_says_is_measured_again(
    tmp_path: Path,
) -> None:
    marker = tmp_path / "marker"
    marker.write_text("0 0.0005")
    (definition,) = (
        it
        for it in definitions(SOURCE.replace("MARKER", str(marker)), "changing.py")
        if it.name == "changing"
    )
    options = replace(OPTIONS, again_s=0.1)
    given = {"profiles": options, "max_concurrent_batches": 2}
    with running_plane({"changing": definition}, **given) as plane:
        before = profile(plane, "changing@v1")
        marker.write_text("0.01 0")
        x = np.ones((1, 256), np.float32)
        num_calls = 0
        while profile(plane, "changing@v1").time_s == before.time_s:
            assert num_calls < 2000, "it is not measured again"
            plane.run("changing@v1", "", x)
            num_calls += 1
        assert num_calls >= 100
        (method,) = profile(plane, "changing@v1").methods
        assert method.points[0].took_s >= 0.01
        assert method.chosen_rows > before.methods[0].chosen_rows


def test_a_profile_that_is_known_is_not_made_again(plane: Plane) -> None:
    known = loaded(plane, "net")
    definition = replace(models()["net"], name="net", profiles=[known.SerializeToString()])
    plane.unload("net@v1")
    num_before = sum(event[0] == "profiled" for event in plane.events)
    plane.load(definition)
    assert state(plane, "net@v1") == "ready"
    assert profile(plane, "net@v1") == known
    assert sum(event[0] == "profiled" for event in plane.events) == num_before
    plane.unload("net@v1")
    known.versions["torch"] = "0.0"
    plane.load(replace(definition, profiles=[known.SerializeToString(), b"\xff"]))
    assert state(plane, "net@v1") != "ready"
    assert profile(plane, "net@v1").versions["torch"] != "0.0"


def test_a_call_has_all_its_rows_although_the_best_batch_has_fewer(plane: Plane) -> None:
    known = loaded(plane, "net")
    known.methods[0].chosen_rows = 1
    plane.unload("net@v1")
    plane.load(replace(models()["net"], profiles=[known.SerializeToString()]))
    assert plane.run("net@v1", "", np.ones((8, 256), np.float32)).shape == (8, 10)
    assert plane.model("net@v1")["statistics"]["batches"] == {1: 1}
    plane.unload("net@v1")


@pytest.mark.accept("C5")
@pytest.mark.parametrize("name", ["fake/device", "net"])
def test_the_batch_chosen_is_as_fast_as_the_best(plane: Plane, name: str, accept: Accept) -> None:
    definition = {**models(), **fake_models("batching")}[name]
    plane.load(definition)
    key, width = f"{name}@v1", 16 if name == "fake/device" else 256
    (method,) = profile(plane, key).methods
    rates_hz = {}
    stream = plane.stream(key)
    stream.hello()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        x = np.ones((rows, width), np.float32)
        # The calls' own way in and out is the same for all sizes, so it is not in the model's time.
        times = [_compute_s(stream, x) for _ in range(5)]
        rates_hz[rows] = rows / min(times)
    assert stream.results() == {}
    chosen_hz = rates_hz[method.chosen_rows]
    accept.figure(max(rates_hz.values()) / chosen_hz, 1 / 0.9, "of the best throughput, at most")


def _compute_s(stream: Wire, x: np.ndarray[Any, Any]) -> float:
    stream.send(x)
    _, value = stream.result()
    assert isinstance(value, np.ndarray), value
    return float(stream.timings.compute_s)


def test_nothing_is_measured_while_the_device_is_busy(plane: Plane) -> None:
    both = models()
    plane.unload("net@v1")
    plane.events.clear()
    plane.load(both["sleepy"])
    stream = plane.stream("sleepy@v1")
    stream.hello()
    stream.send(1.5, method="nap")
    wait_for(lambda: plane.status()["num_running"] == 1, 30)
    plane.load(both["net"])
    assert state(plane, "net@v1") == "pending"
    stream.read()
    assert ("profiled", "net@v1", "") not in plane.events
    assert profile(plane, "net@v1").methods[0].chosen_rows
