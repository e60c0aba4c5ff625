"""Names mean versions, versions never change, and what cannot be served says why."""

from dataclasses import replace

import pytest
from nos.errors import AlreadyExistsError, InvalidRequestError, LoadError, ModelNotFoundError
from nos.wire.v1 import models_pb2
from nos_backend.control.catalogue import Catalogue
from nos_backend.control.describe import describe
from nos_backend.definition import ModelDefinition

SOURCE = "class Net:\n    def __call__(self, x: int) -> int: return x + {}\n"


def add(catalogue, number=1, *, name="net", owner="local", **options):
    source = SOURCE.format(number)
    definition = ModelDefinition(
        name=name,
        version=0,
        owner=owner,
        source=source,
        source_name="<test>",
        class_name="",
        **options,
    )
    return catalogue.add(definition, describe(source)[0])


@pytest.fixture
def catalogue():
    return Catalogue()


def test_changed_source_is_a_new_version_and_the_old_one_stays(catalogue):
    assert [add(catalogue, 1).key, add(catalogue, 2).key] == ["net@v1", "net@v2"]
    found = [catalogue.find(name).key for name in ("net", "net@latest", "net@v1")]
    assert found == ["net@v2", "net@v2", "net@v1"]


def test_same_source_is_the_same_version(catalogue):
    assert add(catalogue) is add(catalogue)


def test_other_init_is_another_version(catalogue):
    assert add(catalogue, init=[("width", 8)]).key != add(catalogue, init=[("width", 9)]).key


def test_going_back_to_an_old_source_makes_it_the_newest(catalogue):
    for number in (1, 2, 1):
        add(catalogue, number)
    assert catalogue.find("net").definition.source == SOURCE.format(1)
    assert catalogue.find("net").key == "net@v3"


def test_definition_carries_its_spec(catalogue):
    version = add(catalogue, device="cpu")
    spec = models_pb2.ModelSpec.FromString(version.definition.spec)
    assert (spec.name, spec.version, spec.owner, spec.device) == ("net", 1, "local", "cpu")
    assert spec == version.spec


def test_deleted_name_never_reuses_a_version(catalogue):
    add(catalogue)
    catalogue.delete("net")
    with pytest.raises(ModelNotFoundError):
        catalogue.find("net")
    assert add(catalogue).key == "net@v2"


def test_unknown_name_suggests_a_close_one(catalogue):
    add(catalogue, name="my/digits")
    with pytest.raises(ModelNotFoundError, match="Did you mean 'my/digits'"):
        catalogue.find("my/digit")


def test_unknown_version_names_those_there_are(catalogue):
    add(catalogue)
    with pytest.raises(ModelNotFoundError, match="expected v1, got v7"):
        catalogue.find("net@v7")


@pytest.mark.parametrize("reference", ["net@3", "net@", "net@v0", "net@v1@v2", "net@v" + "9" * 99])
def test_malformed_reference_is_refused(catalogue, reference):
    with pytest.raises(InvalidRequestError):
        catalogue.find(reference)


@pytest.mark.parametrize(
    "name", ["", "a b", "/a", "a/", "a//b", "..", "a/../b", "é", "a\n", "a" * 201, "a@v1"]
)
def test_malformed_name_is_refused(catalogue, name):
    with pytest.raises(InvalidRequestError, match="cannot be a model's name"):
        add(catalogue, name=name)


def test_name_of_another_owner_is_taken(catalogue):
    add(catalogue)
    with pytest.raises(AlreadyExistsError):
        add(catalogue, 2, owner="somebody")


def test_names_of_the_server_are_not_for_others(catalogue):
    with pytest.raises(AlreadyExistsError):
        add(catalogue, name="nos/digits")


def test_watchers_hear_of_registration_and_deletion(catalogue):
    heard = []
    end = catalogue.subscribe(lambda kind, name: heard.append((kind, name)))
    add(catalogue)
    add(catalogue)
    catalogue.delete("net")
    end()
    add(catalogue)
    assert heard == [("registered", "net"), ("deleted", "net")]


def test_folder_serves_each_file_under_its_name(catalogue, tmp_path):
    (tmp_path / "net.py").write_text(SOURCE.format(1))
    (tmp_path / "_own.py").write_text("not python at all")
    (tmp_path / "two.py").write_text(
        "@nos.model()\nclass A:\n  def f(self): ...\n@nos.model(name='b')\ndef b(): ..."
    )
    catalogue.add_folder(tmp_path)
    assert [entry.name for entry in catalogue.entries()] == ["b", "net", "two/A"]
    definition = catalogue.find("net").definition
    assert (definition.folder, definition.owner) == (str(tmp_path), "local")


def test_broken_file_is_an_entry_that_says_why(catalogue, tmp_path):
    (tmp_path / "broken.py").write_text("class A\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "net.py").write_text(SOURCE.format(1))
    catalogue.add_folder(tmp_path)
    assert "line 1" in str(catalogue.entry("broken").error)
    assert "cannot be read" in str(catalogue.entry("latin").error)
    with pytest.raises(LoadError, match="line 1"):
        catalogue.find("broken")
    assert catalogue.find("net").key == "net@v1"


def test_missing_folder_is_named(catalogue, tmp_path):
    with pytest.raises(InvalidRequestError, match="nowhere"):
        catalogue.add_folder(tmp_path / "nowhere")


def test_broken_built_in_does_not_hide_the_others(catalogue):
    good = ModelDefinition(
        name="nos/a",
        version=0,
        owner="nos",
        source=SOURCE.format(1),
        source_name="a.py",
        class_name="Net",
    )
    catalogue.add_built_ins([replace(good, name="nos/b", class_name="Nut"), good])
    assert [entry.newest is not None for entry in catalogue.entries()] == [True, False]
