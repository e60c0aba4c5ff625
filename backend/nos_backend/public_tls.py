"""TLS of the public port: which certificate the gateway shows, and how clients are told of it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nos.errors import ConfigError
from nos.wire.host import is_loopback
from nos.wire.local import OWN_NAME, TLS_SCHEME

if TYPE_CHECKING:
    from pathlib import Path

    from nos_backend.config import Settings

_ANY: Final = frozenset({"0.0.0.0", "[::]"})  # noqa: S104 - compared, not bound
_RENEW_DAYS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicTls:
    """The certificate of a public port."""

    cert: Path
    key: Path
    fingerprint: str
    """SHA-256 of the certificate, lower-case hex."""
    name: str
    """What it is for."""

    def url(self, address: str) -> str:
        """Return what `nos.connect` takes for a server at `host:port`."""
        name = "" if self.name == OWN_NAME else f"&name={self.name}"
        return f"{TLS_SCHEME}{address}?ca=sha256:{self.fingerprint}{name}"


def public_tls(settings: Settings) -> PublicTls | None:
    """Return what the public port of these settings shows; None on loopback, where nothing need be hidden.

    A public port without a certificate of its own gets one that the server makes, and keeps.

    Raises:
        ConfigError: If the certificate or its key cannot be read.
        OSError: If one cannot be made.
    """
    from nos_backend.cluster.certificates import describe_certificate, make_own

    if settings.tls_cert is not None and settings.tls_key is not None:
        cert, key = settings.tls_cert, settings.tls_key
    elif is_loopback(settings.host):
        return None
    else:
        folder = settings.state_dir / "tls"
        cert, key = folder / "cert.pem", folder / "key.pem"
        try:
            is_good = key.exists() and describe_certificate(cert)[2] > _RENEW_DAYS
        except (OSError, ValueError):
            is_good = False
        if not is_good:
            make_own(cert, key, OWN_NAME)
    try:
        fingerprint, name, _ = describe_certificate(cert)
        key.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the certificate cannot be used", "tls_cert", "PEM files", f"{cert}, {key}: {error}"
        ) from error
    return PublicTls(cert=cert, key=key, fingerprint=fingerprint, name=name)


def reachable(address: str) -> str:
    """Return the `host:port` by which others call a server of this machine that listens on `address`."""
    host, _, port = address.rpartition(":")
    if host not in _ANY:
        return address
    try:
        return f"{own_address('192.0.2.1')}:{port}"
    except OSError:
        return f"{socket.gethostname()}:{port}"


def own_address(towards: str) -> str:
    """Return the address of this machine that another one, by name or address, sees.

    Raises:
        OSError: If nothing leads there.
    """
    family, kind, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing; chooses the interface that leads there
        return str(probe.getsockname()[0])


def from_here(address: str) -> str:
    """Return the `host:port` by which this machine calls its own server that listens on `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in _ANY else address
