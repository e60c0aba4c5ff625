"""ModelManager and executors on a CUDA device: no Dask, no gateway, no network.

`make gpu-check` runs this with the python3 at hand: torch, numpy, grpcio, protobuf, safetensors, pytest. With
`GPU_CHECK_DEVICE=cpu` all but the checks of a device's own memory run on the processor.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
from nos.errors import ExecutorLostError, ModelError, OutOfDeviceMemoryError
from nos_backend.control.describe import describe
from nos_backend.definition import ModelDefinition
from nos_backend.worker.executors import Reply
from nos_backend.worker.manager import ModelManager, Request
from nos_backend.worker.memory import MemoryOptions

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda:0")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE != "cpu" and not torch.cuda.is_available(), reason="no CUDA device here"
    ),
]

SOURCE = '''
import os
import nos
import torch

@nos.model(name="net")
class Net:
    """A model with 64 MiB of weights."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(4096, 4096, bias=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def where(self) -> str:
        return str(next(self.layer.parameters()).device)

    def total(self, x: torch.Tensor) -> float:
        assert str(x.device) == self.where(), x.device
        return float(x.sum())

    def exhaust(self) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=self.where())

    def die(self) -> None:
        os._exit(3)
'''
WEIGHT_BYTES = 4096 * 4096 * 4


def definition(name: str = "net", **init: Any) -> ModelDefinition:
    (found,) = describe(SOURCE, source_name="net.py")
    found.spec.name, found.spec.version = name, 1
    return ModelDefinition(
        name=name,
        version=1,
        owner="local",
        source=SOURCE,
        source_name="net.py",
        class_name="Net",
        init=list(init.items()),
        spec=found.spec.SerializeToString(),
    )


class Device:
    """A manager, and calls that wait for their answer."""

    def __init__(self, manager: ModelManager) -> None:
        self.manager = manager

    async def call(
        self, key: str, method: str, *arrays: np.ndarray, plain: tuple[Any, ...] = ()
    ) -> Any:
        """Return the result: an array, or a plain value."""
        size = sum(array.nbytes for array in arrays)
        taken = self.manager.allocate(key, size) if size else None
        nodes, offset = [["", value] for value in plain], 0
        for array in arrays:
            nodes.append(["", {"t": [array.dtype.name, list(array.shape), offset]}])
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            taken.view[offset : offset + array.nbytes] = memoryview(raw)
            offset += array.nbytes
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def take(reply: Reply) -> None:
            if reply.error is not None:
                done.set_exception(reply.error)
            elif isinstance(reply.node, dict):
                dtype, shape, start = reply.node["t"]
                raw = bytes(reply.block[start:])
                done.set_result(np.frombuffer(raw, dtype)[: np.prod(shape)].reshape(shape))
            else:
                done.set_result(reply.node)
            reply.release()

        request = Request(
            model=key, method=method, tenant="t", arguments=nodes, sink=take, input=taken
        )
        self.manager.submit(request)
        async with asyncio.timeout(120):
            return await done


def on_device(work: Callable[[Device], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        manager = ModelManager(device=DEVICE, **options)
        await manager.start()
        try:
            await work(Device(manager))
        finally:
            await manager.close()

    asyncio.run(run())


def test_a_model_runs_on_the_device_and_computes_what_the_cpu_does() -> None:
    async def work(device: Device) -> None:
        await device.manager.load(definition())
        x = np.random.default_rng(0).standard_normal((8, 4096), np.float32)
        torch.manual_seed(0)
        layer = torch.nn.Linear(4096, 4096, bias=False)
        wanted = layer(torch.from_numpy(x)).detach().numpy()
        assert await device.call("net@v1", "where") == DEVICE
        found = await device.call("net@v1", "__call__", x)
        np.testing.assert_allclose(found, wanted, atol=2e-2)

    on_device(work)


def test_frames_reach_the_device_whole() -> None:
    async def work(device: Device) -> None:
        await device.manager.load(definition())
        for size in (1, 1000, 921_600, 64 << 20):
            frame = np.random.default_rng(size).integers(0, 255, size, np.uint8)
            assert await device.call("net@v1", "total", frame) == frame.sum()

    on_device(work)


def test_one_batch_runs_at_a_time_on_a_gpu() -> None:
    async def work(device: Device) -> None:
        await device.manager.load(definition())
        frame = np.ones(1000, np.uint8)
        calls = [device.call("net@v1", "total", frame) for _ in range(32)]
        assert await asyncio.gather(*calls) == [1000.0] * 32

    on_device(work)


def test_a_model_out_of_memory_fails_its_call_and_lives() -> None:
    async def work(device: Device) -> None:
        await device.manager.load(definition())
        with pytest.raises((OutOfDeviceMemoryError, ModelError)):
            await device.call("net@v1", "exhaust")
        assert await device.call("net@v1", "where") == DEVICE

    on_device(work)


def test_a_crash_frees_the_device_and_the_model_comes_back() -> None:
    async def work(device: Device) -> None:
        await device.manager.load(definition())
        with pytest.raises(ExecutorLostError):
            await device.call("net@v1", "die")
        started = time.monotonic()
        assert await device.call("net@v1", "where") == DEVICE
        print(f"serves again after {time.monotonic() - started:.2f} s")

    on_device(work)


def test_weights_are_counted_and_the_capacity_is_kept() -> None:
    async def work(device: Device) -> None:
        await device.manager.load(definition())
        assert device.manager.status()["used_bytes"] == WEIGHT_BYTES
        await device.manager.load(definition("second"))
        assert device.manager.status()["used_bytes"] == WEIGHT_BYTES, "the first has made room"
        await device.manager.unload("second@v1")
        assert device.manager.status()["used_bytes"] == 0
        assert await device.call("net@v1", "where") == DEVICE

    memory = MemoryOptions(capacity_bytes=int(1.5 * WEIGHT_BYTES), context_bytes=0)
    on_device(work, memory=memory)


@pytest.mark.skipif(DEVICE == "cpu", reason="the host's memory is not the device's")
def test_unloading_the_last_model_gives_all_device_memory_back() -> None:
    free_bytes, _ = torch.cuda.mem_get_info()

    async def work(device: Device) -> None:
        await device.manager.load(definition())
        assert torch.cuda.mem_get_info()[0] < free_bytes - WEIGHT_BYTES
        await device.manager.unload("net@v1")
        deadline = time.monotonic() + 10
        while torch.cuda.mem_get_info()[0] < free_bytes - (16 << 20):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    on_device(work)
