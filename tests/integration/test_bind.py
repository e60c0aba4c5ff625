"""Models constructed in one executor and served from another, with their weights in the worker's memory."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from nos.errors import LoadError, UnavailableError
from nos_backend.definition import WEIGHTS_FILE, ModelDefinition
from nos_backend.worker.executors import Constructed, Executor, ForkServer
from nos_backend.worker.host_store import HostCopy, HostStore
from safetensors.torch import save_file

from tests.integration.test_executors import Caller

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOURCE = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, seed: int = 1):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(100, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(1))
        self.constructed_in = os.getpid()

    def forward(self, x: torch.Tensor):
        self.count += 1
        return self.head(self.embed(x))

    def about(self):
        return {"constructed_in": self.constructed_in, "pid": os.getpid(), "training": self.training,
                "tied": self.head.weight is self.embed.weight, "count": float(self.count)}

class Deep:
    def __init__(self):
        self.parts = {"nets": [nn.Linear(32, 32), nn.Linear(32, 32)], "scale": torch.full((3,), 2.0)}

    def __call__(self, x: torch.Tensor):
        for net in self.parts["nets"]:
            x = net(x)
        return x * self.parts["scale"][0]

class WithLambda(Net):
    def __init__(self):
        super().__init__()
        self.double = lambda x: 2 * x

class Lazy:
    def __init__(self):
        global SHARED
        SHARED = nn.Linear(4, 4)

class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.eye(4).to_sparse())
    def forward(self, x: torch.Tensor): return (self.table @ x)

def double(x): return x + x
"""


def definition(class_name: str = "Net", source: str = SOURCE, **fields: Any) -> ModelDefinition:
    name = f"test/{class_name.lower()}"
    return ModelDefinition(
        name=name,
        version=1,
        owner="ann",
        source=source,
        source_name="<notebook cell 3>",
        class_name=class_name,
        **fields,
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def forkserver() -> AsyncIterator[ForkServer]:
    server = await ForkServer.start()
    yield server
    await server.close()


@asynccontextmanager
async def running(forkserver: ForkServer, name: str = "test") -> AsyncIterator[Executor]:
    executor = await Executor.start(name, device="cpu", num_threads=1, forkserver=forkserver)
    try:
        yield executor
    finally:
        await executor.close()


async def packed(
    forkserver: ForkServer, store: HostStore, what: ModelDefinition
) -> tuple[HostCopy, Constructed]:
    """Construct and store a model in an executor that is gone afterwards."""
    async with running(forkserver, "scratch") as scratch:
        made = await scratch.construct(what, 60)
        copy = store.create(what.key, made.size_bytes, made.skeleton_bytes)
        await scratch.store(what.key, copy.weights_fd, copy.skeleton_fd, 60)
        store.seal(copy)
    return copy, made


async def test_a_model_runs_where_it_was_not_constructed(forkserver: ForkServer) -> None:
    net = definition()
    store = HostStore()
    async with running(forkserver) as reference, running(forkserver) as executor:
        await reference.load(net, 60)
        copy, made = await packed(forkserver, store, net)
        assert made.immovable == ""
        assert 100 * 64 * 4 <= made.size_bytes <= 1.02 * 100 * 64 * 4 + 512
        await executor.bind(net, copy.weights, copy.skeleton, 60)
        x = np.arange(10)
        caller = Caller(executor, net.key)
        assert np.array_equal(
            await caller("__call__", x), await Caller(reference, net.key)("__call__", x)
        )
        about = await caller("about")
        assert about["constructed_in"] != about["pid"] == executor.pid
        assert (about["tied"], about["training"]) == (True, False)
    store.close()


@pytest.mark.accept("B5")
async def test_answers_are_bit_equal_over_200_evictions(forkserver: ForkServer) -> None:
    net = definition()
    store = HostStore()
    async with running(forkserver) as executor:
        copy, _ = await packed(forkserver, store, net)
        await executor.bind(net, copy.weights, copy.skeleton, 60)
        caller, x = Caller(executor, net.key), np.arange(100)
        expected = await caller("__call__", x)
        for _ in range(200):
            await executor.evict(net.key)
            await executor.reload(net.key)
            assert np.array_equal(await caller("__call__", x), expected)
        assert (await caller("about"))["count"] == 201
    store.close()


async def test_an_evicted_model_is_refused_and_never_touched(forkserver: ForkServer) -> None:
    net = definition()
    store = HostStore()
    async with running(forkserver) as executor:
        copy, _ = await packed(forkserver, store, net)
        await executor.bind(net, copy.weights, copy.skeleton, 60)
        await executor.evict(net.key)
        await executor.evict(net.key)
        with pytest.raises(UnavailableError):
            await Caller(executor, net.key)("__call__", np.arange(3))
        await executor.reload(net.key)
        assert (await Caller(executor, net.key)("__call__", np.arange(3))).shape == (3, 100)
    store.close()


async def test_modules_anywhere_in_the_object_are_in_the_run(forkserver: ForkServer) -> None:
    deep = definition("Deep")
    store = HostStore()
    async with running(forkserver) as executor:
        copy, made = await packed(forkserver, store, deep)
        assert made.size_bytes >= 2 * (32 * 32 + 32) * 4
        await executor.bind(deep, copy.weights, copy.skeleton, 60)
        assert (
            await Caller(executor, deep.key)("__call__", np.zeros((2, 32), "float32"))
        ).shape == (2, 32)
    store.close()


async def test_what_cannot_be_flattened_moves_with_the_rest(forkserver: ForkServer) -> None:
    sparse = definition("Sparse")
    store = HostStore()
    async with running(forkserver) as executor:
        copy, made = await packed(forkserver, store, sparse)
        assert made.loose == ("table: layout torch.sparse_coo",)
        await executor.bind(sparse, copy.weights, copy.skeleton, 60)
        x = np.arange(16, dtype="float32").reshape(4, 4)
        assert np.array_equal(await Caller(executor, sparse.key)("__call__", x), x)
    store.close()


async def test_a_function_moves(forkserver: ForkServer) -> None:
    double = definition("double")
    store = HostStore()
    async with running(forkserver) as executor:
        copy, _ = await packed(forkserver, store, double)
        await executor.bind(double, copy.weights, copy.skeleton, 60)
        assert await Caller(executor, double.key)("__call__", 21) == 42
    store.close()


@pytest.mark.parametrize(
    ("class_name", "source", "words"),
    [
        ("WithLambda", SOURCE, "cannot be moved: .*lambda"),
        ("Lazy", SOURCE, "changes globals"),
        ("Net", "import time; time.sleep(0.6)\n" + SOURCE, "running its source takes 0.6 s"),
    ],
)
async def test_what_cannot_be_moved_says_why(
    forkserver: ForkServer, class_name: str, source: str, words: str
) -> None:
    async with running(forkserver) as scratch:
        made = await scratch.construct(definition(class_name, source), 60)
        assert made.skeleton_bytes == 0
        assert re.search(words, made.immovable)


async def test_an_immovable_model_is_evicted_where_it_is(forkserver: ForkServer) -> None:
    fixed = definition("WithLambda")
    store = HostStore()
    async with running(forkserver) as executor:
        made = await executor.construct(fixed, 60)
        copy = store.create(fixed.key, made.size_bytes, 0)
        await executor.store(fixed.key, copy.weights_fd, copy.skeleton_fd, 60)
        store.seal(copy)
        await executor.adopt(fixed.key, copy.weights_fd, 60)
        caller, x = Caller(executor, fixed.key), np.arange(7)
        expected = await caller("__call__", x)
        await executor.evict(fixed.key)
        await executor.reload(fixed.key)
        assert np.array_equal(await caller("__call__", x), expected)
    store.close()


async def test_evicting_gives_no_descriptor_away(forkserver: ForkServer) -> None:
    net = definition()
    store = HostStore()
    async with running(forkserver) as executor:
        copy, _ = await packed(forkserver, store, net)

        def num_fds() -> int:
            return sum(1 for _ in Path(f"/proc/{executor.pid}/fd").iterdir())

        before = num_fds()
        for _ in range(3):
            await executor.bind(net, copy.weights, copy.skeleton, 60)
        assert num_fds() == before
    store.close()


async def test_parts_that_do_not_fit_together_are_refused(forkserver: ForkServer) -> None:
    net = definition()
    store = HostStore()
    async with running(forkserver) as executor:
        copy, made = await packed(forkserver, store, net)
        with pytest.raises(LoadError, match="do not fit together"):
            await executor.bind(net, (copy.weights_fd, made.size_bytes - 256), copy.skeleton, 60)
    store.close()


WITH_FILE = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self, is_read: bool):
        super().__init__()
        self.net = nn.Linear(4096, 4096, bias=False)
        self.first = float(self.net.weight[0, 0]) if is_read else 0.0

    def forward(self, x: torch.Tensor):
        return self.net(x)
"""


async def test_weights_of_a_file_take_no_memory_before_they_are_packed(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    weight = torch.full((4096, 4096), 0.5)
    (tmp_path / WEIGHTS_FILE).parent.mkdir()
    save_file({"net.weight": weight}, tmp_path / WEIGHTS_FILE)
    taken_bytes = {}
    store = HostStore()
    for is_read in (False, True):
        wide = definition("Wide", WITH_FILE, folder=str(tmp_path), init=[("is_read", is_read)])
        async with running(forkserver, "scratch") as scratch:
            before_bytes = anonymous_bytes(scratch.pid)
            made = await scratch.construct(wide, 60)
            taken_bytes[is_read] = anonymous_bytes(scratch.pid) - before_bytes
            assert bool(made.made_first) == is_read
            copy = store.create(wide.key, made.size_bytes, made.skeleton_bytes)
            await scratch.store(wide.key, copy.weights_fd, copy.skeleton_fd, 60)
            store.seal(copy)
        async with running(forkserver) as executor:
            await executor.bind(wide, copy.weights, copy.skeleton, 60)
            found = await Caller(executor, wide.key)("__call__", np.ones((1, 4096), np.float32))
            assert found.tolist() == [[2048.0] * 4096]
        store.release(copy)
    assert taken_bytes[False] < weight.nbytes // 2
    assert taken_bytes[True] > weight.nbytes // 2
    store.close()


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous"))
