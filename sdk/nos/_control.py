"""The server's calls with one answer, and its feeds: path, request, and what the answer means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

from nos import types
from nos.errors import InvalidRequestError, NosError, VersionMismatchError
from nos.wire import signature, status, values
from nos.wire.v1 import cluster_pb2, models_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.message import Message

    from nos.wire.v1 import values_pb2

T = TypeVar("T")

#: The server gives a load up by itself after 300 s.
LOAD_TIMEOUT_S: Final = 330.0

_MODELS: Final = "/nos.v1.ModelService/"
_CLUSTER: Final = "/nos.v1.ClusterService/"


@dataclass(frozen=True, slots=True)
class Rpc(Generic[T]):
    """A call to be made: nothing has been sent yet."""

    path: str
    request: Message
    #: Turns the answer's bytes, or each message of a feed, into what the user gets.
    parse: Callable[[bytes], T]
    #: Replaces the client's default where the server may rightly take longer.
    timeout_s: float | None = None

    def read(self, raw: bytes) -> T:
        """Return what an answer, or a message of a feed, means.

        Raises:
            NosError: If it says so.
            VersionMismatchError: If it means nothing to this version.
        """
        try:
            return self.parse(raw)
        except NosError:
            raise
        except Exception as error:  # protobuf's DecodeError is no stable class across its backends
            raise VersionMismatchError(
                "the server's answer makes no sense",
                got=f"{len(raw)} bytes for {self.path}: {error!r:.200}",
                hint="Another version may serve there; install the client of that version",
            ) from error


def list_models(pattern: str) -> Rpc[types.ModelList]:
    """Ask for the catalogue."""

    def parse(raw: bytes) -> types.ModelList:
        response = models_pb2.ListModelsResponse.FromString(raw)
        return types.ModelList(to_info(model) for model in response.models)

    return Rpc(_MODELS + "ListModels", models_pb2.ListModelsRequest(pattern=pattern), parse)


def get_info(model: str) -> Rpc[types.ModelInfo]:
    """Ask about one model."""
    request = models_pb2.GetModelInfoRequest(model=model)
    return Rpc(
        _MODELS + "GetModelInfo",
        request,
        lambda raw: to_info(models_pb2.GetModelInfoResponse.FromString(raw).model),
    )


def get_spec(model: str) -> Rpc[models_pb2.ModelSpec]:
    """Ask for a model's interface, as calls are checked against."""
    request = models_pb2.GetModelInfoRequest(model=model)
    return Rpc(
        _MODELS + "GetModelInfo",
        request,
        lambda raw: models_pb2.GetModelInfoResponse.FromString(raw).model.spec,
    )


def load(model: str, *, pin: bool | None = None) -> Rpc[types.ModelInfo]:
    """Have a model placed; answered when it can answer. `pin` None leaves it pinned or not."""
    return Rpc(
        _MODELS + "LoadModel",
        models_pb2.LoadModelRequest(model=model, is_pinned=pin),
        lambda raw: to_info(models_pb2.LoadModelResponse.FromString(raw).model),
        LOAD_TIMEOUT_S,
    )


def unload(model: str) -> Rpc[types.ModelInfo]:
    """Have a model taken off its devices; answered when its work in flight is done."""
    return Rpc(
        _MODELS + "UnloadModel",
        models_pb2.UnloadModelRequest(model=model),
        lambda raw: to_info(models_pb2.UnloadModelResponse.FromString(raw).model),
        LOAD_TIMEOUT_S,
    )


def scale(
    model: str,
    replicas: int | None,
    low: int | None,
    high: int | None,
    *,
    device: str = "",
    memory_bytes: int | None = None,
    placement: str = "",
) -> Rpc[types.ModelInfo]:
    """Say how many replicas a model may have, and what they want of their devices.

    Raises:
        InvalidRequestError: If the numbers are missing, or contradict each other.
    """
    if (replicas is None) == (low is None and high is None):
        raise InvalidRequestError(
            "how many replicas?",
            "replicas",
            "replicas, or min and max",
            "both" if replicas else "neither",
        )
    if replicas is not None:
        low = high = replicas
    low = 1 if low is None else low
    high = max(low, 1) if high is None else high
    if memory_bytes is not None and not 0 <= memory_bytes < 1 << 63:
        raise InvalidRequestError(
            "memory_bytes is wrong",
            "memory_bytes",
            "a number of bytes, 0 for any",
            str(memory_bytes),
        )
    if not 0 <= low <= high or high < 1:
        raise InvalidRequestError(
            "the numbers of replicas are wrong",
            "max",
            f"at least {max(1, low)}",
            f"{low} to {high}",
        )
    return Rpc(
        _MODELS + "ScaleModel",
        models_pb2.ScaleModelRequest(
            model=model,
            min_replicas=low,
            max_replicas=high,
            device=device,
            memory_bytes=memory_bytes,
            placement=placement,
        ),
        lambda raw: to_info(models_pb2.ScaleModelResponse.FromString(raw).model),
    )


def delete(model: str) -> Rpc[None]:
    """Have a model forgotten."""
    return Rpc(
        _MODELS + "DeleteModel",
        models_pb2.DeleteModelRequest(model=model),
        lambda _raw: None,
        LOAD_TIMEOUT_S,
    )


def get_logs(model: str, max_lines: int) -> Rpc[list[types.LogLine]]:
    """Ask what a model printed."""

    def parse(raw: bytes) -> list[types.LogLine]:
        lines = models_pb2.GetLogsResponse.FromString(raw).lines
        return [
            types.LogLine(time_s=line.time_s, worker=line.worker, text=line.text) for line in lines
        ]

    request = models_pb2.GetLogsRequest(model=model, max_lines=max_lines)
    return Rpc(_MODELS + "GetLogs", request, parse)


#: Arguments of a call: (name or nothing, value).
Example: TypeAlias = "Sequence[tuple[str, Any]]"


def register(
    source: str,
    class_name: str,
    *,
    init: Sequence[values_pb2.Argument],
    name: str,
    device: str,
    isolation: str,
    source_name: str,
    env: Sequence[str] = (),
    files: Sequence[models_pb2.ModelFile] = (),
    example: Example | None = None,
    check: bool = True,
    repository: str = "",
    task: str = "",
    remote_code: bool = False,
    pin: bool | None = None,
    idle_unload_s: float | None = None,
) -> Rpc[types.ModelInfo]:
    """Make a model of source text.

    Args:
        source: Python.
        class_name: Its top-level name that is the model.
        init: What `__init__` is called with; the bytes of its tensors are among the files.
        name: The model's name; empty leaves it to the source.
        device: As in the request; empty leaves it to the source.
        isolation: Likewise.
        source_name: Where the source came from.
        env: Packages that it needs besides the server's; none leaves it to the source.
        files: What it needs beside its source; uploaded before.
        example: A call that is made before it is accepted.
        check: Whether it is made before it is accepted.
        repository: Of the hub, instead of a source.
        task: What that is for.
        remote_code: Whether its code may run.
        pin: Whether it stays on its device; None leaves it to the source.
        idle_unload_s: Likewise, after how long without use it leaves.
    """
    request = models_pb2.RegisterModelRequest(
        source=source,
        class_name=class_name,
        init_arguments=init,
        name=name,
        device=device,
        isolation=isolation,
        source_name=source_name,
        environment=env,
        files=files,
        is_untried=not check,
        repository=repository,
        task=task,
        allows_remote_code=remote_code,
        is_pinned=pin,
        idle_unload_s=idle_unload_s,
    )
    if example is not None:
        nodes, payload = values.write_arguments(example)
        request.has_example = True
        request.example_arguments.extend(nodes)
        request.example_data = b"".join(payload.buffers)
    return Rpc(
        _MODELS + "RegisterModel",
        request,
        lambda raw: to_info(models_pb2.RegisterModelResponse.FromString(raw).model),
        LOAD_TIMEOUT_S,
    )


def get_status(address: str, source: str, routes: dict[str, str]) -> Rpc[types.Status]:
    """Ask how the server stands; the arguments complete the answer."""
    return Rpc(
        _CLUSTER + "GetStatus",
        cluster_pb2.GetStatusRequest(),
        lambda raw: to_status(
            cluster_pb2.GetStatusResponse.FromString(raw), address, source, routes
        ),
    )


def scale_workers(count: int | None, low: int, high: int) -> Rpc[list[str]]:
    """Say how many workers there are on the server's machine."""
    if count is not None:
        low = high = count
    return Rpc(
        _CLUSTER + "ScaleWorkers",
        cluster_pb2.ScaleWorkersRequest(min_workers=max(0, low), max_workers=max(0, high)),
        lambda raw: list(cluster_pb2.ScaleWorkersResponse.FromString(raw).workers),
    )


def resolve(model: str) -> Rpc[cluster_pb2.ResolveResponse]:
    """Ask the way to a model; loads it if need be."""
    return Rpc(
        _CLUSTER + "Resolve",
        cluster_pb2.ResolveRequest(model=model),
        cluster_pb2.ResolveResponse.FromString,
        LOAD_TIMEOUT_S,
    )


def watch_models() -> Rpc[types.ModelChange]:
    """Follow the catalogue."""

    def parse(raw: bytes) -> types.ModelChange:
        response = models_pb2.WatchModelsResponse.FromString(raw)
        return types.ModelChange(model=to_info(response.model), is_deleted=response.is_deleted)

    return Rpc(_MODELS + "WatchModels", models_pb2.WatchModelsRequest(), parse)


def watch_events(status_interval_s: float, address: str) -> Rpc[types.Event]:
    """Follow the cluster."""

    def parse(raw: bytes) -> types.Event:
        return _to_event(cluster_pb2.WatchEventsResponse.FromString(raw), address)

    request = cluster_pb2.WatchEventsRequest(status_interval_s=status_interval_s)
    return Rpc(_CLUSTER + "WatchEvents", request, parse)


def to_spec(message: models_pb2.ModelSpec) -> types.ModelSpec:
    """Return the interface as users see it."""
    return types.ModelSpec(
        name=message.name,
        version=message.version,
        owner=message.owner,
        doc=message.doc,
        methods=tuple(to_method(method) for method in message.methods),
        device=message.device,
        isolation=message.isolation,
        environment=tuple(message.environment),
        source_sha256=message.source_sha256,
        weight_bytes=message.weight_bytes,
        call_timeout_s=message.call_timeout_s,
        is_pinned=message.is_pinned,
        memory_bytes=message.memory_bytes,
        placement=message.placement or "spread",
        idle_unload_s=message.idle_unload_s if message.HasField("idle_unload_s") else None,
    )


def to_method(message: models_pb2.Method) -> types.MethodInfo:
    """Return a method as users see it."""
    return types.MethodInfo(
        name=message.name,
        doc=message.doc,
        parameters=tuple(
            types.ParameterInfo(
                name=it.name,
                annotation=it.type.annotation,
                wants=signature.describe(it.type),
                has_default=it.has_default,
                default_text=it.default_text,
                is_variadic=it.is_variadic,
                is_keywords=it.is_keywords,
                **_typed(it.type),
            )
            for it in message.parameters
        ),
        returns=message.returns.annotation,
        is_generator=message.is_generator,
        batches=tuple(message.batching.parameters),
        takes_turns=message.batching.is_each,
        padded=message.batching.padded,
        max_batch=message.batching.max_rows,
        queue_delay_s=(
            message.batching.queue_delay_s if message.batching.HasField("queue_delay_s") else None
        ),
    )


def _typed(kind: models_pb2.Type) -> dict[str, Any]:
    """Return the fields of a parameter that say what it takes to a program."""
    return {
        "kind": _kind_name(kind),
        "item_kind": _kind_name(kind.item),
        "dtype": values.dtype_name(kind.dtype) if kind.dtype else "",
        "shape": tuple(it.name or it.size for it in kind.shape) if kind.has_shape else None,
        "choices": tuple(_choice(choice) for choice in kind.choices),
        "is_optional": kind.is_optional,
    }


def _choice(choice: values_pb2.Value) -> Any:
    values.check(choice, 0, "choices")
    return values.read(choice, memoryview(b""))


def _kind_name(kind: models_pb2.Type) -> str:
    if kind.kind == models_pb2.TYPE_KIND_UNSPECIFIED:
        return "anything"
    return values.enum_name(models_pb2.TypeKind, kind.kind, "TYPE_KIND_")


def to_info(message: models_pb2.ModelInfo) -> types.ModelInfo:
    """Return a model as users see it."""
    has_error = message.HasField("error")
    return types.ModelInfo(
        spec=to_spec(message.spec),
        state=_state(message.state),
        replicas=tuple(
            types.ReplicaInfo(
                worker=it.worker,
                device=it.device,
                state=_state(it.state),
                device_bytes=it.device_bytes,
                num_pending=it.num_pending,
                num_answered=it.num_answered,
                load_s=it.load_s,
                history=tuple(
                    types.Transition(
                        time_s=move.time_s,
                        source=move.source,
                        target=move.target,
                        reason=move.reason,
                        moved_bytes=move.moved_bytes,
                        took_s=move.took_s,
                    )
                    for move in it.history
                ),
                host_bytes=it.host_bytes,
                note=it.note,
                phase=it.phase,
            )
            for it in message.replicas
        ),
        error=str(status.from_message(message.error)) if has_error else "",
        scaling=_to_scaling(message.scaling) if message.HasField("scaling") else None,
    )


def to_status(
    message: cluster_pb2.GetStatusResponse, address: str, source: str, routes: dict[str, str]
) -> types.Status:
    """Return the server's state as users see it."""
    return types.Status(
        version=message.version,
        state=message.state,
        uptime_s=message.uptime_s,
        workers=tuple(_to_worker(worker) for worker in message.workers),
        num_models=message.num_models,
        dashboard_url=message.dashboard_url,
        scheduler_address=message.scheduler_address,
        address=address,
        source=source,
        routes=routes,
        notices=tuple(message.notices),
        models=tuple(
            types.ModelReplicas(
                model=it.model, num_serving=it.num_serving, scaling=_to_scaling(it.scaling)
            )
            for it in message.models
        ),
        tenants=tuple(
            types.TenantUsage(
                tenant=it.tenant,
                device_s=it.device_s,
                device_bytes=it.device_bytes,
                num_streams=it.num_streams,
            )
            for it in message.tenants
        ),
        events=tuple(_to_event(event, address) for event in message.events),
    )


def _to_event(message: cluster_pb2.WatchEventsResponse, address: str) -> types.Event:
    has_status = message.HasField("status")
    return types.Event(
        time_s=message.time_s,
        kind=message.kind,
        model=message.model,
        worker=message.worker,
        message=message.message,
        status=to_status(message.status, address, "", {}) if has_status else None,
    )


def _to_scaling(message: models_pb2.Scaling) -> types.Scaling:
    return types.Scaling(
        min_replicas=message.min_replicas,
        max_replicas=message.max_replicas,
        target_replicas=message.target_replicas,
        reason=message.reason,
        pending=message.pending,
    )


def _to_worker(message: cluster_pb2.Worker) -> types.Worker:
    device = message.device
    return types.Worker(
        name=message.name,
        address=message.address,
        pid=message.pid,
        device=types.Device(
            name=device.name,
            product=device.product,
            capacity_bytes=device.capacity_bytes,
            used_bytes=device.used_bytes,
            models=tuple(
                types.ModelMemory(
                    model=it.model,
                    owner=it.owner,
                    device_bytes=it.device_bytes,
                    host_bytes=it.host_bytes,
                )
                for it in device.models
            ),
        ),
        num_queued=message.num_queued,
        num_running=message.num_running,
        num_streams=message.num_streams,
        num_executors=message.num_executors,
        is_retiring=message.is_retiring,
        note=message.note,
        confinement=types.Confinement(
            tier=message.confinement.tier,
            covers=tuple(message.confinement.covers),
            lacks=message.confinement.lacks,
        ),
    )


def _state(number: models_pb2.ModelState.ValueType) -> str:
    return values.enum_name(models_pb2.ModelState, number, "MODEL_STATE_")
