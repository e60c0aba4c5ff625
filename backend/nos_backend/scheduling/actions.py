"""What goes into the device's queue, and what it answers: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Hashable

    from nos.errors import NosError

    from nos_backend.scheduling.caps import Cap


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One unit of work, as far as scheduling cares."""

    id: int
    model: str
    tenant: str
    size_bytes: int = 0
    deadline_s: float | None = None
    """When its answer is worth nothing any more, on the clock of `now_s`."""
    may_wait: bool = False
    """Admitted although the queue is full: its sender waits for it, and has few of them by its window."""
    key: Hashable | None = None
    """Requests of a model with equal keys may run as one batch; None runs alone."""
    rows: int = 1
    """How much of a batch it is."""
    sender: int = 0
    """Whoever sends its next request on the answer to this one, for instance a stream; 0 for nobody known."""
    weight: float = 1.0
    """Its tenant's share of the device, against those of others."""
    is_bulk: bool = False
    """Nobody waits for it in particular: it has a small share while anything else has work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Requests that run in one forward pass."""

    id: int
    model: str
    executor: str
    requests: tuple[Request, ...]
    rows: int = 1
    """Of all requests."""
    gather_s: float = 0.0
    """How long it could have run and waited for more requests instead."""
    is_suspect: bool = False
    """Whether one of its requests may be what ended an executor."""
    is_train: bool = False
    """Whether its requests run one after the other, each answered as it ends."""


@dataclass(frozen=True, slots=True)
class Start:
    """Hand the batch to its executor."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request was not admitted; tell its caller."""

    request_id: int
    error: NosError


@dataclass(frozen=True, slots=True)
class End:
    """The request is over: deliver its result, or `error` instead of it."""

    request_id: int
    error: NosError | None


@dataclass(frozen=True, slots=True)
class PutBack:
    """The executor died of a batch: its requests without an end will be started again.

    In smaller ones, to find the one that ended it; or, of a train, those behind the one that did.
    """

    batch: Batch


@dataclass(frozen=True, slots=True)
class Culprit:
    """The request ended an executor within a batch and then alone; its `End` follows."""

    request_id: int


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Nobody waits for this running request any more; a generator may stop."""

    request_id: int
    executor: str


@dataclass(frozen=True, slots=True)
class KillExecutor:
    """End the process; `executor_lost` is expected to follow."""

    executor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """The executor is idle and gets no batch until `release`."""

    executor: str


@dataclass(frozen=True, slots=True)
class Capped:
    """A model's batches have other limits by what they taught; to be given back when it is opened again."""

    model: str
    cap: Cap | None
    """None: no more."""


@dataclass(frozen=True, slots=True)
class Drained:
    """A model under `drain` has no request left."""

    model: str


Action: TypeAlias = (
    Start | Refuse | End | PutBack | Culprit | CancelCall | KillExecutor | Held | Capped | Drained
)
