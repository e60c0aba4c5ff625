"""What is said of models that are not served as they should be: a sentence, or the error of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nos.errors import Reason
from nos.wire.v1 import errors_pb2

from nos_backend.scheduling.placement import Refusal
from nos_backend.scheduling.reconcile import Failure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nos_backend.scheduling.placement import WorkerLoad
    from nos_backend.scheduling.reconcile import Model


def why_missing(model: Model, loads: Iterable[WorkerLoad]) -> str:
    """Return why replicas of a model are missing, for people; empty if none is.

    Args:
        model: As the reconciler has it.
        loads: Of all workers.
    """
    if model.pending is None:
        return ""
    if isinstance(model.pending, Failure):
        return model.pending.message
    needs, said = model.needs, model.pending.value
    if model.pending is Refusal.NO_DEVICE:
        return f"{said}: {needs.device}"
    if model.pending is Refusal.NO_MEMORY:
        return f"{said}: {needs.memory_bytes} bytes, of at most {_most_bytes(loads)}"
    if model.pending is Refusal.NO_ROOM:
        return f"{said}: {needs.weight_bytes} bytes, of at most {_most_bytes(loads)}"
    return said


def failed(failure: Failure) -> bytes:
    """Return the error (a `nos.v1.Error`) of a model that could not be loaded."""
    return failure.detail or error(Reason.LOAD_FAILED, failure.message)


def refused(key: str, model: Model, loads: Iterable[WorkerLoad]) -> bytes:
    """Return the error (a `nos.v1.Error`) of a model that no worker takes now."""
    pending = model.pending or Refusal.NO_WORKER
    why = pending.message if isinstance(pending, Failure) else pending.value
    message = f"model {key!r} cannot be placed: {why}"
    if model.pending is Refusal.NO_DEVICE:
        return error(
            Reason.LOAD_FAILED,
            message,
            expected=f"device {model.needs.device}",
            got=", ".join(sorted({load.device for load in loads})),
        )
    if model.pending is Refusal.NO_PACKAGES:
        return error(Reason.LOAD_FAILED, message)
    if model.pending is Refusal.NO_MEMORY:
        return error(
            Reason.LOAD_FAILED,
            message,
            expected=f"at most {_most_bytes(loads)} bytes",
            got=f"{model.needs.memory_bytes} bytes",
        )
    if model.pending is Refusal.NO_ROOM:
        return error(
            Reason.OUT_OF_MEMORY,
            message,
            expected=f"at most {_most_bytes(loads)} bytes of weights",
            got=f"{model.needs.weight_bytes} bytes",
        )
    return error(
        Reason.UNAVAILABLE, message, hint="A lost worker is replaced within seconds; try again"
    )


def error(reason: Reason, message: str, expected: str = "", got: str = "", hint: str = "") -> bytes:
    """Return a serialized `nos.v1.Error`, as Dask's comms carry it."""
    return errors_pb2.Error(
        reason=errors_pb2.Reason.ValueType(int(reason)),
        message=message,
        expected=expected,
        got=got,
        hint=hint,
    ).SerializeToString()


def _most_bytes(loads: Iterable[WorkerLoad]) -> int:
    return max((load.capacity_bytes for load in loads), default=0)
