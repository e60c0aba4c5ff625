"""Every error that NOS raises, on either side of the wire.

::

    NosError
    |-- InvalidRequestError         the caller's fault; never retry        (also ValueError)
    |   |-- InvalidTensorError      dtype, shape, rank or bytes
    |   |-- ModelNotFoundError                                             (also LookupError)
    |   |-- MethodNotFoundError                                            (also AttributeError)
    |   |-- AlreadyExistsError
    |   |-- LimitExceededError      a message, tensor or upload is too large
    |   `-- ConfigError             a setting, flag or file of settings
    |-- AccessError                                                        (also PermissionError)
    |   |-- UnauthenticatedError    no credential, or a wrong one
    |   `-- PermissionDeniedError   the credential does not allow it
    |-- OverloadedError             refused at admission; retry later
    |-- OutOfDeviceMemoryError      no placement fits                      (also MemoryError)
    |-- DeadlineExceededError                                              (also TimeoutError)
    |-- CancelledError
    |-- UnavailableError            server or worker gone; retry           (also ConnectionError)
    |   `-- ExecutorLostError       the process that ran the frame died
    |-- ModelError                  the model's own code raised
    |-- LoadError                   the model cannot be loaded
    |   `-- QuarantinedError        it crashed too often
    |-- VersionMismatchError
    |-- InternalError               a defect of the server
    |-- UnimplementedError                                                 (also NotImplementedError)
    `-- StreamClosedError           used after close; raised on the client only

This module imports nothing of the package, so that any layer may raise these. How they travel is in
`nos.wire.status`.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Reason(enum.IntEnum):
    """The machine-readable cause; equals `nos.v1.Reason` number for number."""

    UNSPECIFIED = 0
    INVALID_REQUEST = 1
    INVALID_TENSOR = 2
    MODEL_NOT_FOUND = 3
    METHOD_NOT_FOUND = 4
    ALREADY_EXISTS = 5
    UNAUTHENTICATED = 6
    PERMISSION_DENIED = 7
    OVERLOADED = 8
    OUT_OF_MEMORY = 9
    LIMIT_EXCEEDED = 10
    DEADLINE_EXCEEDED = 11
    CANCELLED = 12
    UNAVAILABLE = 13
    EXECUTOR_LOST = 14
    MODEL_RAISED = 15
    LOAD_FAILED = 16
    QUARANTINED = 17
    VERSION_MISMATCH = 18
    INTERNAL = 19
    UNIMPLEMENTED = 20


class NosError(Exception):
    """Any failure that NOS reports.

    The facts are positional and handed on unchanged, so that every class survives pickling.

    Args:
        message: What is wrong, without a full stop: "unknown argument".
        field: The argument, field, model or setting it is about.
        expected: What would have been right.
        got: What came.
        hint: What to do next, one sentence without a full stop.
        error_id: Names this failure in the server's log.
        retry_after_s: After how many seconds a retry makes sense; 0 if unknown.
    """

    reason: ClassVar[Reason] = Reason.INTERNAL
    #: Whether the same call may succeed later without a change by the caller.
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        field: str = "",
        expected: str = "",
        got: str = "",
        hint: str = "",
        error_id: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message, field, expected, got, hint, error_id, retry_after_s)
        self.message = message
        self.field = field
        self.expected = expected
        self.got = got
        self.hint = hint
        self.error_id = error_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """One sentence: what, expected, got; then the next step."""
        text = self.message
        if self.expected and self.got:
            text += f": expected {self.expected}, got {self.got}"
        elif self.expected:
            text += f": expected {self.expected}"
        elif self.got:
            text += f": got {self.got}"
        if self.error_id:
            text += f" (error id {self.error_id})"
        return f"{text}. {self.hint}" if self.hint else text


class InvalidRequestError(NosError, ValueError):
    """The request is wrong in itself."""

    reason = Reason.INVALID_REQUEST


class InvalidTensorError(InvalidRequestError):
    """A tensor or media value does not fit, or its bytes are not what they claim."""

    reason = Reason.INVALID_TENSOR


class ModelNotFoundError(InvalidRequestError, LookupError):
    """No model of that name or version."""

    reason = Reason.MODEL_NOT_FOUND


class MethodNotFoundError(InvalidRequestError, AttributeError):
    """The model has no such public method."""

    reason = Reason.METHOD_NOT_FOUND


class AlreadyExistsError(InvalidRequestError):
    """The name is taken."""

    reason = Reason.ALREADY_EXISTS


class LimitExceededError(InvalidRequestError):
    """Something is larger than a configured limit."""

    reason = Reason.LIMIT_EXCEEDED


class ConfigError(InvalidRequestError):
    """A setting, flag or settings file is wrong."""


class AccessError(NosError, PermissionError):
    """The caller may not."""

    reason = Reason.PERMISSION_DENIED

    def __str__(self) -> str:
        return NosError.__str__(self)


class UnauthenticatedError(AccessError):
    """No credential, or one that is wrong, expired or revoked."""

    reason = Reason.UNAUTHENTICATED


class PermissionDeniedError(AccessError):
    """The credential does not allow it."""

    reason = Reason.PERMISSION_DENIED


class OverloadedError(NosError):
    """Refused at admission, at once; nothing was queued."""

    reason = Reason.OVERLOADED
    retryable = True


class OutOfDeviceMemoryError(NosError):
    """No placement fits, or the device ran out of memory.

    No MemoryError: CPython keeps those in reserve and cannot always make one of a subclass.
    """

    reason = Reason.OUT_OF_MEMORY


class DeadlineExceededError(NosError, TimeoutError):
    """The deadline passed before the answer."""

    reason = Reason.DEADLINE_EXCEEDED

    def __str__(self) -> str:
        return NosError.__str__(self)


class CancelledError(NosError):
    """Cancelled by the caller."""

    reason = Reason.CANCELLED


class UnavailableError(NosError, ConnectionError):
    """A server, worker or replica is gone or restarting."""

    reason = Reason.UNAVAILABLE
    retryable = True

    def __str__(self) -> str:
        return NosError.__str__(self)


class ExecutorLostError(UnavailableError):
    """The process that ran the frame died; whether the frame's code ran to its end is unknown."""

    reason = Reason.EXECUTOR_LOST


class ModelError(NosError):
    """The model's own code raised.

    Args:
        message: One sentence.
        type_name: Class name of what it raised, for instance `ValueError`.
        remote_message: Its text; empty if the caller may not see it.
        remote_traceback: Its traceback; empty if the caller may not see it.
        error_id: Names this failure in the server's log.
    """

    reason = Reason.MODEL_RAISED

    def __init__(
        self,
        message: str,
        type_name: str = "",
        remote_message: str = "",
        remote_traceback: str = "",
        error_id: str = "",
    ) -> None:
        super().__init__(message, "", "", "", "", error_id)
        self.args = (message, type_name, remote_message, remote_traceback, error_id)
        self.type_name = type_name
        self.remote_message = remote_message
        self.remote_traceback = remote_traceback


class LoadError(NosError):
    """The model cannot be loaded."""

    reason = Reason.LOAD_FAILED


class QuarantinedError(LoadError):
    """The model ended its executor too often and is not run again until it is re-registered."""

    reason = Reason.QUARANTINED


class VersionMismatchError(NosError):
    """Client and server speak no common protocol version."""

    reason = Reason.VERSION_MISMATCH


class InternalError(NosError):
    """A defect of the server; its log has the rest under the error id."""

    reason = Reason.INTERNAL


class UnimplementedError(NosError, NotImplementedError):
    """The server does not offer this operation."""

    reason = Reason.UNIMPLEMENTED


class StreamClosedError(NosError):
    """A stream or client was used after it was closed."""

    reason = Reason.CANCELLED
