"""The certificate that scheduler, workers and gateway of one run show each other.

Whoever reaches a Dask scheduler runs code there, so its comms take mutual TLS from one authority that
lives as long as the run.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_VALIDITY: Final = datetime.timedelta(days=365)
_CLOCK_SKEW: Final = datetime.timedelta(minutes=5)
_DAY: Final = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the files of a run's TLS folder are."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate, PEM."""
        return self.folder / "ca.pem"

    @property
    def cert(self) -> Path:
        """The certificate of every process of the run, PEM."""
        return self.folder / "cert.pem"

    @property
    def key(self) -> Path:
        """Its private key, PEM, readable by this user only."""
        return self.folder / "key.pem"

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str] = ("127.0.0.1",)) -> Self:
        """Make an authority and one certificate by it; the authority's key is kept nowhere.

        Args:
            folder: Made (0700) if missing.
            hosts: IP addresses and names that the certificate is for.

        Raises:
            OSError: If the folder cannot be written.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = cls(folder)
        authority_key = ec.generate_private_key(ec.SECP256R1())
        key = ec.generate_private_key(ec.SECP256R1())
        authority = _sign(authority_key, authority_key, None, ())
        certificate = _sign(key, authority_key, authority, hosts)
        _write(files.ca, authority.public_bytes(serialization.Encoding.PEM))
        _write(files.cert, certificate.public_bytes(serialization.Encoding.PEM))
        _write(files.key, _private_bytes(key))
        return files

    def to_flags(self) -> list[str]:
        """Return what `dask scheduler` and `dask worker` take."""
        return [
            f"--tls-ca-file={self.ca}",
            f"--tls-cert={self.cert}",
            f"--tls-key={self.key}",
        ]


def make_own(cert: Path, key: Path, name: str) -> None:
    """Make the certificate of a public port that nobody else signs; clients know it by its fingerprint.

    Args:
        cert: Written, PEM.
        key: Written, PEM, readable by this user only.
        name: What it is for, whatever the server's address.

    Raises:
        OSError: If they cannot be written.
    """
    cert.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    private = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(name))
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.SubjectAlternativeName([_alternative(name)]), False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .sign(private, hashes.SHA256())
    )
    _write(cert, certificate.public_bytes(serialization.Encoding.PEM))
    _write(key, _private_bytes(private))


def describe_certificate(cert: Path) -> tuple[str, str, float]:
    """Return what clients need to know of a certificate: fingerprint, a name of it, days until it ends.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is none, or names no server.
    """
    certificate = x509.load_pem_x509_certificate(cert.read_bytes())
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError("it names no server (subjectAltName)") from None
    found = names.get_values_for_type(x509.DNSName)
    found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    if not found:
        raise ValueError("it names no server (subjectAltName)")
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return certificate.fingerprint(hashes.SHA256()).hex(), found[0], left / _DAY


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _sign(
    key: ec.EllipticCurvePrivateKey,
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate | None,
    hosts: Sequence[str],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    is_authority = authority is None
    subject = _name("NOS run authority" if is_authority else "nos-internal")
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALIDITY)
        .add_extension(
            x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False
        )
    )
    if is_authority:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, True)
    else:
        names = [_alternative(host) for host in (*hosts, "nos-internal")]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), False)
    return builder.sign(authority_key, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
