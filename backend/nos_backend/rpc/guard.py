"""What stands between the network and every method: access, errors, the count of calls in flight.

All messages are parsed in here, since gRPC tells a client the text of whatever a deserializer or a
handler raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from nos.errors import InternalError, InvalidRequestError, NosError
from nos.wire import status
from nos.wire.limits import ERROR_KEY, TOKEN_KEY

from nos_backend.control.registry import Actor
from nos_backend.rpc.access import check_role, least_role
from nos_backend.rpc.calls import Calls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from nos.wire.v1 import access_pb2

    from nos_backend.control.logins import Logins
    from nos_backend.control.tokens import Identity, Tokens

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handlers: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"

_logger = logging.getLogger(__name__)

#: Trailing metadata over 8 KiB is cut off by clients with default settings.
_MAX_ERROR_BYTES: Final = 6 << 10
_MAX_DETAILS: Final = 1000

_caller: contextvars.ContextVar[Identity] = contextvars.ContextVar("caller")
_peer: contextvars.ContextVar[str] = contextvars.ContextVar("peer")


def caller() -> Identity:
    """Return who made the call that the current task serves."""
    return _caller.get()


def actor() -> Actor:
    """Return who made the call that the current task serves, for the audit log."""
    return Actor(token_id=_caller.get().token_id, peer=_peer.get())


class Activity:
    """Counts the calls of clients, so that an idle server can end."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self._last_s = time.monotonic()
        self._quiet = asyncio.Event()
        self._quiet.set()

    @contextlib.contextmanager
    def count(self) -> Iterator[None]:
        """Count what happens inside as one call."""
        self.num_in_flight += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self._last_s = time.monotonic()
            if not self.num_in_flight:
                self._quiet.set()

    async def wait_quiet(self) -> None:
        """Wait until no call is in flight."""
        await self._quiet.wait()

    @property
    def idle_s(self) -> float:
        """Seconds since the last call ended; 0 while one is in flight."""
        return 0.0 if self.num_in_flight else time.monotonic() - self._last_s


class Guard(grpc.GenericRpcHandler):
    """All methods of a server, each behind its permission.

    The `add_..._to_server` functions of generated code take it in place of a server.
    """

    def __init__(self, tokens: Tokens, activity: Activity, logins: Logins) -> None:
        self._tokens = tokens
        self._activity = activity
        self._logins = logins
        self.calls = Calls()
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        #: Set when the server leaves: raised by every call that comes from then on, health excepted.
        self.refusal: NosError | None = None

    @property
    def methods(self) -> Sequence[str]:
        """The full names of the methods served."""
        return list(self._handlers)

    def add_registered_method_handlers(self, service: str, handlers: _Handlers) -> None:
        """Serve the methods of a service.

        Raises:
            ConfigError: If one declares no permission.
        """
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self._handlers[method] = self._guarded(method, handler)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Take no notice: the generated functions hand over the same methods once more by name."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the method that a call names, for gRPC."""
        return self._handlers.get(handler_call_details.method)

    def _guarded(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        least = least_role(method)
        parse: Callable[[bytes], Any] = handler.request_deserializer or bytes
        # Typed as for the threaded server; ours are coroutines and asynchronous generators.
        behavior: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )

        async def respond(request: Any, context: Context) -> Any:
            async with self._admitted(method, least, context):
                parsed = (
                    _parsed_each(parse, request)
                    if handler.request_streaming
                    else _parsed(parse, request)
                )
                response = behavior(parsed, context)
                if not handler.response_streaming:
                    return await response
                if not hasattr(response, "__aiter__"):
                    return await response
                async with contextlib.aclosing(response):
                    async for item in response:
                        await context.write(item)
            return None

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        return make(respond, None, handler.response_serializer)

    def _check_open(self) -> None:
        if self.refusal is not None:
            raise self.refusal.with_traceback(None)

    async def _authenticated(self, method: str, context: Context) -> Identity:
        authorization = _authorization(context)
        try:
            return self._tokens.authenticate(authorization)
        except NosError as error:
            if authorization:
                await self._logins.failed(context.peer(), method, error)
            raise

    def _check_role(
        self, method: str, role: access_pb2.Role.ValueType, least: access_pb2.Role.ValueType
    ) -> None:
        try:
            check_role(role, least)
        except NosError as error:
            self._logins.refused(actor(), method, error)
            raise

    @contextlib.asynccontextmanager
    async def _admitted(
        self, method: str, least: access_pb2.Role.ValueType | None, context: Context
    ) -> AsyncIterator[None]:
        """Let the caller in, and turn whatever is raised inside into a status."""
        try:
            if least is None:
                yield
                return
            identity = await self._authenticated(method, context)
            _caller.set(identity)
            _peer.set(context.peer())
            self._check_role(method, identity.role, least)
            self._check_open()
            with self._activity.count(), self.calls.hold(identity):
                yield
        except grpc.aio.AbortError:
            raise
        except NosError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the top level of a call's task
            failure = _unexpected(method, error)
        else:
            return
        _logger.debug("%s: %s", method, failure)
        await abort(context, failure)


async def abort(context: Context, error: NosError) -> None:
    """End a call with `error`, in its status and whole in the trailing metadata.

    Raises:
        grpc.aio.AbortError: Always.
    """
    message = status.to_message(error)
    if message.ByteSize() > _MAX_ERROR_BYTES:
        message.exception.traceback = message.exception.traceback[-_MAX_ERROR_BYTES // 2 :]
        for field in ("message", "field", "expected", "got", "hint"):
            setattr(message, field, getattr(message, field)[: _MAX_ERROR_BYTES // 16])
        message.exception.message = message.exception.message[: _MAX_ERROR_BYTES // 16]
    await context.abort(
        status.code_of(error),
        str(error)[:_MAX_DETAILS],
        ((ERROR_KEY, message.SerializeToString()),),
    )


def _unexpected(method: str, error: Exception) -> InternalError:
    """Log a defect under an id, and return what the client may know of it."""
    error_id = secrets.token_hex(6)
    _logger.error("error %s in %s", error_id, method, exc_info=error)
    return InternalError(
        "the server has a defect", error_id=error_id, hint="Its log says more under this id"
    )


def _authorization(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN_KEY:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""


def _parsed(parse: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return parse(raw)
    except DecodeError as error:
        raise InvalidRequestError(
            "the message is not of this method's type", got=f"{len(raw)} other bytes"
        ) from error


async def _parsed_each(parse: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> Any:
    async for raw in requests:
        yield _parsed(parse, raw)
