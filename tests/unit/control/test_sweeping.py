"""What no version names is removed, and nothing else."""

import os

import pytest
from nos_backend.control.blobs import BlobStore
from nos_backend.control.describe import describe
from nos_backend.control.folders import FolderStore
from nos_backend.control.registry import Actor, Registry
from nos_backend.control.sweeping import sweep
from nos_backend.definition import ModelDefinition

SOURCE = "class Net:\n    def __call__(self): ..."
ACTOR = Actor(token_id="t", peer="p")


class Shelf:
    def __init__(self, root):
        self.root = root
        self.blobs = BlobStore(root / "blobs")
        self.folders = FolderStore(root / "folders", self.blobs)
        self.registry = Registry(root, self.blobs)

    async def register(self, name, content):
        folder = self.folders.make([self.folders.keep("weights", content)])
        definition = ModelDefinition(
            name=name,
            version=1,
            owner="ann",
            source=f"{SOURCE} # {name}",
            source_name="<cell>",
            class_name="Net",
            folder=str(folder),
            spec=describe(SOURCE)[0].spec.SerializeToString(),
        )
        await self.registry.add_version(definition, ACTOR)

    def age(self):
        for path in self.root.rglob("*"):
            os.utime(path, (1, 1))

    def sweep(self):
        return sweep(self.registry, self.root / "blobs", self.root / "folders")


@pytest.fixture
def shelf(tmp_path):
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.registry.close()


@pytest.mark.asyncio
async def test_what_a_deleted_model_had_is_removed_and_the_other_serves(shelf):
    await shelf.register("gone", b"1")
    await shelf.register("stays", b"2")
    await shelf.registry.delete_model("gone", ACTOR)
    shelf.age()
    # A source, a folder, and the two blobs that folders were made of.
    assert shelf.sweep() == 4
    (version,) = shelf.registry.read_models()["stays"].definitions.values()
    assert version.source.endswith("stays")
    assert (shelf.root / version.folder / "weights").read_bytes() == b"2"
    assert shelf.sweep() == 0


@pytest.mark.asyncio
async def test_what_is_young_stays(shelf):
    shelf.folders.make([shelf.folders.keep("weights", b"3")])
    assert shelf.sweep() == 0


def test_nothing_to_sweep_is_no_error(shelf):
    assert shelf.sweep() == 0
