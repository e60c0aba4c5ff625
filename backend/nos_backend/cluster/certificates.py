"""The certificates that scheduler, workers and gateway show each other, and workers their clients.

Whoever reaches a Dask scheduler runs code there, so its comms take mutual TLS from one authority: that of one
run, whose key is kept nowhere, or one of several machines (`nos cluster certs`).
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
from nos.errors import ConfigError
from nos.wire.local import WORKER_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_VALIDITY: Final = datetime.timedelta(days=365)
_CLOCK_SKEW: Final = datetime.timedelta(minutes=5)
_DAY: Final = datetime.timedelta(days=1)
_AUTHORITY_VALIDITY: Final = datetime.timedelta(days=3650)
_SERVER: Final = ExtendedKeyUsageOID.SERVER_AUTH
_CLIENT: Final = ExtendedKeyUsageOID.CLIENT_AUTH
#: What the certificates of a cluster of several machines are good for; one of `client` serves nobody.
_ROLES: Final = {
    "scheduler": (_SERVER, _CLIENT),
    "worker": (_SERVER, _CLIENT),
    "client": (_CLIENT,),
}


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
        key = ec.generate_private_key(ec.SECP256R1())
        return cls._issue(folder, _make_authority(key), key, hosts, (_SERVER, _CLIENT))

    @classmethod
    def _issue(
        cls,
        folder: Path,
        authority: x509.Certificate,
        authority_key: ec.EllipticCurvePrivateKey,
        hosts: Sequence[str],
        purposes: Sequence[x509.ObjectIdentifier],
    ) -> Self:
        files = cls(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(key, authority_key, authority, hosts, purposes)
        folder.mkdir(mode=0o700, exist_ok=True)
        _write(files.ca, authority.public_bytes(serialization.Encoding.PEM))
        _write(files.cert, certificate.public_bytes(serialization.Encoding.PEM))
        _write(files.key, _private_bytes(key))
        return files

    @classmethod
    def create_for_cluster(cls, folder: Path) -> dict[str, Self]:
        """Make, or renew, the certificates of several machines: one each for scheduler, worker and client.

        The authority (`ca.pem`, `ca-key.pem`) is made once and stays, so that renewed certificates are
        accepted by whoever has older ones.

        Args:
            folder: Made (0700) if missing; each role's files are in a folder of its name.

        Returns:
            The files by role.

        Raises:
            ConfigError: If what is there is no authority with its key.
            OSError: If the folder cannot be read or written.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ca, ca_key = folder / "ca.pem", folder / "ca-key.pem"
        if not ca.exists() and not ca_key.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            _write(ca_key, _private_bytes(key))
            _write(ca, _make_authority(key).public_bytes(serialization.Encoding.PEM))
        authority, authority_key = _read_authority(ca, ca_key)
        return {
            role: cls._issue(folder / role, authority, authority_key, (), purposes)
            for role, purposes in _ROLES.items()
        }

    def check(self) -> None:
        """Check that the files are there and that this user may read them.

        Raises:
            ConfigError: If not; it names the file.
        """
        for path in (self.ca, self.cert, self.key):
            try:
                path.read_bytes()
            except OSError as error:
                raise ConfigError(
                    "the certificates for the scheduler cannot be read",
                    "tls_dir",
                    "a folder with ca.pem, cert.pem and key.pem, as `nos cluster certs` makes them",
                    f"{path}: {error.strerror}",
                ) from error

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


def check_worker_certificate(pem: bytes) -> None:
    """Check that a worker's port may show a certificate: its clients ask for one name at every address.

    Raises:
        ConfigError: If it is none, or another program's.
    """
    wanted = (
        f"a certificate that is for {WORKER_NAME}, as `nos cluster certs` makes them for workers"
    )
    try:
        extensions = x509.load_pem_x509_certificate(pem).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError(
            "the worker's certificate cannot be used", "tls_cert", wanted, str(error)
        ) from error
    found = names.get_values_for_type(x509.DNSName)
    if WORKER_NAME not in found or _SERVER not in purposes:
        kind = "one for clients only" if WORKER_NAME in found else f"one for {', '.join(found)}"
        raise ConfigError("the worker's certificate cannot be used", "tls_cert", wanted, kind)


def _read_authority(ca: Path, ca_key: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    wanted = "an authority that `nos cluster certs` made, with its key"
    try:
        authority = x509.load_pem_x509_certificate(ca.read_bytes())
        key = serialization.load_pem_private_key(ca_key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "the authority cannot be used", "folder", wanted, f"{ca.parent}: {error}"
        ) from error
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != authority.public_key()
    ):
        raise ConfigError(
            "the authority cannot be used", "folder", wanted, f"another key in {ca_key}"
        )
    return authority, key


def _make_authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return _sign(key, key, None, (), ())


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
    purposes: Sequence[x509.ObjectIdentifier],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    is_authority = authority is None
    subject = _name("NOS authority" if is_authority else WORKER_NAME)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + (_AUTHORITY_VALIDITY if is_authority else _VALIDITY))
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
        names = [_alternative(host) for host in (*hosts, WORKER_NAME)]
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
