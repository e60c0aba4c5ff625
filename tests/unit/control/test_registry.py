"""What was acknowledged is there when the registry is opened again; what cannot be is said."""

import asyncio
import dataclasses
import sqlite3
from pathlib import Path

import pytest
from nos.errors import AlreadyExistsError, ConfigError, LoadError
from nos.wire.v1 import access_pb2, models_pb2
from nos_backend.control.blobs import BlobStore
from nos_backend.control.catalogue import Catalogue
from nos_backend.control.database import MIGRATIONS, Database
from nos_backend.control.describe import describe
from nos_backend.control.registrar import Registrar
from nos_backend.control.registry import FILE_NAME, Actor, Limits, Registry, StoredToken
from nos_backend.definition import ModelDefinition

SOURCE = "class Net:\n    def __call__(self, x: int) -> int: return x + {}\n"
ACTOR = Actor(token_id="t1", peer="ipv4:127.0.0.1:1")


class Shelf:
    """A registry and the catalogue over it, as the gateway composes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.registry = Registry(folder, BlobStore(folder / "blobs"))
        self.catalogue = Catalogue()
        self.catalogue.restore(self.registry.read_models())
        self.registrar = Registrar(self.catalogue, self.registry)

    async def register(self, name="net", number=1, owner="ann"):
        source = SOURCE.format(number)
        definition = ModelDefinition(
            name=name,
            version=0,
            owner=owner,
            source=source,
            source_name="<cell 1>",
            class_name="Net",
            init=[("width", [1, 2.5, None])],
        )
        return await self.registrar.register(definition, describe(source)[0], ACTOR)

    def reopened(self):
        self.registry.close()
        return Shelf(self.folder)

    def rows(self, statement):
        self.registry.close()
        with sqlite3.connect(self.folder / FILE_NAME) as connection:
            found = connection.execute(statement).fetchall()
        connection.close()
        return found


@pytest.fixture
def shelf(tmp_path):
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.registry.close()


@pytest.mark.asyncio
async def test_registered_versions_are_the_same_after_a_restart(shelf):
    kept = [await shelf.register(number=number) for number in (1, 2)]
    again = shelf.reopened()
    assert [again.catalogue.find(f"net@v{number}") for number in (1, 2)] == kept
    assert again.catalogue.find("net").key == "net@v2"
    again.registry.close()


@pytest.mark.asyncio
async def test_every_field_of_a_definition_is_kept(shelf):
    given = {
        "str": "x",
        "int": 7,
        "float": 2.5,
        "bool": True,
        "bytes": models_pb2.ModelSpec(name="x").SerializeToString(),
    }
    fields = {
        field.name: given.get(str(field.type).split("[")[0].split(" ")[0], [("width", [1, None])])
        for field in dataclasses.fields(ModelDefinition)
    }
    lists = {"environment": ["einops"], "profiles": []}
    definition = ModelDefinition(**{**fields, **lists, "folder": str(shelf.folder)})
    await shelf.registry.add_version(definition, ACTOR)
    again = shelf.reopened()
    assert again.registry.read_models()["x"].definitions == {7: definition}
    again.registry.close()


@pytest.mark.asyncio
async def test_same_source_again_writes_nothing(shelf):
    assert (await shelf.register()) is (await shelf.register())
    assert shelf.rows("SELECT count(*) FROM versions") == [(1,)]


@pytest.mark.asyncio
async def test_deleted_model_stays_deleted_and_its_numbers_used(shelf):
    await shelf.register()
    await shelf.registrar.delete("net", ACTOR)
    again = shelf.reopened()
    assert len(again.catalogue) == 0
    assert (await again.register(number=2)).key == "net@v2"
    again.registry.close()


@pytest.mark.accept("F4")
@pytest.mark.asyncio
async def test_of_two_authors_of_one_name_one_wins(shelf):
    outcomes = await asyncio.gather(
        *(shelf.register(owner=owner) for owner in ("ann", "bob") * 5), return_exceptions=True
    )
    owners = {found.definition.owner for found in outcomes if not isinstance(found, Exception)}
    refused = [found for found in outcomes if isinstance(found, AlreadyExistsError)]
    assert (owners, len(refused)) == ({"ann"}, 5)


@pytest.mark.asyncio
async def test_concurrent_updates_of_one_owner_get_a_number_each(shelf):
    versions = await asyncio.gather(*(shelf.register(number=number) for number in range(20)))
    assert [version.spec.version for version in versions] == list(range(1, 21))
    again = shelf.reopened()
    assert [again.catalogue.find(version.key) for version in versions] == versions
    again.registry.close()


@pytest.mark.asyncio
async def test_caller_that_leaves_does_not_undo_its_registration(shelf):
    leaving = asyncio.ensure_future(shelf.register())
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await shelf.register("other")
    assert shelf.catalogue.find("net").key == "net@v1"


@pytest.mark.asyncio
async def test_every_change_is_in_the_audit_log_which_never_changes(shelf):
    await shelf.register()
    await shelf.register(number=2)
    await shelf.registrar.delete("net", ACTOR)
    rows = shelf.rows("SELECT actor, action, substr(object, 1, 6) FROM audit ORDER BY number")
    assert rows == [
        ("t1", "register", "net@v1"),
        ("t1", "update", "net@v2"),
        ("t1", "delete", "net"),
    ]
    for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="never change"):
            shelf.rows(statement)


@pytest.mark.asyncio
async def test_versions_never_change(shelf):
    await shelf.register()
    with pytest.raises(sqlite3.IntegrityError, match="never change"):
        shelf.rows("UPDATE versions SET source_sha256 = 'x'")


@pytest.mark.parametrize("damage", [lambda blob: blob.unlink(), lambda blob: blob.write_text("x")])
@pytest.mark.asyncio
async def test_version_whose_blob_is_lost_says_so_and_the_others_serve(shelf, damage):
    first, second = [await shelf.register(number=number) for number in (1, 2)]
    damage(BlobStore(shelf.folder / "blobs")._whole(second.spec.source_sha256))
    again = shelf.reopened()
    assert again.catalogue.find("net@v1") == first
    for reference in ("net", "net@v2"):
        with pytest.raises(LoadError, match="net@v2 is damaged"):
            again.catalogue.find(reference)
    assert (await again.register(number=2)).key == "net@v3"
    again.registry.close()


@pytest.mark.asyncio
async def test_tokens_outlive_a_restart_and_revoked_ones_do_not(shelf):
    tokens = [
        StoredToken(
            token_id=token_id,
            sha256=token_id.encode(),
            tenant="ann",
            role=access_pb2.ROLE_USER,
            label="",
            created_s=created_s,
            expires_s=0.0,
        )
        for created_s, token_id in enumerate(("a", "b"), 1)
    ]
    for token in tokens:
        await shelf.registry.add_token(token, ACTOR)
    await shelf.registry.revoke_token("a", ACTOR)
    again = shelf.reopened()
    assert again.registry.read_tokens() == tokens[1:]
    again.registry.close()


@pytest.mark.asyncio
async def test_damaged_file_is_put_aside_and_that_is_said(shelf):
    await shelf.register()
    shelf.registry.close()
    path = shelf.folder / FILE_NAME
    content = bytearray(path.read_bytes())
    content[100:4096] = bytes(byte ^ 0x5A for byte in content[100:4096])
    path.write_bytes(content)
    again = Shelf(shelf.folder)
    (notice,) = again.registry.notices
    assert "quarantine" in notice
    (kept,) = (shelf.folder / "quarantine").glob(f"{FILE_NAME}.*")
    assert kept.read_bytes() == content
    await again.register()
    assert again.reopened().registry.notices == []


def test_file_that_is_no_database_is_put_aside(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"hello" * 1000)
    shelf = Shelf(tmp_path)
    assert len(shelf.registry.notices) == 1
    shelf.registry.close()


@pytest.mark.asyncio
async def test_newer_schema_is_refused_in_one_sentence_and_left_alone(shelf):
    await shelf.register()
    newer = len(MIGRATIONS) + 1
    shelf.rows(f"PRAGMA user_version = {newer}")
    with pytest.raises(ConfigError, match=f"newer server: expected .* got schema {newer} in"):
        Shelf(shelf.folder)
    assert not (shelf.folder / "quarantine").exists()


def test_file_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(ConfigError, match="another program"):
        Shelf(tmp_path)


@pytest.mark.asyncio
async def test_older_schema_is_brought_up_to_date(shelf):
    await shelf.register()
    shelf.registry.close()
    step = ("ALTER TABLE names ADD COLUMN note TEXT NOT NULL DEFAULT ''",)
    newer = Database(shelf.folder / FILE_NAME, migrations=(*MIGRATIONS, step))
    assert newer.read("SELECT name, note FROM names") == [("net", "")]
    newer.close()


def test_registry_belongs_to_one_server(shelf):
    with pytest.raises(ConfigError, match="another server is using"):
        Database(shelf.folder / FILE_NAME, lock_wait_s=0.1)


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Registry(tmp_path / "file" / "state", BlobStore(tmp_path))


def test_registered_model_goes_before_a_file_of_its_name(shelf, tmp_path, caplog):
    models = tmp_path / "models"
    models.mkdir()
    (models / "net.py").write_text(SOURCE.format(7))
    kept = asyncio.run(shelf.register())
    again = shelf.reopened()
    again.catalogue.add_folder(models)
    assert again.catalogue.find("net") == kept
    assert "goes before" in caplog.text
    again.registry.close()


@pytest.mark.asyncio
async def test_limits_of_replicas_outlive_a_restart_and_go_with_their_model(shelf):
    await shelf.register()
    limits = Limits(min_replicas=0, max_replicas=4, device="cuda", memory_bytes=9, placement="pack")
    await shelf.registry.set_limits("net@v1", limits, ACTOR)
    await shelf.registry.set_limits("org/other@v2", Limits(min_replicas=1, max_replicas=1), ACTOR)
    again = shelf.reopened()
    assert again.registry.read_limits()["net@v1"] == limits
    await again.registry.set_limits("org/other@v2", None, ACTOR)
    await again.registrar.delete("net", ACTOR)
    assert again.reopened().registry.read_limits() == {}
