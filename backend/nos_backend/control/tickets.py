"""Tickets: what the gateway vouches for towards workers, so that no token ever reaches one.

A ticket names one model version, a tenant and a role, is signed with Ed25519 and lasts a minute; streams
renew theirs. Workers hold the public key only. Imported where tickets are made or checked, which are the
only places that need `cryptography`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError
from nos.errors import UnauthenticatedError
from nos.wire.v1 import access_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TICKET_TTL_S = 60.0

_HINT = "Ask the gateway for a fresh one with ClusterService.Resolve"


class TicketSigner:
    """Makes tickets; lives in the gateway."""

    def __init__(self, key: Ed25519PrivateKey, weights: Mapping[str, float]) -> None:
        self._key = key
        self._weights = weights

    @classmethod
    def generate(cls, weights: Mapping[str, float] | None = None) -> Self:
        """Return a signer with a new key, which exists in this process's memory only.

        Args:
            weights: Shares of a device by tenant; 1 for all others.
        """
        return cls(Ed25519PrivateKey.generate(), weights or {})

    @property
    def public_key_bytes(self) -> bytes:
        """What verifiers need: 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(
        self,
        model: str,
        tenant: str,
        role: access_pb2.Role.ValueType,
        token_id: str,
        ttl_s: float = TICKET_TTL_S,
    ) -> bytes:
        """Return a ticket as it travels.

        Args:
            model: The version it opens, as `name@v3`.
            tenant: Whom it acts for.
            role: What it may do.
            token_id: The token that it came from; revoking that token ends it.
            ttl_s: Seconds from now until it ends.
        """
        ticket = access_pb2.Ticket(
            model=model,
            tenant=tenant,
            role=role,
            expires_s=time.time() + ttl_s,
            token_id=token_id,
            weight=self._weights.get(tenant, 1.0),
        ).SerializeToString()
        return access_pb2.SignedTicket(
            ticket=ticket, signature=self._key.sign(ticket)
        ).SerializeToString()


class TicketVerifier:
    """Checks tickets; lives in the workers. Any thread may call it."""

    def __init__(self, public_key_bytes: bytes) -> None:
        """Take the public key of the gateway's signer.

        Raises:
            ValueError: If these are not the 32 bytes of an Ed25519 key.
        """
        self._key = Ed25519PublicKey.from_public_bytes(public_key_bytes)
        #: Tokens whose tickets are refused, however long they would last.
        self._revoked: frozenset[str] = frozenset()

    def revoke(self, token_ids: Iterable[str]) -> None:
        """Refuse every ticket of these tokens from now on."""
        self._revoked |= frozenset(token_ids)

    def verify(self, raw: bytes, now_s: float) -> access_pb2.Ticket:
        """Return the ticket that `raw` carries.

        Args:
            raw: A serialized SignedTicket; empty if none came.
            now_s: Seconds since 1970.

        Raises:
            UnauthenticatedError: If it is missing, malformed, signed by another key, expired or of a
                revoked token.
        """
        if not raw:
            raise UnauthenticatedError("the ticket is missing", "nos-ticket-bin", hint=_HINT)
        try:
            signed = access_pb2.SignedTicket.FromString(raw)
            self._key.verify(signed.signature, signed.ticket)
            ticket = access_pb2.Ticket.FromString(signed.ticket)
        except DecodeError:
            raise UnauthenticatedError(
                "the ticket is malformed", "nos-ticket-bin", hint=_HINT
            ) from None
        except InvalidSignature:
            raise UnauthenticatedError(
                "the ticket was not signed by this server's gateway", "nos-ticket-bin", hint=_HINT
            ) from None
        if now_s >= ticket.expires_s:
            raise UnauthenticatedError(
                f"the ticket expired {now_s - ticket.expires_s:.0f} s ago",
                "nos-ticket-bin",
                hint=_HINT,
            )
        if ticket.token_id in self._revoked:
            raise UnauthenticatedError("the token of this ticket was revoked", "nos-ticket-bin")
        return ticket
