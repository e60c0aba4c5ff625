from __future__ import annotations

import pytest
from nos.errors import ConfigError
from nos_backend.config import load_settings, unknown_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("NOS_PORT", "NOS_HOST", "NOS_STATE_DIR", "NOS_MODELS"):
        monkeypatch.delenv(name, raising=False)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    config = tmp_path / "nos.toml"
    config.write_text('port = 1\nworkers = 1\nlog_level = "debug"\n')
    monkeypatch.setenv("NOS_PORT", "2")
    monkeypatch.setenv("NOS_WORKERS", "2")
    settings = load_settings({"port": "3"}, config)
    assert (settings.port, settings.workers, settings.log_level) == (3, 2, "debug")


def test_sizes_are_written_as_people_write_them():
    assert load_settings({"capacity_bytes": "8GiB"}).capacity_bytes == 8 << 30


def test_folders_of_models_come_from_several_flags_or_one_variable(tmp_path, monkeypatch):
    assert load_settings({"models": [str(tmp_path), str(tmp_path)]}).models == [tmp_path, tmp_path]
    monkeypatch.setenv("NOS_MODELS", f"{tmp_path}:{tmp_path}")
    assert load_settings({}).models == [tmp_path, tmp_path]


def test_shares_of_tenants_come_from_a_flag_or_a_table(tmp_path):
    assert load_settings({"weights": "ann=4, bob=0.5"}).weights == {"ann": 4, "bob": 0.5}
    config = tmp_path / "nos.toml"
    config.write_text("[weights]\nann = 2\n")
    assert load_settings({}, config).weights == {"ann": 2}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"port": "abc"}, "bad --port: expected a valid integer.*got 'abc'"),
        ({"port": "70000"}, "bad --port: expected less than or equal to 65535, got '70000'"),
        ({"device": "gpu"}, "bad --device: expected auto, cpu, cuda, cuda:N or none, got 'gpu'"),
        ({"log_level": "loud"}, "bad --log-level: expected 'debug', 'info'.*got 'loud'"),
        ({"host": "my.host"}, "bad --host: expected an IP address.*got 'my.host'"),
        ({"tls_cert": "cert.pem"}, "both --tls-cert and --tls-key"),
        ({"scheduler": "tcp://10.0.0.1:8786"}, "bad --scheduler: .*got 'tcp://10.0.0.1:8786'"),
        ({"scheduler": "http://here"}, "bad --scheduler: expected tls://host:port .*'http://here'"),
        (
            {"scheduler": "tls://10.0.0.1:8786"},
            "bad --tls-dir: .*got none|--tls-dir with .*got none",
        ),
        (
            {"worker_host": "0.0.0.0"},
            "bad --worker-host: expected one address that clients can use",
        ),
        ({"models": ["/no/where"]}, "bad --models: expected an existing folder, got '/no/where'"),
        ({"capacity_bytes": "lots"}, "bad --capacity-bytes: .* a size such as 4GiB, got 'lots'"),
        ({"capacity_bytes": "0"}, "bad --capacity-bytes: expected greater than 0, got '0'"),
        ({"capacity_bytes": "-1"}, "bad --capacity-bytes: expected .*greater than 0.*, got '-1'"),
        ({"host_bytes": "0"}, "bad --host-bytes: expected greater than 0, got '0'"),
        ({"eviction": "random"}, "bad --eviction: expected 'lru', 'fifo', 'lfu' or 'gdsf', got"),
        ({"max_models": "-1"}, "bad --max-models: .*got '-1'"),
        ({"weights": "ann"}, "bad --weights: .*got ''"),
        ({"weights": "ann=0"}, "bad --weights: expected tenant=share, 0.01 <= .*got ann=0"),
        ({"weights": "ann=nan"}, "bad --weights: .*got ann=nan"),
        ({"weights": "=2"}, "bad --weights: .*got =2"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_settings(flags)


def test_a_bad_variable_is_named_as_a_variable(monkeypatch):
    monkeypatch.setenv("NOS_PORT", "x")
    with pytest.raises(ConfigError, match="bad NOS_PORT: expected a valid integer"):
        load_settings({})


def test_a_misspelt_key_of_a_file_names_the_file_and_the_right_key(tmp_path):
    config = tmp_path / "nos.toml"
    config.write_text("prot = 1\n")
    with pytest.raises(
        ConfigError, match=r"unknown setting prot in .*nos.toml. Did you mean port\?"
    ):
        load_settings({}, config)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the settings file: got .*No such file"):
        load_settings({}, tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("port = = 1")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_settings({}, tmp_path / "bad.toml")


def test_unknown_variables_are_reported_and_known_ones_are_not():
    names = ["NOS_PROT", "NOS_PORT", "NOS_ADDRESS", "NOS_WORKER_DEVICE", "PATH"]
    assert unknown_variables(names) == [
        "unknown variable NOS_PROT is ignored. Did you mean NOS_PORT?"
    ]
