"""One stream to one model version: a `Session`, the thread that carries it out, and who waits for what."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nos._channel import RpcStream
from nos._local import LocalStream
from nos._session import (
    Done,
    Event,
    Failed,
    Item,
    Leaving,
    Outgoing,
    Session,
    Welcomed,
)
from nos._version import __version__
from nos.errors import (
    DeadlineExceededError,
    ModelError,
    NosError,
    OverloadedError,
    StreamClosedError,
    UnauthenticatedError,
    UnavailableError,
)
from nos.types import Timings
from nos.wire import frames, values
from nos.wire.limits import RESUMABLE_BYTES, RESUME, UNORDERED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from nos._channel import Duplex, Metadata, Transport

_logger = logging.getLogger(__name__)

STREAM_PATH: Final = "/nos.v1.InferenceService/Stream"

#: A worker that was just named answers `Hello` in milliseconds; one that cannot be reached never does.
PROBE_S: Final = 2.0

_NO_TIMINGS: Final = Timings()

#: A shared stream without frames for so long is closed; the next call opens one in milliseconds.
IDLE_S: Final = 60.0

#: What the answer to a call with a deadline may take longer, before the client gives up by itself.
GRACE_S: Final = 2.0

#: Through shared memory, over the network to the worker, through the gateway.
_MAX_ATTEMPTS: Final = 3


def out_of_time(timeout_s: float | None) -> DeadlineExceededError:
    """Return the error for a call whose time limit passed while neither server nor network said so."""
    return DeadlineExceededError("no answer came in time", "timeout_s", f"one within {timeout_s} s")


def _forgotten() -> UnavailableError:
    return UnavailableError("the result of this frame was lost with its connection")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How to reach a model version."""

    #: None for a local stream.
    transport: Transport | None
    metadata: Metadata
    #: The worker's name; empty if it is not known.
    worker: str = ""
    #: The worker's address on the direct path, the socket's on a local one; empty when the gateway relays.
    worker_address: str = ""
    #: Seconds until the ticket in `metadata` expires; 0 if there is none.
    ticket_ttl_s: float = 0.0

    def open(self) -> Duplex:
        """Open a stream.

        Raises:
            NosError: If that fails at once.
        """
        if self.transport is not None:
            return RpcStream(self.transport, STREAM_PATH, self.metadata)
        return LocalStream(self.worker_address, self.metadata)

    def __str__(self) -> str:
        """Say which way it goes."""
        if self.transport is None:
            return "through shared memory"
        return (
            f"direct to {self.worker_address}" if self.worker_address else "relayed by the gateway"
        )


@dataclass(frozen=True, slots=True)
class Lost:
    """A stream whose connection broke while frames of it had no end."""

    stream_id: str
    #: Who served it, and may still.
    worker: str


@dataclass(frozen=True, slots=True)
class _Sent:
    """A frame as it was sent, to be sent again over the stream that takes the place of this one."""

    header: bytes
    messages: Sequence[bytes]

    def again(self, seq: int) -> Outgoing:
        """Return it as a frame that had this number before."""
        payload = values.Payload()
        payload.buffers = [data for _, data in map(frames.cut, self.messages)]
        payload.size = sum(map(len, payload.buffers))
        return Outgoing(frames.resumed(self.header, seq), payload)


class Call(Future[Any]):
    """The answer to one frame, and its way there.

    `cancel()` withdraws the frame at the server, whether it waits or runs.
    """

    def __init__(self, frame: Outgoing, *, is_generator: bool = False) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._created_s = time.monotonic()
        #: Dropped once the frame was sent.
        self.frame: Outgoing | None = frame
        #: Where the time went; set before the result.
        self.timings = _NO_TIMINGS
        #: Takes a generator's items, in the link's thread; None collects them for the result.
        self.on_item: Callable[[Any], None] | None = None
        #: Told in the link's thread, or the sender's, when the frame was sent or will never be.
        self.on_admitted: Callable[[], None] | None = None
        #: How many links had it.
        self.num_attempts = 0
        #: The stream that it was sent over and that was lost.
        self.resumes = ""
        self.link: Link | None = None
        self._items: list[Any] | None = [] if is_generator else None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer; see `concurrent.futures.Future.result`."""
        if os.getpid() != self._pid:
            raise UnavailableError(
                "the call was made before this process was forked", hint="Make it again here"
            )
        return super().result(timeout)

    def wait(self, timeout_s: float | None) -> Any:
        """Wait for the answer; leaving this by any other way withdraws the frame.

        Raises:
            DeadlineExceededError: If neither server nor network kept the deadline.
            NosError: As what the frame ended.
        """
        try:
            return self.result(timeout_s + GRACE_S if timeout_s else None)
        except TimeoutError as error:
            if self.done():  # what the server said, or the model's own
                raise
            self.cancel()
            raise out_of_time(timeout_s) from error
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> bool:
        """Withdraw the frame; return False if it has ended."""
        if not super().cancel():
            return False
        link = self.link
        if link is not None and os.getpid() == self._pid:
            link.cancel(self)
        return True

    def stream_items(self, take: Callable[[Any], None]) -> None:
        """Have a generator's items handed to `take` as they come; the result is then None."""
        self.on_item = take
        self._items = None

    def admitted(self) -> None:
        """Note that the frame is on its way, or ended before."""
        told, self.on_admitted = self.on_admitted, None
        if told is not None:
            told()

    def item(self, value: Any) -> None:
        """Take one item of a generator."""
        if self.on_item is not None:
            if not self.cancelled():
                self.on_item(value)
        elif self._items is None:
            self._items = [value]
        else:
            self._items.append(value)

    def finish(self, value: Any, timings: Timings) -> None:
        """End well."""
        self.timings = Timings(
            queue_s=timings.queue_s,
            batch_wait_s=timings.batch_wait_s,
            compute_s=timings.compute_s,
            server_s=timings.server_s,
            total_s=time.monotonic() - self._created_s,
            batch_size=timings.batch_size,
        )
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            self.set_result(value if self._items is None else self._items)
        self.admitted()

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        if isinstance(error, ModelError) and error.remote_traceback:
            error.add_note(f"On the worker:\n{error.remote_traceback.rstrip()}")
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)
        self.admitted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How a stream treats its frames."""

    #: The most frames that wait for room; above it the oldest of them is dropped. None for no limit.
    max_waiting: int | None = None
    #: The most frames without an end at the server, where that is less than its window.
    max_open: int | None = None
    #: Whether results come in the order of their frames.
    is_ordered: bool = True


class Link:
    """A stream that opens by itself and ends once.

    Frames that wait when it ends were certainly never sent: they are handed to `on_end`. So are, where only
    the connection was lost, those that the worker can tell from new ones; the others failed.

    Args:
        name: Names the thread.
        find_route: Says how to reach the model; called in the link's thread, again after a failed opening;
            it is given the route that failed.
        on_end: Told once, in the link's thread, with the frames that another link may send, and the reason.
        is_shared: Whether it may be closed when idle.
        flow: What becomes of frames for which there is no room, and in which order results come.
        pause_s: How long it waits before it opens.
        resumes: What it takes the place of.
    """

    def __init__(
        self,
        name: str,
        find_route: Callable[[Route | None], Route],
        on_end: Callable[[Link, list[Call], NosError], None],
        *,
        is_shared: bool = True,
        flow: Flow | None = None,
        pause_s: float = 0.0,
        resumes: Lost | None = None,
    ) -> None:
        self._resumes = resumes
        #: What the next link should take the place of; known when it ends.
        self.lost: Lost | None = None
        self._flow = flow or Flow()
        self._pause_s = pause_s
        #: Set when it is closed, to end the pause.
        self._closed = threading.Event()
        self.name = name
        self._find_route = find_route
        self._on_end = on_end
        self.is_shared = is_shared
        self._lock = threading.Lock()
        # Everything below is read and written under the lock.
        self._session = Session()
        #: Frames that were not sent, in order.
        self._waiting: deque[Call] = deque()
        #: Of the frames that the session holds open.
        self._open: dict[int, Call] = {}
        #: Of those in `_open` that may be sent again when the connection is lost.
        self._sent: dict[int, _Sent] = {}
        self._stream: Duplex | None = None
        #: Why the link ends, where that is our own doing.
        self._reason: NosError | None = None
        self._is_over = False
        self._was_welcomed = False
        self._is_half_closed = False
        self._opened_s = self._used_s = time.monotonic()
        self._ended_s: float | None = None
        self._renew_at_s = 0.0
        #: How it goes; None until it is known.
        self.route: Route | None = None
        #: Whether the server asked its clients to go elsewhere: then nothing failed.
        self.left_in_peace = False
        #: As the server names the stream; what it and the number of a frame name is in the logs of all.
        self._stream_id = ""

    def start(self) -> None:
        """Open the stream, in a thread that lives as long as it."""
        threading.Thread(target=self._run, name=f"nos-{self.name}", daemon=True).start()

    @property
    def takes_frames(self) -> bool:
        """Whether a frame may be submitted."""
        return not (self._is_over or self._session.is_closing or self._is_half_closed)

    @property
    def was_welcomed(self) -> bool:
        """Whether the server ever accepted the stream."""
        return self._was_welcomed

    @property
    def served_s(self) -> float:
        """How long the server has accepted it, or had when it ended."""
        return (self._ended_s or time.monotonic()) - self._opened_s if self._was_welcomed else 0.0

    @property
    def num_pending(self) -> int:
        """How many frames have no end."""
        return len(self._open) + len(self._waiting)

    def submit(self, call: Call, *, will_wait: bool = False) -> bool:
        """Send the call's frame as soon as there is room; never blocks.

        Args:
            call: A call that no link has.
            will_wait: The caller keeps its arrays unchanged until the call is admitted, so that a frame
                that must wait need not be copied.

        Returns:
            False if this link takes no new frames.
        """
        with self._lock:
            if not self.takes_frames:
                return False
            call.link = self
            self._used_s = time.monotonic()
            self._waiting.append(call)
            sent = self._pump()
            if call.frame is not None and not will_wait:
                call.frame.snapshot()
            limit = self._flow.max_waiting
            num_dropped = 0 if limit is None else max(0, len(self._waiting) - limit)
            dropped = [self._waiting.popleft() for _ in range(num_dropped)]
        for it in sent:
            it.admitted()
        for it in dropped:
            it.fail(OverloadedError("the frame was dropped by the stream's policy"))
        return True

    def room(self, size: int) -> np.ndarray[Any, Any] | None:
        """Return a place for a frame's data from where it need not be copied; None if there is none."""
        with self._lock:
            return self._stream.room(size) if self._stream is not None else None

    def cancel(self, call: Call) -> None:
        """Withdraw a call's frame."""
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            for seq, it in self._open.items():
                if it is call:
                    self._say(self._session.cancel(seq))
                    break
            self._maybe_finish()
        call.admitted()

    def half_close(self) -> None:
        """Take no more frames; the link ends after the last answer."""
        with self._lock:
            self._is_half_closed = True
            self._maybe_finish()

    def close(self, error: NosError) -> None:
        """End at once: every frame without an end fails with `error`."""
        with self._lock:
            if self._reason is None:
                self._reason = error
            self._is_half_closed = True
            stream = self._stream
            unsent = list(self._waiting)
            self._waiting.clear()
        self._closed.set()
        for call in unsent:
            call.fail(error)
        if stream is not None:
            stream.cancel()

    def on_time(self, now_s: float, renew: Callable[[Link], None]) -> float | None:
        """Do what is due; return when to be called again, None for never.

        Args:
            now_s: By the monotonic clock.
            renew: Called, without the lock, when the ticket wants renewal.
        """
        with self._lock:
            if self._is_over:
                return None
            if not self._was_welcomed:
                is_probing = self.route is not None and bool(self.route.worker_address)
                if not (is_probing and now_s >= self._opened_s + PROBE_S):
                    return now_s + PROBE_S / 4
                self._reason = UnavailableError("the worker does not answer", "address")
                stream = self._stream
            elif self.is_shared and not self.num_pending and now_s >= self._used_s + IDLE_S:
                self._is_half_closed = True
                self._maybe_finish()
                return None
            elif self._renew_at_s and now_s >= self._renew_at_s:
                stream = None
                ttl_s = self.route.ticket_ttl_s if self.route else 0.0
                self._renew_at_s = now_s + max(ttl_s / 4, 1.0)
            else:
                due = [self._used_s + IDLE_S] if self.is_shared else []
                due += [self._renew_at_s] if self._renew_at_s else []
                return max(min(due), now_s + 1.0) if due else None
        if stream is not None:
            stream.cancel()
        elif self._was_welcomed:
            renew(self)
        return now_s + 1.0

    def renew(self, ticket: bytes, ttl_s: float) -> None:
        """Put a fresh ticket in place."""
        with self._lock:
            if self._is_over or not self.route or not self.route.ticket_ttl_s:
                return
            self._say(self._session.renewal(ticket))
            self._renew_at_s = time.monotonic() + ttl_s * 0.6

    def _run(self) -> None:
        route: Route | None = None
        error: NosError = StreamClosedError("the stream was closed")
        if self._pause_s:
            self._closed.wait(self._pause_s)
        for _ in range(_MAX_ATTEMPTS):
            try:
                route = self._find_route(route)
                error = self._serve(route)
            except NosError as failure:
                error = failure
            if not self._may_reopen(error):
                break
        self._finish(error)

    def _serve(self, route: Route) -> NosError:
        """Open the stream and carry it out to its end; return why it ended."""
        with self._lock:
            if self._reason is not None:
                return self._reason
            self.route = route
            self._opened_s = time.monotonic()
        stream = route.open()
        with self._lock:
            self._session = session = Session(stream.pack)
            if route.ticket_ttl_s:
                self._renew_at_s = self._opened_s + route.ticket_ttl_s * 0.6
            self._stream = stream
            features = [] if self._flow.is_ordered else [UNORDERED]
            # Calls that are made anew by whoever waits for them are not worth it.
            features += [RESUME] if route.transport is not None and not self.is_shared else []
            resumes = self._resumes.stream_id if self._resumes is not None else ""
            self._say(session.hello(__version__, features, resumes))
            if self._reason is not None:  # closed meanwhile
                stream.cancel()
        error: NosError = UnavailableError(
            "the server ended the stream", hint="Call again: a new stream is opened by itself"
        )
        try:
            for message, data in stream.messages():
                with self._lock:
                    events = session.take(message, data)
                    self._take(events)
                    ended = self._enders(events)
                    refused = self._unresumable() if self._resumes and not self._open else []
                    sent = self._pump()
                    if (receipt := stream.receipt()) is not None:
                        stream.put(receipt)
                self._deliver(ended)
                for call in refused:
                    call.fail(_forgotten())
                for call in sent:
                    call.admitted()
                if session.lost is not None:
                    stream.cancel()
                    return session.lost
        except NosError as failure:
            error = failure
        with self._lock:
            reason: NosError | None = self._reason
            if reason is None and isinstance(error, UnavailableError):
                self._take_back(route.worker)
            error = reason or error
            events = session.lose(error)
            ended = self._enders(events)
            self._stream = None
            stream.close()
        self._deliver(ended)
        return error

    def _take_back(self, worker: str) -> None:
        """Let frames that were sent wait for the link that takes the place of this one. Holds the lock."""
        unanswered = []
        for seq, sent in self._sent.items():
            call = self._open[seq]
            if not call.cancelled():
                del self._open[seq]
                self._session.take_back(seq)
                call.frame, call.resumes = sent.again(seq), self._stream_id
                unanswered.append(call)
        self._sent.clear()
        self._waiting.extendleft(reversed(unanswered))
        if unanswered:
            self.lost = Lost(self._stream_id, worker)

    def _unresumable(self) -> list[Call]:
        """Take out the calls that this server would run again, not knowing them. Holds the lock."""
        if self._session.can_resume or not self._session.is_welcomed:
            return []
        found = [call for call in self._waiting if call.resumes]
        self._waiting = deque(call for call in self._waiting if not call.resumes)
        return found

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Welcomed):
                self._was_welcomed = True
                self._stream_id = event.stream_id
                _logger.debug("stream %s to %s goes %s", event.stream_id, self.name, self.route)
            elif isinstance(event, Leaving):
                self._is_half_closed = True
                self.left_in_peace = True
        self._maybe_finish()

    def _enders(self, events: list[Event]) -> list[tuple[Call, Item | Done | Failed]]:
        """Return the calls that `events` are about; forget those that ended."""
        told: list[tuple[Call, Item | Done | Failed]] = []
        for event in events:
            if isinstance(event, Item):
                told.append((self._open[event.seq], event))
                self._sent.pop(event.seq, None)  # what came of it cannot be taken back
            elif isinstance(event, Done | Failed):
                told.append((self._open.pop(event.seq), event))
                self._sent.pop(event.seq, None)
                if _logger.isEnabledFor(logging.DEBUG):
                    self._log_end(event)
        if told:
            self._used_s = time.monotonic()
            self._maybe_finish()
        return told

    def _log_end(self, event: Done | Failed) -> None:
        name = f"{self._stream_id}/{event.seq}"
        if isinstance(event, Failed):
            _logger.debug("frame %s ends: %s", name, type(event.error).__name__)
        else:
            _logger.debug("frame %s ends: %.6f s at the server", name, event.timings.server_s)

    @staticmethod
    def _deliver(told: list[tuple[Call, Item | Done | Failed]]) -> None:
        for call, event in told:
            if isinstance(event, Item):
                call.item(event.value)
            elif isinstance(event, Done):
                call.finish(event.value, event.timings)
            else:
                call.fail(event.error)

    def _pump(self) -> list[Call]:
        """Send what there is room for; return the calls that were sent. Holds the lock."""
        sent = []
        while self._waiting:
            call = self._waiting[0]
            frame = call.frame
            if frame is None or call.cancelled():
                self._waiting.popleft()
                continue
            is_full = self._flow.max_open is not None and len(self._open) >= self._flow.max_open
            if is_full or not self._session.has_room(frame.payload.size):
                break
            self._waiting.popleft()
            seq, messages = self._session.send(frame)
            self._open[seq] = call
            is_small = frame.payload.size <= RESUMABLE_BYTES
            if self._session.can_resume and is_small and not call.resumes:
                self._sent[seq] = _Sent(frame.header, messages)
            call.frame = None
            if _logger.isEnabledFor(logging.DEBUG):
                size = frame.payload.size
                _logger.debug("frame %s/%d is sent: %d bytes", self._stream_id, seq, size)
            if self._stream is not None:
                for message in messages:
                    self._stream.put(message)
            sent.append(call)
        return sent

    def _maybe_finish(self) -> None:
        """Half-close the stream once nothing will follow. Holds the lock."""
        if (
            self._is_half_closed
            and not self._open
            and (not self._waiting or self._session.is_closing)
        ):
            self._session.close()
            if self._stream is not None:
                self._stream.put(None)

    def _say(self, message: bytes | None) -> None:
        """Send a message about the stream. Holds the lock."""
        if message is not None and self._stream is not None:
            self._stream.put(self._stream.wrap(message))

    def _may_reopen(self, error: NosError) -> bool:
        with self._lock:
            if self._was_welcomed or isinstance(self._reason, StreamClosedError):
                return False
            self._reason = None
            is_direct = self.route is not None and bool(self.route.worker_address)
            return error.retryable or (is_direct and isinstance(error, UnauthenticatedError))

    def _finish(self, error: NosError) -> None:
        with self._lock:
            self._is_over = True
            self._ended_s = time.monotonic()
            self._stream = None
            error = self._reason or error
            if not self._was_welcomed:
                self.lost = self._resumes
            left = self.lost.stream_id if self.lost is not None else ""
            waiting = [call for call in self._waiting if call.resumes in {"", left}]
            forgotten = [call for call in self._waiting if call.resumes not in {"", left}]
            self._waiting.clear()
        for call in forgotten:
            call.fail(_forgotten())
        self._on_end(self, waiting, error)
