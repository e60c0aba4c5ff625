from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest
from nos_backend.cluster.certificates import TlsFiles


def connect(server: TlsFiles, client: TlsFiles | None) -> bytes:
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
        with outer.wrap_socket(near, server_hostname="127.0.0.1") as connection:
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
