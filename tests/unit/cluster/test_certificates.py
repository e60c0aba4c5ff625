from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest
from nos.errors import ConfigError
from nos.wire.local import WORKER_NAME
from nos_backend.cluster.certificates import TlsFiles, check_worker_certificate
from nos_backend.worker.service import DataPlane


def connect(server: TlsFiles, client: TlsFiles | None, name: str = "127.0.0.1") -> bytes:
    """Return what a client with `client`'s certificate reads from a server with `server`'s."""
    inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inner.load_cert_chain(server.cert, server.key)
    inner.load_verify_locations(server.ca)
    inner.verify_mode = ssl.CERT_REQUIRED
    outer = ssl.create_default_context(cafile=str((client or server).ca))
    if client is not None:
        outer.load_cert_chain(client.cert, client.key)
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with inner.wrap_socket(far, server_side=True) as connection:
                connection.sendall(b"hello")
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with outer.wrap_socket(near, server_hostname=name) as connection:
            return connection.recv(5)
    finally:
        near.close()
        thread.join()


@pytest.fixture
def files(tmp_path):
    return TlsFiles.create(tmp_path / "one")


def test_processes_of_one_run_accept_each_other(files):
    assert connect(files, files) == b"hello"


def test_a_certificate_of_another_run_is_refused(files, tmp_path):
    with pytest.raises(ssl.SSLError):
        connect(files, TlsFiles.create(tmp_path / "other"))


def test_a_client_without_a_certificate_is_refused(files):
    with contextlib.suppress(
        OSError
    ):  # TLS 1.3 refuses after the client's handshake: an alert or the end
        assert connect(files, None) == b""


def test_the_key_is_private(files):
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert files.folder.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def cluster(tmp_path):
    return TlsFiles.create_for_cluster(tmp_path / "cluster")


def test_machines_of_one_cluster_accept_each_other(cluster):
    assert connect(cluster["scheduler"], cluster["worker"], WORKER_NAME) == b"hello"
    assert connect(cluster["worker"], cluster["client"], WORKER_NAME) == b"hello"


def test_renewed_certificates_are_accepted_by_those_who_have_older_ones(cluster, tmp_path):
    old = {path: path.read_bytes() for path in (cluster["worker"].cert, cluster["worker"].ca)}
    renewed = TlsFiles.create_for_cluster(tmp_path / "cluster")
    assert renewed["worker"].cert.read_bytes() != old[renewed["worker"].cert]
    assert renewed["worker"].ca.read_bytes() == old[renewed["worker"].ca]
    assert (tmp_path / "cluster" / "ca-key.pem").stat().st_mode & 0o777 == 0o600


def test_a_certificate_for_clients_serves_nobody(cluster):
    with pytest.raises(ssl.SSLError):
        connect(cluster["client"], cluster["worker"], WORKER_NAME)
    with pytest.raises(ConfigError, match="one for clients only"):
        check_worker_certificate(cluster["client"].cert.read_bytes())
    check_worker_certificate(cluster["worker"].cert.read_bytes())


def test_an_authority_without_its_key_is_refused(cluster, tmp_path):
    (tmp_path / "cluster" / "ca-key.pem").write_bytes(cluster["worker"].key.read_bytes())
    with pytest.raises(ConfigError, match=r"the authority cannot be used: .*another key"):
        TlsFiles.create_for_cluster(tmp_path / "cluster")
    (tmp_path / "cluster" / "ca-key.pem").unlink()
    with pytest.raises(ConfigError, match="the authority cannot be used"):
        TlsFiles.create_for_cluster(tmp_path / "cluster")


def test_a_workers_port_that_others_reach_needs_a_certificate():
    plane = DataPlane(lambda: None, lambda raw: None, "0.0.0.0")
    with pytest.raises(ConfigError, match="open to others without TLS"):
        plane.start()
