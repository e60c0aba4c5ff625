"""`nos apply`: what a file says is served, twice is once, and what is wrong is named with its line."""

import json

import pytest
from nos import cli

FILE = """
models:
  - name: applied/file
    source: net.py
    class: Net
    init: {by: 3}
    device: cpu
    pin: true
  - name: applied/inline
    isolation: process
    idle_unload_s: 600
    inline: |
      class Twice:
          def __call__(self, x: int) -> int:
              return 2 * x
"""
NET = """
class Net:
    def __init__(self, by: int): self.by = by
    def __call__(self, x: int) -> int: return self.by * x
"""


@pytest.fixture
def apply(server, monkeypatch, capsys, tmp_path):
    """Apply a text as a file: exit code, standard output, standard error."""
    monkeypatch.setenv("NOS_ADDRESS", server.address)
    monkeypatch.setenv("NOS_TOKEN_FILE", str(server.token_file))
    (tmp_path / "net.py").write_text(NET)

    def apply(text, *flags):
        (tmp_path / "models.yaml").write_text(text)
        code = cli.run_command(["apply", str(tmp_path / "models.yaml"), *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return apply


def changes(outcome):
    code, out, _ = outcome
    assert code == 0
    return {item["model"]: item["change"] for item in json.loads(out)}


def test_models_of_a_file_are_served_and_twice_changes_nothing(apply, client):
    first = changes(apply(FILE, "--json"))
    assert first == {"applied/file@v1": "registered", "applied/inline@v1": "registered"}
    assert [client.model(name)(7) for name in ("applied/file", "applied/inline")] == [21, 14]
    assert client.info("applied/inline").spec.isolation == "process"
    assert client.info("applied/inline").spec.idle_unload_s == 600.0
    assert client.info("applied/file").spec.is_pinned
    assert "pinned" in str(client.info("applied/file"))
    assert set(changes(apply(FILE, "--json")).values()) == {"unchanged"}
    third = changes(apply(FILE.replace("by: 3", "by: 4"), "--json"))
    assert third == {"applied/file@v2": "updated", "applied/inline@v1": "unchanged"}
    for name in ("applied/file", "applied/inline"):
        client.unregister(name)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("device: cpu", "devise: cpu", "line 7: unknown key 'devise'"),
        ("device: cpu", "device: tpu", "line 7: device: expected auto or cpu or cuda, got 'tpu'"),
        ("source: net.py", "source: no.py", "line 4: source: expected a Python file"),
        ("    source: net.py\n", "", "line 3: the model's code: expected either"),
        ("applied/inline", "applied/file", "line 9: model 'applied/file' is there twice"),
        ("pin: true", "pin: 1", "line 8: pin: expected true or false, got 1"),
        ("_s: 600", "_s: -1", "line 11: idle_unload_s: expected seconds, at least 0, got -1"),
        ("_s: 600", "_s: long", "line 11: idle_unload_s: expected seconds, got 'long'"),
        ("class: Net", "class: Net\n    class: Net", "line 6: key 'class' is there twice"),
        ("name: applied/file", "name: [1]", "line 3: name: expected text"),
        ("init: {by: 3}", "init: [3]", "line 6: init: expected arguments by name"),
        (
            "_s: 600",
            "_s: 600\n    replicas: {min: 3, max: 2}",
            "line 12: replicas: expected a number",
        ),
        ("_s: 600", "_s: 600\n    memory_bytes: 8GiB", "line 12: memory_bytes: expected a whole"),
        ("_s: 600", "_s: 600\n    placement: heap", "line 12: placement: expected spread or pack"),
        ("models:", "model:", "line 2: unknown key 'model'"),
        ("{by: 3}", "{by: 3", "line 7 is no YAML"),
        ("{by: 3}", "!!python/object:os.system {}", "line 6: this: expected plain YAML"),
    ],
)
def test_wrong_file_is_named_with_its_line_and_nothing_is_registered(apply, client, old, new, told):
    code, _, complaint = apply(FILE.replace(old, new, 1))
    assert code != 0
    assert told in complaint
    assert not client.models("applied/")
