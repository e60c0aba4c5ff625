"""Channels to the workers: one per address, kept as long as it is good."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc
from nos.wire.local import WORKER_NAME
from nos.wire.options import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nos_backend.cluster.link import Placement

_SERVICE: Final = "/nos.v1.InferenceService/"

RawUnary: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
RawStream: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"


class WorkerChannel:
    """The two inference methods of one worker, with messages as bytes."""

    def __init__(self, address: str, ca_certificate: bytes) -> None:
        self.address = address
        if ca_certificate:
            options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", WORKER_NAME))
            credentials = grpc.ssl_channel_credentials(ca_certificate)
            self._channel = grpc.aio.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        self.run: RawUnary = self._channel.unary_unary(f"{_SERVICE}Run")
        self.stream: RawStream = self._channel.stream_stream(f"{_SERVICE}Stream")
        #: Calls that use it now.
        self.num_calls = 0
        #: Set once it is to be closed as soon as nobody uses it.
        self.is_retired = False

    async def close(self) -> None:
        """Close it; calls that use it end."""
        await self._channel.close()


class Channels:
    """Hands out channels by address; belongs to the gateway's loop.

    Args:
        ca_certificate: PEM of what signed the certificates of the workers that encrypt; empty if none does.
    """

    def __init__(self, ca_certificate: bytes = b"") -> None:
        self._ca_certificate = ca_certificate
        self._channels: dict[str, WorkerChannel] = {}
        #: Closings under way, held so that they are not collected.
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def use(self, placement: Placement) -> Iterator[WorkerChannel]:
        """Give the channel to a worker for the time of one call."""
        address = placement.address
        channel = self._channels.get(address)
        if channel is None:
            shown = self._ca_certificate if placement.is_encrypted else b""
            channel = self._channels[address] = WorkerChannel(address, shown)
        channel.num_calls += 1
        try:
            yield channel
        finally:
            channel.num_calls -= 1
            self._close_if_unused(channel)

    def chooser(self, worker: str) -> Callable[[Sequence[Placement]], Placement]:
        """Return what chooses the replica on this worker, if there is one, else the least used."""

        def choose(placements: Sequence[Placement]) -> Placement:
            named = (placement for placement in placements if placement.worker == worker)
            return next(named, None) or self.least_used(placements)

        return choose

    def least_used(self, placements: Sequence[Placement]) -> Placement:
        """Return the replica whose worker the fewest calls go to from here."""

        def load(placement: Placement) -> tuple[int, int]:
            channel = self._channels.get(placement.address)
            return channel.num_calls if channel else 0, placement.num_pending

        return min(placements, key=load)

    def retire(self, address: str) -> None:
        """Give the channel of a lost worker to no new call; those that still use it keep it."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            channel.is_retired = True
            self._close_if_unused(channel)

    async def close(self) -> None:
        """Close all channels."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()
        await asyncio.gather(*self._closing)

    def _close_if_unused(self, channel: WorkerChannel) -> None:
        if channel.is_retired and channel.num_calls == 0:
            task = asyncio.create_task(channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
