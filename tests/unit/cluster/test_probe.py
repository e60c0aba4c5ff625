"""A server that is to join a scheduler learns before it starts what is wrong with that."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest
from nos.errors import ConfigError, UnavailableError
from nos_backend.cluster import probe
from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.probe import check_scheduler

GREETING = b"\x01\0\0\0\0\0\0\0 ... compression ..."


@contextlib.contextmanager
def listener(says=b"", tls=None):
    """A port that says something to whoever comes, and ends; gives its `host:port`."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection = server.accept()[0]
                with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                    stack.enter_context(connection)
                    if tls is not None:
                        context = ssl.create_default_context(
                            ssl.Purpose.CLIENT_AUTH, cafile=str(tls.ca)
                        )
                        context.verify_mode = ssl.CERT_REQUIRED
                        context.load_cert_chain(tls.cert, tls.key)
                        connection = context.wrap_socket(connection, server_side=True)
                        stack.enter_context(connection)
                    connection.sendall(says)
                    connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def certs(tmp_path):
    return TlsFiles.create_for_cluster(tmp_path / "certs")


@pytest.mark.accept("E6")
def test_a_scheduler_that_knows_us_is_taken(certs):
    with listener(GREETING, certs["scheduler"]) as place:
        check_scheduler(f"tls://{place}", certs["client"])


@pytest.mark.accept("E6")
def test_certificates_of_another_authority_do_not_match(certs, tmp_path):
    other = TlsFiles.create_for_cluster(tmp_path / "other")["client"]
    with (
        listener(GREETING, certs["scheduler"]) as place,
        pytest.raises(ConfigError, match=r"the certificates do not match .*nos cluster certs"),
    ):
        check_scheduler(f"tls://{place}", other)


def test_a_scheduler_that_does_not_know_our_authority_says_so(certs, tmp_path):
    other = TlsFiles.create_for_cluster(tmp_path / "other")["client"]
    (other.folder / "ca.pem").write_bytes(certs["client"].ca.read_bytes())
    with (
        listener(GREETING, certs["scheduler"]) as place,
        pytest.raises(ConfigError, match="the certificates do not match"),
    ):
        check_scheduler(f"tls://{place}", other)


def test_what_is_no_scheduler_is_told_from_one(certs, monkeypatch):
    monkeypatch.setattr(probe, "_PATIENCE_S", 0.2)
    with listener() as mute:
        with pytest.raises(UnavailableError, match="is no Dask scheduler, or speaks without TLS"):
            check_scheduler(f"tcp://{mute}", None)
        with pytest.raises(UnavailableError, match="is no Dask scheduler, or speaks without TLS"):
            check_scheduler(f"tls://{mute}", certs["client"])
    with (
        listener(b"HTTP/1.1 400 Bad Request\r\n\r\n", certs["scheduler"]) as web,
        pytest.raises(UnavailableError, match="is no Dask scheduler"),
    ):
        check_scheduler(f"tls://{web}", certs["client"])


def test_a_scheduler_without_tls_is_not_asked_for_certificates(certs):
    with (
        listener(GREETING) as plain,
        pytest.raises(UnavailableError, match="is no Dask scheduler, or speaks without TLS"),
    ):
        check_scheduler(f"tls://{plain}", certs["client"])


def test_nobody_at_the_address_is_one_sentence(certs):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(UnavailableError, match=f"no scheduler listens on tls://127.0.0.1:{port}: "):
        check_scheduler(f"tls://127.0.0.1:{port}", certs["client"])
