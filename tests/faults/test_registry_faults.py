"""The registry keeps its word through kill -9, full disks and failing ones."""

from __future__ import annotations

import asyncio
import collections
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import nos
import pytest
from nos.wire.limits import TOKEN_KEY
from nos.wire.v1 import models_pb2, models_pb2_grpc
from nos_backend.control.blobs import BlobStore
from nos_backend.control.catalogue import Catalogue
from nos_backend.control.registrar import Registrar
from nos_backend.control.registry import FILE_NAME, Registry

from tests.accept import Accept
from tests.faults import registering
from tests.gateways import TOKEN, Flags, Start, flags, ready, scheduler, start

__all__ = ["flags", "scheduler", "start"]

METADATA = ((TOKEN_KEY, f"Bearer {TOKEN}"),)
NUM_REGISTRATIONS = 60
NUM_KILLS = 8
NUM_AUTHORS = 3
SEED = 7


def restored(folder: Path) -> tuple[Catalogue, list[str]]:
    """Return what a gateway would serve from a folder, and what it would say of it."""
    registry = Registry(folder, BlobStore(folder / "blobs"))
    catalogue = Catalogue()
    catalogue.restore(registry.read_models())
    registry.close()
    return catalogue, registry.notices


def integrity(folder: Path) -> str:
    with sqlite3.connect(folder / FILE_NAME) as connection:
        (found,) = connection.execute("PRAGMA integrity_check").fetchone()
    connection.close()
    return str(found)


def num_lost(folder: Path, acknowledged: set[int]) -> int:
    """Return how many acknowledged are not served; whatever is served is as it was given."""
    assert integrity(folder) == "ok"
    catalogue, notices = restored(folder)
    assert notices == []
    served = {entry.name: catalogue.find(entry.name) for entry in catalogue.entries()}
    for name, version in served.items():
        number = int(name.partition("-")[2])
        assert version.definition.source == registering.source_of(number)
    return len({f"net-{number}" for number in acknowledged} - served.keys())


class Authors:
    """A few clients that register one model after the other, until the gateway is gone."""

    def __init__(self) -> None:
        self.acknowledged: set[int] = set()
        self.next = iter(range(1_000_000))

    def work(self, address: str, limit: int) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = models_pb2_grpc.ModelServiceStub(channel)
            while len(self.acknowledged) < limit:
                number = next(self.next)
                request = models_pb2.RegisterModelRequest(
                    name=f"net-{number}", source=registering.source_of(number)
                )
                try:
                    stub.RegisterModel(request, metadata=METADATA)
                except grpc.RpcError:
                    return
                self.acknowledged.add(number)


@pytest.mark.accept("F4")
def test_no_acknowledged_registration_is_lost_to_kill_9(
    flags: Flags, start: Start, accept: Accept
) -> None:
    chance = random.Random(SEED)
    authors = Authors()
    num_killed = 0
    num_kills = NUM_KILLS if accept.strict else NUM_KILLS // 2
    for life in range(1, num_kills + 1):
        gateway = start(flags)
        address = ready(flags, gateway)
        Path(flags["--run-dir"], "gateway.ready").unlink()
        limit = len(authors.acknowledged) + NUM_REGISTRATIONS // num_kills + 1
        threads = [
            threading.Thread(target=authors.work, args=(address, 1_000_000))
            for _ in range(NUM_AUTHORS)
        ]
        for thread in threads:
            thread.start()
        while len(authors.acknowledged) < limit:
            assert gateway.poll() is None, life
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        num_killed += gateway.poll() is None
        gateway.kill()
        gateway.wait()
        for thread in threads:
            thread.join()
    assert num_killed == num_kills
    assert len(authors.acknowledged) >= NUM_REGISTRATIONS
    lost = num_lost(Path(flags["--state-dir"]), authors.acknowledged)
    accept.figure(lost, 0, f"of {len(authors.acknowledged)} acknowledged lost")


def seeded(folder: Path, count: int) -> Path:
    """Make a state folder with models in it."""

    async def fill() -> None:
        registry = Registry(folder, BlobStore(folder / "blobs"))
        registrar = Registrar(Catalogue(), registry)
        for number in range(count):
            await registering.register(registrar, number)
        registry.close()

    asyncio.run(fill())
    return folder


@pytest.mark.accept("F4")
def test_gateway_with_1000_models_is_ready_within_3_s(
    flags: Flags, start: Start, accept: Accept
) -> None:
    count = 1000 if accept.strict else 200
    seeded(Path(flags["--state-dir"]), count)
    started_s = time.monotonic()
    with grpc.insecure_channel(ready(flags, start(flags))) as channel:
        accept.figure(time.monotonic() - started_s, 3.0, "s")
        stub = models_pb2_grpc.ModelServiceStub(channel)
        request = models_pb2.ListModelsRequest(pattern="net-")
        assert len(stub.ListModels(request, metadata=METADATA).models) == count


def test_damaged_registry_is_said_in_the_status(flags: Flags, start: Start) -> None:
    folder = Path(flags["--state-dir"])
    folder.mkdir(mode=0o700)
    (folder / FILE_NAME).write_bytes(b"no database " * 1000)
    address = ready(flags, start(flags))
    with nos.connect(address, token=TOKEN) as client:
        (notice,) = client.status().notices
        assert "quarantine" in notice
        assert notice in str(client.status())


def injected(folder: Path, call: str, error: str, when: str) -> tuple[list[str], int]:
    """Register three models while some of a system call fail: the Nth, or with a `+` all from the Nth on.

    Returns:
        What the process said, and how many calls failed.
    """
    log = folder.parent / f"{folder.name}.strace"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        subprocess.run(
            [
                *("strace", "-f", "-qq", "-o", str(log), "-e", f"trace={call}"),
                *("-e", f"inject={call}:error={error}:when={when}"),
                *(sys.executable, "-m", "tests.faults.registering"),
                *(str(folder), "10", "3", str(theirs.fileno())),
            ],
            pass_fds=[theirs.fileno()],
            cwd=Path(__file__).parents[2],
            check=False,
            timeout=60,
        )
        theirs.close()
        said = ours.makefile().read().splitlines()
    return said, log.read_text().count("(INJECTED)")


#: Which system call fails, how, and whether it goes on failing.
FAULTS = [
    ("pwrite64", "ENOSPC", "+"),
    ("pwrite64", "EIO", ""),
    ("fdatasync", "EIO", ""),
    ("fsync", "EIO", "+"),
    ("write", "ENOSPC", ""),
    ("rename", "EIO", "+"),
]


@pytest.mark.accept("F4")
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the faults")
@pytest.mark.parametrize(("call", "error", "more"), FAULTS)
def test_what_was_acknowledged_is_readable_whichever_write_failed(
    tmp_path: Path, accept: Accept, call: str, error: str, more: str
) -> None:
    seed = seeded(tmp_path / "seed", 2)
    num_injected = 0
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(1, 100, 1 if accept.strict else 11):
        folder = shutil.copytree(seed, tmp_path / f"state-{number}")
        said, count = injected(folder, call, error, f"{number}{more}")
        words = [line.split() for line in said]
        outcomes.update(line[0] for line in words)
        acknowledged = {int(line[1]) for line in words if line[0] == "acknowledged"}
        assert num_lost(folder, {0, 1} | acknowledged) == 0
        num_injected += count
        if not count:
            assert len(acknowledged) == 3
            break
    else:
        pytest.fail("there was always one more write")
    assert num_injected
    assert outcomes["failed"] + outcomes["refused"]
