"""Connections: bytes of messages out, bytes of messages in, and every failure a `NosError`."""

from __future__ import annotations

import queue
import socket
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import grpc

from nos import _fork, _tls
from nos._session import broken
from nos.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    NosError,
    StreamClosedError,
    UnavailableError,
)
from nos.wire import frames, values
from nos.wire.limits import ERROR_KEY
from nos.wire.options import CHANNEL_OPTIONS
from nos.wire.status import from_status
from nos.wire.v1 import inference_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

#: A server on this machine or in this cluster accepts a connection at once, or is not there.
CONNECT_TIMEOUT_S: Final = 2.0

START_HINT: Final = (
    "Start one with `nos serve` in a terminal or nos.start() here, "
    "or name another by nos.connect(address) or NOS_ADDRESS"
)


class StreamCall(Protocol):
    """A running RPC that gives messages until it ends."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield messages; may be used from one thread, once.

        Raises:
            NosError: As what the RPC ended, if not well.
        """

    def cancel(self) -> None:
        """End it soon; from any thread; idempotent."""


class Transport(Protocol):
    """A connection to one server, usable from any thread."""

    def unary(
        self, path: str, request: bytes, metadata: Metadata, timeout_s: float | None
    ) -> Future[bytes]:
        """Start a call with one answer; its failures are `NosError`."""

    def stream(
        self,
        path: str,
        requests: Iterator[bytes],
        metadata: Metadata,
        timeout_s: float | None = None,
    ) -> StreamCall:
        """Start a call that sends `requests`, pulled from another thread, until they end."""

    def close(self) -> None:
        """End all its calls."""


class Duplex(Protocol):
    """A running stream of inference: how its messages are made, sent and received."""

    def pack(
        self, seq: int, header: bytes, buffers: Sequence[frames.Buffer], size: int
    ) -> list[bytes]:
        """Return frame `seq` as what `put` takes, in order; the data is copied by then."""

    def room(self, size: int) -> np.ndarray[Any, Any] | None:
        """Return a place for a frame's data from which `pack` need not copy it; None if there is none."""

    def wrap(self, message: bytes) -> bytes:
        """Return a message without data as what `put` takes."""

    def put(self, message: bytes | None) -> None:
        """Send soon, in the order of the calls; None says that nothing will follow. Never blocks."""

    def messages(self) -> Iterator[tuple[inference_pb2.StreamResponse, memoryview]]:
        """Yield messages, each with its data; from one thread, once.

        Data that is writable is the receiver's; what is not is valid until the next message.

        Raises:
            NosError: As what the stream ended, if not well.
        """

    def receipt(self) -> bytes | None:
        """Return what to `put` after a message was read, if anything."""

    def cancel(self) -> None:
        """End it soon; from any thread; idempotent."""

    def close(self) -> None:
        """Let go of everything, once `messages` ended; nothing may be packed any more."""


class RpcStream:
    """A stream over a `Transport`."""

    def __init__(self, transport: Transport, path: str, metadata: Metadata) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = transport.stream(path, iter(self._outbox.get, None), metadata)
        self.put = self._outbox.put

    def pack(
        self, seq: int, header: bytes, buffers: Sequence[frames.Buffer], size: int
    ) -> list[bytes]:
        """See `Duplex`."""
        return list(frames.pack(seq, header, buffers, size))

    def room(self, size: int) -> np.ndarray[Any, Any] | None:
        """See `Duplex`."""
        return None

    def wrap(self, message: bytes) -> bytes:
        """See `Duplex`."""
        return message

    def messages(self) -> Iterator[tuple[inference_pb2.StreamResponse, memoryview]]:
        """See `Duplex`."""
        try:
            for raw in self._call:
                message, data = frames.split(inference_pb2.StreamResponse, raw)
                yield message, values.adopt(data)
        except InvalidRequestError as error:
            raise broken(error) from error
        finally:
            self.put(None)

    def receipt(self) -> bytes | None:
        """See `Duplex`."""
        return None

    def cancel(self) -> None:
        """See `Duplex`."""
        self._call.cancel()

    def close(self) -> None:
        """See `Duplex`."""


def open_transport(address: str, ca_certificate: bytes = b"") -> Transport:
    """Return a connection to `address` (`host:port` or `unix:path`); it connects with its first call."""
    if _fork.is_tainted():
        from nos import _bridge  # only forked children need it

        return _bridge.BridgeTransport(address, ca_certificate)
    return GrpcTransport(address, ca_certificate)


class GrpcTransport:
    """gRPC's synchronous stack; its threads are its own."""

    def __init__(self, address: str, ca_certificate: bytes = b"") -> None:
        _fork.note_use()
        self._address = address
        options: Sequence[tuple[str, Any]] = (
            *CHANNEL_OPTIONS,
            ("grpc.use_local_subchannel_pool", 1),
        )
        if ca_certificate:
            if name := _tls.name_of(ca_certificate):
                options = (*options, ("grpc.ssl_target_name_override", name))
            credentials = grpc.ssl_channel_credentials(ca_certificate)
            self._channel = grpc.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._lock = threading.Lock()
        #: Making a stub takes longer than calling one.
        self._unary_stubs: dict[str, Any] = {}

    def unary(
        self, path: str, request: bytes, metadata: Metadata, timeout_s: float | None
    ) -> Future[bytes]:
        """See `Transport`."""
        with self._lock:
            stub = self._unary_stubs.get(path)
            if stub is None:
                stub = self._unary_stubs[path] = self._channel.unary_unary(path)
        answer: Future[bytes] = Future()
        try:
            call = stub.future(request, timeout=timeout_s, metadata=metadata)
        except ValueError as error:  # what grpc raises for a closed channel
            raise StreamClosedError("the client is closed") from error

        def on_done(call: Any) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            if call.cancelled():
                answer.set_exception(CancelledError("the call was cancelled"))
            elif call.code() is grpc.StatusCode.OK:
                answer.set_result(call.result())
            else:
                answer.set_exception(to_error(call, self._address))

        call.add_done_callback(on_done)
        answer.add_done_callback(lambda it: call.cancel() if it.cancelled() else None)
        return answer

    def stream(
        self,
        path: str,
        requests: Iterator[bytes],
        metadata: Metadata,
        timeout_s: float | None = None,
    ) -> StreamCall:
        """See `Transport`."""
        try:
            stub: Any = self._channel.stream_stream(path)
            call = stub(requests, timeout=timeout_s, metadata=metadata)
        except ValueError as error:
            raise StreamClosedError("the client is closed") from error
        return _GrpcStreamCall(call, self._address)

    def close(self) -> None:
        """See `Transport`."""
        self._channel.close()


class _GrpcStreamCall:
    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise to_error(error, self._address) from error

    def cancel(self) -> None:
        self._call.cancel()


def to_error(call: Any, address: str) -> NosError:
    """Return what a failed RPC means, with the address in it where the text of gRPC is of no help."""
    code, details, metadata = call.code(), call.details() or "", call.trailing_metadata() or ()
    has_detail = any(key == ERROR_KEY for key, _ in metadata)
    if code is grpc.StatusCode.UNAVAILABLE and not has_detail:
        if "connect" in details.lower() and "reset" not in details.lower():
            return nobody_listens(address)
        return UnavailableError(
            f"the connection to {address} broke",
            "address",
            hint="See whether the server still runs, with `nos status`",
        )
    if code is grpc.StatusCode.CANCELLED and not has_detail:
        return CancelledError("the call was cancelled")
    return from_status(code, details, metadata)


def nobody_listens(address: str) -> UnavailableError:
    """Return the error for an address where no server is."""
    return UnavailableError(f"no server listens on {address}", "address", hint=START_HINT)


def check_listening(address: str) -> None:
    """Return if something accepts connections at `address`.

    Raises:
        UnavailableError: If nothing does within `CONNECT_TIMEOUT_S`.
        ConfigError: If it is no address.
    """
    if address.startswith("unix:"):
        return
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError:  # it says no more than we do
        raise nobody_listens(address) from None


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`, where the host may be an IPv6 address in brackets.

    Raises:
        ConfigError: If it is something else.
    """
    host, colon, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    if not (host and colon and is_port) or "/" in host:
        raise ConfigError("the address is wrong", "address", "host:port", repr(address)[:80])
    return host.strip("[]"), int(port)
