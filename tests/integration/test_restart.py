"""What a whole server keeps through its own end: models and their files, tokens, replicas, profiles."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import nos
import numpy as np
import pytest
from nos.cli import run_command
from nos.errors import InvalidRequestError, LoadError, ModelNotFoundError
from nos.wire.limits import TOKEN_KEY
from nos.wire.v1 import blobs_pb2, blobs_pb2_grpc, models_pb2, models_pb2_grpc

from tests.integration.test_access import audit_of
from tests.servers import Server, start_server, wait_for

SOURCE = "class Double:\n    def __call__(self, x: int) -> int:\n        return {} * x\n"
NET = """
from typing import Annotated
import nos, torch
from torch import nn

Rows = Annotated[torch.Tensor, "float32[batch, 64]"]

@nos.model(name="me/net")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 64)
    def forward(self, x: Rows) -> Rows:
        print("a pass")
        return self.net(x)
"""
OPEN = NET.replace('"float32[batch, 64]"', '"float32[batch, width]"').replace("me/net", "me/open")
TIGHT = """
import time
from typing import Annotated
import nos, torch

Rows = Annotated[torch.Tensor, "float32[batch, 2]"]

@nos.model(name="me/tight")
class Tight:
    def __init__(self):
        self.most = 64
    def fill(self, most: int):
        self.most = most
        time.sleep(0.5)
    def __call__(self, x: Rows) -> Rows:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return x
"""
FILES = {
    "net/weights.txt": b"3",
    "net/deep/er.py": b"def times(a, b):\n    return a * b\n",
    "scale.py": b"from net.deep.er import times\n",
}
WITH_FILES = """
from pathlib import Path

from scale import times

class Scaled:
    def __init__(self):
        self.by = int(Path(__file__).with_name("net").joinpath("weights.txt").read_text())

    def __call__(self, x: int) -> int:
        return times(x, self.by)
"""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What was known of a server before its end."""

    author: str
    """A token."""
    profile: nos.Profile
    """Of `me/net`, which nobody had called."""
    printed: int
    """Lines that it had printed, as far as its owner saw."""
    note: str
    """What is said of `me/tight` after a batch that did not fit."""
    audit: list[Any]


def serve(folder: Path) -> Server:
    return start_server(folder, "--idle-shutdown-s", "0", "--profile-s", "60")


def connect(server: Server, **options: Any) -> nos.Client:
    return nos.connect(server.address, **(options or {"token_file": server.token_file}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restart")


@pytest.fixture(scope="module")
def known(folder: Path) -> Known:
    """A server's first life."""
    server = serve(folder)
    try:
        with connect(server) as client:
            author = client.create_token("ann", role="author").secret
            client.register(NET)
            profile = client.profile("me/net")
            printed = len(client.logs("me/net"))
            note = learn(client)
        with connect(server, token=author) as client:
            for number in (1, 2):
                client.register(SOURCE.format(number), name="mine", class_name="Double")
            assert client.model("mine")(4) == 8
            client.scale("mine", replicas=1, placement="pack")
            client.scale("mine@v1", min=0, max=3)
            client.unload("mine@v1")
        for _ in range(2):
            assert register_with_files(server, FILES).spec.version == 1
        changed = {**FILES, "net/weights.txt": b"5"}
        assert register_with_files(server, changed).spec.version == 2
    finally:
        server.stop()
    return Known(
        author=author,
        profile=profile,
        printed=printed,
        note=note,
        audit=list(audit_of(server.state_dir)),
    )


@pytest.fixture(scope="module")
def restarted(folder: Path, known: Known) -> Iterator[Server]:
    """Its second life."""
    server = serve(folder)
    yield server
    server.stop()
    assert audit_of(server.state_dir)[: len(known.audit)] == known.audit


def learn(client: nos.Client) -> str:
    """Have a batch that does not fit; returns what is said of the model from then on."""
    client.register(TIGHT)
    tight = client.model("me/tight")
    tight.fill(3)
    full = tight.fill.submit(3)
    calls = [tight.submit(np.full((1, 2), number, np.float32)) for number in range(12)]
    full.result(60)
    assert [call.result(60)[0, 0] for call in calls] == list(range(12))
    return note_of(client, "me/tight")


def note_of(client: nos.Client, model: str) -> str:
    """What the cluster says of a model, once it says something."""
    return wait_for(lambda: client.info(model).replicas[0].note, "its note")


def register_with_files(server: Server, files: dict[str, bytes]) -> models_pb2.ModelInfo:
    """Upload the files and register a model that needs them."""
    metadata = ((TOKEN_KEY, f"Bearer {server.token}"),)
    request = models_pb2.RegisterModelRequest(
        name="scaled", source=WITH_FILES, source_name="/home/ann/model.py"
    )
    with grpc.insecure_channel(server.address) as channel:
        blobs = blobs_pb2_grpc.BlobServiceStub(channel)
        for path, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            part = blobs_pb2.UploadRequest(sha256=sha256, size_bytes=len(content), data=content)
            blobs.Upload(iter([part]), metadata=metadata)
            request.files.add(path=path, sha256=sha256, size_bytes=len(content))
        stub = models_pb2_grpc.ModelServiceStub(channel)
        return stub.RegisterModel(request, metadata=metadata).model


def test_models_tokens_and_replicas_survive_it_and_a_killed_gateway(
    restarted: Server, known: Known
) -> None:
    check_mine(restarted, known.author)
    gateway = next(it for it in restarted.processes() if "nos_backend.app" in it.cmdline())
    os.kill(gateway.pid, signal.SIGKILL)
    wait_for(lambda: answers(restarted, known.author), "the gateway is back")
    check_mine(restarted, known.author)
    actions = [action for _, action, _ in known.audit]
    of_models = ["register", "update", *["scale"] * 3, "register", "update"]
    assert actions == ["create-token", "register", "register", *of_models]


def check_mine(server: Server, author: str) -> None:
    with connect(server, token=author) as client:
        assert client.info("mine").spec.owner == "ann"
        wait_for(lambda: phases(client, "mine") == ["serving"], "it serves")
        assert client.info("mine").spec.placement == "pack"
        assert [client.model(f"mine@v{number}")(4) for number in (1, 2)] == [4, 8]


def phases(client: nos.Client, name: str) -> list[str]:
    return [replica.phase for replica in client.info(name).replicas]


def answers(server: Server, token: str) -> bool:
    try:
        with connect(server, token=token) as client:
            return client.status().state == "ready"
    except nos.NosError:
        return False


def test_model_with_files_imports_and_reads_them(restarted: Server) -> None:
    with connect(restarted) as client:
        assert client.model("scaled@v2")(4) == 20
    folders = list((restarted.state_dir / "folders").iterdir())
    assert len(folders) == 2
    assert not [path for path in folders if path.name.startswith(".")]


@pytest.mark.accept("C5")
def test_profile_and_what_batches_taught_are_known(restarted: Server, known: Known) -> None:
    assert "at most" in known.note
    (method,) = known.profile.methods
    assert known.profile.model == "me/net@v1"
    assert known.profile.product
    assert known.printed == 0
    assert method.chosen_rows in [point.rows for point in method.points]
    series = known.profile.series()
    assert series["rows"] == [1, 2, 4, 8, 16, 32, 64]
    assert series["flops"] == [rows * 2 * 64 * 64 for rows in series["rows"]]
    with connect(restarted) as client:
        assert client.profile("me/net") == known.profile
        client.load("me/net")
        assert client.model("me/net")(np.ones((3, 64), np.float32)).shape == (3, 64)
        assert client.profile("me/net") == known.profile
        assert asyncio.run(_profile_of(restarted)) == known.profile
        weight_bytes = known.profile.weight_bytes
        assert client.memory_history().series()["me/net@v1"][-1] == weight_bytes
        client.unload("me/net")
        history = client.memory_history()
        assert [it.models.get("me/net@v1", 0) for it in history.samples][-1] == 0
        assert weight_bytes in [it.models.get("me/net@v1", 0) for it in history.samples]
        assert "<table" in history._repr_html_()
        client.load("me/tight")
        assert note_of(client, "me/tight") == known.note


async def _profile_of(server: Server) -> nos.Profile:
    client = await nos.AsyncClient.connect(server.address, token_file=server.token_file)
    async with client:
        return await client.profile("me/net@v1")


def test_profile_is_shown(
    restarted: Server, known: Known, capsys: pytest.CaptureFixture[str]
) -> None:
    (method,) = known.profile.methods
    assert "<table" in known.profile._repr_html_()
    assert method.why in str(known.profile)
    place = ["--address", restarted.address, "--token-file", str(restarted.token_file)]
    assert run_command([*place, "profile", "me/net", "--modules"]) == 0
    shown = capsys.readouterr().out
    assert f"batches of {method.chosen_rows}: {method.why}" in shown
    assert "Linear" in shown
    assert run_command([*place, "profile", "me/net", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time_s"] == known.profile.time_s
    assert run_command([*place, "profile", "me/none"]) == 1


def test_model_of_any_width_is_measured_by_its_first_call(restarted: Server) -> None:
    with connect(restarted) as client:
        with pytest.raises(ModelNotFoundError):
            client.profile("me/open")
        client.register(OPEN)
        with pytest.raises(InvalidRequestError, match="first call"):
            client.profile("me/open")
        client.model("me/open")(np.ones((2, 64), np.float32))
        assert client.profile("me/open").methods[0].sample == "first call"
        client.unregister("me/open")
        with pytest.raises(ModelNotFoundError):
            client.profile("me/open")


@pytest.mark.long
def test_lost_source_is_a_load_error_that_says_what_to_do(tmp_path: Path) -> None:
    server = serve(tmp_path)
    with connect(server) as client:
        made = client.register(SOURCE.format(2), name="mine", class_name="Double")
        sha256 = made.spec.source_sha256
    server.stop()
    (server.state_dir / "blobs" / sha256[:2] / sha256).unlink()
    server = serve(tmp_path)
    try:
        with connect(server) as client:
            assert client.info("mine").state == "failed"
            with pytest.raises(LoadError, match="Register it again"):
                client.load("mine")
    finally:
        server.stop()
