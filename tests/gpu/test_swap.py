"""Swapping, running out, profiles and giving memory back on a CUDA device; see `test_device.py`."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nos.errors import OutOfDeviceMemoryError
from nos_backend.control.describe import describe
from nos_backend.definition import ModelDefinition
from nos_backend.executor import footprint
from nos_backend.executor.devices import open_device
from nos_backend.worker.memory import MemoryOptions
from torch import nn

from tests.gpu.test_device import DEVICE, Device, on_device

ON_CPU = DEVICE == "cpu"
GIB = 1 << 30
SLACK_BYTES = 64 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device here"),
]
needs_device_memory = pytest.mark.skipif(ON_CPU, reason="the processor has no memory of its own")


def host_copy(size_bytes: int, pattern: int) -> int:
    """A sealed host copy that is full of one float32 value."""
    fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    piece = np.full(1 << 20, pattern, np.float32).tobytes()
    for _ in range(size_bytes // len(piece)):
        os.write(fd, piece)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def wait_for_device() -> None:
    if not ON_CPU:
        torch.cuda.synchronize()


def median_s(work: Callable[[], Any], rounds: int, before: Callable[[], Any]) -> float:
    found = []
    for _ in range(rounds):
        before()
        wait_for_device()
        started = time.perf_counter()
        work()
        wait_for_device()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """Residences to close, and descriptors."""
    held: list[Any] = []
    yield held
    for item in reversed(held):
        if isinstance(item, int):
            os.close(item)
        else:
            item.close()


def test_no_kernel_sees_the_next_owners_bytes(closing: list[Any]) -> None:
    """Poison: each run is full of a number of its own; kernels are still queued when the run leaves."""
    size_bytes, device = (8 if ON_CPU else 64) << 20, open_device(DEVICE)
    runs = []
    for pattern in (1, 2, 3):
        fd = host_copy(size_bytes, pattern)
        run = device.reside(fd, size_bytes)
        runs.append((pattern, run, run.flat.view(torch.float32)))
        closing += [fd, run]
    chance, answers = random.Random(1), []
    for _ in range(200 if not ON_CPU else 20):
        pattern, run, weights = chance.choice(runs)
        run.load()
        answer = weights
        for _ in range(4):
            answer = answer * 1.0
        answers.append((pattern, answer.min(), answer.max()))
        run.evict()  # while the kernels above may still run
    wait_for_device()
    wrong = [item for item in answers if not item[0] == float(item[1]) == float(item[2])]
    assert wrong == []


@needs_device_memory
def test_a_reload_is_as_fast_as_a_pinned_copy(closing: list[Any]) -> None:
    size_bytes, device = GIB, open_device(DEVICE)
    fd = host_copy(size_bytes, 1)
    run = device.reside(fd, size_bytes)
    closing += [fd, run]
    run._pinning.join()  # in the background elsewhere
    pinned = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size_bytes, dtype=torch.uint8, device=DEVICE)
    copy_s = median_s(lambda: target.copy_(pinned, non_blocking=True), 10, lambda: None)
    run.load()
    reload_s = median_s(run.load, 10, run.evict)
    evict_s = median_s(run.evict, 10, run.load)
    print(
        f"pinned copy {size_bytes / copy_s / 1e9:.1f} GB/s, reload {size_bytes / reload_s / 1e9:.1f} GB/s"
    )
    print(f"evict {evict_s * 1e3:.3f} ms")
    assert reload_s <= copy_s / 0.95 + 1e-3
    assert evict_s <= 1e-3


def test_a_pinned_host_copy_is_not_copied_in_main_memory(closing: list[Any]) -> None:
    size_bytes, device = 64 << 20, open_device(DEVICE)
    fd = host_copy(size_bytes, 1)
    before = anonymous_bytes()
    run = device.reside(fd, size_bytes)
    closing += [fd, run]
    if not ON_CPU:
        run._pinning.join()
    run.load()
    wait_for_device()
    assert anonymous_bytes() - before < size_bytes // 2


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


SOURCE = """
import nos, torch

@nos.model(name="NAME")
class Heavy:
    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(MIB << 18))
        self.net = torch.nn.ParameterList([self.weight])

    def total(self) -> float:
        return float(self.weight[:1000].sum())

    def take(self, mib: int) -> int:
        return int(torch.zeros(mib << 20, dtype=torch.uint8, device=self.weight.device).sum())

    def where(self) -> str:
        return str(self.weight.device)
"""


def heavy(name: str, mib: int) -> ModelDefinition:
    source = SOURCE.replace("NAME", name).replace("MIB", str(mib))
    (found,) = describe(source, source_name=f"{name}.py")
    found.spec.version = 1
    return ModelDefinition(
        name=name,
        version=1,
        owner="local",
        source=source,
        source_name=f"{name}.py",
        class_name="Heavy",
        spec=found.spec.SerializeToString(),
    )


async def call(device: Device, key: str, method: str, *plain: Any) -> Any:
    """A call with plain arguments."""
    return await device.call(key, method, plain=plain)


def states(device: Device) -> dict[str, str]:
    return {item["name"]: item["state"] for item in device.manager.status()["models"]}


@needs_device_memory
def test_a_device_that_is_really_full_is_survived_at_load_and_in_a_call() -> None:
    """Another program has all but 4 GiB; the budget knows nothing of it."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    ballast = torch.empty(free_bytes - 4 * GIB, dtype=torch.uint8, device=DEVICE)

    async def work(device: Device) -> None:
        for name in ("a", "b", "c", "d", "e"):
            await device.manager.load(heavy(name, 1024))
        assert "host" in states(device).values(), "not all five fit"
        for name in ("a", "b", "c", "d", "e"):
            assert await call(device, f"{name}@v1", "total") == 1000.0
        assert await call(device, "a@v1", "take", 2048) == 0
        with pytest.raises(OutOfDeviceMemoryError, match="bytes"):
            await call(device, "a@v1", "take", 8192)
        assert await call(device, "a@v1", "total") == 1000.0

    on_device(work, memory=MemoryOptions(capacity_bytes=2 * total_bytes, context_bytes=0))
    del ballast
    torch.cuda.empty_cache()


def test_models_that_do_not_fit_together_swap_and_answer_right() -> None:
    async def work(device: Device) -> None:
        names = [f"m{index}" for index in range(4)]
        for name in names:
            await device.manager.load(heavy(name, 16))
        for name in names * 5:
            assert await call(device, f"{name}@v1", "total") == 1000.0
        assert device.manager.status()["used_bytes"] <= 40 << 20
        assert "host" in states(device).values()

    memory = MemoryOptions(capacity_bytes=40 << 20, context_bytes=0, min_residency_s=0.0)
    on_device(work, memory=memory)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024)),
        (1024,),
    ),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)),
        (3, 128, 128),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True), (128, 512)),
}


@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_the_predicted_peak_is_the_measured_one(name: str) -> None:
    make, shape = NETS[name]
    model = make().eval().to(DEVICE)
    for batch_size in (1, 2) if ON_CPU else (8, 64):
        x = torch.randn(batch_size, *shape, device=DEVICE)
        model(x)
        predicted = footprint.predict(model, model, [x], batch_size).peak_bytes
        if ON_CPU:
            measured = footprint.measure(model, model, [x], batch_size).peak_bytes
        else:
            device = open_device(DEVICE)
            wait_for_device()
            device.start_measuring()
            model(x)
            wait_for_device()
            measured = device.peak_bytes()
        print(f"{name} x {batch_size}: predicted {predicted}, measured {measured}")
        assert abs(predicted - measured) <= max(0.1 * measured, SLACK_BYTES)


@needs_device_memory
def test_a_killed_executor_gives_its_device_memory_back_within_a_second() -> None:
    free_bytes, _ = torch.cuda.mem_get_info()

    async def work(device: Device) -> None:
        await device.manager.load(heavy("a", 2048))
        assert torch.cuda.mem_get_info()[0] < free_bytes - 2 * GIB
        for pid in device.manager.executor_pids().values():
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        while torch.cuda.mem_get_info()[0] < free_bytes - SLACK_BYTES:
            assert time.monotonic() - started < 1.0
            await asyncio.sleep(0.005)
        assert await call(device, "a@v1", "total") == 1000.0

    on_device(work)
