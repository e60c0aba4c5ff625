"""Who holds the token is its user; nobody else is anybody."""

import pytest
from nos.errors import ConfigError, UnauthenticatedError
from nos.wire.v1 import access_pb2
from nos_backend.control.tokens import Tokens

SECRET = "nos_" + "s" * 40


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return Tokens.from_file(path)


def test_holder_of_the_token_is_the_local_admin(tokens):
    identity = tokens.authenticate(f"Bearer {SECRET}")
    assert (identity.tenant, identity.role) == ("local", access_pb2.ROLE_ADMIN)
    assert SECRET not in repr(identity)


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer x", f"Basic {SECRET}", SECRET, "bearer \xff"]
)
def test_anything_else_is_refused_with_a_next_step(tokens, value):
    with pytest.raises(UnauthenticatedError, match="NOS_TOKEN_FILE") as caught:
        tokens.authenticate(value)
    assert SECRET not in str(caught.value)


def test_no_secret_stays_in_memory(tokens):
    assert SECRET not in repr(vars(tokens))


@pytest.mark.parametrize("content", ["", "short", "two words of the right length here", "é" * 40])
def test_file_without_a_token_is_refused(tmp_path, content):
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(ConfigError):
        Tokens.from_file(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing"):
        Tokens.from_file(tmp_path / "nothing")
