"""The cluster with real parts: Dask scheduler, nannies, serving workers, link; no supervisor, no gateway."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from nos.errors import InvalidRequestError, LoadError, OutOfDeviceMemoryError, UnavailableError
from nos.wire.limits import TICKET_KEY
from nos.wire.v1 import access_pb2, inference_pb2, inference_pb2_grpc, models_pb2, values_pb2
from nos_backend import hub
from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.device import WorkerSettings
from nos_backend.cluster.launch import Command, scheduler_command, worker_command
from nos_backend.cluster.link import ClusterEvent, ClusterLink
from nos_backend.control.tickets import TicketSigner
from nos_backend.definition import ModelDefinition, folder_name

pytestmark = pytest.mark.timeout(90)

OK = grpc.StatusCode.OK
REFUSED = grpc.StatusCode.UNAUTHENTICATED

SOURCE = """
class Doubler:
    def __call__(self, x: int) -> int:
        return 2 * x
"""


def definition(name: str = "test/double", source: str = SOURCE, **options: Any) -> ModelDefinition:
    spec = models_pb2.ModelSpec(name=name, version=1, owner="local")
    spec.weight_bytes = options.pop("weight_bytes", 0)
    method = spec.methods.add(name="__call__")
    method.parameters.add(name="x")
    return ModelDefinition(
        name=name,
        version=1,
        owner="local",
        source=source,
        source_name=f"<{name}>",
        class_name="Doubler",
        spec=spec.SerializeToString(),
        **options,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A scheduler and its workers, each of which may be killed and started again."""

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tls = TlsFiles.create(self.folder / "tls")

    @property
    def address(self) -> str:
        return f"tls://127.0.0.1:{self.port}"

    def start_scheduler(self) -> None:
        command = scheduler_command(
            host="127.0.0.1", port=self.port, dashboard_port=self.dashboard_port, tls=self.tls
        )
        self._start("scheduler", command)

    def start_worker(
        self, name: str, capacity_bytes: int | None = None, device: str = "cpu", **environ: str
    ) -> None:
        settings = WorkerSettings(device=device, host="127.0.0.1", capacity_bytes=capacity_bytes)
        command = worker_command(
            name=name,
            scheduler=self.address,
            host="127.0.0.1",
            settings=settings,
            tls=self.tls,
            scratch=self.folder / "dask",
        )
        command.environ.update(environ)
        self._start(name, command)

    def _start(self, name: str, command: Command) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command.arguments,
                env={**os.environ, **command.environ},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """End a process as a crash would, and wait for it."""
        self.processes[name].kill()
        self.processes[name].wait()

    def close(self) -> None:
        """End the workers, then the scheduler."""
        scheduler = self.processes.pop("scheduler")
        self._end(list(self.processes.values()))
        self._end([scheduler])

    def _end(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    running = Cluster(tmp_path)
    running.start_scheduler()
    running.start_worker("a", capacity_bytes=1 << 20)
    running.start_worker("b", capacity_bytes=1 << 20)
    yield running
    running.close()


@pytest_asyncio.fixture
async def link(cluster: Cluster) -> AsyncIterator[ClusterLink]:
    connected = ClusterLink()
    await connected.connect(cluster.address, cluster.tls.folder)
    await connected.set_keys(TicketSigner.generate().public_key_bytes)
    await until(lambda: num_workers(connected), 2)
    yield connected
    await connected.close()


async def num_workers(link: ClusterLink) -> int:
    try:
        return len((await link.state())["workers"])
    except UnavailableError:
        return -1


async def until(ask: Callable[[], Any], wanted: Any, timeout_s: float = 30.0) -> float:
    """Ask until the answer is `wanted`; returns after how many seconds it was."""
    start = time.monotonic()
    while (answer := await ask()) != wanted:
        assert time.monotonic() - start < timeout_s, f"still {answer!r}, never {wanted!r}"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


async def model_state(link: ClusterLink, key: str) -> str:
    try:
        return str((await link.state())["models"].get(key, {}).get("state"))
    except UnavailableError:
        return "unknown"


async def worker_pid(link: ClusterLink, name: str) -> int:
    workers = (await link.state())["workers"]
    return next(int(worker["pid"]) for worker in workers if worker["name"] == name)


@pytest.mark.asyncio
async def test_a_model_is_loaded_once_and_unloaded(link):
    events: list[ClusterEvent] = []
    link.subscribe(events.append)
    [first], [second] = await asyncio.gather(link.load(definition()), link.load(definition()))
    assert first == second
    host, _, port = first.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=5):
        pass
    holders = [
        worker["name"]
        for worker in (await link.state())["workers"]
        if any(model["key"] == "test/double@v1" for model in worker["status"]["models"])
    ]
    assert holders in ([first.worker], [])  # the status comes with the next heartbeat
    await link.unload("test/double@v1")
    assert await model_state(link, "test/double@v1") == "None"
    await until(lambda: seen(events, "unloaded"), True)
    assert await seen(events, "loaded")
    assert {event.worker for event in events if event.model and event.worker} == {first.worker}


async def seen(events: list[ClusterEvent], kind: str, key: str = "test/double@v1") -> bool:
    return any(event.kind == kind and event.model == key for event in events)


READS_FILES = """
from pathlib import Path

import sibling


class Doubler:
    def __init__(self) -> None:
        self.weights = Path(__file__).with_name("weights").read_bytes()
        assert len(self.weights) == sibling.SIZE_BYTES

    def __call__(self, x: int) -> int:
        return len(self.weights)
"""


@pytest.mark.asyncio
async def test_workers_of_other_machines_get_a_models_files_and_have_their_own_built_ins(
    cluster, tmp_path
):
    folders = tmp_path / "gateway"
    weights = os.urandom(3 << 20)
    files = {"weights": weights, "sibling.py": f"SIZE_BYTES = {len(weights)}".encode()}
    name = folder_name({path: hashlib.sha256(data).hexdigest() for path, data in files.items()})
    (folders / name).mkdir(parents=True)
    for path, data in files.items():
        (folders / name / path).write_bytes(data)
    link = ClusterLink(folders=folders)
    await link.connect(cluster.address, cluster.tls.folder)
    await link.set_keys(TicketSigner.generate().public_key_bytes)
    await until(lambda: num_workers(link), 2)
    elsewhere = f"/of/the/gateways/machine/{name}"
    await link.load(definition("test/files", READS_FILES, folder=elsewhere))
    (kept,) = (cluster.folder / "dask").glob("**/files/*/weights")
    assert kept.read_bytes() == weights
    [digits] = [it for it in hub.definitions() if it.name == "nos/digits"]
    await link.load(replace(digits, folder="/of/another/installation"))
    await link.close()


@pytest.mark.asyncio
@pytest.mark.long
async def test_models_spread_over_workers(link):
    placed = [await link.load(definition(f"test/m{index}")) for index in range(4)]
    assert sorted(placement.worker for [placement] in placed) == ["a", "a", "b", "b"]


@pytest.mark.asyncio
async def test_failures_are_typed_and_leave_the_rest_alone(link):
    with pytest.raises(LoadError):
        await link.load(definition("test/bad", "raise RuntimeError('no')"))
    with pytest.raises(
        LoadError, match="no worker has such a device: expected device cuda, got cpu"
    ):
        await link.load(definition("test/gpu", device="cuda"))
    with pytest.raises(
        OutOfDeviceMemoryError, match="at most 1048576 bytes of weights, got 2097152"
    ):
        await link.load(definition("test/big", weight_bytes=2 << 20))
    assert (await link.load(definition()))[0].worker in {"a", "b"}


@pytest.mark.accept("A6")
@pytest.mark.asyncio
async def test_a_killed_workers_models_move_to_a_survivor(link, accept):
    [placement] = await link.load(definition())
    os.kill(await worker_pid(link, placement.worker), signal.SIGKILL)
    start = time.monotonic()
    await until(lambda: moved(link, placement.worker), True)
    accept.figure(time.monotonic() - start, 5.0, "s")
    [again] = await link.load(definition())
    assert again.worker != placement.worker
    await until(lambda: num_workers(link), 2)


async def moved(link: ClusterLink, lost: str) -> bool:
    model = (await link.state())["models"]["test/double@v1"]
    return bool(model["state"] == "loaded" and lost not in model["replicas"])


@pytest.mark.asyncio
@pytest.mark.long
async def test_the_only_workers_model_waits_for_its_replacement(cluster, link):
    cluster.kill("a")
    await until(lambda: num_workers(link), 1)
    await link.load(definition())
    os.kill(await worker_pid(link, "b"), signal.SIGKILL)
    await until(lambda: num_workers(link), 0)
    assert (await link.load(definition()))[0].worker == "b"


@pytest.mark.asyncio
@pytest.mark.long
async def test_a_lost_scheduler_is_found_again_with_all_that_was_wanted(cluster, link):
    called = asyncio.Event()

    async def reconnected() -> None:
        called.set()

    link.on_reconnected = reconnected
    await link.load(definition())
    events: list[ClusterEvent] = []
    link.subscribe(events.append)
    cluster.kill("scheduler")
    await until(lambda: unavailable(link), True)
    cluster.start_scheduler()
    for name in ("a", "b"):
        # A worker ends with its scheduler; the supervisor would start it again.
        cluster.processes[name].wait(30)
        cluster.start_worker(name, capacity_bytes=1 << 20)
    await asyncio.wait_for(called.wait(), 20)
    await until(lambda: model_state(link, "test/double@v1"), "loaded")
    await link.load(definition("test/after"))
    await until(lambda: seen(events, "loaded", "test/after@v1"), True)


@pytest.mark.accept("E3", "E9")
@pytest.mark.asyncio
async def test_dask_scales_as_the_models_need_and_closes_no_worker_that_serves(cluster, link):
    scheduler = link._client.scheduler
    assert await scheduler.adaptive_target() == 0
    assert len(await scheduler.workers_to_close(n=2)) == 2
    await link.scale(definition(), 2, 2)
    await until(lambda: num_serving(link), 2)
    assert await scheduler.adaptive_target() == 2
    assert await asyncio.to_thread(gauge, cluster, "dask_scheduler_desired_workers") == 2.0
    assert list(await scheduler.workers_to_close(n=2)) == []
    await link.scale(definition(), 1, 1)
    await until(lambda: num_serving(link), 1)
    assert await scheduler.adaptive_target() == 1
    assert len(await scheduler.workers_to_close(n=2)) == 1


def gauge(cluster: Cluster, name: str) -> float:
    """Return what the scheduler tells Prometheus."""
    url = f"http://127.0.0.1:{cluster.dashboard_port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name)))


@pytest.mark.asyncio
@pytest.mark.long
async def test_a_worker_that_retires_hands_its_model_over_and_ends(cluster, link):
    [before] = await link.load(definition())
    await link.retire([before.worker])
    await until(lambda: num_workers(link), 1)
    [after] = await link.load(definition())
    assert after.worker != before.worker
    await asyncio.to_thread(cluster.processes[before.worker].wait, 60)
    with pytest.raises(InvalidRequestError, match="there is no such worker"):
        await link.retire(["nobody"])


async def num_serving(link: ClusterLink) -> int:
    replicas = (await link.state())["models"]["test/double@v1"]["replicas"]
    return list(replicas.values()).count("serving") if "draining" not in replicas.values() else -1


async def unavailable(link: ClusterLink) -> bool:
    try:
        await link.state()
    except UnavailableError:
        return True
    return False


@pytest.mark.asyncio
@pytest.mark.long
async def test_workers_refuse_a_revoked_tokens_tickets_and_so_do_those_that_join(cluster):
    link, signer = ClusterLink(), TicketSigner.generate()
    await link.connect(cluster.address, cluster.tls.folder)
    await link.set_keys(signer.public_key_bytes)
    await until(lambda: num_workers(link), 2)
    cluster.kill("b")
    await until(lambda: num_workers(link), 1)
    address = (await link.load(definition()))[0].address
    tickets = {
        token_id: signer.sign("test/double@v1", "local", access_pb2.ROLE_USER, token_id)
        for token_id in ("kept", "gone")
    }
    assert [await code(address, ticket) for ticket in tickets.values()] == [OK, OK]
    await link.revoke("gone")
    assert [await code(address, ticket) for ticket in tickets.values()] == [OK, REFUSED]
    cluster.start_worker("b", capacity_bytes=1 << 20)
    await until(lambda: num_workers(link), 2)
    os.kill(await worker_pid(link, "a"), signal.SIGKILL)
    cluster.kill("a")
    await until(lambda: num_workers(link), 1)
    address = (await link.load(definition()))[0].address
    assert [await code(address, ticket) for ticket in tickets.values()] == [OK, REFUSED]
    await link.close()


async def code(address: str, ticket: bytes) -> grpc.StatusCode:
    """Call the model on a worker's port; returns the status."""
    argument = values_pb2.Argument(value=values_pb2.Value(integer=4))
    request = inference_pb2.RunRequest(arguments=[argument])
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            await stub.Run(request, metadata=((TICKET_KEY, ticket),), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return OK


@pytest.mark.asyncio
async def test_a_stranger_is_refused(cluster, link, tmp_path):
    stranger = ClusterLink()
    other = TlsFiles.create(tmp_path / "other")
    with pytest.raises(UnavailableError, match="no Dask scheduler with the NOS plane answers"):
        await stranger.connect(cluster.address, other.folder, timeout_s=0.5)
    assert await num_workers(link) == 2


@pytest.mark.accept("E4")
@pytest.mark.long
@pytest.mark.asyncio
async def test_a_worker_whose_device_disappears_ends_and_is_back_with_it(cluster, link):
    devices = cluster.folder / "devices"
    devices.write_text("A100\n")
    fakes = str(Path(__file__).parent.parent / "fakes" / "nvml")
    environ = {
        "FAKE_NVML": str(devices),
        "PYTHONPATH": fakes,
        "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False",
    }
    cluster.start_worker("gpu", device="cuda:0", **environ)
    await until(lambda: num_workers(link), 3)
    devices.write_text("")
    await until(lambda: num_workers(link), 2)
    assert await asyncio.to_thread(cluster.processes["gpu"].wait, 60) is not None
    cluster.start_worker("gpu", device="cuda:0", **environ)
    assert await asyncio.to_thread(cluster.processes["gpu"].wait, 60) == 1
    assert "no such device" in (cluster.folder / "gpu.log").read_text()
    devices.write_text("A100\n")
    cluster.start_worker("gpu", device="cuda:0", **environ)
    await until(lambda: num_workers(link), 3)


async def pid_of(link: ClusterLink, name: str) -> int:
    """Return a worker's process; 0 while there is none that may be given models."""
    try:
        workers = (await link.state())["workers"]
    except UnavailableError:
        return 0
    found = [it["pid"] for it in workers if it["name"] == name and not it["note"]]
    return int(found[0]) if found else 0


@pytest.mark.accept("E4")
@pytest.mark.long
@pytest.mark.asyncio
async def test_a_worker_that_dies_again_and_again_gets_no_model_and_disturbs_none(link):
    [placement] = await link.load(definition())
    (flapping,) = {"a", "b"} - {placement.worker}
    events: list[ClusterEvent] = []
    link.subscribe(events.append)
    for _ in range(3):
        pid = await pid_of(link, flapping)
        os.kill(pid, signal.SIGKILL)

        async def is_back(lost: int = pid) -> bool:
            return await pid_of(link, flapping) not in {0, lost}

        await until(is_back, True, timeout_s=60)
    # It has nothing else to do, and is chosen last all the same.
    placed = [await link.load(definition(f"test/m{index}")) for index in range(3)]
    assert {one.worker for [one] in placed} == {placement.worker}
    assert (await link.load(definition()))[0] == placement
    moves = {"unloaded", "evicted", "failed", "unplaced", "executor-lost"}
    told = [event for event in events if event.model == "test/double@v1" and event.kind in moves]
    assert told == []


@pytest.mark.asyncio
async def test_a_worker_that_cannot_serve_never_joins(cluster, link):
    command = worker_command(
        name="broken",
        scheduler=cluster.address,
        host="127.0.0.1",
        settings=WorkerSettings(device="cuda:99"),
        tls=cluster.tls,
        scratch=cluster.folder / "dask",
    )
    done = await asyncio.to_thread(
        subprocess.run,
        command.arguments,
        env={**os.environ, **command.environ},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert await num_workers(link) == 2
