"""The fork server makes children that work, and none outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from nos.errors import ExecutorLostError
from nos_backend.definition import ModelDefinition
from nos_backend.worker.executors import Executor, ForkServer, Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[2]
MATMUL = """
import torch
def Multiply():
    a = torch.ones(512, 512)
    return [torch.get_num_threads(), float((a @ a).sum())]
"""
DEFINITION = ModelDefinition(
    name="test/multiply",
    version=1,
    owner="ann",
    source=MATMUL,
    source_name="multiply.py",
    class_name="Multiply",
)


@pytest_asyncio.fixture
async def forkserver() -> AsyncIterator[ForkServer]:
    server = await ForkServer.start()
    yield server
    await server.close()


async def start(forkserver: ForkServer | None, num_threads: int = 1) -> Executor:
    return await Executor.start(
        "test", device="cpu", num_threads=num_threads, forkserver=forkserver, arena_bytes=1 << 20
    )


async def multiply(executor: Executor) -> Any:
    await executor.load(DEFINITION, 60)
    replies: asyncio.Queue[Reply] = asyncio.Queue()
    executor.call(1, DEFINITION.key, "__call__", [], None, replies.put_nowait)
    return (await replies.get()).node


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def num_threads(pid: int) -> int:
    """Count them; a zombie has one, and a process that is not there none."""
    return sum(1 for _ in Path("/proc").glob(f"{pid}/task/*"))


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(10):
        while any(is_running(pid) for pid in pids):  # noqa: ASYNC110 - other processes make it so
            await asyncio.sleep(0.01)


@pytest.mark.long
async def test_200_children_each_run_a_matmul_of_two_threads(forkserver: ForkServer) -> None:
    num_children = 0
    for _ in range(40):
        executors = [await start(forkserver, num_threads=2) for _ in range(5)]
        for executor in executors:
            assert await multiply(executor) == {"l": [2, 512.0**3]}
            num_children += 1
        await asyncio.gather(*(executor.close() for executor in executors))
    assert num_children == 200


async def test_it_has_one_thread_and_leaves_no_zombies(forkserver: ForkServer) -> None:
    executor = await start(forkserver)
    os.kill(executor.pid, signal.SIGKILL)
    assert await executor.closed == "signal SIGKILL"
    assert num_threads(executor.pid) == 0
    assert num_threads(forkserver.pid) == 1


async def test_its_children_end_with_it(forkserver: ForkServer) -> None:
    executors = [await start(forkserver) for _ in range(3)]
    await forkserver.close()
    for executor in executors:
        assert await executor.closed == "ended with its fork server"
    await until_gone(forkserver.pid, *(executor.pid for executor in executors))


async def test_its_children_end_when_it_is_killed(forkserver: ForkServer) -> None:
    executors = [await start(forkserver) for _ in range(3)]
    os.kill(forkserver.pid, signal.SIGKILL)
    for executor in executors:
        assert await executor.closed == "ended with its fork server"
    await until_gone(*(executor.pid for executor in executors))


async def test_a_dead_fork_server_says_so_and_executors_are_spawned_without_it(
    forkserver: ForkServer,
) -> None:
    os.kill(forkserver.pid, signal.SIGKILL)
    await until_gone(forkserver.pid)
    with pytest.raises(ExecutorLostError):
        await start(forkserver)
    assert not forkserver.is_alive
    executor = await start(None)
    assert await multiply(executor) == {"l": [1, 512.0**3]}
    await executor.close()


async def test_a_python_without_torch_makes_no_fork_server(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ExecutorLostError, match="did not start"):
        await ForkServer.start(str(python))


async def test_executors_end_when_the_worker_dies() -> None:
    """A worker that is killed has no time to end anybody."""
    script = """
import asyncio
from tests.integration.test_forkserver import ForkServer, start
async def main():
    forkserver = await ForkServer.start()
    executors = [await start(forkserver), await start(None)]
    print(forkserver.pid, *(executor.pid for executor in executors), flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert worker.stdout is not None
    pids = [int(pid) for pid in (await worker.stdout.readline()).split()]
    assert len(pids) == 3
    worker.kill()
    await worker.wait()
    await until_gone(*pids)
