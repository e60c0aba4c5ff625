"""What is in the built wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_three_packages_and_nothing_else(names):
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    data = {top for top in tops if top.endswith(".data")}
    assert tops - data == {"nos", "nos_backend", "nos_jupyter"}
    assert not [name for name in names if "__pycache__" in name or "tests" in name]


@pytest.mark.parametrize(
    "name",
    [
        "nos/py.typed",
        "nos_backend/py.typed",
        "nos_jupyter/py.typed",
        "nos/wire/v1/inference_pb2.py",
        "nos/wire/v1/inference_pb2_grpc.pyi",
        "nos_backend/hub/models/digits.py",
        "nos_backend/hub/weights/digits.safetensors",
    ],
)
def test_wheel_holds(names, name):
    assert name in names


def test_wheel_holds_every_tracked_file_of_the_packages(names):
    roots = ["sdk/nos", "backend/nos_backend", "jupyter_ext/nos_jupyter"]
    listed = subprocess.run(
        ["git", "ls-files", *roots], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = {name.partition("/")[2] for name in listed.stdout.splitlines()}
    assert not {name for name in tracked if (ROOT / name).exists()} - names


def test_wheel_switches_the_server_extension_on(names):
    assert any(name.endswith("jupyter_server_config.d/nos_jupyter.json") for name in names)
