"""A server on a public address: TLS with a certificate of its own, or one that it is given."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nos
import numpy as np
import pytest
from nos.errors import ConfigError, NosError, UnavailableError
from nos.wire.local import read_backend
from nos_backend.cluster.certificates import TlsFiles

from tests.network import Host
from tests.servers import ROOT, Server, start_server


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(
        tmp_path_factory.mktemp("public"), "--host", "0.0.0.0", "--idle-shutdown-s", "0"
    )
    yield running
    running.stop()


def remote_address(server: Server) -> str:
    record = read_backend(server.state_dir)
    assert record is not None
    return record.remote_address


def port_of(server: Server) -> str:
    return server.address.partition("?")[0].rpartition(":")[2]


@pytest.mark.accept("F6")
@pytest.mark.parametrize("via", ["auto", "relay"])
def test_the_line_that_it_prints_is_all_a_client_needs(public: Server, via: nos.client.Via) -> None:
    assert remote_address(public) in public.log()
    frame = np.arange(12, dtype=np.uint8)
    with nos.connect(remote_address(public), token_file=public.token_file, via=via) as client:
        assert np.array_equal(client.model("nos/echo")(frame), frame)
        with nos.connect(client.address, token_file=public.token_file) as again:
            assert again.status().state == "ready"


def test_programs_of_this_machine_find_it_as_ever(
    public: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOS_STATE_DIR", str(public.state_dir))
    for address in (None, f"127.0.0.1:{port_of(public)}", f"localhost:{port_of(public)}"):
        with nos.connect(address) as client:
            assert client.status().state == "ready"


@pytest.mark.accept("F6")
def test_another_certificate_is_refused(public: Server) -> None:
    wrong = f"tls://127.0.0.1:{port_of(public)}?ca=sha256:{'0' * 64}"
    with pytest.raises(UnavailableError, match="not the one that you named"):
        nos.connect(wrong, token_file=public.token_file)


@pytest.mark.accept("F6")
def test_nothing_is_said_without_encryption(public: Server) -> None:
    with pytest.raises(UnavailableError):
        nos.connect(f"127.0.0.1:{port_of(public)}", token="nos_x", timeout_s=10)


def test_a_server_without_tls_is_told_from_one_with(server: Server) -> None:
    plain = f"tls://{server.address}?ca=sha256:{'0' * 64}"
    with pytest.raises(UnavailableError):
        nos.connect(plain, token_file=server.token_file)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tls://127.0.0.1:1?cacert=x", r"\?ca="),
        ("tls://127.0.0.1:1?ca=/nowhere/ca.pem", "PEM certificates"),
    ],
)
def test_an_address_that_says_something_else_is_refused(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        nos.connect(address, token="nos_x")


def test_a_certificate_of_ones_own_authority_serves(tmp_path: Path) -> None:
    files = TlsFiles.create(tmp_path / "tls", ("127.0.0.1",))
    flags = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    server = start_server(tmp_path, *flags, "--idle-shutdown-s", "0")
    try:
        address = f"tls://127.0.0.1:{port_of(server)}?ca={files.ca}"
        for known in (address, server.address, remote_address(server)):
            with nos.connect(known, token_file=server.token_file) as client:
                assert client.model("nos/echo")(7) == 7
        other = TlsFiles.create(tmp_path / "other")
        with pytest.raises(NosError):  # noqa: SIM117 - the connection is made by the call
            with nos.connect(
                f"tls://127.0.0.1:{port_of(server)}?ca={other.ca}",
                token_file=server.token_file,
                timeout_s=10,
            ) as client:
                client.status()
    finally:
        server.stop()


def test_half_a_certificate_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nos_backend", "serve", "--state-dir", str(tmp_path)]
    found = subprocess.run(
        [*command, "--tls-cert", "cert.pem"], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "both --tls-cert and --tls-key" in found.stderr


@pytest.mark.accept("E6")
def test_a_scheduler_that_is_not_there_is_one_sentence_before_anything_starts(
    tmp_path: Path,
) -> None:
    certs = tmp_path / "certs" / "client"
    made = [sys.executable, "-m", "nos.cli", "cluster", "certs", str(certs.parent)]
    assert "ca-key.pem" in subprocess.run(made, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, "-m", "nos_backend", "serve", "--state-dir", str(tmp_path / "state")]
    flags = ["--scheduler", "tls://127.0.0.1:1", "--tls-dir", str(certs), "--device", "none"]
    found = subprocess.run(
        [*command, "--port", "0", *flags], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "no scheduler listens on tls://127.0.0.1:1: connection refused" in found.stderr
    assert not (tmp_path / "state" / "backend.json").exists()


@pytest.mark.accept("G6")
def test_another_host_needs_only_that_line_and_the_token(public: Server, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(public.token)
    _, _, rest = remote_address(public).partition("tls://")
    _, _, query = rest.partition(":")
    code = f"""
import nos, numpy as np
client = nos.connect("tls://@:{query}", token_file={str(token)!r})
frame = np.arange(6.0)
assert np.array_equal(client.model("nos/echo")(frame), frame)
print(client.status().state, "torch" in __import__("sys").modules)
"""
    with contextlib.ExitStack() as stack:
        host = Host(stack)
        found = subprocess.run(
            [*host.inside, sys.executable, "-c", code.replace("@", host.gateway)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert found.stdout == "ready False\n", found.stderr
