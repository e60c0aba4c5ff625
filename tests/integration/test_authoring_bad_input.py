"""What authors get wrong is told to them in one sentence, and harms nobody."""

from concurrent.futures import ThreadPoolExecutor
from sqlite3 import connect

import nos
import pytest
from nos.errors import AlreadyExistsError, InvalidRequestError, LoadError, ModelNotFoundError

NEEDY = "class Needy:\n    def __init__(self, width: int): ...\n    def f(self): ..."


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        ("class A(:\n    pass", InvalidRequestError, "not Python: line 1"),
        ("import nosuchpackage\ndef f(): ...", LoadError, "No module named 'nosuchpackage'"),
        (NEEDY, InvalidRequestError, "width"),
        ("x = 3", InvalidRequestError, "does not say which class is the model"),
        ("def f(): ...\ndel f", LoadError, "defines no class or function 'f'"),
        ("class A:\n    f = 3", InvalidRequestError, "no public method"),
        ("raise SystemExit(3)\ndef f(): ...", LoadError, "SystemExit"),
    ],
)
def test_source_that_cannot_be_a_model_is_told_at_once(client, source, error, told):
    with pytest.raises(error, match=told):
        client.register(source, name="bad/source")
    with pytest.raises(ModelNotFoundError):
        client.info("bad/source")


@pytest.mark.parametrize("name", ["../etc", "a/../b", "..", "n" * 300, "", "a b", "nos/mine"])
def test_name_that_cannot_be_is_refused(client, name):
    with pytest.raises((InvalidRequestError, AlreadyExistsError), match="name"):
        client.register("def f(x: int) -> int:\n    return x", name=name)


def test_class_that_closes_over_a_connection_is_told_which(client):
    handle = connect(":memory:")

    class Reader:
        def __call__(self):
            return handle.total_changes

    with pytest.raises(InvalidRequestError, match=r"Reader needs handle.*sqlite3\.Connection"):
        client.register(Reader, name="bad/reader")
    handle.close()


def sorted(items):
    return [*items, "mine"]


def sort(items: list[int]) -> list[str]:
    return sorted(items)


def test_redefined_builtin_travels(client):
    client.register(sort, name="bad/sort")
    assert client.model("bad/sort")([2, 1]) == [2, 1, "mine"]


def test_of_two_authors_who_register_one_name_at_once_one_gets_it(server, client):
    tokens = [client.create_token(tenant, role="author").secret for tenant in ("ann", "bob")]

    def register(token):
        with nos.connect(server.address, token=token) as author:
            try:
                return author.register("def f() -> int:\n    return 1", name="both/one").spec.owner
            except AlreadyExistsError:
                return "refused"

    with ThreadPoolExecutor(2) as threads:
        owners = list(threads.map(register, tokens))
    assert owners.count("refused") == 1
    assert client.info("both/one").spec.owner in owners


def test_versions_are_called_by_number_and_the_newest_by_name_or_latest(client):
    for number in (1, 2):
        client.register(f"def f() -> int:\n    return {number}", name="bad/aliases")
    found = [client.model(f"bad/aliases{suffix}")() for suffix in ("", "@latest", "@v1", "@v2")]
    assert found == [2, 2, 1, 2]
    with pytest.raises(ModelNotFoundError, match="v1, v2"):
        client.model("bad/aliases@v3")
    client.unregister("bad/aliases")
    with pytest.raises(ModelNotFoundError):
        client.model("bad/aliases@v1")
