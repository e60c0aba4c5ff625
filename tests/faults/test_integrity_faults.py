"""Weights are what they claim: files that a model came with, and packed weights that waited on the disk."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nos.errors import LoadError
from nos.wire.v1 import models_pb2
from nos_backend.control.blobs import BlobStore
from nos_backend.control.folders import FolderStore
from nos_backend.definition import ModelDefinition

from tests.accept import Accept
from tests.integration.test_memory import MB, call, model, options
from tests.plane import Plane, definitions, running_plane

SOURCE = """
import pathlib
import numpy as np
import torch

class Shipped:
    def __init__(self):
        path = pathlib.Path(__file__).parent / "weights" / "w.bin"
        self.weight = torch.from_numpy(np.fromfile(path, np.float32))

    def __call__(self) -> float:
        return float(self.weight.sum())
"""


def shipped(tmp_path: Path, version: int, values: np.ndarray) -> ModelDefinition:
    """A model version with these weights in a file of its own."""
    blobs = BlobStore(tmp_path / "blobs")
    data = values.astype(np.float32).tobytes()
    blobs.put(data)
    file = models_pb2.ModelFile(
        path="weights/w.bin", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)
    )
    folder = FolderStore(tmp_path / "folders", blobs).make([file])
    (found,) = definitions(SOURCE, "shipped.py")
    return replace(found, name="shipped", version=version, folder=str(folder))


def weights_of(definition: ModelDefinition) -> Path:
    path = Path(definition.folder, "weights", "w.bin")
    path.chmod(0o644)
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    position = random.randrange(len(data) * 8)
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def swap(path: Path) -> None:
    replaced = path.with_name("other")
    replaced.write_bytes(path.read_bytes()[::-1])
    replaced.replace(path)


def add(path: Path) -> None:
    path.with_name("more.py").write_text("print('not what was registered')")


@pytest.mark.accept("B10")
def test_a_changed_file_of_a_model_is_refused_and_its_other_versions_serve(tmp_path: Path) -> None:
    with running_plane({"first": shipped(tmp_path, 1, np.full(1000, 1))}) as plane:
        for version, damage in enumerate((flip, truncate, swap, add), 2):
            definition = shipped(tmp_path, version, np.full(1000, version))
            damage(weights_of(definition))
            with pytest.raises(LoadError, match="the model's files are damaged"):
                plane.load(definition)
            assert plane.model(definition.key)["state"] == "failed"
        assert plane.run("shipped@v1", "") == 1000.0


@pytest.mark.accept("B10")
def test_any_flipped_bit_of_a_models_file_is_refused(tmp_path: Path, accept: Accept) -> None:
    """200 bits; 5 in an ordinary run."""
    definition = shipped(tmp_path, 1, np.arange(1000))
    path = weights_of(definition)
    whole = path.read_bytes()
    with running_plane({}) as plane:
        for _ in range(200 if accept.strict else 5):
            flip(path)
            with pytest.raises(LoadError, match="damaged"):
                plane.load(definition)
            path.write_bytes(whole)
        plane.load(definition)
        assert plane.run("shipped@v1", "") == float(np.arange(1000, dtype=np.float32).sum())


@pytest.mark.accept("B10")
@pytest.mark.parametrize("damage", [truncate, swap])
def test_packed_weights_that_were_cut_or_exchanged_fail_their_model_alone(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    def attempt(plane: Plane) -> None:
        call(plane, "a")

    given = options(capacity_bytes=5 * MB, host_bytes=9 * MB, folder=tmp_path)
    with running_plane({}, memory=given) as plane:
        for name in ("a", "b", "c"):
            plane.load(model(name, 4, owner="local"))
        (path,) = tmp_path.iterdir()
        damage(path)
        with pytest.raises(LoadError, match=r"damaged|gone"):
            attempt(plane)
        assert plane.model("a@v1")["state"] == "failed"
        assert call(plane, "b").shape == call(plane, "c").shape == (1, 64)
