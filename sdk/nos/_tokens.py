"""Tokens as users see them, and the calls that make, list and end them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nos import _tables
from nos._control import Rpc
from nos.errors import InvalidRequestError
from nos.types import _Table
from nos.wire import values
from nos.wire.v1 import access_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

ROLES: Final = ("viewer", "user", "author", "admin")

_ACCESS: Final = "/nos.v1.AccessService/"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo(_Table):
    """A token, without its secret."""

    token_id: str
    tenant: str
    role: str
    """`viewer`, `user`, `author` or `admin`."""
    label: str = ""
    created_s: float = 0.0
    """Seconds since 1970; 0 for the one that the server generated at its start."""
    expires_s: float = 0.0
    """Seconds since 1970; 0 means never."""

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        return TokenList([self]).columns()


class TokenList(tuple[TokenInfo, ...]):
    """The tokens of a server, in order of creation; shows itself as a table."""

    __slots__ = ()

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            (
                token.token_id,
                token.tenant,
                token.role,
                _date(token.expires_s) if token.expires_s else "never",
                token.label if token.created_s else "generated at the start of the server",
            )
            for token in self
        ]
        return ("token", "tenant", "role", "expires", "label"), rows, ""

    def __str__(self) -> str:
        return _tables.to_text(*self.columns())

    _repr_pretty_ = _Table._repr_pretty_
    _repr_html_ = _Table._repr_html_


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token that was just made; its secret is nowhere else, and not in its `repr`."""

    info: TokenInfo
    secret: str = field(repr=False)


def create(tenant: str, role: str, ttl_s: float, label: str) -> Rpc[NewToken]:
    """Make a token.

    Raises:
        InvalidRequestError: If the role is none.
    """
    if role not in ROLES:
        raise InvalidRequestError("this is no role", "role", ", ".join(ROLES), repr(role))

    def parse(raw: bytes) -> NewToken:
        response = access_pb2.CreateTokenResponse.FromString(raw)
        return NewToken(info=_to_info(response.token), secret=response.secret)

    request = access_pb2.CreateTokenRequest(
        tenant=tenant,
        role=access_pb2.Role.Value(f"ROLE_{role.upper()}"),
        ttl_s=ttl_s,
        label=label,
    )
    return Rpc(_ACCESS + "CreateToken", request, parse)


def list_all() -> Rpc[TokenList]:
    """Ask for the tokens."""

    def parse(raw: bytes) -> TokenList:
        response = access_pb2.ListTokensResponse.FromString(raw)
        return TokenList(_to_info(token) for token in response.tokens)

    return Rpc(_ACCESS + "ListTokens", access_pb2.ListTokensRequest(), parse)


def revoke(token_id: str) -> Rpc[None]:
    """End a token."""
    request = access_pb2.RevokeTokenRequest(token_id=token_id)
    return Rpc(_ACCESS + "RevokeToken", request, lambda _raw: None)


def _to_info(message: access_pb2.Token) -> TokenInfo:
    return TokenInfo(
        token_id=message.token_id,
        tenant=message.tenant,
        role=values.enum_name(access_pb2.Role, message.role, "ROLE_"),
        label=message.label,
        created_s=message.created_s,
        expires_s=message.expires_s,
    )


def _date(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))
