"""What comes from an executor: the answers to calls, and its errors as the caller's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from nos.errors import (
    CancelledError,
    InternalError,
    InvalidRequestError,
    InvalidTensorError,
    LimitExceededError,
    LoadError,
    MethodNotFoundError,
    ModelError,
    ModelNotFoundError,
    NosError,
    OutOfDeviceMemoryError,
    UnavailableError,
)

from nos_backend.executor.messages import MalformedError

if TYPE_CHECKING:
    from collections.abc import Callable

#: How much of what a model printed an error quotes.
TRACEBACK_TAIL_LINES: Final = 3
#: As long as the longest that executors tell.
_TEXT_CHARS: Final = 64 << 10
_LONGEST_S: Final = 1e9
#: Errors that an executor may report.
_ERRORS: Final[dict[str, type[NosError]]] = {
    "INVALID_REQUEST": InvalidRequestError,
    "INVALID_TENSOR": InvalidTensorError,
    "MODEL_NOT_FOUND": ModelNotFoundError,
    "METHOD_NOT_FOUND": MethodNotFoundError,
    "LIMIT_EXCEEDED": LimitExceededError,
    "OUT_OF_MEMORY": OutOfDeviceMemoryError,
    "CANCELLED": CancelledError,
    "LOAD_FAILED": LoadError,
    "UNAVAILABLE": UnavailableError,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that an executor has loaded."""

    key: str
    weight_bytes: int
    """Parameters and buffers."""
    load_s: float
    """Running its source and moving its weights."""


@dataclass(frozen=True, slots=True)
class Constructed:
    """A model that an executor has made and does not serve yet."""

    size_bytes: int
    """Of its flat run of weights; 0 if it has none."""
    skeleton_bytes: int
    """Of the rest of it; 0 if it cannot be moved to another executor."""
    immovable: str
    """Why it cannot be moved."""
    made_first: str
    """Why its weights, which are in a file, took memory before they were read; empty if they did not."""
    loose: tuple[str, ...]
    """The first of its tensors that are in no run, each with the reason."""
    took_s: float
    """Running its source and its constructor."""


class Lease:
    """The right to read a block of the output arena; ends once."""

    __slots__ = ("_release",)

    def __init__(self, release: Callable[[], None] | None) -> None:
        """Make one at whose end `release` is called."""
        self._release = release

    def end(self) -> None:
        """End it; more than once is once."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def forget(self) -> None:
        """Have it end without a word."""
        self._release = None


NO_LEASE: Final = Lease(None)
NO_BYTES: Final = memoryview(b"")


@dataclass(slots=True)
class Reply:
    """One answer to a call; handed to its sink, on the loop."""

    kind: str
    """`result`, `item`, `end` or `error`; all but `item` are the last of their call."""
    node: Any = None
    """JSON node, checked; None for `end` and `error`."""
    block: memoryview = NO_BYTES
    """The bytes that the node's offsets count from; valid until `release`."""
    compute_s: float = 0.0
    """In the model's method: for an item since the last one, else in all."""
    error: NosError | None = None
    """Why it failed; set for `error` only."""
    batch_size: int = 1
    """Number of calls that ran as one."""
    raw_node: bytes = b""
    """The node as the executor wrote it, where results like it are expected; else empty."""
    can_repeat: bool = False
    """Whether the call ran out of memory and can be made again with the same input; see `take_input`."""
    _lease: Lease = field(default=NO_LEASE, repr=False)

    def release(self) -> None:
        """Let the executor use the block again; every reply wants this once, more do no harm."""
        self._lease.end()

    def take_input(self) -> None:
        """Keep the input of a call that can be repeated from being given back by `release`."""
        self._lease.forget()

    @classmethod
    def repeatable(cls, reply: Reply, release: Callable[[], None] | None) -> Reply:
        """Return the end of a call that ran out of memory; `release` gives its input back."""
        return replace(reply, can_repeat=True, _lease=Lease(release))

    @classmethod
    def shared(
        cls,
        node: Any,
        block: memoryview,
        compute_s: float,
        batch_size: int,
        release: Callable[[], None],
    ) -> Reply:
        """Return one call's result of a batch; `release` is called once."""
        return cls("result", node, block, compute_s, None, batch_size, _lease=Lease(release))


def to_error(facts: dict[str, Any]) -> NosError:
    """Return what an executor reports; whatever it is not known for is the model's own."""
    if facts["reason"] == "MODEL_RAISED":
        return ModelError(
            *(_text(facts[name]) for name in ("message", "type_name", "text", "traceback"))
        )
    cls = _ERRORS.get(facts["reason"], InternalError)
    message, about, expected, got, hint = (
        _text(facts.get(name, "")) for name in ("message", "field", "expected", "got", "hint")
    )
    return cls(message, about, expected, got, hint)


def _text(value: Any) -> str:
    """Return what an executor tells as text that any message can carry: of a limited length, and Unicode."""
    return str(value)[:_TEXT_CHARS].encode(errors="replace").decode()


def to_seconds(value: Any) -> float:
    """Return a time that an executor tells.

    Raises:
        MalformedError: If it cannot be one.
    """
    seconds = float(value)
    if not 0 <= seconds < _LONGEST_S:
        raise MalformedError(f"{seconds} s")
    return seconds


def to_load_error(key: str, error: NosError) -> NosError:
    """Return what the load of `key` failed with, as its caller is to read it."""
    if isinstance(error, OutOfDeviceMemoryError):
        return OutOfDeviceMemoryError(
            f"{key} does not fit: {error.message}", expected=error.expected
        )
    if isinstance(error, ModelError):
        tail = error.remote_traceback.strip().splitlines()[-TRACEBACK_TAIL_LINES:]
        text = "\n".join(tail) or error.message
        return LoadError(f"{key} cannot be loaded: {text}")
    return LoadError(
        f"{key} cannot be loaded: {error.message}", error.field, error.expected, error.got
    )
