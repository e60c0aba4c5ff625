"""Tokens by the command line."""

import json

import nos as sdk
import pytest
from nos import cli
from nos.errors import UnauthenticatedError


@pytest.fixture
def nos(server, monkeypatch, capsys):
    """Run a command line against the run's server: exit code, standard output, standard error."""
    monkeypatch.setenv("NOS_ADDRESS", server.address)
    monkeypatch.setenv("NOS_TOKEN_FILE", str(server.token_file))

    def run(*arguments):
        code = cli.run_command(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_token_is_made_listed_and_revoked(nos, server):
    code, out, _ = nos("token", "create", "ann", "--role", "viewer", "--expires", "1h", "--json")
    made = json.loads(out)
    assert (code, made["tenant"], made["role"]) == (0, "ann", "viewer")
    assert made["expires_s"] - made["created_s"] == pytest.approx(3600)
    listed = nos("token", "list")[1]
    assert made["token_id"] in listed
    assert made["secret"] not in listed
    with sdk.connect(server.address, token=made["secret"]) as viewer:
        assert viewer.models()
    assert nos("token", "revoke", made["token_id"])[0] == 0
    assert made["token_id"] not in nos("token", "list")[1]
    with pytest.raises(UnauthenticatedError):
        sdk.connect(server.address, token=made["secret"])


def test_secret_is_printed_once_on_a_line_of_its_own(nos):
    code, out, _ = nos("token", "create", "ann")
    (secret,) = [line for line in out.splitlines() if line.startswith("nos_user_")]
    assert (code, len(secret)) == (0, len("nos_user_") + 43)
    assert secret not in nos("token", "list", "--json")[1]


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (("create", "ann", "--role", "king"), "viewer, user, author, admin", 1),
        (("create", "ann", "--expires", "soon"), "90s, 30m, 12h, 7d or never", 2),
        (("create", "../x"), "tenant", 1),
        (("revoke", "nothing"), "`nos token list`", 1),
    ],
)
def test_wrong_use_is_one_sentence(nos, arguments, told, code):
    found, _, complaint = nos("token", *arguments)
    assert found == code
    assert told in complaint
    assert complaint.count("\n") == 1
