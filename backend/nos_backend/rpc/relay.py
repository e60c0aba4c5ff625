"""InferenceService of the gateway: passes calls on to a worker as bytes, and knows nothing of their content.

The token stays here: the worker gets a ticket, which is renewed in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

import grpc
from nos.errors import InvalidRequestError, NosError, Reason, UnauthenticatedError, UnavailableError
from nos.wire import frames, status
from nos.wire.limits import ERROR_KEY, MODEL_KEY, TICKET_KEY, WORKER_KEY
from nos.wire.v1 import inference_pb2

from nos_backend.rpc.guard import caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nos_backend.control.resolver import Resolver, Way
    from nos_backend.control.tokens import Identity
    from nos_backend.rpc.channels import Channels
    from nos_backend.rpc.guard import Context, Guard

_logger = logging.getLogger(__name__)

#: Statuses that say, without a detail of ours, that the worker went away.
_LOST: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
)

_TELLING_S: Final = 1.0
#: A client that takes no message for so long reads no more.
_STALLED_S: Final = 10.0


class Relay:
    """Passes `Run` and `Stream` on, both directions, with the backpressure of both sides."""

    def __init__(self, resolver: Resolver, channels: Channels) -> None:
        self._resolver = resolver
        self._channels = channels
        # Half of the ticket's time: a renewal may be late by the other half.
        self._renewal_s = resolver.ticket_ttl_s / 2
        self._streams: set[_RelayedStream] = set()

    def add_to(self, guard: Guard) -> None:
        """Serve `nos.v1.InferenceService` by this relay."""
        guard.add_registered_method_handlers(
            "nos.v1.InferenceService",
            {
                "Run": grpc.unary_unary_rpc_method_handler(self.run),
                "Stream": grpc.stream_stream_rpc_method_handler(self.stream),
            },
        )

    async def run(self, request: bytes, context: Context) -> bytes:
        """Pass one call on."""
        way = await self._resolver.resolve(_model(context), caller(), self._channels.least_used)
        with self._channels.use(way.placement) as channel:
            try:
                return await channel.run(
                    request, metadata=_metadata(way), timeout=context.time_remaining()
                )
            except grpc.aio.AioRpcError as error:
                raise self._translated(way, error) from None

    async def stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Pass a stream on until either side ends it."""
        identity = caller()
        reference = _model(context)
        choose = self._channels.chooser(_metadata_of(context, WORKER_KEY))
        way = await self._resolver.resolve(reference, identity, choose)
        first = await anext(aiter(requests), None)
        if first is None:
            return
        # The client may have waited: what was found and signed then may have gone stale.
        way = await self._resolver.resolve(way.version.key, identity, choose)
        with self._channels.use(way.placement) as channel:
            call = channel.stream(metadata=_metadata(way))
            stream = _RelayedStream(call, context)
            self._streams.add(stream)
            _logger.info("stream of %s to %s opens", way.version.key, way.placement.worker)
            try:
                await stream.pump(first, requests, self._renewals(way, identity))
            except grpc.aio.AioRpcError as error:
                raise self._translated(way, error) from None
            finally:
                self._streams.discard(stream)
                call.cancel()
                _logger.info("stream of %s to %s closed", way.version.key, way.placement.worker)

    async def tell_draining(self, grace_s: float) -> None:
        """Tell the client of every stream that the server is about to leave."""
        message = inference_pb2.StreamResponse(
            draining=inference_pb2.Draining(grace_s=grace_s)
        ).SerializeToString()
        telling = [asyncio.ensure_future(stream.send_down(message)) for stream in self._streams]
        if telling:
            # A client that does not read is not waited for.
            done, _ = await asyncio.wait(telling, timeout=_TELLING_S)
            for task in done:
                task.exception()

    async def _renewals(self, way: Way, identity: Identity) -> AsyncIterator[bytes]:
        """Yield a renewal whenever it is time for one."""
        while True:
            await asyncio.sleep(self._renewal_s)
            ticket = self._resolver.ticket(way.version.key, identity)
            yield inference_pb2.StreamRequest(
                renewal=inference_pb2.Renewal(ticket=ticket)
            ).SerializeToString()

    def _translated(self, way: Way, failure: grpc.aio.AioRpcError) -> NosError:
        """Return the error that the client gets for a worker's status."""
        error = status.from_status(
            failure.code(), failure.details() or "", failure.trailing_metadata()
        )
        has_detail = any(key == ERROR_KEY for key, _ in failure.trailing_metadata() or ())
        worker = way.placement.worker
        if failure.code() in _LOST and not has_detail:
            self._resolver.forget(way.version.key, way.placement)
            self._channels.retire(way.placement.address)
            return UnavailableError(
                f"worker {worker} is gone", "worker", "", "", "Try again: another one takes over"
            )
        if failure.code() is grpc.StatusCode.INTERNAL and not has_detail:
            # gRPC's own word for a write that came just behind the end of the stream.
            self._resolver.forget(way.version.key, way.placement)
            return UnavailableError(
                f"worker {worker} ended the stream", "worker", hint="Try again: it is opened anew"
            )
        if error.reason == Reason.UNAVAILABLE:
            # It is draining, or holds the model no more: the next call asks the cluster again.
            self._resolver.forget(way.version.key, way.placement)
        if isinstance(error, UnauthenticatedError) or error.reason == Reason.MODEL_NOT_FOUND:
            # The client's token and the name are right: the worker lags behind the gateway.
            self._resolver.forget(way.version.key, way.placement)
            return UnavailableError(
                f"worker {worker} does not serve {way.version.key} now: {error.message}",
                "worker",
                hint="Try again",
            )
        return error


class _RelayedStream:
    """One stream and its two directions."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes], context: Context) -> None:
        self._call = call
        self._context = context
        # gRPC takes one message at a time and direction.
        self._up = asyncio.Lock()
        self._down = asyncio.Lock()
        #: As the worker names the stream; for logs.
        self._id = ""

    async def pump(
        self, first: bytes, requests: AsyncIterator[bytes], renewals: AsyncIterator[bytes]
    ) -> None:
        """Pass messages on until the worker ends the stream.

        Raises:
            grpc.aio.AioRpcError: If it ends it with a failure.
            UnavailableError: If the client does not read.
        """
        upward = asyncio.create_task(self._pump_up(first, requests, renewals))
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if _logger.isEnabledFor(logging.DEBUG):
                    self._log_down(message)
                await self.send_down(message)
            code = await self._call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code,
                    await self._call.initial_metadata(),
                    await self._call.trailing_metadata(),
                    details=await self._call.details(),
                )
        finally:
            upward.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await upward

    async def send_down(self, message: Any) -> None:
        """Send a message to the client, waiting until it is taken.

        Raises:
            UnavailableError: If it takes none.
        """
        async with self._down:
            try:
                async with asyncio.timeout(_STALLED_S):
                    await self._context.write(message)
            except TimeoutError:
                raise UnavailableError("the client does not read its results") from None

    async def _pump_up(
        self, first: bytes, requests: AsyncIterator[bytes], renewals: AsyncIterator[bytes]
    ) -> None:
        # A failed write means that the worker ended the stream: its status tells, to whoever reads.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._send_up(first)
            renewing = asyncio.create_task(self._renew(renewals))
            try:
                async for message in requests:
                    await self._send_up(message)
            finally:
                # Cancelling a write would cancel the whole call: with the lock, none is under way.
                async with self._up:
                    renewing.cancel()
            await self._call.done_writing()

    async def _renew(self, renewals: AsyncIterator[bytes]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async for message in renewals:
                await self._send_up(message)

    def _log_down(self, message: Any) -> None:
        """Note whose answer this is; only where somebody reads that, since it takes the message apart."""
        with contextlib.suppress(NosError):  # the client finds out
            header, data = frames.split(inference_pb2.StreamResponse, message)
            if header.HasField("welcome"):
                self._id = header.welcome.stream_id
            if header.seq:
                _logger.debug("frame %s/%d: %d bytes down", self._id, header.seq, data.nbytes)

    def _log_up(self, message: bytes) -> None:
        with contextlib.suppress(NosError):
            header, data = frames.split(inference_pb2.StreamRequest, message)
            if header.seq:
                _logger.debug("frame %s/%d: %d bytes up", self._id, header.seq, data.nbytes)

    async def _send_up(self, message: bytes) -> None:
        if _logger.isEnabledFor(logging.DEBUG):
            self._log_up(message)
        async with self._up:
            await self._call.write(message)


def _model(context: Context) -> str:
    if model := _metadata_of(context, MODEL_KEY):
        return model
    raise InvalidRequestError("the call names no model", MODEL_KEY, "the metadata nos-model")


def _metadata_of(context: Context, name: str) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return ""


def _metadata(way: Way) -> tuple[tuple[str, str | bytes], ...]:
    return ((MODEL_KEY, way.version.key), (TICKET_KEY, way.ticket))
