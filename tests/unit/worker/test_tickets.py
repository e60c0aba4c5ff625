"""Tickets open what the gateway signed, for as long as it said, and nothing else."""

from __future__ import annotations

import time

import pytest
from nos.errors import UnauthenticatedError
from nos.wire.v1 import access_pb2
from nos_backend.control.tickets import TicketSigner, TicketVerifier

SIGNER = TicketSigner.generate()


def ticket(ttl_s: float = 60.0) -> bytes:
    return SIGNER.sign("m@v1", "ada", access_pb2.ROLE_USER, "t1", ttl_s)


def tampered() -> bytes:
    signed = access_pb2.SignedTicket.FromString(ticket())
    inner = access_pb2.Ticket.FromString(signed.ticket)
    inner.role = access_pb2.ROLE_ADMIN
    signed.ticket = inner.SerializeToString()
    return signed.SerializeToString()


def test_a_signed_ticket_says_who_may_do_what() -> None:
    found = TicketVerifier(SIGNER.public_key_bytes).verify(ticket(), time.time())
    assert (found.model, found.tenant, found.role) == ("m@v1", "ada", access_pb2.ROLE_USER)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "is missing"),
        (b"\xff\xff", "is malformed"),
        (TicketSigner.generate().sign("m@v1", "ada", access_pb2.ROLE_ADMIN, "t1"), "not signed by"),
        (tampered(), "not signed by"),
        (ticket(-1), r"expired \d+ s ago"),
    ],
    ids=["missing", "malformed", "of another signer", "tampered", "expired"],
)
def test_anything_else_is_refused_by_its_own_sentence(raw: bytes, sentence: str) -> None:
    with pytest.raises(UnauthenticatedError, match=sentence):
        TicketVerifier(SIGNER.public_key_bytes).verify(raw, time.time())


def test_revoking_a_token_ends_its_tickets() -> None:
    verifier = TicketVerifier(SIGNER.public_key_bytes)
    verifier.revoke(["t1"])
    with pytest.raises(UnauthenticatedError, match="revoked"):
        verifier.verify(ticket(), time.time())
