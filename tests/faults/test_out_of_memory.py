"""A device that runs out: other models leave, batches get smaller, and only what cannot fit fails.

The executors are real; their device is `tests.fakes.device`, of 12 MB, while the budget believes in more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nos.errors import OutOfDeviceMemoryError, QuarantinedError
from nos_backend.definition import ModelDefinition

from tests.integration.test_memory import MB, on_device, options
from tests.plane import Plane, definitions, running_plane

ROOT = Path(__file__).resolve().parent.parent.parent
#: 12 MB, and a little for the buffers of the models.
CAPACITY_BYTES = 12 * MB + 4096
BUFFER_BYTES = 256
SOURCE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from typing import Annotated
import nos, torch
from tests.fakes.device import install

DEVICE = install({CAPACITY_BYTES}, SCRIPT)

@nos.model(name="NAME")
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((WEIGHTS, 1 << 18), NUMBER))
        self.register_buffer("num_calls", torch.zeros(1))

    def forward(
        self, x: Annotated[torch.Tensor, "float32[batch, 2]"]
    ) -> Annotated[torch.Tensor, "float32[batch, 2]"]:
        with DEVICE.activations(len(x) << 20):
            rows = torch.full((len(x), 1), float(len(x)))
            return torch.cat([x[:, :1] * self.weight[-1, -1], rows], dim=1)

    def count(self):
        self.num_calls += 1
        return float(self.num_calls)

    def items(self):
        yield 1
        with DEVICE.activations(100 << 20):
            yield 2

    def wait(self, s: float):
        time.sleep(s)

    def room(self):
        return DEVICE.room_bytes()
"""


def model(name: str, mb: int, script: str = "{}") -> ModelDefinition:
    """A model with so many megabytes of weights, whose forward pass takes one for each row."""
    text = SOURCE.replace("NAME", name).replace("WEIGHTS", str(mb))
    text = text.replace("NUMBER", f"{len(name)}.0").replace("SCRIPT", script)
    (found,) = definitions(text, f"{name}.py")
    return found


@contextmanager
def plane_of(*models: ModelDefinition, **given: Any) -> Iterator[Plane]:
    memory = options(capacity_bytes=100 * MB, **given)
    found = {item.name: item for item in models}
    with running_plane(found, memory=memory, max_concurrent_batches=1) as plane:
        yield plane


def send(plane: Plane, name: str, *sizes: int) -> list[Any]:
    """Send calls of so many rows that wait while another one runs, so that they can run as one."""
    stream = plane.stream(f"{name}@v1")
    stream.send(0.3, method="wait")
    for index, size in enumerate(sizes):
        stream.send(np.full((size, 2), float(index), np.float32))
    return [outcome for _, outcome in sorted(stream.results().items())][1:]


@pytest.mark.accept("B7")
def test_an_idle_model_leaves_for_a_call_that_finds_no_room() -> None:
    with plane_of(model("a", 4), model("bb", 4)) as plane:
        assert on_device(plane) == ["a", "bb"]
        (found,) = send(plane, "a", 8)
        assert found[:, 1].tolist() == [8.0] * 8
        assert on_device(plane) == ["a"]
        assert plane.model("bb@v1")["history"][-1]["reason"] == "room for a call of a@v1"
        assert plane.run("bb@v1", "", np.ones((1, 2), np.float32)).tolist() == [[2.0, 1.0]]
        assert on_device(plane) == ["a", "bb"]


@pytest.mark.accept("B2", "B7")
def test_a_pinned_model_never_leaves_for_a_call() -> None:
    with plane_of(model("a", 4), model("bb", 4)) as plane:
        plane.pin(model("bb", 4))
        (found,) = send(plane, "a", 8)
        assert isinstance(found, OutOfDeviceMemoryError)
        assert on_device(plane) == ["a", "bb"]


@pytest.mark.accept("B7")
def test_a_batch_that_does_not_fit_is_split_and_the_cap_is_kept() -> None:
    with plane_of(model("a", 4)) as plane:
        found = send(plane, "a", *[1] * 12)
        assert [row[0, 0] for row in found] == [float(index) for index in range(12)]
        assert [row[0, 1] for row in found] == [1.0] * 12, "each ran alone"
        assert "at most 6 rows" in plane.model("a@v1")["note"]
        assert [row[0, 1] for row in send(plane, "a", *[1] * 12)] == [6.0] * 12
        plane.unload("a@v1")
        plane.load(model("a", 4))
        assert [row[0, 1] for row in send(plane, "a", *[1] * 12)] == [6.0] * 12, "after a reload"


@pytest.mark.accept("B7")
def test_only_the_request_that_cannot_fit_fails_and_says_the_bytes() -> None:
    with plane_of(model("a", 4)) as plane:
        found = send(plane, "a", 1, 9, 1)
        assert isinstance(found[1], OutOfDeviceMemoryError)
        weight_bytes = 4 * MB + BUFFER_BYTES
        room_bytes = CAPACITY_BYTES - weight_bytes
        assert f"at most {room_bytes} bytes, which are free" in str(found[1])
        assert f"72 bytes of input beside {weight_bytes} bytes of models" in str(found[1])
        assert [found[0].shape, found[2].shape] == [(1, 2), (1, 2)]
        assert plane.run("a@v1", "room") == room_bytes, "nothing is held"


@pytest.mark.accept("B7")
def test_no_room_for_weights_takes_another_model_off_although_the_budget_had_room() -> None:
    """7 MB are free in two holes, of which neither takes 5 MB."""
    with plane_of(model("a", 4), model("bb", 4), model("ccc", 4)) as plane:
        plane.unload("a@v1")
        plane.unload("ccc@v1")
        plane.load(model("d", 3))
        plane.load(model("eeeee", 5))
        assert on_device(plane) == ["d", "eeeee"]
        assert plane.run("bb@v1", "", np.ones((1, 2), np.float32)).tolist() == [[2.0, 1.0]]


@pytest.mark.accept("B7")
@pytest.mark.parametrize("operation", ["load", "forward"])
def test_an_error_by_script_is_survived(operation: str) -> None:
    script = f'{{("{operation}", 1): torch.OutOfMemoryError("CUDA out of memory by script")}}'
    with plane_of(model("a", 1, script), model("bb", 1)) as plane:
        assert plane.run("a@v1", "", np.ones((1, 2), np.float32)).tolist() == [[1.0, 1.0]]


@pytest.mark.accept("B7")
def test_a_generator_that_gave_items_is_not_repeated() -> None:
    with plane_of(model("a", 1), model("bb", 1)) as plane:
        stream = plane.stream("a@v1")
        stream.send(method="items")
        (outcome,) = stream.results().values()
        assert isinstance(outcome, OutOfDeviceMemoryError)
        assert on_device(plane) == ["a", "bb"]


def test_buffers_that_a_model_wrote_are_there_after_an_eviction() -> None:
    with plane_of(model("a", 4), model("bb", 4)) as plane:
        assert [plane.run("a@v1", "count") for _ in range(2)] == [1.0, 2.0]
        send(plane, "bb", 8)
        assert on_device(plane) == ["bb"]
        assert plane.run("a@v1", "count") == 3.0


@pytest.mark.accept("B7")
def test_an_error_that_loses_the_device_while_loading_costs_its_model_alone() -> None:
    gone = '{("load", 1): RuntimeError("CUDA error: an illegal memory access was encountered")}'
    with plane_of(replace(model("bb", 1), owner="bob")) as plane:
        pid = plane.executor_pids()["bob"]
        with pytest.raises(QuarantinedError, match="illegal memory access"):
            plane.load(model("a", 1, gone))
        assert plane.executor_pids() == {"bob": pid}
        assert plane.run("bb@v1", "", np.ones((1, 2), np.float32)).tolist() == [[2.0, 1.0]]
