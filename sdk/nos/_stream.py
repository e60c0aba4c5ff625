"""What a stream does before and after the waiting, which is the clients' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from nos._link import Flow
from nos._results import Results
from nos.errors import InvalidRequestError, NosError, StreamClosedError, UnavailableError
from nos.types import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos._engine import Engine
    from nos._link import Call, Link


#: What becomes of a frame for which there is no room: its sender waits, the frame that waits longest is
#: dropped, or all but the newest.
Policy = Literal["block", "drop_oldest", "latest"]

#: Frames that wait for room under `drop_oldest`: as many as the server's usual window.
_MAX_WAITING: Final = 16
#: Frames at the server under `latest`: one that runs, and one that is there when it ends.
_LIVE_FRAMES: Final = 2


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


class StreamCore:
    """A stream of its own to one model version.

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
        self._change = change
        self._error: NosError | None = None
        self._link: Link = engine.open_link(key, self._on_end, flow=flow)

    @property
    def route(self) -> str:
        """Which way the frames go; empty until that is known."""
        return str(self._link.route or "")

    def submit(self, call: Call, seq: int, on_admitted: Callable[[], None]) -> None:
        """Send a frame that `results` knows of; its results go there.

        Raises:
            NosError: If the stream is over, and why.
        """
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
        if not self._link.submit(call, will_wait=self.is_blocking):
            error = self._error or UnavailableError(
                "the stream takes no more frames", hint="Open another with model.stream()"
            )
            call.fail(error)

    def finish(self) -> None:
        """Send nothing more."""
        self._link.half_close()

    def close(self) -> None:
        """End at once."""
        self._link.close(StreamClosedError("the stream was closed"))

    def _on_end(self, _link: Link, unsent: list[Call], error: NosError) -> None:
        self._error = error
        for call in unsent:
            call.fail(error)
        self._change(lambda: self.results.on_lost(error))
