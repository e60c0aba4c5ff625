"""What happened, told to everybody who watches; a watcher that does not keep up is let go."""

from __future__ import annotations

import asyncio
import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nos.errors import NosError, OverloadedError

if TYPE_CHECKING:
    from types import TracebackType

_MAX_WAITING: Final = 1000
#: Told to whoever asks how the server stands.
_MAX_RECENT: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, as `nos.v1.WatchEventsResponse` tells it."""

    time_s: float
    kind: str
    model: str = ""
    """A name or a key; may be empty."""
    worker: str = ""
    message: str = ""


class Events:
    """Hands each event to every watcher; belongs to one loop."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._ended: NosError | None = None
        #: The last events, the oldest first.
        self.recent: collections.deque[Event] = collections.deque(maxlen=_MAX_RECENT)

    def tell(self, event: Event) -> None:
        """Hand on an event; never waits."""
        self.recent.append(event)
        for watcher in self._watchers:
            watcher.put(event)

    def end(self, error: NosError) -> None:
        """End all watching, now and to come, with `error`."""
        self._ended = error
        for watcher in self._watchers:
            watcher.end(error)

    def watch(self) -> Watcher:
        """Return a watcher, to be entered with `with`."""
        watcher = Watcher(self._watchers)
        if self._ended is not None:
            watcher.end(self._ended)
        return watcher


class Watcher:
    """One reader of events; holds those it has not read, up to a limit."""

    def __init__(self, watchers: set[Watcher]) -> None:
        self._watchers = watchers
        self._waiting: collections.deque[Event] = collections.deque()
        self._changed = asyncio.Event()
        self._error: NosError | None = None

    def __enter__(self) -> Watcher:
        self._watchers.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watchers.discard(self)

    def put(self, event: Event) -> None:
        """Take an event."""
        if len(self._waiting) >= _MAX_WAITING:
            self.end(OverloadedError("events came faster than they were read", hint="Watch again"))
            return
        self._waiting.append(event)
        self._changed.set()

    def end(self, error: NosError) -> None:
        """Have the next `take` raise `error`."""
        self._error = error
        self._changed.set()

    async def take(self, timeout_s: float | None = None) -> list[Event]:
        """Return the events since the last call, waiting for one; none if the time is up.

        Raises:
            NosError: Why watching ended.
        """
        if not self._waiting and self._error is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return []
        if self._error is not None:
            raise self._error
        events = list(self._waiting)
        self._waiting.clear()
        self._changed.clear()
        return events
