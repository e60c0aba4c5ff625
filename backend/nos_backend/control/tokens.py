"""Tokens: who a caller is. Only their hashes stay in memory."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nos.errors import ConfigError, InvalidRequestError, UnauthenticatedError
from nos.wire.limits import TOKEN_KEY
from nos.wire.v1 import access_pb2

from nos_backend.control.catalogue import BUILT_IN_OWNER, LOCAL_OWNER
from nos_backend.control.registry import StoredToken

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_logger = logging.getLogger(__name__)

_MIN_TOKEN_LENGTH: Final = 16
_SECRET_BYTES: Final = 32
_ID_LENGTH: Final = 12
_MAX_TTL_S: Final = 10 * 365 * 86_400.0
_MAX_LABEL: Final = 100
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ROLES: Final = frozenset(
    {
        access_pb2.ROLE_VIEWER,
        access_pb2.ROLE_USER,
        access_pb2.ROLE_AUTHOR,
        access_pb2.ROLE_ADMIN,
    }
)
_HINT: Final = (
    "Pass token=..., or name the token file of `nos serve` with token_file=... or NOS_TOKEN_FILE"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who calls."""

    token_id: str
    """Names the token; not secret."""
    tenant: str
    """Whom it acts for."""
    role: access_pb2.Role.ValueType
    """What it may do."""
    expires_s: float = 0.0
    """When the token ends, in seconds since 1970; 0 means never."""
    label: str = ""
    """What it is for."""
    created_s: float = 0.0
    """Seconds since 1970; 0 for the generated one."""


class Tokens:
    """The tokens that are accepted, in order of creation; belongs to one thread."""

    def __init__(self, secrets: dict[str, tuple[str, access_pb2.Role.ValueType]]) -> None:
        """Take secrets, each with its tenant and role; only their hashes are kept."""
        # Found by hash: how long that takes says nothing of a secret.
        self._identities = {
            digest: Identity(token_id=digest.hex()[:_ID_LENGTH], tenant=tenant, role=role)
            for digest, tenant, role in (
                (_digest(secret), tenant, role) for secret, (tenant, role) in secrets.items()
            )
        }

    @classmethod
    def from_file(cls, path: Path) -> Tokens:
        """Accept the one token that a file holds, as that of this machine's user.

        Raises:
            ConfigError: If the file cannot be read, or holds no token.
        """
        try:
            secret = path.read_text(encoding="ascii").strip()
            mode = stat.S_IMODE(path.stat().st_mode)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "the token file cannot be read", "token_file", "a file of mode 0600", str(error)
            ) from error
        if len(secret) < _MIN_TOKEN_LENGTH or len(secret.split()) != 1:
            raise ConfigError(
                "the token file holds no token",
                "token_file",
                f"one word of at least {_MIN_TOKEN_LENGTH} characters",
                f"{len(secret)} characters in {path}",
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            _logger.warning("others may read the token: %s has mode %04o, not 0600", path, mode)
        return cls({secret: (LOCAL_OWNER, access_pb2.ROLE_ADMIN)})

    def __iter__(self) -> Iterator[Identity]:
        return iter(self._identities.values())

    def accept(self, token: StoredToken) -> Identity:
        """Accept a token from now on; returns who holds it."""
        identity = Identity(
            token_id=token.token_id,
            tenant=token.tenant,
            role=token.role,
            expires_s=token.expires_s,
            label=token.label,
            created_s=token.created_s,
        )
        self._identities[token.sha256] = identity
        return identity

    def revoke(self, token_id: str) -> None:
        """Accept a token no more.

        Raises:
            InvalidRequestError: If there is none of that name, or it is the generated one.
        """
        for digest, identity in self._identities.items():
            if identity.token_id == token_id:
                if not identity.created_s:
                    raise InvalidRequestError(
                        "the generated token cannot be revoked",
                        "token_id",
                        "a token that was created",
                        token_id,
                        "Each start of `nos serve` makes another one",
                    )
                del self._identities[digest]
                return
        raise InvalidRequestError(
            "there is no such token",
            "token_id",
            got=repr(token_id[:80]),
            hint="`nos token list` lists those there are",
        )

    def authenticate(self, authorization: str) -> Identity:
        """Return who sent this `authorization`.

        Raises:
            UnauthenticatedError: If it is empty, of another scheme, or holds no token of ours, or one that
                has expired.
        """
        if not authorization:
            raise UnauthenticatedError("no token came", TOKEN_KEY, hint=_HINT)
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError(
                "the token came in another form", TOKEN_KEY, "Bearer <token>", hint=_HINT
            )
        found = self._identities.get(_digest(secret.strip()))
        if found is None:
            raise UnauthenticatedError("the token is wrong", TOKEN_KEY, hint=_HINT)
        if found.expires_s and time.time() >= found.expires_s:
            raise UnauthenticatedError(
                "the token expired", TOKEN_KEY, hint="Ask an admin for another"
            )
        return found


def make_token(
    tenant: str, role: access_pb2.Role.ValueType, ttl_s: float, label: str
) -> tuple[StoredToken, str]:
    """Return a new token, and its secret, which is nowhere else.

    Args:
        tenant: Whom it acts for.
        role: What it may do.
        ttl_s: Seconds until it ends; 0 means never.
        label: What it is for.

    Raises:
        InvalidRequestError: If one of them cannot be.
    """
    if not _TENANT.fullmatch(tenant) or tenant == BUILT_IN_OWNER:
        raise InvalidRequestError(
            "this cannot be a tenant",
            "tenant",
            f"1 to 64 letters, digits, '.', '_', '-', and not {BUILT_IN_OWNER!r}",
            repr(tenant[:80]),
        )
    if role not in _ROLES:
        raise InvalidRequestError(
            "this is no role", "role", "viewer, user, author or admin", str(int(role))
        )
    if not 0 <= ttl_s <= _MAX_TTL_S:
        raise InvalidRequestError(
            "a token cannot last so long", "ttl_s", f"0 (for ever) to {_MAX_TTL_S:g}", f"{ttl_s:g}"
        )
    if len(label) > _MAX_LABEL or not label.isprintable():
        raise InvalidRequestError(
            "this cannot be a label",
            "label",
            f"at most {_MAX_LABEL} characters in one line",
            f"{len(label)} characters",
        )
    # Scanners for secrets find it by its first letters.
    secret = f"nos_{role_name(role)}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    digest = _digest(secret)
    now_s = time.time()
    stored = StoredToken(
        token_id=digest.hex()[:_ID_LENGTH],
        sha256=digest,
        tenant=tenant,
        role=role,
        label=label,
        created_s=now_s,
        expires_s=now_s + ttl_s if ttl_s else 0.0,
    )
    return stored, secret


def role_name(role: access_pb2.Role.ValueType) -> str:
    """Return a role as people write it."""
    return access_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
