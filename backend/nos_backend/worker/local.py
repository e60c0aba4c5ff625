"""Streams of clients on this host: a UNIX socket for messages, shared memory for frames.

The socket is abstract: it has no file, and is gone with the process however that ends. It takes processes of
its own user only, and each stream shows a ticket as everywhere. `nos.wire.shared` describes the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nos.errors import CancelledError, InvalidRequestError, NosError, PermissionDeniedError
from nos.wire.limits import MAX_SHARED_BYTES, MODEL_KEY
from nos.wire.shared import SharedEnd
from nos.wire.status import to_message
from nos.wire.v1 import inference_pb2

from nos_backend.worker.access import authorize, unexpected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nos.wire.v1 import access_pb2

    from nos_backend.worker.access import Access
    from nos_backend.worker.pipes import Pipe, Receive

_logger = logging.getLogger(__name__)

_BACKLOG: Final = 128
#: A client says hello at once, or is none.
_HELLO_S: Final = 5.0
_HELLO_BYTES: Final = 64 << 10
_MAX_DESCRIPTORS: Final = 4
#: Messages are joined up to this before they are sent.
_JOINED_BYTES: Final = 64 << 10
_LENGTH: Final = struct.Struct("<I")
_PEER: Final = struct.Struct("3i")
_NEEDED_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class LocalPort:
    """Listens for clients of this host. Belongs to one event loop.

    Args:
        verify: As for `DataPlane`.
        serve: Serves one stream; what it raises is told to the client.
    """

    def __init__(
        self,
        verify: Callable[[bytes], access_pb2.Ticket],
        serve: Callable[[Access, Pipe], Awaitable[None]],
    ) -> None:
        self._verify = verify
        self._serve = serve
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"nos-{secrets.token_hex(16)}"
        self._socket.bind(f"\0{name}")
        self._socket.listen(_BACKLOG)
        self._socket.setblocking(False)
        #: Where it listens; the `@` stands for a zero byte.
        self.address = f"@{name}"
        self._loop.add_reader(self._socket, self._accept)

    async def close(self) -> None:
        """Take no more clients, and end the streams that there are."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (
            OSError
        ):  # it left again, or there are no descriptors: then others wait in the backlog
            return
        task = self._loop.create_task(self._answer(connection), name="local stream")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: socket.socket) -> None:
        pipe: LocalPipe | None = None
        try:
            connection.setblocking(False)
            async with asyncio.timeout(_HELLO_S):
                hello, memory = await self._read_hello(connection)
            try:
                pipe = LocalPipe(hello, memory, _peer(connection)[0])
            finally:
                os.close(memory)
            await self._loop.connect_accepted_socket(lambda: pipe, connection)
        except (OSError, TimeoutError, NosError) as error:
            _logger.info("a local client was turned away: %s", error)
            connection.close()
            return
        failure: NosError | None = None
        try:
            access = authorize(self._verify(hello.ticket), {MODEL_KEY: hello.model})
            await self._serve(access, pipe)
        except NosError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the top level of a stream
            failure = unexpected(error, "serving a local stream")
        finally:
            pipe.close(failure)

    async def _read_hello(self, connection: socket.socket) -> tuple[inference_pb2.LocalHello, int]:
        """Return the hello and the descriptor that came with it, which is the caller's to close."""
        await self._readable(connection)
        # The descriptor comes with the first byte; what follows the hello is the stream's.
        data, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _MAX_DESCRIPTORS)
        try:
            _check_peer(connection, len(descriptors), data)
            (size,) = _LENGTH.unpack(data)
            raw = b""
            while len(raw) < min(size, _HELLO_BYTES):
                await self._readable(connection)
                more = connection.recv(size - len(raw))
                if not more:
                    break
                raw += more
            return _parse_hello(raw, size), descriptors.pop(0)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _readable(self, connection: socket.socket) -> None:
        readable = asyncio.Event()
        self._loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(connection)


class LocalPipe(asyncio.Protocol):
    """A stream of a local client; a `nos_backend.worker.streams.Pipe`."""

    #: Without the client's end, or ours, there is nobody to go on.
    can_be_lost = False

    def __init__(self, hello: inference_pb2.LocalHello, memory: int, peer_pid: int) -> None:
        """Map the client's memory; the descriptor stays the caller's.

        Raises:
            InvalidRequestError: If it is not what the hello says, or could be shrunk while it is mapped.
        """
        _check_memory(hello, memory)
        requests = mmap.mmap(memory, hello.request_bytes, prot=mmap.PROT_READ)
        results = mmap.mmap(memory, hello.result_bytes, offset=hello.request_bytes)
        self._memory = (requests, results)
        self._shared = SharedEnd(memoryview(results), memoryview(requests))
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._receive: Receive | None = None
        self._flowing = asyncio.Event()
        #: What arrived while nobody received.
        self._early: list[bytes] = []
        #: Resolves when the client has half-closed; fails if it broke the protocol or left.
        self._ended: asyncio.Future[None] = self._loop.create_future()
        #: Resolves when the client left.
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self.num_written = 0
        #: Written at once and not sent yet, and its bytes.
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        #: The client's process; 0 if it is in another namespace.
        self._peer_pid = peer_pid
        self._was_stopped = False

    async def read(self, receive: Receive, flowing: asyncio.Event) -> None:
        """See `Pipe`; the client's messages are received as they come, without a task between."""
        self._flowing, self._receive = flowing, receive
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)
        while not self._ended.done():
            if flowing.is_set():
                await asyncio.wait({self._ended})
            else:
                await flowing.wait()
        self._ended.result()

    async def leave(self) -> None:
        """See `Pipe`."""
        await asyncio.wait({self._lost})
        raise _left()

    @property
    def takes_at_once(self) -> bool:
        """See `Pipe`."""
        return self._writable.is_set()

    def write_at_once(self, seq: int, header: bytes, data: memoryview) -> None:
        """See `Pipe`."""
        for message in self._shared.pack(seq, header, [data], data.nbytes):
            self._unsent.append(message)
            self._unsent_bytes += len(message)
        self.num_written += 1
        if self._unsent_bytes > _JOINED_BYTES:
            self.flush()

    def flush(self) -> None:
        """See `Pipe`."""
        unsent, self._unsent, self._unsent_bytes = self._unsent, [], 0
        if unsent:
            self._transport.write(unsent[0] if len(unsent) == 1 else b"".join(unsent))

    async def write(self, seq: int, header: bytes, data: memoryview) -> None:
        """See `Pipe`."""
        for message in self._shared.pack(seq, header, [data], data.nbytes):
            if not self._writable.is_set():
                await self._writable.wait()
            self._transport.write(message)
            self.num_written += 1
        if not self._writable.is_set():
            await self._writable.wait()

    async def write_whole(self, messages: list[bytes]) -> None:
        """See `Pipe`."""
        raise AssertionError("it cannot be lost")

    def is_frozen(self) -> bool:
        """See `Pipe`."""
        was_stopped, self._was_stopped = self._was_stopped, _is_stopped(self._peer_pid)
        return was_stopped and self._was_stopped

    def close(self, error: NosError | None) -> None:
        """End it, with word of why if it did not end well and the client takes it."""
        self._receive = None
        if not self._writable.is_set():
            self._transport.abort()
        elif error is not None and not self._transport.is_closing():
            last = inference_pb2.StreamResponse(error=to_message(error))
            self._transport.write(self._shared.wrap(last.SerializeToString()))
        self._transport.close()
        if not self._ended.done():
            self._ended.set_result(None)
        self._shared.close()
        for memory in self._memory:
            # A view that an exception's traceback holds delays it.
            with contextlib.suppress(BufferError):
                memory.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream socket's is one
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._ended.done():
            return
        if self._receive is None:
            self._early.append(data)
            return
        try:
            for header, block in self._shared.feed(data):
                self._receive(header, block)
        except Exception as error:  # noqa: BLE001 - handed to the reading task
            self._ended.set_exception(error)
            return
        receipt = self._shared.receipt()
        if receipt is not None:
            self._transport.write(receipt)
        if self._shared.is_finished:
            self._ended.set_result(None)
        elif not self._flowing.is_set():
            self._transport.pause_reading()
            self._loop.create_task(self._resume())

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._writable.set()
        self._lost.set_result(None)
        if not self._ended.done():
            self._ended.set_exception(_left())

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._writable.set()

    async def _resume(self) -> None:
        await self._flowing.wait()
        if not self._transport.is_closing():
            self._transport.resume_reading()


def _left() -> CancelledError:
    return CancelledError("the client left")


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return the client's process and user."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(raw)
    return pid, uid


def _is_stopped(pid: int) -> bool:
    """Return whether a process was stopped by a signal; False if it cannot be seen."""
    try:
        # Its name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] == b"T"


def _check_peer(connection: socket.socket, num_descriptors: int, data: bytes) -> None:
    if _peer(connection)[1] != os.geteuid():
        raise PermissionDeniedError("another user's process", "unix_socket")
    if num_descriptors != 1 or len(data) != _LENGTH.size:
        raise InvalidRequestError("no hello", "hello", "a length and one descriptor")


def _parse_hello(raw: bytes, size: int) -> inference_pb2.LocalHello:
    if len(raw) != size:
        raise InvalidRequestError("no hello", "hello", f"{size} bytes", f"{len(raw)}")
    try:
        return inference_pb2.LocalHello.FromString(raw)
    except Exception as error:  # protobuf's DecodeError is no stable class across its backends
        raise InvalidRequestError("no hello", "hello", "a nos.v1.LocalHello") from error


def _check_memory(hello: inference_pb2.LocalHello, memory: int) -> None:
    sizes = (hello.request_bytes, hello.result_bytes)
    if not all(0 < size <= MAX_SHARED_BYTES and size % mmap.PAGESIZE == 0 for size in sizes):
        raise InvalidRequestError(
            "bad sizes of shared memory", "hello", f"pages, at most {MAX_SHARED_BYTES}", str(sizes)
        )
    status = os.fstat(memory)
    try:
        seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
    except OSError as error:  # a file of another kind
        raise InvalidRequestError("not shared memory", "hello", "a memfd") from error
    # Of huge pages there may be none left, and touching one then ends the process.
    is_plain = status.st_size == sum(sizes) and status.st_blksize == mmap.PAGESIZE
    if not is_plain or seals & _NEEDED_SEALS != _NEEDED_SEALS:
        raise InvalidRequestError(
            "the shared memory is not as agreed",
            "hello",
            f"a memfd of {sum(sizes)} bytes, sealed against shrinking and growing",
            f"{status.st_size} bytes",
        )


def open_port(
    verify: Callable[[bytes], access_pb2.Ticket],
    serve: Callable[[Access, Pipe], Awaitable[None]],
) -> LocalPort | None:
    """Return a port, or None where the platform has no such sockets."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        return LocalPort(verify, serve)
    return None
