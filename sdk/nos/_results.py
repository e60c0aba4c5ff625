"""The receiving end of a stream: what has come, and when there is nothing more to wait for. No I/O."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nos.errors import NosError
    from nos.types import Result


class Results:
    """Results of one stream, in the order of their arrival. Not thread-safe: the shell holds a lock."""

    def __init__(self) -> None:
        self._arrived: deque[Result] = deque()
        #: Frames without an end.
        self.num_open = 0
        #: No frame will follow.
        self.is_finished = False
        #: Why the stream broke, until somebody was told.
        self._error: NosError | None = None
        #: Who sent: threads or tasks.
        self._senders: set[Any] = set()
        self._last_seq = 0

    @property
    def num_pending(self) -> int:
        """Frames without an end, and results that nobody took."""
        return self.num_open + len(self._arrived)

    def on_send(self, sender: Any) -> int:
        """Note that a frame is about to be sent; return its number."""
        self._senders.add(sender)
        self._last_seq += 1
        self.num_open += 1
        return self._last_seq

    def on_result(self, result: Result) -> None:
        """Take a result or an item."""
        if not result.more:
            self.num_open -= 1
        self._arrived.append(result)

    def on_lost(self, error: NosError) -> None:
        """Note that the stream is over."""
        if not self.is_finished:
            self._error = error
        self.is_finished = True

    def take(self, receiver: Any) -> Result | None:
        """Return the next result; None if it has yet to come.

        Raises:
            StopIteration: If none will come: nothing will be sent, or only the receiver itself sends and
                everything that it sent has its end.
            NosError: Once, if the stream broke.
        """
        if self._arrived:
            return self._arrived.popleft()
        if self.num_open:
            return None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.is_finished or self._senders == {receiver}:
            raise StopIteration
        return None
