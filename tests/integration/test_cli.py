"""The client's command line, as a process would use it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from nos import cli
from PIL import Image

from tests.fakes.server import NAME, TOKEN, FakeServer


@pytest.fixture(scope="module")
def fake():
    running = FakeServer()
    yield running
    running.stop()


@pytest.fixture
def nos(fake, tmp_path, monkeypatch, capsys):
    """Run a command line against the fake server: exit code, standard output, standard error."""
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    monkeypatch.setenv("NOS_ADDRESS", fake.address)
    monkeypatch.setenv("NOS_TOKEN_FILE", str(token_file))
    monkeypatch.setenv("NOS_STATE_DIR", str(tmp_path / "state"))

    def run(*arguments):
        code = cli.run_command(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_status_names_the_server_and_where_it_was_found(nos, fake):
    code, out, _ = nos("status")
    assert code == 0
    assert f"{fake.address} (NOS_ADDRESS)" in out
    assert "cpu-0" in out


def test_status_as_json(nos):
    code, out, _ = nos("status", "--json")
    assert code == 0
    assert json.loads(out)["workers"][0]["device"]["models"][0]["model"] == NAME


def test_models_are_listed(nos):
    assert NAME in nos("models")[1]
    assert json.loads(nos("models", "--json")[1])[0]["spec"]["name"] == NAME
    assert json.loads(nos("models", "no-such", "--json")[1]) == []


@pytest.mark.parametrize("command", ["info", "load", "unload"])
def test_a_models_state_is_shown(nos, command):
    code, out, _ = nos(command, NAME)
    assert code == 0
    assert "rows(x: " in out
    assert json.loads(nos(command, NAME, "--json")[1])["state"] == "device"


def test_run_takes_text(nos):
    assert nos("run", NAME, "hello there") == (0, "hello there\n", "")


def test_run_takes_named_arguments(nos):
    code, out, _ = nos("run", NAME, "-m", "add", "-i", "a=40", "-i", "b=2")
    assert (code, out) == (0, "42\n")


def test_run_takes_arrays_and_gives_json(nos, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3, dtype=np.float32))
    code, out, _ = nos("run", NAME, str(tmp_path / "x.npy"), "--json")
    assert code == 0
    assert json.loads(out)["value"] == [0.0, 1.0, 2.0]
    assert json.loads(out)["timings"]["total_s"] > 0


def test_run_takes_images(nos, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    code, out, _ = nos("run", NAME, str(tmp_path / "x.png"))
    assert code == 0
    assert out.startswith("image/png, ")


def test_run_writes_arrays(nos, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    output = tmp_path / "y.npy"
    assert nos("run", NAME, str(tmp_path / "x.npy"), "-o", str(output))[0] == 0
    np.testing.assert_array_equal(np.load(output), np.ones((2, 3), np.float32))


def test_run_reads_standard_input(fake, tmp_path):
    command = [sys.executable, "-m", "nos.cli", "--address", fake.address, "run", NAME, "-"]
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    environment = {**os.environ, "NOS_TOKEN_FILE": str(token_file)}
    done = subprocess.run(
        command,
        input="from a pipe\n",
        text=True,
        capture_output=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "from a pipe\n", "")


def test_generators_give_one_list(nos):
    assert nos("run", NAME, "-m", "count", "-i", "n=3") == (0, "[0, 1, 2]\n", "")


def test_stream_says_a_line_for_each_file(nos, tmp_path):
    files = []
    for index in range(20):
        path = tmp_path / f"{index}.npy"
        np.save(path, np.full(2, index, np.float32))
        files.append(str(path))
    code, out, _ = nos("stream", NAME, *files, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["file"] for line in lines] == files
    assert [line["value"][0] for line in lines] == list(range(20))


def test_stream_with_a_failed_frame_exits_with_one(nos, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("boo")
    code, out, _ = nos("stream", NAME, str(path), "-m", "fail")
    assert code == 1
    assert "ValueError: boo" in out


@pytest.mark.accept("A11")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("info", "no/such"), "there is no model 'no/such'"),
        (("run", NAME, "-m", "nope"), "no public method 'nope'"),
        (("run", NAME, "-m", "rows"), "misses 'x'"),
        (("run", NAME, "-m", "rows", "-i", "x=[[1, 2]]"), "expected (batch, 3), got (1, 2)"),
        (("run", NAME, "-m", "add", "-i", "a"), "expected name=value, got 'a'"),
        (("run", NAME, "-m", "fail", "boo"), "ValueError: boo"),
        (("run", NAME, "missing.npy"), "No such file"),
        (("--token-file", "/none", "status"), "token file cannot be read"),
        (("--address", "127.0.0.1:1", "status"), "no server listens on 127.0.0.1:1"),
        (("--address", "nonsense", "status"), "expected host:port, got 'nonsense'"),
    ],
)
def test_what_went_wrong_is_one_line_and_exit_code_one(nos, arguments, text):
    code, out, err = nos(*arguments)
    assert code == 1
    assert text in err
    assert err.startswith("nos: ")
    assert err.count("\n") == 1
    assert not out


def test_errors_as_json_name_the_field(nos):
    code, out, _ = nos("info", "no/such", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "ModelNotFoundError"
    assert json.loads(out)["error"]["field"] == "model"


@pytest.mark.parametrize("arguments", [("run",), ("no-such-command",), ("status", "--no-such")])
def test_wrong_usage_exits_with_two(nos, arguments):
    code, _, err = nos(*arguments)
    assert code == 2
    assert "Usage: nos" in err


def test_files_that_are_no_arrays_are_refused(nos, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"nonsense")
    code, _, err = nos("run", NAME, str(tmp_path / "x.npy"))
    assert code == 1
    assert "not an array file" in err


def test_stop_without_a_backend_says_so(nos):
    assert nos("stop") == (0, "No backend runs.\n", "")


def test_logs_are_shown_from_the_state_folder(nos, tmp_path):
    folder = tmp_path / "state" / "logs"
    folder.mkdir(parents=True)
    (folder / "gateway.log").write_text("one\ntwo\nthree\n")
    code, out, _ = nos("logs", "-n", "2")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [["gateway", "two"], ["gateway", "three"]]


def test_version_is_that_of_the_distribution(nos):
    from importlib.metadata import version

    assert nos("version")[1].strip() == version("nos-inference")


def test_names_of_models_complete(nos):
    assert cli._complete_model("fake/") == [NAME]
    assert cli._complete_model("zz") == []


def test_serve_without_the_backend_says_how_to_install_it():
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "nos_backend" else real(name, *rest)
from nos.cli import run_command
sys.exit(run_command(["serve", "--port", "1"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert 'pip install "nos-inference[backend]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_server_commands_are_there_with_the_backend(nos):
    assert "serve" in nos("--help")[1]
