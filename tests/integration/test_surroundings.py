"""Models make way for what others use of the device, and host copies for what others use of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nos.errors import OutOfDeviceMemoryError
from nos.wire.v1 import models_pb2
from nos_backend.worker.surroundings import Probes, memory_stalls

from tests.integration.test_memory import MB, call, model, on_device, options
from tests.plane import Plane, running_plane
from tests.servers import wait_for


class Machine:
    """A made-up machine."""

    def __init__(self) -> None:
        self.host_room_bytes = self.device_room_bytes = 1 << 40
        self.stalls = 0.0

    def probes(self) -> Probes:
        return Probes(
            host_room_bytes=lambda: self.host_room_bytes,
            host_stalls=lambda: self.stalls,
            device_room_bytes=lambda: self.device_room_bytes,
        )


def note(plane: Plane, key: str, activation_bytes: int) -> None:
    """Hand the manager a profile, as if the model had been measured."""

    async def tell() -> None:
        manager, profile = plane.manager, models_pb2.Profile(activation_bytes=activation_bytes)
        manager._on_profile(manager._entries[key], profile)

    plane.data_plane.submit_coroutine(tell).result(10)


@pytest.mark.accept("B1")
def test_models_keep_within_what_others_leave_of_the_device() -> None:
    machine = Machine()
    models = {name: model(name, mb) for name, mb in (("m20", 20), ("m30", 30))}
    given: dict[str, Any] = {"memory": options(capacity_bytes=64 * MB), "probes": machine.probes()}
    with running_plane(models, **given) as plane:
        expected = call(plane, "m20")
        machine.device_room_bytes = 5 * MB
        wait_for(lambda: plane.status()["capacity_bytes"] == 55 * MB, "foreign use is noticed")
        assert on_device(plane) == ["m20", "m30"]
        plane.load(model("m10", 10))
        assert len(on_device(plane)) == 2, "55 MB do not hold all three"
        machine.device_room_bytes = 1 << 40
        wait_for(lambda: plane.status()["capacity_bytes"] == 64 * MB, "the room is back")
        plane.load(model("m60", 60))
        assert np.array_equal(call(plane, "m20"), expected)


@pytest.mark.accept("B1")
def test_the_largest_activations_count_in_the_budget() -> None:
    models = {name: model(name, 20) for name in ("a", "b")}
    with running_plane(models, memory=options(capacity_bytes=64 * MB)) as plane:
        note(plane, "a@v1", 20 * MB)
        assert plane.status()["used_bytes"] == 60 * MB
        note(plane, "b@v1", 10 * MB)
        assert plane.status()["used_bytes"] == 60 * MB, "one batch runs at a time"
        note(plane, "b@v1", 30 * MB)
        wait_for(lambda: len(on_device(plane)) == 1, "one leaves")
        assert plane.status()["used_bytes"] <= 64 * MB
        assert call(plane, "a").shape == call(plane, "b").shape == (1, 64)


@pytest.mark.parametrize("kind", ["room", "stalls"])
def test_a_full_machine_sends_host_copies_to_files_and_no_model_off_the_device(
    tmp_path: Path, kind: str
) -> None:
    machine = Machine()
    memory = options(capacity_bytes=5 * MB, folder=tmp_path)
    models = {name: model(name, 4) for name in ("a", "b")}
    with running_plane(models, memory=memory, probes=machine.probes()) as plane:
        expected = {name: call(plane, name) for name in ("a", "b")}
        assert plane.model("a@v1")["state"] == "host"
        if kind == "room":
            machine.host_room_bytes = 1
        else:
            machine.stalls = 0.5
        wait_for(lambda: plane.model("a@v1")["state"] == "disk", "the host tier shrinks")
        assert plane.model("b@v1")["state"] == "device"
        machine.host_room_bytes, machine.stalls = 1 << 40, 0.0
        for name in ("a", "b"):
            assert np.array_equal(call(plane, name), expected[name])


def test_a_load_beyond_host_memory_names_what_would_have_to_go(tmp_path: Path) -> None:
    memory = options(host_bytes=9 * MB, folder=tmp_path)
    with running_plane({"a": model("a", 4), "b": model("b", 3)}, memory=memory) as plane:
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            plane.load(model("c", 4))
        assert f"at most {9 * MB} bytes" in str(caught.value)
        assert "Unload a@v1, or raise --host-bytes" in str(caught.value)


def test_the_kernel_says_how_long_everything_waited_for_memory(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_text("some avg10=50.00 avg60=1.00 total=1\nfull avg10=12.50 avg60=0.00 total=1\n")
    assert memory_stalls(path) == 0.125
    assert memory_stalls(tmp_path / "none") == 0.0
