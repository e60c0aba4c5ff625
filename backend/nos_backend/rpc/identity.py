"""AccessService: who the caller is; making, listing and ending tokens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nos.errors import InvalidRequestError, NosError, UnavailableError
from nos.wire.v1 import access_pb2, access_pb2_grpc

from nos_backend.control.registrar import whole
from nos_backend.control.tokens import make_token
from nos_backend.rpc.guard import actor, caller

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.control.registry import Actor, Registry, StoredToken
    from nos_backend.control.tokens import Identity, Tokens
    from nos_backend.rpc.guard import Context

_MAX_TOKENS = 10_000


class AccessService(access_pb2_grpc.AccessServiceServicer):
    """Serves `nos.v1.AccessService`."""

    def __init__(
        self, tokens: Tokens, registry: Registry, on_revoked: Callable[[str], asyncio.Future[None]]
    ) -> None:
        """Serve these tokens.

        Args:
            tokens: Those accepted.
            registry: Keeps those that are created.
            on_revoked: Ends what a token has under way, by its id; done when the workers know.
        """
        self._tokens = tokens
        self._registry = registry
        self._on_revoked = on_revoked

    async def WhoAmI(
        self, request: access_pb2.WhoAmIRequest, context: Context
    ) -> access_pb2.WhoAmIResponse:
        """Say who calls."""
        return access_pb2.WhoAmIResponse(token=_message(caller()))

    async def CreateToken(
        self, request: access_pb2.CreateTokenRequest, context: Context
    ) -> access_pb2.CreateTokenResponse:
        """Make a token, and tell its secret."""
        if sum(1 for _ in self._tokens) >= _MAX_TOKENS:
            raise InvalidRequestError(
                "there are too many tokens",
                "token",
                f"at most {_MAX_TOKENS}",
                hint="Revoke some; `nos token list` lists them",
            )
        token, secret = make_token(request.tenant, request.role, request.ttl_s, request.label)
        identity = await whole(self._create(token, actor()))
        return access_pb2.CreateTokenResponse(token=_message(identity), secret=secret)

    async def ListTokens(
        self, request: access_pb2.ListTokensRequest, context: Context
    ) -> access_pb2.ListTokensResponse:
        """List the tokens that were not revoked; some may have expired."""
        return access_pb2.ListTokensResponse(tokens=[_message(token) for token in self._tokens])

    async def RevokeToken(
        self, request: access_pb2.RevokeTokenRequest, context: Context
    ) -> access_pb2.RevokeTokenResponse:
        """End a token and all that it has under way, then keep that it ended."""
        self._tokens.revoke(request.token_id)
        # Before the disk is asked: a stolen token must not live on because that is full.
        telling = self._on_revoked(request.token_id)
        try:
            await whole(self._registry.revoke_token(request.token_id, actor()))
        except NosError as error:
            raise UnavailableError(
                f"the token is revoked, but only until the server starts again: {error.message}",
                "token_id",
                hint="Look at the disk of its state folder, then start it again and revoke once more",
            ) from error
        finally:
            await asyncio.shield(telling)
        return access_pb2.RevokeTokenResponse()

    async def _create(self, token: StoredToken, by: Actor) -> Identity:
        await self._registry.add_token(token, by)
        return self._tokens.accept(token)


def _message(identity: Identity) -> access_pb2.Token:
    return access_pb2.Token(
        token_id=identity.token_id,
        tenant=identity.tenant,
        role=identity.role,
        expires_s=identity.expires_s,
        label=identity.label,
        created_s=identity.created_s,
    )
