"""Streams to a worker on this host: a UNIX socket for messages, shared memory for frames. Linux only.

Nothing here has a name in a file system: the socket is abstract, the memory is known by its descriptors.
Both are gone with the last process that has them, however that ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Final

from nos import _fork
from nos._session import broken
from nos.errors import InvalidRequestError, UnavailableError
from nos.wire import frames
from nos.wire.limits import MODEL_KEY, SHARED_BYTES, TICKET_KEY
from nos.wire.shared import SharedEnd
from nos.wire.v1 import inference_pb2

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from nos._channel import Metadata

#: Of `send`; a plain number, since combining an enum's members takes as long as the call.
_AT_ONCE: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) if sys.platform == "linux" else 0
_READ_BYTES: Final = 1 << 18
#: A worker that lives accepts at once; one that does not is not worth more.
_CONNECT_S: Final = 2.0
_PEER: Final = struct.Struct("3i")


def make_memory(size_bytes: int) -> int:
    """Return the descriptor of new memory that nobody can shrink or grow.

    A peer that could shrink it would end the other by SIGBUS.
    """
    descriptor = os.memfd_create("nos-stream", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def peer_uid(connection: socket.socket) -> int:
    """Return whose process is at the other end, as the kernel says."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(raw)[1])


class LocalStream:
    """A stream of a local client; a `nos._channel.Duplex`."""

    def __init__(self, address: str, metadata: Metadata) -> None:
        """Connect to the socket `address`, where a leading `@` means an abstract one.

        Raises:
            UnavailableError: If nobody of this user listens there.
        """
        fields = dict(metadata)
        ticket = fields[TICKET_KEY]
        hello = inference_pb2.LocalHello(
            model=str(fields[MODEL_KEY]),
            ticket=ticket if isinstance(ticket, bytes) else ticket.encode(),
            request_bytes=SHARED_BYTES,
            result_bytes=SHARED_BYTES,
        ).SerializeToString()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        memory = -1
        try:
            self._socket.settimeout(_CONNECT_S)
            self._socket.connect(address.replace("@", "\0", 1))
            if peer_uid(self._socket) != os.geteuid():
                raise PermissionError("another user listens there")
            memory = make_memory(2 * SHARED_BYTES)
            requests = mmap.mmap(memory, SHARED_BYTES)
            results = mmap.mmap(memory, SHARED_BYTES, prot=mmap.PROT_READ, offset=SHARED_BYTES)
            first = struct.pack("<I", len(hello)) + hello
            socket.send_fds(self._socket, [first], [memory])
            self._socket.settimeout(None)
        except OSError as error:
            self._socket.close()
            raise UnavailableError(
                "no worker listens for clients of this host", "unix_socket", got=str(error)
            ) from error
        finally:
            if memory >= 0:
                os.close(memory)
        self._memory = (requests, results)
        self._shared = SharedEnd(memoryview(requests), memoryview(results))
        self._lock = threading.Lock()
        #: What the socket did not take yet, in order.
        self._unsent: deque[bytes | memoryview] = deque()
        self._is_finished = False
        _Open.streams.add(self)

    def pack(
        self, seq: int, header: bytes, buffers: Sequence[frames.Buffer], size: int
    ) -> list[bytes]:
        """See `Duplex`."""
        return list(self._shared.pack(seq, header, buffers, size))

    def wrap(self, message: bytes) -> bytes:
        """See `Duplex`."""
        return self._shared.wrap(message)

    def room(self, size: int) -> np.ndarray[Any, Any] | None:
        """See `Duplex`."""
        return self._shared.room(size)

    def put(self, message: bytes | None) -> None:
        """See `Duplex`; sends in the caller's thread what the socket takes at once."""
        with self._lock:
            if self._is_finished:
                return
            if message is None:
                self._is_finished = True
                message = self._shared.finish()
            if self._unsent:
                self._unsent.append(message)
                return
            rest = self._try_send(message)
            if rest is None:
                return
            self._unsent.append(rest)
        threading.Thread(target=self._flush, name="nos-local-flush", daemon=True).start()

    def messages(self) -> Iterator[tuple[inference_pb2.StreamResponse, memoryview]]:
        """See `Duplex`."""
        try:
            while data := self._socket.recv(_READ_BYTES):
                for header, block in self._shared.feed(data):
                    yield frames.parse(inference_pb2.StreamResponse, header), block
        except OSError as error:
            raise UnavailableError("the connection to the worker broke", got=str(error)) from error
        except InvalidRequestError as error:
            raise broken(error) from error
        finally:
            self.cancel()
            self._socket.close()

    def receipt(self) -> bytes | None:
        """See `Duplex`."""
        return self._shared.receipt()

    def cancel(self) -> None:
        """See `Duplex`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `Duplex`."""
        self._socket.close()
        self._shared.close()
        for memory in self._memory:
            # A view that an exception's traceback holds delays it.
            with contextlib.suppress(BufferError):
                memory.close()

    def detach(self) -> None:
        """Let go of the connection without a word: it is the parent process's."""
        self._socket.close()

    def _try_send(self, message: bytes) -> memoryview | None:
        """Send; return what the socket did not take."""
        try:
            sent = self._socket.send(message, _AT_ONCE)
        except BlockingIOError:
            sent = 0
        except OSError:  # the reader finds out and says so
            return None
        return memoryview(message)[sent:] if sent < len(message) else None

    def _flush(self) -> None:
        while True:
            with self._lock:
                message = self._unsent[0]
            try:
                self._socket.sendall(message, socket.MSG_NOSIGNAL)
            except OSError:
                return  # what follows is never sent either: the list stays as it is
            with self._lock:
                self._unsent.popleft()
                if not self._unsent:
                    return


class _Open:
    """This process's local streams.

    A forked child lets go of its copies, or the worker would not see the parent's end.
    """

    streams: ClassVar[weakref.WeakSet[LocalStream]] = weakref.WeakSet()

    @classmethod
    def forget(cls) -> list[object]:
        """Called in a fork."""
        held = list(cls.streams)
        cls.streams = weakref.WeakSet()
        for stream in held:
            stream.detach()
        return list(held)


_fork.register(_Open)
