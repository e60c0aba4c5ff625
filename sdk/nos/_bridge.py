"""Connections of a forked child: gRPC runs in a helper process that was exec'd, behind a socket pair.

One helper per process, started with the first connection; it ends when the socket does. Both ends are in
this file. A message is a head (kind, call, size) and `size` bytes; see `_fork` for why all this.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nos import _fork
from nos.errors import NosError, StreamClosedError, UnavailableError
from nos.wire.status import from_message, to_message
from nos.wire.v1 import errors_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeAlias

    from nos._channel import GrpcTransport, Metadata, StreamCall

    #: What came for one call: (kind, data); None means that the helper is gone.
    _Inbox: TypeAlias = queue.SimpleQueue[tuple[int, bytes] | None]

_HEAD: Final = struct.Struct("!BIQ")
#: To the helper: a call as JSON; a message of it; no more messages; end it.
_OPEN, _SEND, _FINISH, _CANCEL = 1, 2, 3, 4
#: From the helper: a message; the end, empty or with a serialized `Error`.
_DATA, _END = 5, 6


class _Wire:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("rb", buffering=1 << 18)
        self._write_lock = threading.Lock()

    def write(self, kind: int, call: int, data: bytes = b"") -> None:
        with self._write_lock:
            self._socket.sendall(_HEAD.pack(kind, call, len(data)))
            if data:
                self._socket.sendall(data)

    def read(self) -> tuple[int, int, bytes] | None:
        """Return the next message; None at the end."""
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        kind, call, size = _HEAD.unpack(head)
        data = self._file.read(size)
        return (kind, call, data) if len(data) == size else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class _Helper:
    """The child's end: starts the helper process and hands out what comes back."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from nos._bridge import main; main()"
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError as error:
            raise UnavailableError(
                "a forked process needs a helper process to call the server, and it did not start",
                got=str(error),
                hint="Start workers with the method 'spawn' rather than 'fork'",
            ) from error
        self._wire = _Wire(ours)
        self._lock = threading.Lock()
        self._last_call = 0
        #: Inboxes of the running calls; None ends one.
        self._inboxes: dict[int, _Inbox] = {}
        threading.Thread(target=self._read, name="nos-bridge", daemon=True).start()

    def open(self, spec: dict[str, object]) -> tuple[int, _Inbox]:
        inbox: _Inbox = queue.SimpleQueue()
        with self._lock:
            self._last_call += 1
            call = self._last_call
            self._inboxes[call] = inbox
        self.write(_OPEN, call, json.dumps(spec).encode())
        return call, inbox

    def write(self, kind: int, call: int, data: bytes = b"") -> None:
        try:
            self._wire.write(kind, call, data)
        except OSError:
            self._end_all()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._wire.read()) is not None:
                kind, call, data = message
                with self._lock:
                    inbox = self._inboxes.get(call)
                    if kind == _END:
                        self._inboxes.pop(call, None)
                if inbox is not None:
                    inbox.put((kind, data))
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            inboxes, self._inboxes = list(self._inboxes.values()), {}
        for inbox in inboxes:
            inbox.put(None)
        with _Slot.lock:
            if _Slot.helper is self:
                _Slot.helper = None


class _Slot:
    """This process's helper."""

    lock = threading.Lock()
    helper: _Helper | None = None

    @classmethod
    def get(cls) -> _Helper:
        with cls.lock:
            if cls.helper is None:
                cls.helper = _Helper()
            return cls.helper

    @classmethod
    def forget(cls) -> list[object]:
        """Called in a fork: the helper is the parent's."""
        held, cls.helper, cls.lock = cls.helper, None, threading.Lock()
        return [held]


_fork.register(_Slot)


class BridgeTransport:
    """A `Transport` whose gRPC is in the helper."""

    def __init__(self, address: str, ca_certificate: bytes = b"") -> None:
        self._place = {"address": address, "ca": ca_certificate.decode("ascii")}
        self._lock = threading.Lock()
        self._open_calls: dict[int, _Helper] = {}
        self._is_closed = False

    def unary(
        self, path: str, request: bytes, metadata: Metadata, timeout_s: float | None
    ) -> Future[bytes]:
        """See `Transport`."""
        stream = self._start(path, iter((request,)), metadata, timeout_s)
        answer: Future[bytes] = Future()

        def wait() -> None:
            error: NosError | None = None
            try:
                messages = list(stream)
                if not messages:
                    error = UnavailableError("the server gave no answer")
            except NosError as failure:
                messages, error = [], failure
            if answer.set_running_or_notify_cancel():
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(messages[0])

        threading.Thread(target=wait, name="nos-bridge-call", daemon=True).start()
        answer.add_done_callback(lambda it: stream.cancel() if it.cancelled() else None)
        return answer

    def stream(
        self,
        path: str,
        requests: Iterator[bytes],
        metadata: Metadata,
        timeout_s: float | None = None,
    ) -> StreamCall:
        """See `Transport`."""
        return self._start(path, requests, metadata, timeout_s)

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            self._is_closed = True
            calls, self._open_calls = self._open_calls, {}
        for call, helper in calls.items():
            helper.write(_CANCEL, call)

    def _start(
        self, path: str, requests: Iterator[bytes], metadata: Metadata, timeout_s: float | None
    ) -> _BridgeCall:
        if self._is_closed:
            raise StreamClosedError("the client is closed")
        helper = _Slot.get()
        call, inbox = helper.open(
            {
                **self._place,
                "path": path,
                "timeout_s": timeout_s,
                "metadata": [
                    [key, value, ""]
                    if isinstance(value, str)
                    else [key, "", base64.b64encode(value).decode()]
                    for key, value in metadata
                ],
            }
        )
        with self._lock:
            self._open_calls[call] = helper

        def send() -> None:
            for request in requests:
                helper.write(_SEND, call, request)
            helper.write(_FINISH, call)

        def forget() -> None:
            with self._lock:
                self._open_calls.pop(call, None)

        threading.Thread(target=send, name="nos-bridge-send", daemon=True).start()
        return _BridgeCall(helper, call, inbox, forget)


class _BridgeCall:
    def __init__(
        self, helper: _Helper, call: int, inbox: _Inbox, on_end: Callable[[], None]
    ) -> None:
        self._helper, self._call, self._inbox, self._on_end = helper, call, inbox, on_end

    def __iter__(self) -> Iterator[bytes]:
        while True:
            message = self._inbox.get()
            if message is None:
                self._on_end()
                raise UnavailableError("the helper process of this forked process ended")
            kind, data = message
            if kind == _DATA:
                yield data
                continue
            self._on_end()
            if data:
                raise from_message(errors_pb2.Error.FromString(data))
            return

    def cancel(self) -> None:
        self._helper.write(_CANCEL, self._call)


class _Server:
    """The helper's end: carries out the calls."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._transports: dict[tuple[str, str], GrpcTransport] = {}
        self._outboxes: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self._calls: dict[int, StreamCall] = {}

    def run(self) -> None:
        while (message := self._wire.read()) is not None:
            kind, call, data = message
            if kind == _OPEN:
                self._open(call, json.loads(data))
            elif kind == _SEND and call in self._outboxes:
                self._outboxes[call].put(data)
            elif kind == _FINISH and call in self._outboxes:
                self._outboxes.pop(call).put(None)
            elif kind == _CANCEL and call in self._calls:
                self._calls[call].cancel()

    def _open(self, call: int, spec: dict[str, Any]) -> None:
        from nos._channel import GrpcTransport  # gRPC belongs to the helper alone

        place = (spec["address"], spec["ca"])
        if place not in self._transports:
            self._transports[place] = GrpcTransport(place[0], place[1].encode())
        metadata = tuple(
            (key, text or base64.b64decode(raw)) for key, text, raw in spec["metadata"]
        )
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outboxes[call] = outbox
        stream = self._calls[call] = self._transports[place].stream(
            spec["path"], iter(outbox.get, None), metadata, spec["timeout_s"]
        )
        threading.Thread(target=self._pump, args=(call, stream), daemon=True).start()

    def _pump(self, call: int, stream: StreamCall) -> None:
        end = b""
        try:
            for message in stream:
                self._wire.write(_DATA, call, message)
        except NosError as error:
            end = to_message(error).SerializeToString()
        outbox = self._outboxes.pop(call, None)
        if outbox is not None:
            outbox.put(None)
        self._calls.pop(call, None)
        self._wire.write(_END, call, end)


def main() -> None:
    """Run the helper until its socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError):
        _Server(_Wire(end)).run()
    os._exit(0)
