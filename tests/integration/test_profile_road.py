"""A model's profile on its whole road: measured by a worker, kept by the gateway, shown to its user."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import nos
import numpy as np
import pytest
from nos.cli import run_command
from nos.errors import InvalidRequestError, ModelNotFoundError

from tests.servers import Server, start_server, wait_for

SOURCE = """
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
        return self.net(x)
"""
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
OPEN = SOURCE.replace('"float32[batch, 64]"', '"float32[batch, width]"').replace(
    "me/net", "me/open"
)


def connect(server: Server) -> nos.Client:
    return nos.connect(server.address, token_file=server.token_file)


@pytest.mark.accept("C5")
def test_a_profile_is_made_shown_and_known_after_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what batches taught is known as well."""
    server = start_server(tmp_path, "--profile-s", "60")
    try:
        found = look(server, capsys)
        note = learn(server)
        assert "at most" in note
    finally:
        server.stop()
    again = start_server(tmp_path, "--profile-s", "60")
    try:
        look_again(again, found)
        with connect(again) as client:
            client.load("me/tight")
            assert note_of(client, "me/tight") == note
    finally:
        again.stop()


def look(server: Server, capsys: pytest.CaptureFixture[str]) -> nos.Profile:
    with connect(server) as client:
        client.register(SOURCE)
        found = client.profile("me/net")
        (method,) = found.methods
        assert found.model == "me/net@v1"
        assert found.product
        assert method.chosen_rows in [point.rows for point in method.points]
        series = found.series()
        assert series["rows"] == [1, 2, 4, 8, 16, 32, 64]
        assert series["flops"] == [rows * 2 * 64 * 64 for rows in series["rows"]]
        assert "<table" in found._repr_html_()
        assert method.why in str(found)
        with pytest.raises(ModelNotFoundError):
            client.profile("me/none")
        client.register(OPEN)
        with pytest.raises(InvalidRequestError, match="first call"):
            client.profile("me/open")
        client.model("me/open")(np.ones((2, 64), np.float32))
        assert client.profile("me/open").methods[0].sample == "first call"

    place = ["--address", server.address, "--token-file", str(server.token_file)]
    assert run_command([*place, "profile", "me/net", "--modules"]) == 0
    shown = capsys.readouterr().out
    assert f"batches of {method.chosen_rows}: {method.why}" in shown
    assert "Linear" in shown
    assert run_command([*place, "profile", "me/net", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time_s"] == found.time_s
    assert run_command([*place, "profile", "me/none"]) == 1
    capsys.readouterr()

    return found


def learn(server: Server) -> str:
    """Have a batch that does not fit; returns what is said of the model from then on."""
    with connect(server) as client:
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


def look_again(server: Server, known: nos.Profile) -> None:
    with connect(server) as client:
        assert client.profile("me/net") == known
        client.load("me/net")
        assert client.model("me/net")(np.ones((3, 64), np.float32)).shape == (3, 64)
        assert client.profile("me/net") == known
        assert asyncio.run(_profile_of(server)) == known
        weight_bytes = known.weight_bytes
        assert client.memory_history().series()["me/net@v1"][-1] == weight_bytes
        client.unload("me/net")
        history = client.memory_history()
        assert [it.models.get("me/net@v1", 0) for it in history.samples][-1] == 0
        assert weight_bytes in [it.models.get("me/net@v1", 0) for it in history.samples]
        assert "<table" in history._repr_html_()
        client.unregister("me/net")
        with pytest.raises(ModelNotFoundError):
            client.profile("me/net")


async def _profile_of(server: Server) -> nos.Profile:
    client = await nos.AsyncClient.connect(server.address, token_file=server.token_file)
    async with client:
        return await client.profile("me/net@v1")
