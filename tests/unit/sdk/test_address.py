"""Where a client finds its server."""

import pytest
from nos import _address
from nos.errors import ConfigError
from nos.wire import local


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for name in ("NOS_ADDRESS", "NOS_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    project = tmp_path / "project" / "deep"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)
    return tmp_path


def find(address=None, token=None, token_file=None):
    return _address.find(address, token, token_file)


def leave_word(place, address="127.0.0.1:7"):
    import os

    state = place / "state"
    state.mkdir()
    (state / "token").write_text("local-token\n")
    record = local.BackendRecord(address=address, pid=os.getpid(), token_file=str(state / "token"))
    local.write_backend(state, record)


def test_default_is_this_machine():
    target = find()
    assert (target.address, target.url) == ("127.0.0.1:50051", "127.0.0.1:50051")
    assert (target.token, target.source, target.ca_certificate) == ("", "default", b"")


def test_running_backend_of_this_user_is_found(place):
    leave_word(place)
    target = find()
    assert (target.address, target.token) == ("127.0.0.1:7", "local-token")
    assert target.source == "this user's running backend"


def test_settings_of_the_project_come_before_the_running_backend(place):
    leave_word(place)
    (place / "project" / "nos.toml").write_text('address = "a:1"\ntoken_file = "key"\n')
    (place / "project" / "key").write_text("project-token")
    target = find()
    assert (target.address, target.token) == ("a:1", "project-token")
    assert target.source == str(place / "project" / "nos.toml")


def test_settings_of_the_user_come_last(place):
    (place / "config" / "nos").mkdir(parents=True)
    (place / "config" / "nos" / "nos.toml").write_text('address = "user:1"')
    assert find().address == "user:1"


def test_variable_comes_before_settings(place, monkeypatch):
    (place / "project" / "nos.toml").write_text('address = "a:1"')
    monkeypatch.setenv("NOS_ADDRESS", "b:2")
    assert (find().address, find().source) == ("b:2", "NOS_ADDRESS")


def test_argument_comes_first(monkeypatch):
    monkeypatch.setenv("NOS_ADDRESS", "b:2")
    assert (find("c:3").address, find("c:3").source) == ("c:3", "argument")


def test_token_of_the_local_backend_is_sent_to_no_other_server(place):
    leave_word(place)
    assert find("elsewhere:7").token == ""
    assert find("localhost:7").token == "local-token"


def test_token_file_of_the_variable_is_read(place, monkeypatch):
    (place / "t").write_text("secret\n")
    monkeypatch.setenv("NOS_TOKEN_FILE", str(place / "t"))
    assert find("a:1").token == "secret"


def test_token_is_not_in_the_repr(place):
    assert "secret" not in repr(find("a:1", token="secret"))


def test_misspelt_setting_is_named(place):
    (place / "project" / "nos.toml").write_text('adress = "a:1"')
    with pytest.raises(ConfigError, match=r"'adress'.*Did you mean 'address'"):
        find()


def test_broken_settings_name_their_file(place):
    (place / "project" / "nos.toml").write_text("address = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        find()


def test_missing_token_file_is_named():
    with pytest.raises(ConfigError, match="no-such-file"):
        find("a:1", token_file="no-such-file")


def test_token_file_with_lines_is_refused(place):
    (place / "t").write_text("one\ntwo")
    with pytest.raises(ConfigError, match="one line"):
        find("a:1", token_file=place / "t")
