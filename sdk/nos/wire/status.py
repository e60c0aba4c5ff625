"""The one table between errors, their messages and gRPC status codes, both ways."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import grpc
from google.protobuf.message import DecodeError

from nos import errors
from nos.errors import NosError, Reason
from nos.wire.limits import ERROR_KEY
from nos.wire.v1 import errors_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

_Code = grpc.StatusCode

#: Every reason, the class that stands for it, and the status that carries it.
TABLE: Final[dict[Reason, tuple[type[NosError], grpc.StatusCode]]] = {
    Reason.INVALID_REQUEST: (errors.InvalidRequestError, _Code.INVALID_ARGUMENT),
    Reason.INVALID_TENSOR: (errors.InvalidTensorError, _Code.INVALID_ARGUMENT),
    Reason.MODEL_NOT_FOUND: (errors.ModelNotFoundError, _Code.NOT_FOUND),
    Reason.METHOD_NOT_FOUND: (errors.MethodNotFoundError, _Code.NOT_FOUND),
    Reason.ALREADY_EXISTS: (errors.AlreadyExistsError, _Code.ALREADY_EXISTS),
    Reason.UNAUTHENTICATED: (errors.UnauthenticatedError, _Code.UNAUTHENTICATED),
    Reason.PERMISSION_DENIED: (errors.PermissionDeniedError, _Code.PERMISSION_DENIED),
    Reason.OVERLOADED: (errors.OverloadedError, _Code.RESOURCE_EXHAUSTED),
    Reason.OUT_OF_MEMORY: (errors.OutOfDeviceMemoryError, _Code.RESOURCE_EXHAUSTED),
    Reason.LIMIT_EXCEEDED: (errors.LimitExceededError, _Code.RESOURCE_EXHAUSTED),
    Reason.DEADLINE_EXCEEDED: (errors.DeadlineExceededError, _Code.DEADLINE_EXCEEDED),
    Reason.CANCELLED: (errors.CancelledError, _Code.CANCELLED),
    Reason.UNAVAILABLE: (errors.UnavailableError, _Code.UNAVAILABLE),
    Reason.EXECUTOR_LOST: (errors.ExecutorLostError, _Code.UNAVAILABLE),
    Reason.MODEL_RAISED: (errors.ModelError, _Code.INTERNAL),
    Reason.LOAD_FAILED: (errors.LoadError, _Code.FAILED_PRECONDITION),
    Reason.QUARANTINED: (errors.QuarantinedError, _Code.FAILED_PRECONDITION),
    Reason.VERSION_MISMATCH: (errors.VersionMismatchError, _Code.FAILED_PRECONDITION),
    Reason.INTERNAL: (errors.InternalError, _Code.INTERNAL),
    Reason.UNIMPLEMENTED: (errors.UnimplementedError, _Code.UNIMPLEMENTED),
}

#: For a status without our detail: it came from gRPC itself or from something between.
_BY_CODE: Final[dict[grpc.StatusCode, Reason]] = {
    _Code.INVALID_ARGUMENT: Reason.INVALID_REQUEST,
    _Code.NOT_FOUND: Reason.MODEL_NOT_FOUND,
    _Code.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    _Code.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    _Code.RESOURCE_EXHAUSTED: Reason.LIMIT_EXCEEDED,
    _Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    _Code.CANCELLED: Reason.CANCELLED,
    _Code.UNAVAILABLE: Reason.UNAVAILABLE,
    _Code.UNIMPLEMENTED: Reason.UNIMPLEMENTED,
}


def code_of(error: NosError) -> grpc.StatusCode:
    """Return the gRPC status code that carries `error`."""
    return TABLE[error.reason][1]


def to_message(error: NosError) -> errors_pb2.Error:
    """Return `error` as it travels."""
    message = errors_pb2.Error(
        reason=errors_pb2.Reason.ValueType(int(error.reason)),
        message=error.message,
        field=error.field,
        expected=error.expected,
        got=error.got,
        hint=error.hint,
        error_id=error.error_id,
        retry_after_s=error.retry_after_s,
    )
    if isinstance(error, errors.ModelError):
        message.exception.type_name = error.type_name
        message.exception.message = error.remote_message
        message.exception.traceback = error.remote_traceback
    return message


def from_message(message: errors_pb2.Error) -> NosError:
    """Return the error that `message` carries; one of an unknown reason becomes an `InternalError`."""
    try:
        cls = TABLE[Reason(message.reason)][0]
    except (ValueError, KeyError):
        cls = errors.InternalError
    if cls is errors.ModelError:
        return errors.ModelError(
            message.message,
            message.exception.type_name,
            message.exception.message,
            message.exception.traceback,
            message.error_id,
        )
    return cls(
        message.message,
        message.field,
        message.expected,
        message.got,
        message.hint,
        message.error_id,
        message.retry_after_s,
    )


def from_status(
    code: grpc.StatusCode, details: str, metadata: Iterable[tuple[str, str | bytes]] | None
) -> NosError:
    """Return the error behind a failed RPC.

    Args:
        code: Its status.
        details: Its text.
        metadata: Its trailing metadata, where our servers put the whole error.
    """
    for key, value in metadata or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                return from_message(errors_pb2.Error.FromString(value))
    reason = _BY_CODE.get(code, Reason.INTERNAL)
    return TABLE[reason][0](details or code.name.lower().replace("_", " "))
