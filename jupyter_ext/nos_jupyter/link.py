"""The Jupyter server's own connection to the backend, and what its failures are in HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from nos.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    NosError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import nos

T = TypeVar("T")

TIMEOUT_S = 5.0
#: The first class that fits gives the status; anything else that the backend says is a 502.
_STATUSES: tuple[tuple[type[NosError], int], ...] = (
    (ModelNotFoundError, 404),
    (InvalidRequestError, 400),
    (PermissionDeniedError, 403),
    (OverloadedError, 503),
    (DeadlineExceededError, 504),
)


def http_status(error: NosError) -> int:
    """Return the HTTP status of a failure of the backend."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 502)


class Link:
    """A connection that is made on first use and made anew where the backend was restarted.

    For one event loop.

    Args:
        address: The backend's; empty: as the SDK finds it.
        token_file: Where its token is; empty: as the SDK finds it.
    """

    def __init__(self, address: str, token_file: str) -> None:
        self._address = address
        self._token_file = token_file
        self._lock = asyncio.Lock()
        #: None before the first use and after a loss; replaced under the lock.
        self._client: nos.AsyncClient | None = None

    async def client(self) -> nos.AsyncClient:
        """Return the connection, and make it if there is none.

        Raises:
            NosError: If the backend does not answer.
        """
        import nos

        async with self._lock:
            if self._client is None:
                self._client = await nos.AsyncClient.connect(
                    self._address or None,
                    token_file=self._token_file or None,
                    timeout_s=TIMEOUT_S,
                )
            return self._client

    async def ask(self, question: Callable[[nos.AsyncClient], Awaitable[T]]) -> T:
        """Ask the backend; once more over a new connection where an old one failed.

        Raises:
            NosError: If that fails too.
        """
        client = await self.client()
        try:
            return await question(client)
        except (UnavailableError, UnauthenticatedError):
            # A backend that was restarted may have another port, and another token.
            await self.drop(client)
            return await question(await self.client())

    async def drop(self, client: nos.AsyncClient | None = None) -> None:
        """Close the connection, if it is still this one; by default whichever it is."""
        async with self._lock:
            if self._client is None or client not in (None, self._client):
                return
            old, self._client = self._client, None
        await old.close()
