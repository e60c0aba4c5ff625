"""The calls in flight by token, so that revoking one ends them, and so does its expiry."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final, cast

from nos.errors import UnauthenticatedError
from nos.wire.limits import TOKEN_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nos_backend.control.tokens import Identity

#: Timers of a loop count no further.
_MAX_TIMER_S: Final = 86_400.0


class _Call:
    """One call of a token."""

    __slots__ = ("error", "task")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        #: Why it was cut; None while it was not.
        self.error: UnauthenticatedError | None = None

    def cut(self, message: str) -> None:
        if self.error is None:
            self.error = UnauthenticatedError(message, TOKEN_KEY, hint="Ask an admin for another")
            self.task.cancel()


class Calls:
    """Belongs to the gateway's loop."""

    def __init__(self) -> None:
        self._calls: defaultdict[str, set[_Call]] = defaultdict(set)

    @contextlib.contextmanager
    def hold(self, identity: Identity) -> Iterator[None]:
        """Have what happens inside, by the current task, end with the caller's token.

        Raises:
            UnauthenticatedError: When it does.
        """
        task = cast("asyncio.Task[object]", asyncio.current_task())
        call = _Call(task)
        held = self._calls[identity.token_id]
        held.add(call)
        expiry = None
        if identity.expires_s:
            left_s = identity.expires_s - time.time()
            if left_s < _MAX_TIMER_S:
                expiry = asyncio.get_running_loop().call_later(
                    left_s, call.cut, "the token expired"
                )
        try:
            yield
        except asyncio.CancelledError:
            if call.error is None:
                raise
            task.uncancel()
            raise call.error from None
        finally:
            held.discard(call)
            if not held:
                self._calls.pop(identity.token_id, None)
            if expiry is not None:
                expiry.cancel()

    def cut(self, token_id: str) -> int:
        """End the calls of a token, but for the one that asks for it; returns how many."""
        calls = [
            call
            for call in self._calls.get(token_id, ())
            if call.task is not asyncio.current_task()
        ]
        for call in calls:
            call.cut("the token was revoked")
        return len(calls)
