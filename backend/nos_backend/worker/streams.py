"""One inference stream: frames in, results out in their order, exactly one end for each frame.

Memory of a stream is bounded by its window: a frame counts until its last message is handed to the
transport, which takes no more than it can send. A reader of generator items that stops reading stops
the generator, since an executor waits when its items are not released.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nos.errors import (
    CancelledError,
    InvalidRequestError,
    LimitExceededError,
    NosError,
    UnauthenticatedError,
    UnavailableError,
    VersionMismatchError,
)
from nos.wire import frames
from nos.wire.limits import PROTOCOL_VERSION, RESUME, UNORDERED
from nos.wire.signature import find_method
from nos.wire.status import to_message
from nos.wire.v1 import inference_pb2, values_pb2

from nos_backend.worker.access import authorize, unexpected
from nos_backend.worker.arguments import Call, check_arguments, from_node
from nos_backend.worker.dispatch import Request, failure
from nos_backend.worker.replies import NO_BYTES, Reply
from nos_backend.worker.resuming import Remains

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos.wire.v1 import access_pb2, models_pb2

    from nos_backend.worker.access import Access
    from nos_backend.worker.inputs import Input
    from nos_backend.worker.manager import ModelManager
    from nos_backend.worker.pipes import Pipe
    from nos_backend.worker.resuming import Last

T = TypeVar("T")

_logger = logging.getLogger(__name__)

WINDOW_FRAMES: Final = 16
WINDOW_BYTES: Final = 64 << 20
HEARTBEAT_S: Final = 5.0
#: How long a stream outlives its ticket: a renewal may be on its way, and clocks differ.
_EXPIRY_GRACE_S: Final = 1.0
#: What is remembered of frames and results, so that those like them need not be taken apart again: so many,
#: each of at most so many bytes.
_MAX_FORMS: Final = 32
_MAX_FORM_BYTES: Final = 512
#: The write under way may take so long when a stream is cut.
_LAST_WRITE_S: Final = 1.0
#: Frames over the window still get their error each; beyond this many nothing more is read.
_CLOGGED_FRAMES: Final = 4 * WINDOW_FRAMES


_senders = itertools.count(1)


@dataclass(frozen=True, slots=True)
class _Form:
    """What frames say whose headers differ in nothing but their number; as `nos.v1.Frame`, and checked."""

    data_bytes: int
    timeout_s: float
    is_bulk: bool
    call: Call


@dataclass(slots=True, eq=False)
class _Frame:
    """A frame without its end."""

    seq: int
    #: Bytes in all; counted towards the window.
    size: int = 0
    filled: int = 0
    call: Call | None = None
    #: Whether the call is that of other frames as well.
    recurs: bool = False
    is_bulk: bool = False
    input: Input | None = None
    deadline_s: float | None = None
    #: Set once it was submitted.
    request: Request | None = None
    #: What came and was not written yet; the last one is terminal if `is_ended`.
    replies: deque[Reply] = field(default_factory=deque)
    is_ended: bool = False
    #: It runs although the stream is lost.
    runs_on: bool = False
    #: Its end is that of a frame of the stream before.
    is_resumed: bool = False


class Stream:
    """Serves one stream. Belongs to one event loop."""

    def __init__(
        self,
        manager: ModelManager,
        access: Access,
        verify: Callable[[bytes], access_pb2.Ticket],
        spec: models_pb2.ModelSpec,
        owner: str,
        inherit: Callable[[str, Remains], Remains | None],
    ) -> None:
        """Make a stream.

        Args:
            manager: Runs its frames.
            access: Opens its model.
            verify: As for `DataPlane`.
            spec: Interface of the model.
            owner: Of the model.
            inherit: Returns what the stream of that name left behind, once, to another of the same tenant
                and model; ends it if it is not over.
        """
        self._inherit = inherit
        self._manager = manager
        self._access = access
        self._verify = verify
        self._model = access.model
        self._spec = spec
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._id = secrets.token_hex(8)
        #: What is left when the connection is lost; None where the client wants none of it.
        self.remains: Remains | None = None
        #: What the stream left that this one takes the place of.
        self._inherited: Remains | None = None
        self._sender = next(_senders)
        #: Frames without an end, in order.
        self._frames: dict[int, _Frame] = {}
        self._open_bytes = 0
        self._last_seq = 0
        #: Whether results are written in the order of their frames.
        self._is_ordered = True
        self._num_ended = 0
        #: By their messages without number and data.
        self._forms: dict[bytes, _Form] = {}
        #: Serialized values of results, by the node that they were made of.
        self._values: dict[bytes, bytes] = {}
        #: Messages about the stream itself; written before results.
        self._control: deque[inference_pb2.StreamResponse] = deque()
        #: Something may be there to write.
        self._wake = asyncio.Event()
        #: Frames may be read.
        self._flowing = asyncio.Event()
        self._flowing.set()
        #: Resolves with why the stream is cut.
        self._cut: asyncio.Future[NosError] = self._loop.create_future()
        #: The client sends nothing more.
        self._is_half_closed = False
        #: Set when the server leaves: the stream ends with this once the client has half-closed.
        self._leaving: NosError | None = None
        #: Whether it ends without that, as soon as no frame is open.
        self._is_overdue = False
        self._is_closed = False
        #: The task that writes is at it; it does nothing else while the transport takes all at once.
        self._is_writing = False
        self._is_flush_due = False
        self._pipe: Pipe | None = None
        #: The client took nothing between the last two beats although something was there for it.
        self._was_stalled = False
        self._heartbeat: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._grace: asyncio.TimerHandle | None = None
        #: Resolves when it is over.
        self.ended: asyncio.Future[None] = self._loop.create_future()

    @property
    def model(self) -> str:
        """The model version that it runs."""
        return self._model

    @property
    def id(self) -> str:
        """Names it."""
        return self._id

    @property
    def tenant(self) -> str:
        """For whom it runs."""
        return str(self._access.ticket.tenant)

    @property
    def token_id(self) -> str:
        """The token that its ticket came from."""
        return self._access.ticket.token_id

    async def serve(self, pipe: Pipe) -> NosError | None:
        """Serve until the client has half-closed and has all its ends, or until the stream is cut.

        Cancelled when the connection is lost; `remains` are for the stream that takes its place then.

        Returns:
            Why it was cut; None if it ended well.
        """
        _logger.info(
            "stream %s opens: %s for %s", self._id, self._model, self._access.ticket.tenant
        )
        self._pipe = pipe
        reader = asyncio.create_task(self._read(pipe), name=f"read {self._id}")
        writer = asyncio.create_task(self._write(pipe), name=f"write {self._id}")
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat, pipe, 0)
        self._check_ticket()
        either: set[asyncio.Future[Any]] = {writer, self._cut}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._cut.done():
                return self._cut.result()
            await writer
        except asyncio.CancelledError:
            self.abandon()
            raise
        else:
            return self._leaving
        finally:
            self._close()
            reader.cancel()
            if self._is_writing:
                # Cancelled in the middle of a write, gRPC never tells the client how the call ended.
                await asyncio.wait({writer}, timeout=_LAST_WRITE_S)
            writer.cancel()
            _logger.info("stream %s closes after %d frames", self._id, self._num_ended)

    def cut(self, error: NosError) -> None:
        """End the stream at once."""
        if not self._cut.done():
            self._cut.set_result(error)

    def abandon(self) -> None:
        """The connection is lost, whether it knows or not: withdraw what waits, and keep the other ends."""
        if self._is_closed:
            return
        if self.remains is not None:
            for frame in list(self._frames.values()):
                self._leave_behind(frame, self.remains)
        self._close()
        self.cut(UnavailableError("another stream took the place of this one"))

    def leave(self, grace_s: float, reason: str) -> None:
        """Tell the client to go elsewhere; frames that it sent before it heard of that are still taken.

        Args:
            grace_s: Afterwards the stream ends once no frame is open, whether it has half-closed or not.
            reason: Told to a client that stays.
        """
        self._leaving = UnavailableError(reason, hint="Resolve the model again")
        draining = inference_pb2.Draining(grace_s=grace_s)
        self._say(inference_pb2.StreamResponse(draining=draining))
        if self._grace is None:
            self._grace = self._loop.call_later(grace_s, self._run_out)

    # Reading.

    async def _read(self, pipe: Pipe) -> None:
        try:
            await pipe.read(self._receive, self._flowing)
            self._half_close()
            await pipe.leave()
        except NosError as error:
            self.cut(error)
        except Exception as error:  # noqa: BLE001 - the top level of this task
            self.cut(unexpected(error, f"reading stream {self._id}"))

    def _receive(self, header: bytes, data: memoryview) -> None:
        seq, acknowledged, rest = frames.split_seq(header)
        if acknowledged and self.remains is not None:
            self.remains.acknowledge(acknowledged)
        form = self._forms.get(rest)
        if form is not None:
            self._on_frame(seq, form, data)
            return
        message = frames.parse(inference_pb2.StreamRequest, header)
        if message.acknowledged and self.remains is not None:
            self.remains.acknowledge(message.acknowledged)
        match message.WhichOneof("event"):
            case "frame":
                self._on_frame(message.seq, message.frame, data, rest)
            case "chunk":
                self._on_chunk(message.seq, data)
            case "cancel":
                self._on_cancel(message.seq)
            case "hello":
                self._on_hello(message.hello)
            case "renewal":
                self._on_renewal(message.renewal.ticket)
            case _:  # a heartbeat, or something newer than this server
                return

    def _on_hello(self, hello: inference_pb2.Hello) -> None:
        if hello.versions and PROTOCOL_VERSION not in hello.versions:
            raise VersionMismatchError(
                "no common protocol version",
                "versions",
                str(PROTOCOL_VERSION),
                str(list(hello.versions)[:10]),
                "Install the client that fits the server",
            )
        self._is_ordered = UNORDERED not in hello.features
        features = [] if self._is_ordered else [UNORDERED]
        if RESUME in hello.features and self._pipe is not None and self._pipe.can_be_lost:
            features.append(RESUME)
            self.remains = Remains(self._model, self._access.ticket.tenant)
            if hello.resumes:
                self._inherited = self._inherit(hello.resumes, self.remains)
        welcome = inference_pb2.Welcome(
            version=PROTOCOL_VERSION,
            stream_id=self._id,
            model_version=self._spec.version,
            features=features,
            window_frames=WINDOW_FRAMES,
            window_bytes=WINDOW_BYTES,
        )
        self._say(inference_pb2.StreamResponse(welcome=welcome))

    def _on_renewal(self, raw: bytes) -> None:
        access = authorize(self._verify(raw), {})
        if access.model != self._model or access.ticket.tenant != self._access.ticket.tenant:
            raise UnauthenticatedError("the new ticket is not for this stream", "renewal")
        self._access = access

    def _on_frame(
        self, seq: int, header: inference_pb2.Frame | _Form, data: memoryview, rest: bytes = b""
    ) -> None:
        """Take a frame.

        Args:
            seq: Its number.
            header: What it says.
            data: Its bytes, or the first of them.
            rest: The message without its number and data.
        """
        if seq != self._last_seq + 1:
            raise InvalidRequestError(
                "the frame is out of order", "seq", str(self._last_seq + 1), str(seq)
            )
        self._last_seq = seq
        frame = _Frame(seq)
        try:
            self._admit(frame, header, data, rest)
        except NosError as error:
            self._refuse(frame, error)
        except Exception as error:  # noqa: BLE001 - one frame's failure is not its neighbours'
            self._refuse(frame, unexpected(error, f"taking frame {seq} of stream {self._id}"))

    def _admit(
        self, frame: _Frame, header: inference_pb2.Frame | _Form, data: memoryview, rest: bytes
    ) -> None:
        size = header.data_bytes or data.nbytes
        num_open, open_bytes = len(self._frames), self._open_bytes + size
        self._frames[frame.seq] = frame
        if len(self._frames) >= _CLOGGED_FRAMES:
            self._flowing.clear()
        if num_open >= WINDOW_FRAMES:
            raise LimitExceededError(
                "the frame is over the stream's window",
                "frames",
                f"at most {WINDOW_FRAMES} without an end",
                f"{num_open + 1}",
            )
        if num_open and open_bytes > WINDOW_BYTES:
            raise LimitExceededError(
                "the frame is over the stream's window",
                "data_bytes",
                f"at most {WINDOW_BYTES} bytes without an end",
                f"{open_bytes}",
            )
        self._manager.limits.check_frame(size)
        frame.deadline_s = deadline_of(header.timeout_s, self._loop.time())
        frame.is_bulk = header.is_bulk
        if isinstance(header, _Form):
            frame.call, frame.recurs = header.call, True
        elif not (header.resumes and self._resume(frame, header.resumes)):
            frame.call = check_arguments(self._spec, header.method, header.arguments, size)
            if header.data_bytes and 0 < len(rest) <= _MAX_FORM_BYTES and not header.resumes:
                form = _Form(size, header.timeout_s, header.is_bulk, frame.call)
                self._remember(self._forms, rest, form)
        frame.size = size
        self._open_bytes += size
        if size and frame.call is not None:
            frame.input = self._manager.allocate(self._model, size)
        self._fill(frame, data)

    def _resume(self, frame: _Frame, seq: int) -> bool:
        """Have a frame end as it did on the stream before; return False if it never ran there.

        Raises:
            UnavailableError: If that is not known.
        """
        lost = UnavailableError("the result of this frame was lost with its connection")

        def wait(last: Last | None) -> None:
            if last is None:
                self._on_reply(frame, failure(lost))
            else:
                self._on_reply(frame, Reply("resumed", last[0], memoryview(last[1])))

        if self._inherited is None:
            raise lost
        frame.is_resumed = self._inherited.claim(seq, wait)
        return frame.is_resumed

    @staticmethod
    def _remember(memory: dict[bytes, T], name: bytes, item: T) -> None:
        if len(memory) >= _MAX_FORMS:
            memory.clear()
        memory[name] = item

    def _on_chunk(self, seq: int, data: memoryview) -> None:
        if not 0 < seq <= self._last_seq:
            raise InvalidRequestError(
                "the chunk belongs to no frame", "seq", f"1 .. {self._last_seq}", str(seq)
            )
        frame = self._frames.get(seq)
        if frame is None or frame.is_ended:
            return  # the rest of a frame that was refused or cancelled
        try:
            if frame.request is not None:
                raise _too_long(frame)
            self._fill(frame, data)
        except NosError as error:
            self._refuse(frame, error)

    def _fill(self, frame: _Frame, data: memoryview) -> None:
        end = frame.filled + data.nbytes
        if end > frame.size:
            raise _too_long(frame)
        if frame.input is not None:
            frame.input.view[frame.filled : end] = data
        frame.filled = end
        if end == frame.size:
            self._submit(frame)

    def _submit(self, frame: _Frame) -> None:
        if frame.call is None:
            return
        frame.request = Request(
            model=self._model,
            method=frame.call.method,
            tenant=self._access.ticket.tenant,
            weight=self._access.weight,
            arguments=frame.call.arguments,
            sink=partial(self._on_reply, frame),
            input=frame.input,
            deadline_s=frame.deadline_s,
            # The window holds the sender back. With a deadline it would rather know at once.
            may_wait=frame.deadline_s is None,
            sender=self._sender,
            recurs=frame.recurs,
            is_bulk=frame.is_bulk,
        )
        if _logger.isEnabledFor(logging.DEBUG):
            frame.request.trace = self._trace(frame)
            _logger.debug("frame %s has arrived: %d bytes", frame.request.trace, frame.size)
        frame.call = frame.input = None
        self._manager.submit(frame.request)

    def _on_cancel(self, seq: int) -> None:
        frame = self._frames.get(seq)
        if frame is None or frame.is_ended:
            return
        if frame.request is not None:
            self._manager.cancel(frame.request.id)
        else:
            self._refuse(frame, CancelledError("cancelled by the caller"))

    def _half_close(self) -> None:
        for frame in list(self._frames.values()):
            if frame.request is None and not frame.is_ended and not frame.is_resumed:
                error = InvalidRequestError(
                    "the stream ended within the frame",
                    "data_bytes",
                    f"{frame.size} bytes",
                    f"{frame.filled}",
                )
                self._refuse(frame, error)
        self._is_half_closed = True
        self._wake.set()

    def _refuse(self, frame: _Frame, error: NosError) -> None:
        """End a frame early, whatever has become of it."""
        self._on_reply(frame, failure(error))
        if frame.request is not None:
            self._manager.cancel(frame.request.id)
        elif frame.input is not None:
            frame.input.release()
            frame.input = None

    def _on_reply(self, frame: _Frame, reply: Reply) -> None:
        if self._is_closed or frame.is_ended:
            if frame.runs_on and self.remains is not None:
                frame.runs_on = False
                self.remains.keep(*self._message(frame, reply))
            reply.release()
            return
        frame.replies.append(reply)
        frame.is_ended = reply.kind != "item"
        if self._pipe is None or self._is_writing or not self._pipe.takes_at_once:
            self._wake.set()
        elif len(self._frames) == 1 and reply.kind == "result":
            self._flush(self._pipe)
        elif not self._is_flush_due:
            # Results that come at the same time are sent as one.
            self._is_flush_due = True
            self._loop.call_soon(self._flush, self._pipe)

    # Writing.

    def _flush(self, pipe: Pipe) -> None:
        """Write what the transport takes at once; saves the task a round through the loop."""
        self._is_flush_due = False
        try:
            while pipe.takes_at_once and not (self._is_writing or self._is_closed or self._control):
                if (frame := self._head()) is None:
                    break
                reply = frame.replies.popleft()
                try:
                    pipe.write_at_once(*self._message(frame, reply))
                finally:
                    reply.release()
            pipe.flush()
        except Exception as error:  # noqa: BLE001 - the top level of this callback
            self.cut(unexpected(error, f"writing stream {self._id}"))
        if self._control or self._head() is not None or self._is_half_closed or self._leaving:
            self._wake.set()

    async def _write(self, pipe: Pipe) -> None:
        try:
            while not self._is_closed:
                self._is_writing = True
                if self._control:
                    message = self._control.popleft()
                    await pipe.write(message.seq, message.SerializeToString(), NO_BYTES)
                elif (frame := self._head()) is not None:
                    reply = frame.replies.popleft()
                    try:
                        await self._put(pipe, frame, reply)
                    finally:
                        reply.release()
                elif self._frames or not (self._is_half_closed or self._is_overdue):
                    self._is_writing = False
                    self._wake.clear()
                    await self._wake.wait()
                else:
                    return
        except Exception as error:  # noqa: BLE001 - the top level of this task
            self.cut(unexpected(error, f"writing stream {self._id}"))

    async def _put(self, pipe: Pipe, frame: _Frame, reply: Reply) -> None:
        """Write one reply, and keep it where it may have to be written again."""
        message = self._message(frame, reply)
        messages = None
        if self.remains is not None:
            if reply.kind == "item":
                self.remains.forget(frame.seq)
            else:
                messages = self.remains.keep(*message)
        if messages is None:
            await pipe.write(*message)
        else:
            await pipe.write_whole(messages)

    def _leave_behind(self, frame: _Frame, remains: Remains) -> None:
        """Decide what becomes of a frame whose client is out of reach."""
        request, last = frame.request, frame.replies[-1] if frame.replies else None
        if frame.is_ended and last is not None:
            if len(frame.replies) == 1:
                remains.keep(*self._message(frame, last))
            else:
                remains.forget(frame.seq)
        elif request is not None and request.granted_s:
            if find_method(self._spec, request.method).is_generator:
                remains.forget(frame.seq)
            else:
                frame.runs_on = True
                remains.runs_on(frame.seq)

    def _head(self) -> _Frame | None:
        """Return an open frame that has something to write; in order only the first may."""
        if not self._is_ordered:
            return next((frame for frame in self._frames.values() if frame.replies), None)
        frame = next(iter(self._frames.values()), None)
        return frame if frame is not None and frame.replies else None

    def _message(self, frame: _Frame, reply: Reply) -> tuple[int, bytes, memoryview]:
        """Return one reply's number, header and data; a frame that ends with it has ended.

        The client may send the next frame as soon as it sees the last of it.
        """
        seq = frame.seq
        if reply.kind != "item" and self._frames.pop(seq, None) is not None:
            self._open_bytes -= frame.size
            self._num_ended += 1
            if len(self._frames) < _CLOGGED_FRAMES:
                self._flowing.set()
            if _logger.isEnabledFor(logging.DEBUG):
                self._log_end(frame, reply)
        if reply.kind == "resumed":
            return seq, frames.renumbered(seq, reply.node), reply.block
        error = reply.error
        if error is None:
            try:
                return seq, self._result_header(frame, reply), reply.block
            except NosError as malformed:
                error = malformed
        visible = self._access.visible(error, self._owner)
        failed = inference_pb2.StreamResponse(seq=seq, error=to_message(visible))
        return seq, failed.SerializeToString(), NO_BYTES

    def _trace(self, frame: _Frame) -> str:
        return f"{self._id}/{frame.seq}"

    def _log_end(self, frame: _Frame, reply: Reply) -> None:
        if frame.is_resumed:
            _logger.debug("frame %s ends as it did on the stream before", self._trace(frame))
            return
        if reply.error is not None or frame.request is None:
            _logger.debug("frame %s ends: %s", self._trace(frame), type(reply.error).__name__)
            return
        names = ("queue", "batch wait", "compute", "server")
        times_s = timings_of(frame.request, reply, self._loop.time())
        parts = ", ".join(f"{name} {s:.6f} s" for name, s in zip(names, times_s, strict=False))
        _logger.debug("frame %s ends: %s", self._trace(frame), parts)

    def _result_header(self, frame: _Frame, reply: Reply) -> bytes:
        value = self._values.get(reply.raw_node) if reply.raw_node else None
        if value is None:
            target = values_pb2.Value()
            if reply.kind != "end":
                from_node(reply.node, target)
            value = target.SerializeToString()
            if reply.raw_node:
                self._remember(self._values, reply.raw_node, value)
        if reply.kind == "result" and frame.request is not None:
            timings = timings_of(frame.request, reply, self._loop.time())
            return frames.result_header(frame.seq, value, timings, reply.block.nbytes)
        head = inference_pb2.StreamResponse(seq=frame.seq)
        head.result.more = reply.kind == "item"
        if reply.kind == "item":
            head.result.value.MergeFromString(value)
        elif frame.request is not None:
            set_timings(head.result.timings, frame.request, reply, self._loop.time())
        head.result.data_bytes = reply.block.nbytes
        return head.SerializeToString()

    def _say(self, message: inference_pb2.StreamResponse) -> None:
        self._control.append(message)
        self._wake.set()

    # Time, and the end.

    def _beat(self, pipe: Pipe, num_written: int) -> None:
        """Show that the server lives, and see whether the client does.

        Args:
            pipe: The stream's.
            num_written: How many messages it had written at the last beat.
        """
        is_silent = pipe.num_written == num_written
        if is_silent and not self._is_writing:
            self._say(inference_pb2.StreamResponse(heartbeat=inference_pb2.Heartbeat()))
        is_stalled = is_silent and self._is_writing
        if is_stalled and self._was_stalled:
            self.cut(UnavailableError("the client does not read its results"))
        elif pipe.is_frozen():
            self.cut(UnavailableError("the client is stopped"))
        self._was_stalled = is_stalled
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat, pipe, pipe.num_written)

    def _check_ticket(self) -> None:
        left_s = self._access.ticket.expires_s + _EXPIRY_GRACE_S - time.time()
        if left_s <= 0:
            self.cut(
                UnauthenticatedError(
                    "the ticket of this stream expired", "renewal", hint="Resolve the model again"
                )
            )
        else:
            self._expiry = self._loop.call_later(left_s, self._check_ticket)

    def _run_out(self) -> None:
        self._is_overdue = True
        self._wake.set()

    def _close(self) -> None:
        """Withdraw everything that has no end; nobody reads any more."""
        if self._is_closed:
            return
        self._is_closed = True
        for timer in (self._heartbeat, self._expiry, self._grace):
            if timer is not None:
                timer.cancel()
        for frame in self._frames.values():
            if frame.request is not None and not frame.runs_on:
                self._manager.cancel(frame.request.id)
            elif frame.input is not None:
                frame.input.release()
            for reply in frame.replies:
                reply.release()
        self._frames.clear()
        self.ended.set_result(None)


def deadline_of(timeout_s: float, now_s: float) -> float | None:
    """Return when a call's answer is worth nothing any more; 0 means never.

    Raises:
        InvalidRequestError: If it is negative or not a number.
    """
    if math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidRequestError("not a time to wait", "timeout_s", "seconds >= 0", str(timeout_s))
    return now_s + timeout_s if timeout_s else None


def timings_of(request: Request, reply: Reply, now_s: float) -> frames.Timings:
    """Return where the time of an answered request went."""
    queue_s = max(0.0, request.granted_s - request.arrived_s - request.batch_wait_s)
    server_s = now_s - request.arrived_s
    return queue_s, request.batch_wait_s, reply.compute_s, server_s, reply.batch_size


def set_timings(
    target: inference_pb2.Timings, request: Request, reply: Reply, now_s: float
) -> None:
    """Write where the time of an answered request went."""
    (
        target.queue_s,
        target.batch_wait_s,
        target.compute_s,
        target.server_s,
        target.batch_size,
    ) = timings_of(request, reply, now_s)


def _too_long(frame: _Frame) -> InvalidRequestError:
    return InvalidRequestError(
        "the frame has more bytes than it said", "data_bytes", f"{frame.size} bytes"
    )
