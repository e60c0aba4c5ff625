"""What a stream does before and after the waiting, which is the clients' own."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from nos._link import Flow
from nos._results import Results
from nos.errors import (
    InvalidRequestError,
    NosError,
    OverloadedError,
    StreamClosedError,
    UnauthenticatedError,
    UnavailableError,
)
from nos.types import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos._engine import Engine
    from nos._link import Call, Link, Lost


#: What becomes of a frame for which there is no room: its sender waits, the frame that waits longest is
#: dropped, or all but the newest.
Policy = Literal["block", "drop_oldest", "latest"]

#: Frames that wait for room under `drop_oldest`: as many as the server's usual window.
_MAX_WAITING: Final = 16
#: Frames at the server under `latest`: one that runs, and one that is there when it ends.
_LIVE_FRAMES: Final = 2
#: How long frames wait for a server that is away: a gateway is back after 2 s, a worker with its models
#: after 5 s.
PATIENCE_S: Final = 30.0
#: A link that lasted so long had found its way.
_SETTLED_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0


def flow_of(policy: Policy, *, ordered: bool) -> Flow:
    """Return how a link treats the frames of such a stream.

    Raises:
        InvalidRequestError: If there is no such policy.
    """
    if policy == "latest":
        return Flow(max_waiting=1, max_open=_LIVE_FRAMES, is_ordered=ordered)
    if policy == "drop_oldest":
        return Flow(max_waiting=_MAX_WAITING, is_ordered=ordered)
    if policy != "block":
        raise InvalidRequestError(
            "no such policy", "policy", "block, drop_oldest or latest", repr(policy)[:40]
        )
    return Flow(is_ordered=ordered)


class Outage:
    """How long a stream has been without a link, and when it should try again. No I/O, no clock."""

    def __init__(self) -> None:
        #: When the first of the failures in a row was noted.
        self._since_s: float | None = None
        self._num_failures = 0

    def on_end(self, now_s: float, lasted_s: float, chance: float) -> float | None:
        """Note that a link ended; return after how many seconds to open another, None for never.

        Args:
            now_s: By the monotonic clock.
            lasted_s: How long it served frames; 0 if it never did.
            chance: A random number in [0, 1), so that clients do not come back all at once.
        """
        if self._since_s is None or lasted_s >= _SETTLED_S:
            self._since_s, self._num_failures = now_s, 0
        elif now_s - self._since_s >= PATIENCE_S:
            return None
        pause_s = min(_FIRST_PAUSE_S * 2 ** (self._num_failures - 1), _LONGEST_PAUSE_S)
        self._num_failures += 1
        return 0.0 if self._num_failures == 1 else pause_s * (0.5 + chance / 2)


class StreamCore:
    """A stream of its own to one model version, over one link after the other.

    Where a link is lost, what waits goes over the next one, which is opened when there is a frame for it. The
    frames that were sent and have no end go over it too, as such, where only the connection was lost: a
    worker that ran them answers as it did before. Else they fail.

    Args:
        engine: Carries it.
        key: The model version.
        flow: How it treats its frames.
        change: Runs a change of `results` where the receiver can see it, and wakes the receiver; called
            from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        key: str,
        flow: Flow,
        change: Callable[[Callable[[], None]], None],
    ) -> None:
        #: Whether senders wait for room.
        self.is_blocking = flow.max_waiting is None
        self.results = Results()
        self._engine, self._key, self._flow = engine, key, flow
        self._change = change
        self._lock = threading.Lock()
        # Everything below is read and written under the lock.
        #: Frames that came while the link was about to end, in order.
        self._held: list[Call] = []
        self._outage = Outage()
        #: How long the next link waits before it opens.
        self._pause_s = 0.0
        #: What it takes the place of.
        self._lost: Lost | None = None
        self._is_finished = False
        #: Why the stream is over.
        self._error: NosError | None = None
        #: None between two links.
        self._link: Link | None = engine.open_link(key, self._on_end, flow=flow)
        self._route = ""

    @property
    def route(self) -> str:
        """Which way the frames go, or went last; empty until that is known."""
        link = self._link
        return str((link and link.route) or self._route)

    def buffer(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
        """Return an array with any content, which `submit` need not copy where that is possible."""
        made: np.ndarray[Any, Any] = np.empty(shape, dtype)
        with self._lock:
            room = self._link.room(made.nbytes) if self._link is not None else None
        return made if room is None else room.view(made.dtype).reshape(made.shape)

    def submit(self, call: Call, seq: int, on_admitted: Callable[[], None]) -> None:
        """Send a frame that `results` knows of; its results go there, and if it cannot be sent, why."""
        results, change = self.results, self._change

        def on_item(value: Any) -> None:
            item = Result(seq=seq, _value=value, more=True)
            change(lambda: results.on_result(item))

        def on_end(it: Any) -> None:
            if it.cancelled():
                result = Result(seq=seq, error=StreamClosedError("the frame was withdrawn"))
            elif (error := it.exception()) is not None:
                result = Result(seq=seq, error=error, timings=it.timings)
            else:
                result = Result(seq=seq, _value=it.result(), timings=it.timings)
            change(lambda: results.on_result(result))

        call.stream_items(on_item)
        call.on_admitted = on_admitted
        call.add_done_callback(on_end)
        with self._lock:
            error = self._error or self._send([call], will_wait=self.is_blocking)
        if error is not None:
            call.fail(error)

    def finish(self) -> None:
        """Send nothing more."""
        with self._lock:
            self._is_finished = True
            if self._link is not None and not self._held:
                self._link.half_close()

    def close(self) -> None:
        """End at once."""
        error = StreamClosedError("the stream was closed")
        with self._lock:
            self._error = self._error or error
            link, held = self._link, self._held
            self._held = []
        for call in held:
            call.fail(error)
        if link is not None:
            link.close(error)

    def _send(self, calls: list[Call], *, will_wait: bool) -> NosError | None:
        """Hand frames to the link, or keep them for the next; return why neither can be. Holds the lock."""
        try:
            if self._link is None:
                self._link = self._engine.open_link(
                    self._key,
                    self._on_end,
                    flow=self._flow,
                    pause_s=self._pause_s,
                    resumes=self._lost,
                )
        except NosError as error:  # the client was closed
            return error
        link = self._link
        for call in calls:
            if not self._held and link.submit(call, will_wait=will_wait):
                continue
            if call.frame is not None and not will_wait:
                call.frame.snapshot()
            self._held.append(call)
        limit = self._flow.max_waiting
        while limit is not None and len(self._held) > limit:
            self._held.pop(0).fail(OverloadedError("the frame was dropped by the stream's policy"))
        return None

    def _on_end(self, link: Link, unsent: list[Call], error: NosError) -> None:
        with self._lock:
            unsent += self._held
            self._lost = link.lost
            self._held, self._link, self._route = [], None, self.route
            pause_s = None if self._error else self._pause_after(link, error)
            if pause_s is None:
                self._error = self._error or error
            elif unsent:
                self._pause_s = pause_s
                self._error = self._send(unsent, will_wait=True)
                if self._link is not None and self._is_finished and not self._held:
                    self._link.half_close()
            failure = self._error
        if failure is None:
            return
        for call in unsent:
            call.fail(failure)
        self._change(lambda: self.results.on_lost(failure))

    def _pause_after(self, link: Link, error: NosError) -> float | None:
        """Return how long to wait before another link is opened, None if this was the last."""
        # A worker that lost touch with the gateway trusts no ticket; the gateway knows whether to.
        is_stale = isinstance(error, UnauthenticatedError) and link.was_welcomed
        if not (isinstance(error, UnavailableError) or is_stale or link.left_in_peace):
            return None
        return self._outage.on_end(time.monotonic(), link.served_s, random.random())  # noqa: S311 - no secret
