"""The catalogue and the cluster's state, put together as clients see them; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nos.errors import LoadError
from nos.wire import status
from nos.wire.v1 import cluster_pb2, errors_pb2, models_pb2

if TYPE_CHECKING:
    from nos_backend.control.catalogue import Entry
    from nos_backend.control.cluster import State

_STATES: Final[dict[str, models_pb2.ModelState.ValueType]] = {
    "waiting": models_pb2.MODEL_STATE_LOADING,
    "loading": models_pb2.MODEL_STATE_LOADING,
    "idle": models_pb2.MODEL_STATE_REGISTERED,
    "loaded": models_pb2.MODEL_STATE_DEVICE,
    "device": models_pb2.MODEL_STATE_DEVICE,
    "host": models_pb2.MODEL_STATE_HOST,
    "disk": models_pb2.MODEL_STATE_DISK,
    "failed": models_pb2.MODEL_STATE_FAILED,
    "quarantined": models_pb2.MODEL_STATE_FAILED,
}

#: From the best to the worst.
_RANKS: Final = (
    models_pb2.MODEL_STATE_DEVICE,
    models_pb2.MODEL_STATE_LOADING,
    models_pb2.MODEL_STATE_HOST,
    models_pb2.MODEL_STATE_DISK,
    models_pb2.MODEL_STATE_FAILED,
    models_pb2.MODEL_STATE_REGISTERED,
)


def model_info(entry: Entry, state: State, number: int | None = None) -> models_pb2.ModelInfo:
    """Describe one model as it stands.

    Args:
        entry: Of the catalogue.
        state: Of the cluster.
        number: The version wanted; None for the newest. Replicas are those of this version.
    """
    version = entry.versions[number] if number is not None else entry.newest
    info = models_pb2.ModelInfo(state=models_pb2.MODEL_STATE_REGISTERED)
    if entry.error is not None and number is None:
        info.state = models_pb2.MODEL_STATE_FAILED
        info.error.CopyFrom(status.to_message(entry.error))
    if version is None:
        info.spec.name = entry.name
        info.spec.owner = entry.owner
        return info
    info.spec.CopyFrom(version.spec)
    placed = state["models"].get(version.key)
    if placed is None:
        # Workers report once a second: until then they still list what was just unloaded.
        return info
    info.scaling.CopyFrom(_scaling(placed))
    for worker in state["workers"]:
        phase = placed["replicas"].get(worker["name"], "")
        told = [
            model for model in worker["status"].get("models", ()) if model["key"] == version.key
        ]
        for model in told:
            info.replicas.append(_replica(worker, model, phase))
            _add_error(info, model.get("error"))
        if phase and not told:
            info.replicas.add(
                worker=worker["name"],
                device=worker["device"],
                state=_state_of("loaded" if phase == "serving" else "loading"),
                phase=phase,
            )
    states = {replica.state for replica in info.replicas} or {_state_of(placed["state"])}
    _add_error(info, placed.get("error"))
    best = next((rank for rank in _RANKS if rank in states), models_pb2.MODEL_STATE_LOADING)
    if info.state != models_pb2.MODEL_STATE_FAILED:
        info.state = best
        if best != models_pb2.MODEL_STATE_FAILED:
            info.ClearField("error")
    return info


def loaded_keys(entry: Entry, state: State) -> list[str]:
    """Return the keys of the entry's versions that were asked of the cluster."""
    return [version.key for version in entry.versions.values() if version.key in state["models"]]


def workers(state: State) -> list[cluster_pb2.Worker]:
    """Describe the workers, in order of names."""
    return [_worker(worker) for worker in sorted(state["workers"], key=lambda item: item["name"])]


def replicas(state: State) -> list[cluster_pb2.ModelReplicas]:
    """Describe how many replicas models have and should have, in order of their keys."""
    return [
        cluster_pb2.ModelReplicas(
            model=key,
            num_serving=sum(phase == "serving" for phase in placed["replicas"].values()),
            scaling=_scaling(placed),
        )
        for key, placed in sorted(state["models"].items())
    ]


def _worker(worker: dict[str, Any]) -> cluster_pb2.Worker:
    now = worker["status"]
    described = cluster_pb2.Worker(
        name=worker["name"],
        address=worker["address"],
        pid=worker["pid"],
        num_queued=now.get("num_queued", 0),
        num_running=now.get("num_running", 0),
        num_streams=now.get("num_streams", 0),
        num_executors=now.get("num_executors", 0),
        is_retiring=worker.get("is_retiring", False),
        note=worker.get("note", ""),
    )
    if confinement := now.get("confinement"):
        described.confinement.CopyFrom(cluster_pb2.Confinement(**confinement))
    device = described.device
    device.name = worker["device"]
    device.product = worker["product"]
    device.capacity_bytes = worker["capacity_bytes"] or 0
    device.used_bytes = now.get("used_bytes", 0)
    for model in now.get("models", ()):
        device.models.add(
            model=model["name"],
            owner=model.get("owner", ""),
            device_bytes=model.get("device_bytes", 0),
            host_bytes=model.get("host_bytes", 0),
        )
    return described


def _scaling(placed: dict[str, Any]) -> models_pb2.Scaling:
    return models_pb2.Scaling(
        min_replicas=placed["min_replicas"],
        max_replicas=placed["max_replicas"],
        target_replicas=placed["target"],
        reason=placed["why"],
        pending=placed["pending"],
    )


def _replica(worker: dict[str, Any], model: dict[str, Any], phase: str) -> models_pb2.Replica:
    return models_pb2.Replica(
        worker=worker["name"],
        device=worker["device"],
        state=_state_of(model.get("state")),
        device_bytes=model.get("device_bytes", 0),
        num_pending=model.get("num_pending", 0),
        num_answered=model.get("num_answered", 0),
        load_s=model.get("load_s") or 0.0,
        history=[models_pb2.Transition(**move) for move in model.get("history", ())],
        host_bytes=model.get("host_bytes", 0),
        note=model.get("note", ""),
        phase=phase,
    )


def _state_of(name: Any) -> models_pb2.ModelState.ValueType:
    return _STATES.get(str(name), models_pb2.MODEL_STATE_UNSPECIFIED)


def _add_error(info: models_pb2.ModelInfo, error: Any) -> None:
    """Add why a replica failed: a serialized `nos.v1.Error`, or a sentence."""
    if not error or info.HasField("error"):
        return
    if isinstance(error, bytes):
        info.error.CopyFrom(errors_pb2.Error.FromString(error))
    else:
        info.error.CopyFrom(status.to_message(LoadError(str(error))))
