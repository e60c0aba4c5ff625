"""Whether a Dask scheduler takes us, asked without Dask: a server learns before it starts what is wrong."""

from __future__ import annotations

import socket
import ssl
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from nos.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from nos_backend.cluster.certificates import TlsFiles

_PATIENCE_S: Final = 5.0
#: In the first message of every Dask comm, whoever opened it.
_GREETING: Final = b"compression"
_MAX_BYTES: Final = 4096
#: What OpenSSL calls bytes that are no TLS.
_NO_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
)


def check_scheduler(address: str, tls: TlsFiles | None) -> None:
    """Connect as Dask does, and wait for its greeting.

    Args:
        address: `tls://host:port` or `tcp://host:port`.
        tls: What to show; None for a scheduler without TLS.

    Raises:
        UnavailableError: If nobody answers there, or somebody who is no Dask scheduler.
        ConfigError: If it refuses the certificate, or shows one of another authority.
    """
    place = urlsplit(address)
    try:
        connection = socket.create_connection((place.hostname, place.port), _PATIENCE_S)
    except OSError as error:
        raise UnavailableError(
            f"no scheduler listens on {address}: {(error.strerror or str(error)).lower()}",
            "scheduler",
            hint="Start it with `dask scheduler --preload nos_backend.cluster.preload`",
        ) from error
    try:
        said = _listen(connection) if tls is None else _listen_encrypted(connection, tls)
    except ssl.SSLError as error:
        if isinstance(error, ssl.SSLEOFError) or error.reason in _NO_TLS:
            raise _no_scheduler(address) from error
        raise ConfigError(
            f"the certificates do not match those of the scheduler at {address}",
            "tls_dir",
            "certificates of the scheduler's authority",
            error.reason or str(error),
            "Make all of them with one `nos cluster certs`",
        ) from error
    except OSError:  # it has hung up, or says nothing
        said = b""
    if _GREETING not in said:
        raise _no_scheduler(address)


def _no_scheduler(address: str) -> UnavailableError:
    return UnavailableError(
        f"what listens on {address} is no Dask scheduler, or speaks without TLS",
        "scheduler",
        "a Dask scheduler with the preload nos_backend.cluster.preload",
    )


def _listen_encrypted(connection: socket.socket, tls: TlsFiles) -> bytes:
    with connection:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.check_hostname = False  # as Dask does: who has a certificate of ours is one of us
        context.load_cert_chain(tls.cert, tls.key)
        encrypted = context.wrap_socket(connection)
    try:
        return _listen(encrypted)
    except ConnectionResetError as error:
        # It has refused our certificate, and hung up before we read its reason.
        raise ssl.SSLError("it hung up") from error


def _listen(connection: socket.socket) -> bytes:
    """Return the first bytes that a server says by itself, up to the greeting."""
    deadline_s = time.monotonic() + _PATIENCE_S
    said = b""
    with connection:
        while _GREETING not in said and len(said) < _MAX_BYTES:
            connection.settimeout(max(0.001, deadline_s - time.monotonic()))
            data = connection.recv(_MAX_BYTES)
            if not data:
                break
            said += data
    return said
