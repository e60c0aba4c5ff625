"""What models print: kept by model, bounded, and shown to their owner alone."""

from __future__ import annotations

import json
from typing import Any

import nos
import pytest
from nos import cli
from nos.errors import ModelError, NosError, PermissionDeniedError
from nos_backend.worker.model_logs import MAX_BYTES, MAX_LINES, MAX_MODELS, ModelLogs

from tests.servers import Server, wait_for

SOURCE = """
class Loud:
    def __init__(self):
        print("made NAME")

    def __call__(self, x: int) -> int:
        print("NAME got", x)
        if x < 0:
            raise ValueError("negative")
        return x
"""


def loud(client: nos.Client, name: str) -> Any:
    client.register(SOURCE.replace("NAME", name.partition("/")[2]), name=name)
    return client.model(name)


def texts(client: nos.Client, name: str, **given: Any) -> list[str]:
    return [line.text for line in client.logs(name, **given)]


def test_each_model_has_its_own_lines_although_they_share_a_process(client: nos.Client) -> None:
    a, b = loud(client, "logs/a"), loud(client, "logs/b")
    for number in range(3):
        a(number)
        b(number)
    expected = {
        name: [f"made {name}", *(f"{name} got {number}" for number in range(3))] for name in "ab"
    }
    for name, lines in expected.items():
        wait_for(lambda lines=lines, name=name: texts(client, f"logs/{name}") == lines, "its lines")
    assert texts(client, "logs/a", max_lines=1) == ["a got 2"]
    with pytest.raises(ModelError):
        a(-1)
    wait_for(lambda: texts(client, "logs/a")[-1] == "a got -1", "the line before the error")
    client.unload("logs/a")
    assert texts(client, "logs/a")[-1] == "a got -1", "kept over an unload"
    for name in "ab":
        client.unregister(f"logs/{name}")


def test_only_the_owner_and_admins_read_them(server: Server, client: nos.Client) -> None:
    loud(client, "logs/mine")(1)
    author = client.create_token("other", role="author")
    with nos.connect(server.address, token=author.secret) as other:
        with pytest.raises(PermissionDeniedError):
            other.logs("logs/mine")
        with pytest.raises(NosError, match="no-such"):
            other.logs("no-such")
    client.revoke_token(author.info.token_id)
    client.unregister("logs/mine")


def test_the_command_line_shows_them(
    server: Server, client: nos.Client, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loud(client, "logs/cli")(7)
    monkeypatch.setenv("NOS_ADDRESS", server.address)
    monkeypatch.setenv("NOS_TOKEN_FILE", str(server.token_file))
    wait_for(lambda: len(client.logs("logs/cli")) == 2, "its lines")
    assert cli.run_command(["logs", "logs/cli"]) == 0
    assert [line[9:] for line in capsys.readouterr().out.splitlines()] == ["made cli", "cli got 7"]
    assert cli.run_command(["logs", "logs/cli", "--json", "-n", "1"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["text"] == "cli got 7"
    client.unregister("logs/cli")


def test_lines_are_bounded_in_number_and_bytes_and_models_in_number() -> None:
    logs = ModelLogs()
    for number in range(MAX_LINES + 10):
        logs.add("many", str(number))
    assert [len(logs.lines("many", 0)), logs.lines("many", 1)[0][1]] == [
        MAX_LINES,
        f"{MAX_LINES + 9}",
    ]
    for _ in range(100):
        logs.add("long", "ä" * 4096)
    assert len(logs.lines("long", 0)) == MAX_BYTES // 8192
    for number in range(MAX_MODELS):
        logs.add(f"m{number}", "one")
    assert logs.lines("many", 0) == []
    assert logs.lines("m0", 0) != []
