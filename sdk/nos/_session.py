"""The state of one inference stream, seen from the client; no I/O, no threads, no clock.

A shell (`nos._link`) hands in what the user wants and the messages that arrive, and carries out what
comes back: bytes to send, and events for whoever waits. Not thread-safe: the shell holds a lock.

Invariants, whatever arrives:

* Sequence numbers of sent frames are 1, 2, 3, ... without a gap.
* No frame is sent before the server's `Welcome`, so a stream that is lost before it has delivered nothing.
* At most `window_frames` frames and `window_bytes` bytes are without an end; one larger frame goes alone.
* Every sent frame gets exactly one `Done` or `Failed`, if only when the stream is lost, but those taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from nos.errors import InternalError, NosError, OverloadedError, VersionMismatchError
from nos.types import Timings
from nos.wire import frames, status, values
from nos.wire.limits import FRAME_BYTES, PROTOCOL_VERSION, RESUME
from nos.wire.v1 import inference_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Pack: TypeAlias = "Callable[[int, bytes, Sequence[frames.Buffer], int], Iterable[bytes]]"

#: For a server that leaves its window open.
_DEFAULT_WINDOW_FRAMES: Final = 16
_DEFAULT_WINDOW_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The server accepted the stream; frames may be sent from now on."""

    stream_id: str
    model_version: int


@dataclass(frozen=True, slots=True)
class Item:
    """A generator yielded; the frame goes on."""

    seq: int
    value: Any


@dataclass(frozen=True, slots=True)
class Done:
    """A frame ended well."""

    seq: int
    value: Any
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """A frame ended in an error."""

    seq: int
    error: NosError


@dataclass(frozen=True, slots=True)
class Leaving:
    """The server wants no new frames here; those that were sent are still answered."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream is over; every open frame has had its `Failed` before this."""

    error: NosError


Event: TypeAlias = Welcomed | Item | Done | Failed | Leaving | Lost


@dataclass(slots=True)
class Outgoing:
    """A frame that has not been sent; its bytes may still be the caller's memory."""

    #: The serialized `nos.v1.Frame`.
    header: bytes
    payload: values.Payload

    def snapshot(self) -> None:
        """Copy the bytes, so that the caller may change its arrays from now on."""
        if self.payload.size:
            self.payload.buffers = [b"".join(self.payload.buffers)]


class _Assembly:
    """A result whose bytes are still arriving."""

    __slots__ = ("data", "filled", "result")

    def __init__(self, result: inference_pb2.Result) -> None:
        self.result = result
        #: Becomes the memory of the result's arrays.
        self.data = bytearray(result.data_bytes)
        #: Bytes of `data` that have arrived; never more than `len(data)`.
        self.filled = 0

    def add(self, piece: memoryview) -> bool:
        """Take the next bytes; return whether all are there."""
        end = self.filled + piece.nbytes
        if end > len(self.data):
            raise InternalError(
                "the server sent more bytes than it announced",
                expected=f"{len(self.data)} bytes",
                got=f"at least {end}",
            )
        self.data[self.filled : end] = piece
        self.filled = end
        return end == len(self.data)


def broken(error: NosError) -> InternalError:
    """Return what a stream ends with whose server sent nonsense."""
    return InternalError(
        "the server broke the stream's protocol", got=str(error), error_id=error.error_id
    )


class Session:
    """What is in flight on one stream.

    Args:
        pack: Makes the messages of a frame, as `nos.wire.frames.pack`, in the form that the stream wants.
    """

    def __init__(self, pack: Pack = frames.pack) -> None:
        self._pack = pack
        #: Set by `Welcome`; before it nothing fits.
        self.is_welcomed = False
        #: Whether the server keeps the ends of frames until they are acknowledged.
        self.can_resume = False
        #: The server asked for no new frames, or the client said that none will come.
        self.is_closing = False
        #: Set once; nothing changes afterwards.
        self.lost: NosError | None = None
        self.window_frames = 0
        self.window_bytes = 0
        #: Sum of the sizes in `_open`.
        self.open_bytes = 0
        #: Sequence number -> bytes of each frame without an end.
        self._open: dict[int, int] = {}
        #: Only of open frames.
        self._assemblies: dict[int, _Assembly] = {}
        self._last_seq = 0

    @property
    def num_open(self) -> int:
        """How many frames have no end yet."""
        return len(self._open)

    def hello(self, client_version: str, features: Sequence[str] = (), resumes: str = "") -> bytes:
        """Return the stream's first message; `resumes` names the one that it takes the place of."""
        hello = inference_pb2.Hello(
            versions=[PROTOCOL_VERSION],
            features=features,
            client_version=client_version,
            resumes=resumes,
        )
        return inference_pb2.StreamRequest(hello=hello).SerializeToString()

    def has_room(self, size: int) -> bool:
        """Return whether a frame of `size` bytes may be sent now."""
        if not self.is_welcomed or self.is_closing or self.lost is not None:
            return False
        if not self._open:
            return True
        return len(self._open) < self.window_frames and self.open_bytes + size <= self.window_bytes

    def send(self, frame: Outgoing) -> tuple[int, list[bytes]]:
        """Open a frame for which there is room.

        Returns:
            Its sequence number, and its messages: to be sent in this order, before any of a later frame.
        """
        self._last_seq += 1
        seq = self._last_seq
        size = frame.payload.size
        acknowledged = next(iter(self._open), seq) - 1 if self.can_resume else 0
        self._open[seq] = size
        self.open_bytes += size
        header = frames.request_header(seq, frame.header, acknowledged)
        return seq, list(self._pack(seq, header, frame.payload.buffers, size))

    def cancel(self, seq: int) -> bytes | None:
        """Return the message that withdraws a frame, or None if it has ended.

        The frame stays open until the server says how it ended.
        """
        if seq not in self._open or self.lost is not None:
            return None
        message = inference_pb2.StreamRequest(seq=seq, cancel=inference_pb2.Cancel())
        return message.SerializeToString()

    def take_back(self, seq: int) -> None:
        """Forget an open frame, which goes to another stream when this one is lost."""
        self.open_bytes -= self._open.pop(seq)
        self._assemblies.pop(seq, None)

    def renewal(self, ticket: bytes) -> bytes:
        """Return the message that puts a fresh ticket in place."""
        renewal = inference_pb2.Renewal(ticket=ticket)
        return inference_pb2.StreamRequest(renewal=renewal).SerializeToString()

    def close(self) -> None:
        """Say that no frame will follow; those that are open are still answered."""
        self.is_closing = True

    def lose(self, error: NosError) -> list[Event]:
        """End every open frame with `error`; idempotent."""
        if self.lost is not None:
            return []
        self.lost = error
        events: list[Event] = [Failed(seq, error) for seq in self._open]
        self._open.clear()
        self._assemblies.clear()
        self.open_bytes = 0
        return [*events, Lost(error)]

    def receive(self, raw: bytes) -> list[Event]:
        """Take a message of the server.

        A message that breaks the protocol loses the stream. One about a frame that has ended is ignored.
        """
        if self.lost is not None:
            return []
        try:
            message, data = frames.split(inference_pb2.StreamResponse, raw)
        except NosError as error:
            return self.lose(broken(error))
        return self.take(message, data)

    def take(self, message: inference_pb2.StreamResponse, data: memoryview) -> list[Event]:
        """Take a message of the server that was split from its data; as `receive`.

        What is kept of the data is copied before this returns, but where it may be written: then it is the
        result's memory.
        """
        if self.lost is not None:
            return []
        try:
            return self._dispatch(message, data)
        except NosError as error:
            return self.lose(broken(error))

    def _dispatch(self, message: inference_pb2.StreamResponse, data: memoryview) -> list[Event]:
        match message.WhichOneof("event"):
            case "result":
                return self._on_result(message.seq, message.result, data)
            case "chunk":
                return self._on_chunk(message.seq, data)
            case "error":
                error = status.from_message(message.error)
                return self._end(Failed(message.seq, error)) if message.seq else self.lose(error)
            case "welcome":
                return self._on_welcome(message.welcome)
            case "credit":
                self.window_frames += message.credit.frames
                self.window_bytes += message.credit.bytes
            case "dropped":
                return self._on_dropped(message.seq, message.dropped.count)
            case "draining":
                self.is_closing = True
                return [Leaving(message.draining.grace_s)]
            case _:  # a heartbeat, or news from a newer server that we can live without
                pass
        return []

    def _on_welcome(self, welcome: inference_pb2.Welcome) -> list[Event]:
        if welcome.version != PROTOCOL_VERSION:
            error = VersionMismatchError(
                "client and server speak different protocols",
                "version",
                str(PROTOCOL_VERSION),
                str(welcome.version),
                "Install the same version of nos-inference on both sides",
            )
            return self.lose(error)
        self.is_welcomed = True
        self.can_resume = RESUME in welcome.features
        self.window_frames += welcome.window_frames or _DEFAULT_WINDOW_FRAMES
        self.window_bytes += welcome.window_bytes or _DEFAULT_WINDOW_BYTES
        return [Welcomed(welcome.stream_id, welcome.model_version)]

    def _on_result(self, seq: int, result: inference_pb2.Result, data: memoryview) -> list[Event]:
        if seq not in self._open:
            return []
        if result.data_bytes > data.nbytes:
            if result.data_bytes > FRAME_BYTES:
                raise InternalError(
                    "the result is too large", "", f"{FRAME_BYTES} bytes", str(result.data_bytes)
                )
            assembly = self._assemblies[seq] = _Assembly(result)
            assembly.add(data)
            return []
        return self._deliver(seq, result, data)

    def _on_chunk(self, seq: int, data: memoryview) -> list[Event]:
        assembly = self._assemblies.get(seq)
        if assembly is None:
            return []
        if not assembly.add(data):
            return []
        del self._assemblies[seq]
        # The bytes were copied into memory of their own on arrival.
        return self._deliver(seq, assembly.result, memoryview(assembly.data))

    def _deliver(self, seq: int, result: inference_pb2.Result, data: memoryview) -> list[Event]:
        values.check(result.value, data.nbytes, "result")
        value = values.read(result.value, data, copy=data.readonly)
        if result.more:
            return [Item(seq, value)]
        timings = Timings(
            queue_s=result.timings.queue_s,
            batch_wait_s=result.timings.batch_wait_s,
            compute_s=result.timings.compute_s,
            server_s=result.timings.server_s,
            batch_size=result.timings.batch_size or 1,
        )
        return self._end(Done(seq, value, timings))

    def _on_dropped(self, last_seq: int, count: int) -> list[Event]:
        error = OverloadedError("the server dropped the frame by the stream's policy")
        oldest = sorted(seq for seq in self._open if seq <= last_seq)[:count]
        return [event for seq in oldest for event in self._end(Failed(seq, error))]

    def _end(self, event: Done | Failed) -> list[Event]:
        size = self._open.pop(event.seq, None)
        if size is None:
            return []
        self.open_bytes -= size
        self._assemblies.pop(event.seq, None)
        return [event]
