"""The worker's gRPC server: `InferenceService` on the direct path, on a thread and an event loop of its own.

Every RPC of the port, whatever its name, needs a ticket; nothing is looked at before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import grpc
from nos.errors import (
    ConfigError,
    LimitExceededError,
    ModelError,
    NosError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)
from nos.wire import frames
from nos.wire.host import is_loopback
from nos.wire.limits import ALIGNMENT_BYTES, ERROR_KEY, MAX_STREAMS, MESSAGE_BYTES, TICKET_KEY
from nos.wire.options import SERVER_OPTIONS
from nos.wire.status import code_of, to_message
from nos.wire.v1 import inference_pb2

from nos_backend.worker.access import authorize, unexpected
from nos_backend.worker.arguments import check_arguments, from_node
from nos_backend.worker.dispatch import Request
from nos_backend.worker.local import LocalPort, open_port
from nos_backend.worker.pipes import Context, GrpcPipe, Pipe
from nos_backend.worker.streams import Stream, deadline_of, set_timings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from nos.wire.v1 import access_pb2, models_pb2

    from nos_backend.definition import ModelDefinition
    from nos_backend.worker.access import Access
    from nos_backend.worker.manager import ModelManager
    from nos_backend.worker.replies import Reply
    from nos_backend.worker.resuming import Remains

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_SERVICE: Final = "/nos.v1.InferenceService/"
_HEALTH: Final = "/grpc.health.v1.Health/"
#: Text of a failed unary call travels in its trailing metadata, which is limited to a few KiB.
_MAX_TRACEBACK_CHARS: Final = 4000
_MAX_DETAILS_CHARS: Final = 500
_START_TIMEOUT_S: Final = 30.0
_LAST_WORDS_S: Final = 1.0
#: How long a client may take to come back for the ends that it missed: as long as its own patience.
_RESUME_S: Final = 30.0
#: Of the ends of all lost streams; those that were lost first are forgotten.
_MAX_LEFT_BYTES: Final = 256 << 20
#: Clients half-close within milliseconds of being asked to leave; who does not is not waited for longer.
_LEAVE_S: Final = 2.0


class DataPlane:
    """A server on a thread of its own. Its methods may be called from any other thread.

    Whoever composes the process also sets `sys.setswitchinterval(0.0005)`: another thread that holds the
    interpreter lock delays every frame by up to the switch interval.
    """

    def __init__(
        self,
        manager_factory: Callable[[], ModelManager],
        verify: Callable[[bytes], access_pb2.Ticket],
        host: str,
        port: int = 0,
        max_streams: int = MAX_STREAMS,
        max_tenant_streams: int = 0,
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Make one that does not run yet.

        Args:
            manager_factory: Called once, on the data plane's loop.
            verify: Returns the ticket that the bytes of `nos-ticket-bin` carry, or raises
                UnauthenticatedError; gets empty bytes where none came. Called on the loop.
            host: Where to listen.
            port: 0 means any free one.
            max_streams: How many streams it serves at once.
            max_tenant_streams: How many of these one tenant may have; 0 means all.
            tls: Private key and certificate, PEM; None for a port without TLS, which is for loopback only.
        """
        self._manager_factory = manager_factory
        self._verify = verify
        self._host = host
        self._port = port
        self._max_streams = max_streams
        self._max_tenant_streams = max_tenant_streams
        self._tls = tls
        self._thread = threading.Thread(target=self._main, name="nos-data-plane", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._manager: ModelManager
        self._started: Future[None] = Future()
        self._stop: asyncio.Future[float]
        self._local: LocalPort | None = None
        self._streams: set[Stream] = set()
        #: By stream: what it left when its connection was lost, for a while.
        self._left: dict[str, Remains] = {}
        #: Models that are being unloaded; each resolves when it is gone.
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_draining = False

    @property
    def address(self) -> str:
        """Where it listens, `host:port`; known once started."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    @property
    def unix_socket(self) -> str:
        """Where it listens for clients of this host; known once started, empty if nowhere."""
        return self._local.address if self._local is not None else ""

    def start(self) -> None:
        """Start the thread and wait until the server listens.

        Raises:
            ConfigError: If the address cannot be used, or others could listen to what is said there.
        """
        if self._tls is None and not is_loopback(self._host):
            raise ConfigError(
                "the worker's port would be open to others without TLS",
                "host",
                "a loopback address, or certificates: --tls-ca-file, --tls-cert, --tls-key",
                self._host,
                "Make them with `nos cluster certs`",
            )
        self._thread.start()
        self._started.result(_START_TIMEOUT_S)

    def submit_coroutine(self, coro_fn: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine on the data plane's loop, for instance one of the manager's."""
        return asyncio.run_coroutine_threadsafe(_call(coro_fn), self._loop)

    @property
    def num_streams(self) -> int:
        """Streams open at the moment; any thread may ask."""
        return len(self._streams)

    @property
    def streams_by_tenant(self) -> dict[str, int]:
        """Streams open at the moment, by whom they run for. On the data plane's loop."""
        return dict(Counter(stream.tenant for stream in self._streams))

    async def load(self, definition: ModelDefinition) -> None:
        """Have the manager load a model, after an unloading of it that is under way."""
        while (gone := self._leaving.get(definition.key)) is not None:
            await asyncio.shield(gone)
        await self._manager.load(definition)

    async def unload(self, key: str, budget_s: float | None = None) -> None:
        """Take a model off the device once its streams have moved on and its work in flight is done.

        Runs on the data plane's loop (`submit_coroutine`). Its streams are told to go elsewhere, and new
        ones are refused; frames on their way are taken. A client that hears of it resolves the model again
        at its next frame.

        Args:
            key: The model.
            budget_s: How long streams may stay that do not heed it, None for the usual time; what they sent
                is answered all the same.
        """
        gone = self._leaving.get(key)
        if gone is None:
            gone = self._leaving[key] = self._loop.create_future()
            task = asyncio.create_task(
                self._unload(key, budget_s or _LEAVE_S, gone), name=f"unload {key}"
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.shield(gone)

    def revoke(self, token_ids: Iterable[str]) -> None:
        """Cut the streams of these tokens; `verify` has to refuse their tickets from now on."""
        wanted = frozenset(token_ids)
        self._loop.call_soon_threadsafe(self._cut, wanted)

    def stop(self, grace_s: float) -> None:
        """Tell clients to leave, finish what is in flight for at most so long, and end everything."""
        if self._thread.is_alive() and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._ask_to_stop, grace_s)
        self._thread.join()

    # On the loop.

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:  # the top level of this thread
            if not self._started.done():
                self._started.set_exception(error)
            else:
                _logger.exception("the data plane ended by a defect")

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = self._loop.create_future()
        self._manager = self._manager_factory()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((_Port(self, self._verify),))
        try:
            if self._tls is None:
                self._port = server.add_insecure_port(self.address)
            else:
                credentials = grpc.ssl_server_credentials([self._tls])
                self._port = server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                "the data plane cannot listen there", "port", "a free port", self.address
            ) from error
        await self._manager.start()
        await server.start()
        self._local = open_port(self._verify, self.serve_stream)
        self._started.set_result(None)
        _logger.info("data plane of %s listens on %s", self._manager.device, self.address)
        grace_s = await self._stop
        self._is_draining = True
        await self._clear(
            list(self._streams), min(grace_s, _LEAVE_S), "the worker is shutting down"
        )
        await self._manager.drain(grace_s)
        # What is answered by now is written by then; who reads slower than this is cut.
        await server.stop(_LAST_WORDS_S)
        if self._local is not None:
            await self._local.close()
        await self._manager.close()

    async def _unload(self, key: str, budget_s: float, gone: asyncio.Future[None]) -> None:
        try:
            await self._clear(
                [stream for stream in self._streams if stream.model == key],
                budget_s,
                f"{key} is being unloaded from this worker",
            )
            await self._manager.unload(key)
        finally:
            del self._leaving[key]
            gone.set_result(None)

    async def _clear(self, streams: list[Stream], budget_s: float, reason: str) -> None:
        """Ask streams to leave, and wait for that."""
        for stream in streams:
            stream.leave(budget_s, reason)
        if streams:
            await asyncio.wait([stream.ended for stream in streams], timeout=budget_s)

    def _ask_to_stop(self, grace_s: float) -> None:
        if not self._stop.done():
            self._stop.set_result(grace_s)

    def _cut(self, token_ids: frozenset[str]) -> None:
        for stream in list(self._streams):
            if stream.token_id in token_ids:
                stream.cut(UnauthenticatedError("the token of this stream was revoked"))

    def _open(self, access: Access) -> tuple[models_pb2.ModelSpec, str]:
        """Return the interface and owner of the model that a caller wants to use now.

        Raises:
            UnavailableError: If it is not here, or the worker is draining.
            LoadError: If it failed.
        """
        if self._is_draining:
            raise UnavailableError("the worker is shutting down", hint="Resolve the model again")
        if access.model in self._leaving:
            raise UnavailableError(
                f"{access.model} is being unloaded from this worker", hint="Resolve the model again"
            )
        owner = self._manager.owner(access.model)
        try:
            return self._manager.spec(access.model), owner
        except NosError as error:
            raise access.visible(error, owner) from None

    async def serve_stream(self, access: Access, pipe: Pipe) -> None:
        """Serve one stream.

        Raises:
            OverloadedError: If there are as many as may be, in all or of this tenant.
        """
        spec, owner = self._open(access)
        tenant, most = access.ticket.tenant, self._max_tenant_streams
        if most and self.streams_by_tenant.get(tenant, 0) >= most:
            raise OverloadedError(
                f"{tenant} has no room for another stream on this worker",
                "streams",
                f"at most {most} of one tenant",
            )
        if len(self._streams) >= self._max_streams:
            raise OverloadedError(
                "the worker has no room for another stream",
                "streams",
                f"at most {self._max_streams}",
            )
        stream = Stream(self._manager, access, self._verify, spec, owner, self._inherit)
        self._streams.add(stream)
        try:
            error = await stream.serve(pipe)
        except asyncio.CancelledError:
            if stream.remains is not None:
                self._keep(stream.id, stream.remains)
            raise
        finally:
            self._streams.discard(stream)
        if error is not None:
            raise error

    def _keep(self, stream_id: str, remains: Remains) -> None:
        """Keep what a lost stream left for the one that takes its place."""
        self._left[stream_id] = remains
        self._loop.call_later(_RESUME_S, self._left.pop, stream_id, None)
        while sum(it.num_bytes for it in self._left.values()) > _MAX_LEFT_BYTES:
            del self._left[next(iter(self._left))]

    def _inherit(self, stream_id: str, heir: Remains) -> Remains | None:
        """Return what a stream left whose connection was lost, which it may not have noticed yet.

        Args:
            stream_id: Names it.
            heir: Of the stream that takes its place; nothing is left to another tenant or model.
        """
        stream = next((it for it in self._streams if it.id == stream_id), None)
        left = stream.remains if stream is not None else self._left.get(stream_id)
        if left is None or (left.model, left.tenant) != (heir.model, heir.tenant):
            return None
        if stream is not None:
            stream.abandon()
        self._left.pop(stream_id, None)
        return left

    async def serve_run(self, access: Access, raw: bytes) -> bytes:
        """Serve one unary call; a generator's items come as one list."""
        spec, owner = self._open(access)
        message, data = frames.split(inference_pb2.RunRequest, raw)
        self._manager.limits.check_frame(data.nbytes)
        deadline_s = deadline_of(message.timeout_s, self._loop.time())
        call = check_arguments(spec, message.method, message.arguments, data.nbytes)
        taken = self._manager.allocate(access.model, data.nbytes) if data.nbytes else None
        if taken is not None:
            taken.view[:] = data
        answer = _Answer(self._loop)
        request = Request(
            model=access.model,
            method=call.method,
            tenant=access.ticket.tenant,
            weight=access.weight,
            arguments=call.arguments,
            sink=answer.take,
            input=taken,
            deadline_s=deadline_s,
        )
        self._manager.submit(request)
        try:
            reply = await answer.last
        finally:
            self._manager.cancel(request.id)
        if reply.error is not None:
            raise _brief(access.visible(reply.error, owner))
        set_timings(answer.response.timings, request, reply, self._loop.time())
        return frames.join(answer.response, answer.buffers, answer.size)


class _Answer:
    """The reply of a unary call in the making."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.response = inference_pb2.RunResponse()
        self.buffers: list[bytes] = []
        self.size = 0
        #: Resolves with the terminal reply, whose block is not to be read any more.
        self.last: asyncio.Future[Reply] = loop.create_future()

    def take(self, reply: Reply) -> None:
        """Copy what a reply brings."""
        try:
            if self.last.done():
                return
            if reply.kind == "item":
                self._add(reply, self.response.value.items.items.add())
                return
            if reply.kind == "result":
                self._add(reply, self.response.value)
            elif reply.kind == "end":
                self.response.value.items.SetInParent()
            self.last.set_result(reply)
        except NosError as error:
            self.last.set_exception(error)
        finally:
            reply.release()

    def _add(self, reply: Reply, target: Any) -> None:
        padding = -self.size % ALIGNMENT_BYTES
        from_node(reply.node, target, self.size + padding)
        self.buffers += [bytes(padding), bytes(reply.block)]
        self.size += padding + reply.block.nbytes
        if self.size > MESSAGE_BYTES:
            raise LimitExceededError(
                "the result is too large for one message",
                expected=f"at most {MESSAGE_BYTES} bytes",
                got=f"{self.size} or more",
                hint="Call the model over a stream",
            )


class _Port(grpc.GenericRpcHandler):
    """Finds the handler of every RPC of the port, behind one check of access."""

    def __init__(self, plane: DataPlane, verify: Callable[[bytes], access_pb2.Ticket]) -> None:
        self._plane = plane
        self._verify = verify
        self._health = _health_handlers()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler for a call; called by gRPC on the loop."""
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            raw = metadata.get(TICKET_KEY, b"")
            ticket = self._verify(raw if isinstance(raw, bytes) else b"")
            if method in self._health:
                return self._health[method]
            access = authorize(ticket, metadata)
        except NosError as error:
            return grpc.stream_stream_rpc_method_handler(partial(_refuse, error))
        except Exception as error:  # noqa: BLE001 - whatever it is, access is not granted
            hidden = unexpected(error, "checking a ticket")
            return grpc.stream_stream_rpc_method_handler(partial(_refuse, hidden))
        if method == f"{_SERVICE}Stream":
            return grpc.stream_stream_rpc_method_handler(partial(self._stream, access))
        if method == f"{_SERVICE}Run":
            return grpc.unary_unary_rpc_method_handler(partial(self._run, access))
        return None

    async def _stream(self, access: Access, _requests: Any, context: Context) -> None:
        await _answer(context, self._plane.serve_stream(access, GrpcPipe(context)))

    async def _run(self, access: Access, raw: bytes, context: Context) -> bytes:
        return await _answer(context, self._plane.serve_run(access, raw))


async def _answer(context: Context, work: Awaitable[T]) -> T:
    """Turn whatever `work` raises into a status, with the whole error in the trailing metadata."""
    try:
        return await work
    except NosError as error:
        failed = error
    except Exception as error:  # noqa: BLE001 - the top level of an RPC
        failed = unexpected(error, "serving a call")
    return await _abort(context, failed)


async def _refuse(error: NosError, _requests: Any, context: Context) -> None:
    await _abort(context, error)


async def _abort(context: Context, error: NosError) -> NoReturn:
    detail = to_message(error).SerializeToString()
    await context.abort(code_of(error), str(error)[:_MAX_DETAILS_CHARS], ((ERROR_KEY, detail),))
    raise AssertionError("abort raises")


def _brief(error: NosError) -> NosError:
    """Return an error that fits into metadata."""
    if isinstance(error, ModelError):
        return ModelError(
            error.message[:_MAX_DETAILS_CHARS],
            error.type_name,
            error.remote_message[:_MAX_DETAILS_CHARS],
            error.remote_traceback[-_MAX_TRACEBACK_CHARS:],
            error.error_id,
        )
    return error


async def _call(coro_fn: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return await coro_fn()


def _health_handlers() -> dict[str, Any]:
    """Return `grpc.health.v1`, where its package is installed."""
    try:
        from grpc_health.v1 import health, health_pb2
    except ImportError:
        return {}
    servicer = health.aio.HealthServicer()
    check = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return {f"{_HEALTH}Check": check}
