"""Addresses of servers that encrypt, `tls://host:port?ca=...`, and how such a server is known.

`ca` is a file of PEM certificates, or `sha256:` and the fingerprint of the server's own certificate, as
`nos serve` prints it: then nobody need have signed it. Without `ca` the system's authorities decide.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from nos.errors import ConfigError, UnavailableError
from nos.wire.local import OWN_NAME, TLS_SCHEME

_FINGERPRINT: Final = "sha256:"
_TIMEOUT_S: Final = 5.0
#: Ahead of the certificates of a server whose name differs from its address: PEM ignores it.
_NAME: Final = b"# name: "


def split(url: str) -> tuple[str, dict[str, str] | None]:
    """Return `host:port` and what `tls://` says besides; None where the address is without TLS.

    Raises:
        ConfigError: If the address says something else.
    """
    if not url.startswith(TLS_SCHEME):
        return url, None
    address, _, query = url.removeprefix(TLS_SCHEME).partition("?")
    options = dict(parse_qsl(query))
    for key in options:
        if key not in {"ca", "name"}:
            raise ConfigError("the address is wrong", "address", "?ca=... and &name=...", key[:80])
    return address.rstrip("/"), options


def certificates(address: str, options: dict[str, str]) -> bytes:
    """Return what the server's certificate is checked against, as `name_of` and gRPC take it: PEM.

    Args:
        address: `host:port`; asked for its certificate where that is known by its fingerprint.
        options: As `split` returned them.

    Raises:
        ConfigError: If the authority cannot be read.
        UnavailableError: If the server does not answer, or its certificate is another.
    """
    authority, name = options.get("ca", ""), options.get("name", "")
    if authority.startswith(_FINGERPRINT):
        pem = _fetch(address, authority.removeprefix(_FINGERPRINT))
        name = name or OWN_NAME
    else:
        path = Path(authority or ssl.get_default_verify_paths().cafile or "").expanduser()
        try:
            pem = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                "the certificate authority cannot be read",
                "ca",
                "a file of PEM certificates, or sha256: and a fingerprint",
                f"{path}: {error.strerror}",
            ) from error
    return named(name, pem) if name else pem


def named(name: str, pem: bytes) -> bytes:
    """Return certificates by which a server is known that has this name at every address."""
    return _NAME + name.encode() + b"\n" + pem


def name_of(pem: bytes) -> str:
    """Return the name that the server's certificate must have; empty for that of its address."""
    first, _, _ = pem.partition(b"\n")
    return first.removeprefix(_NAME).decode() if first.startswith(_NAME) else ""


def fingerprint(pem: str) -> str:
    """Return the fingerprint of a certificate: lower-case hex of its SHA-256."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def _fetch(address: str, expected: str) -> bytes:
    """Return a server's certificate, if its fingerprint is the expected one."""
    from nos._channel import nobody_listens, split_address

    try:
        # Whoever answers: what it shows is compared, and gRPC then checks that it has the key.
        pem = ssl.get_server_certificate(split_address(address), timeout=_TIMEOUT_S)
    except ssl.SSLError as error:
        raise UnavailableError(
            f"what listens on {address} does not speak TLS", "address", hint="Leave out tls://"
        ) from error
    except OSError:
        raise nobody_listens(address) from None
    found = fingerprint(pem)
    wanted = expected.replace(":", "").lower()
    if not hmac.compare_digest(found.encode(), wanted.encode()):
        raise UnavailableError(
            f"the server at {address} is not the one that you named: its certificate is another",
            "ca",
            _FINGERPRINT + wanted[:64],
            _FINGERPRINT + found,
            "Take the line that `nos serve` printed when it started last",
        )
    return pem.encode("ascii")
