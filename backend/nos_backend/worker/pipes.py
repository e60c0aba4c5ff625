"""How a stream's messages are carried: what the roads have in common, and the one over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from nos.wire import frames

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    import grpc

#: What a handler of raw bytes reads from and writes to.
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
#: Takes a client's serialized message and its data, which is valid for the call only.
Receive: TypeAlias = "Callable[[bytes, memoryview], None]"


class Pipe(Protocol):
    """Carries a stream's messages; one task reads, one writes."""

    #: Messages that the transport has taken.
    num_written: int
    #: Whether its end may be the network's, while both sides live.
    can_be_lost: bool

    async def read(self, receive: Receive, flowing: asyncio.Event) -> None:
        """Hand messages to `receive` until the client has half-closed.

        Args:
            receive: Called on the loop; what it raises ends this.
            flowing: While it is not set, few messages more are read.

        Raises:
            NosError: If a message makes no sense, or as `receive`.
        """

    async def leave(self) -> None:
        """Wait until the client is gone, and raise then; return where the task is told otherwise.

        Raises:
            CancelledError: When it is gone.
        """

    @property
    def takes_at_once(self) -> bool:
        """Whether a message can be written without waiting."""

    def write_at_once(self, seq: int, header: bytes, data: memoryview) -> None:
        """As `write`, while `takes_at_once`; sent by `flush` at the latest, before anything else is."""

    def flush(self) -> None:
        """Send what was written at once."""

    async def write(self, seq: int, header: bytes, data: memoryview) -> None:
        """Write a message, with its data in as many more as it takes; the data is copied by then.

        Args:
            seq: Which frame it belongs to.
            header: The serialized message.
            data: Its data; may be empty.
        """

    async def write_whole(self, messages: list[bytes]) -> None:
        """Write messages that are serialized with their data; where `can_be_lost` only."""

    def is_frozen(self) -> bool:
        """Return whether the client is known to be stopped, here and when this was asked last."""


class GrpcPipe:
    """A stream over gRPC."""

    can_be_lost = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self.num_written = 0

    async def read(self, receive: Receive, flowing: asyncio.Event) -> None:
        """See `Pipe`."""
        while isinstance(raw := await self._context.read(), bytes):
            receive(*frames.cut(raw))
            if not flowing.is_set():
                await flowing.wait()

    async def leave(self) -> None:
        """See `Pipe`: gRPC cancels the call."""

    @property
    def takes_at_once(self) -> bool:
        """See `Pipe`: gRPC says only afterwards."""
        return False

    def write_at_once(self, seq: int, header: bytes, data: memoryview) -> None:
        """See `Pipe`."""
        raise AssertionError("it takes nothing at once")

    def flush(self) -> None:
        """See `Pipe`."""

    async def write(self, seq: int, header: bytes, data: memoryview) -> None:
        """See `Pipe`."""
        for message in frames.pack(seq, header, [data], data.nbytes):
            await self._context.write(message)
            self.num_written += 1

    async def write_whole(self, messages: list[bytes]) -> None:
        """See `Pipe`."""
        for message in messages:
            await self._context.write(message)
            self.num_written += 1

    def is_frozen(self) -> bool:
        """See `Pipe`: gRPC's keepalive finds out, and cancels the call."""
        return False
