"""Where the server is and what opens it: arguments, environment, settings files, the local default."""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nos import _tls
from nos.errors import ConfigError
from nos.wire import local

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
SETTINGS_NAME: Final = "nos.toml"
_KEYS: Final = ("address", "token_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server and the credential for it."""

    #: `host:port`.
    address: str
    #: The same, as `find` takes it; says how the server is encrypted, too.
    url: str
    #: What its certificate is checked against, PEM; empty for a server without TLS.
    ca_certificate: bytes = field(repr=False)
    #: Empty if none was found.
    token: str = field(repr=False)
    #: Where the address came from, for people.
    source: str


@dataclass(frozen=True, slots=True)
class _Settings:
    path: Path
    address: str
    token_file: str


def find(address: str | None, token: str | None, token_file: str | Path | None) -> Target:
    """Return the server that `nos.connect` with these arguments means.

    The address is the argument, else `NOS_ADDRESS`, else that of the first `nos.toml` (from the working
    folder upwards, then the user's configuration folder), else that of the backend of this user that runs
    on this machine, else 127.0.0.1:50051. The token likewise: arguments, `NOS_TOKEN_FILE`, the file of
    settings that named the address, the local backend's own.

    An address `tls://host:port?ca=sha256:...` is of a server that encrypts; see `nos._tls`.

    Raises:
        ConfigError: If a file named here cannot be read, or says what is not a setting.
        UnavailableError: If the certificate of the server is asked for, and it does not answer or has
            another than the address says.
    """
    settings = None if address or os.environ.get("NOS_ADDRESS") else _find_settings()
    record = local.read_backend(local.state_dir())
    if address:
        found, source = address, "argument"
    elif variable := os.environ.get("NOS_ADDRESS"):
        found, source = variable, "NOS_ADDRESS"
    elif settings is not None and settings.address:
        found, source = settings.address, str(settings.path)
    elif record is not None:
        found, source = record.address, "this user's running backend"
    else:
        found, source = DEFAULT_ADDRESS, "default"
    if token is None:
        if token_file:
            token = _read_token(Path(token_file), "token_file")
        elif variable := os.environ.get("NOS_TOKEN_FILE"):
            token = _read_token(Path(variable), "NOS_TOKEN_FILE")
        elif settings is not None and settings.token_file:
            path = settings.path.parent / Path(settings.token_file).expanduser()
            token = _read_token(path, f"token_file in {settings.path}")
        elif record is not None and _is_same(found, record.address):
            token = _read_token(Path(record.token_file), "the local backend's token file")
        else:
            token = ""
    if record is not None and _is_same(found, record.address):
        found = record.address  # which says whether it encrypts
    plain, options = _tls.split(found)
    authority = b"" if options is None else _tls.certificates(plain, options)
    return Target(address=plain, url=found, ca_certificate=authority, token=token, source=source)


def _is_same(left: str, right: str) -> bool:
    (left, _), (right, _) = _tls.split(left), _tls.split(right)
    names = {"localhost", "127.0.0.1", "[::1]", "0.0.0.0"}  # noqa: S104 - compared, not bound
    (host, _, port), (other_host, _, other_port) = left.rpartition(":"), right.rpartition(":")
    return port == other_port and (host == other_host or {host, other_host} <= names)


def _read_token(path: Path, field_name: str) -> str:
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the token file cannot be read", field_name, got=f"{path}: {error}"
        ) from error
    if not token.isascii() or not token.isprintable():
        raise ConfigError(
            "the token file holds no token", field_name, "one line of ASCII", str(path)
        )
    return token


def _find_settings() -> _Settings | None:
    here = Path.cwd()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nos"
    for folder in (here, *here.parents, config):
        path = folder / SETTINGS_NAME
        if path.is_file():
            return _read_settings(path)
    return None


def _read_settings(path: Path) -> _Settings:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("the settings file cannot be read", str(path), got=str(error)) from error
    for key, value in content.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown setting in {path}", key, f"one of {', '.join(_KEYS)}", repr(key), hint
            )
        if not isinstance(value, str):
            raise ConfigError(f"wrong setting {key!r} in {path}", key, "text", repr(value)[:80])
    return _Settings(path, content.get("address", ""), content.get("token_file", ""))
