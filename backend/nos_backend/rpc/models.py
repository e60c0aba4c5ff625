"""ModelService: the catalogue, and the life of its models on the cluster."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from nos.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
)
from nos.wire.signature import bind, check_call
from nos.wire.v1 import access_pb2, models_pb2, models_pb2_grpc
from nos.wire.values import check

from nos_backend.control import report, statistics
from nos_backend.control.blobs import disk_errors
from nos_backend.control.catalogue import BUILT_IN_OWNER
from nos_backend.control.describe import DEVICES, ISOLATIONS, PLACEMENTS
from nos_backend.control.describe_apart import describe_apart
from nos_backend.control.names import parse_reference
from nos_backend.control.registry import Limits
from nos_backend.control.requirements import normalize
from nos_backend.definition import INIT_FILE, ModelDefinition
from nos_backend.hub import references
from nos_backend.rpc.guard import actor, caller
from nos_backend.worker.arguments import check_arguments, to_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nos_backend.control.catalogue import Catalogue, Entry
    from nos_backend.control.cluster import StateCache
    from nos_backend.control.describe import Description
    from nos_backend.control.events import Events
    from nos_backend.control.folders import FolderStore
    from nos_backend.control.profiles import Profiles
    from nos_backend.control.registrar import Registrar
    from nos_backend.control.resolver import Resolver
    from nos_backend.control.scaling import Scaler
    from nos_backend.rpc.guard import Context

#: More replicas of one model than anybody has devices for is a slip of the hand.
MAX_REPLICAS: Final = 1024

_SETTLE_S: Final = 2.5
_SETTLE_POLL_S: Final = 0.5


class ModelService(models_pb2_grpc.ModelServiceServicer):
    """Serves `nos.v1.ModelService`."""

    def __init__(
        self,
        catalogue: Catalogue,
        registrar: Registrar,
        folders: FolderStore,
        states: StateCache,
        resolver: Resolver,
        events: Events,
        profiles: Profiles,
        scaler: Scaler,
    ) -> None:
        self._catalogue = catalogue
        self._registrar = registrar
        self._folders = folders
        self._states = states
        self._resolver = resolver
        self._events = events
        self._profiles = profiles
        self._scaler = scaler

    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        """List the catalogue."""
        state = await self._states.read()
        return models_pb2.ListModelsResponse(
            models=[
                report.model_info(entry, state)
                for entry in self._catalogue.entries(request.pattern)
            ]
        )

    async def GetModelInfo(
        self, request: models_pb2.GetModelInfoRequest, context: Context
    ) -> models_pb2.GetModelInfoResponse:
        """Describe one model."""
        return models_pb2.GetModelInfoResponse(model=await self._info(request.model))

    async def RegisterModel(
        self, request: models_pb2.RegisterModelRequest, context: Context
    ) -> models_pb2.RegisterModelResponse:
        """Take a source as a model."""
        _check_option("device", request.device, DEVICES)
        _check_option("isolation", request.isolation, ISOLATIONS)
        if request.repository or request.task:
            request = _of_repository(request)
        source_name = request.source_name or f"<{request.name or 'model'}>"
        descriptions = await describe_apart(
            request.source, request.class_name, source_name, self._catalogue.max_source_bytes
        )
        if len(descriptions) > 1:
            names = ", ".join(description.class_name for description in descriptions)
            raise InvalidRequestError(
                "the source holds several models", "class_name", f"one of {names[:200]}"
            )
        description = descriptions[0]
        if request.HasField("is_pinned"):
            description.spec.is_pinned = request.is_pinned
        if request.HasField("idle_unload_s"):
            description.spec.idle_unload_s = _idle_unload_s(request.idle_unload_s)
        name = request.name or description.spec.name
        init = _init(description.init, request)
        folder = ""
        if request.files or request.data:
            with disk_errors("files"):
                folder = str(await asyncio.to_thread(self._make_folder, request))
        definition = ModelDefinition(
            name=name,
            version=0,
            owner=self._owner(name),
            source=request.source,
            source_name=source_name,
            class_name=description.class_name,
            folder=folder,
            init=init,
            environment=normalize(request.environment),
            device=request.device or "auto",
            isolation=request.isolation or "shared",
        )
        await self._try(definition, description, request)
        version = await self._registrar.register(definition, description, actor())
        return models_pb2.RegisterModelResponse(model=await self._info(version.definition.name))

    async def LoadModel(
        self, request: models_pb2.LoadModelRequest, context: Context
    ) -> models_pb2.LoadModelResponse:
        """Load a model and wait for it; its owner may pin it."""
        version = self._catalogue.find(request.model)
        if request.HasField("is_pinned"):
            _check_owner(self._catalogue.entry(request.model))
            version = self._catalogue.pin(version, is_pinned=request.is_pinned)
        await self._resolver.load(version)
        return models_pb2.LoadModelResponse(model=await self._info(request.model, max_age_s=0))

    async def UnloadModel(
        self, request: models_pb2.UnloadModelRequest, context: Context
    ) -> models_pb2.UnloadModelResponse:
        """Unload one version, or all of them where none is named."""
        entry = self._catalogue.entry(request.model)
        _check_owner(entry)
        if "@" in request.model:
            keys = [self._catalogue.find(request.model).key]
        else:
            keys = report.loaded_keys(entry, await self._states.read(0))
        for key in keys:
            await self._scaler.forget(key, actor())
            await self._resolver.unload(key)
        return models_pb2.UnloadModelResponse(model=await self._info(request.model, max_age_s=0))

    async def DeleteModel(
        self, request: models_pb2.DeleteModelRequest, context: Context
    ) -> models_pb2.DeleteModelResponse:
        """Forget a model, then unload all its versions."""
        if "@" in request.model:
            raise InvalidRequestError(
                "a model is deleted with all its versions", "model", "a bare name", request.model
            )
        entry = self._catalogue.entry(request.model)
        _check_owner(entry)
        keys = report.loaded_keys(entry, await self._states.read(0))
        for number in entry.versions:
            await self._scaler.forget(f"{entry.name}@v{number}", actor())
        await self._registrar.delete(entry.name, actor())
        for key in keys:
            await self._resolver.unload(key)
        return models_pb2.DeleteModelResponse()

    async def ScaleModel(
        self, request: models_pb2.ScaleModelRequest, context: Context
    ) -> models_pb2.ScaleModelResponse:
        """Say how many replicas a model may have; the server sees to it from then on."""
        entry = self._catalogue.entry(request.model)
        _check_owner(entry)
        low, high = request.min_replicas, request.max_replicas
        if not max(1, low) <= high <= MAX_REPLICAS:
            raise InvalidRequestError(
                "the numbers of replicas are wrong",
                "max_replicas",
                f"{max(1, low)} .. {MAX_REPLICAS}",
                f"{low} to {high}",
            )
        _check_option("device", request.device, DEVICES)
        _check_option("placement", request.placement, PLACEMENTS)
        limits = Limits(
            min_replicas=low,
            max_replicas=high,
            device=request.device,
            memory_bytes=request.memory_bytes if request.HasField("memory_bytes") else None,
            placement=request.placement,
        )
        await self._scaler.scale(self._catalogue.find(request.model), limits, actor())
        return models_pb2.ScaleModelResponse(model=await self._info(request.model, max_age_s=0))

    async def GetLogs(
        self, request: models_pb2.GetLogsRequest, context: Context
    ) -> models_pb2.GetLogsResponse:
        """Return what a model printed, to its owner."""
        _check_owner(self._catalogue.entry(request.model))
        version = self._catalogue.find(request.model)
        logs = await self._resolver.logs(version.key, request.max_lines)
        lines = [
            models_pb2.LogLine(time_s=time_s, worker=worker, text=text)
            for worker, found in logs.items()
            for time_s, text in found
        ]
        lines.sort(key=lambda line: line.time_s)
        return models_pb2.GetLogsResponse(lines=lines[-request.max_lines or None :])

    async def GetProfile(
        self, request: models_pb2.GetProfileRequest, context: Context
    ) -> models_pb2.GetProfileResponse:
        """Say what a model needs."""
        version = self._catalogue.find(request.model)
        profile = await self._profiles.get(version, self._resolver)
        return models_pb2.GetProfileResponse(profile=profile)

    async def GetStats(
        self, request: models_pb2.GetStatsRequest, context: Context
    ) -> models_pb2.GetStatsResponse:
        """Say what became of requests; only admins see who else used a model."""
        keys = [self._catalogue.find(request.model).key] if request.model else None
        state = await self._states.read(0)
        tenant = None if caller().role == access_pb2.ROLE_ADMIN else caller().tenant
        return models_pb2.GetStatsResponse(models=statistics.stats(state, keys, tenant))

    async def WatchModels(
        self, request: models_pb2.WatchModelsRequest, context: Context
    ) -> AsyncIterator[models_pb2.WatchModelsResponse]:
        """Send all infos, then each that changes."""
        #: What the client knows, by name.
        told: dict[str, models_pb2.WatchModelsResponse] = {}
        settled_s = 0.0
        with self._events.watch() as watcher:
            while True:
                state = await self._states.read(0)
                names = {entry.name for entry in self._catalogue.entries()} | told.keys()
                for name in sorted(names):
                    change = self._change(name, state)
                    if change.is_deleted:
                        del told[name]
                    elif _is_news(change, told.get(name)):
                        told[name] = change
                    else:
                        continue
                    yield change
                # Workers report once a second, so news may follow an event late.
                loading = any(
                    change.model.state == models_pb2.MODEL_STATE_LOADING for change in told.values()
                )
                unsettled = loading or time.monotonic() < settled_s
                if await watcher.take(_SETTLE_POLL_S if unsettled else None):
                    settled_s = time.monotonic() + _SETTLE_S

    async def _try(
        self,
        definition: ModelDefinition,
        description: Description,
        request: models_pb2.RegisterModelRequest,
    ) -> None:
        """Have a model made, and called if there is an example, before it is accepted.

        Raises:
            LoadError: If its code fails.
            InvalidRequestError: If the example does not fit it.
        """
        version = self._catalogue.prepare(definition, description)
        call = None
        if request.has_example:
            method = request.example_method or _main_method(version.spec)
            call = asdict(
                check_arguments(
                    version.spec, method, request.example_arguments, len(request.example_data)
                )
            )
        entry = self._catalogue.get(definition.name)
        is_known = entry is not None and version.definition.version in entry.versions
        if not (is_known or request.is_untried or definition.environment):
            await self._resolver.attempt(version.definition, call, request.example_data)

    def _make_folder(self, request: models_pb2.RegisterModelRequest) -> Path:
        files = list(request.files)
        if request.data:
            files.append(self._folders.keep(INIT_FILE, request.data))
        return self._folders.make(files)

    def _owner(self, name: str) -> str:
        """Return whose model a registration makes: an admin's goes to whoever has the name."""
        identity, entry = caller(), self._catalogue.get(name)
        if entry is None or entry.owner == BUILT_IN_OWNER or identity.role < access_pb2.ROLE_ADMIN:
            return identity.tenant
        return entry.owner

    def _change(self, name: str, state: dict[str, Any]) -> models_pb2.WatchModelsResponse:
        try:
            entry = self._catalogue.entry(name)
        except ModelNotFoundError:
            spec = models_pb2.ModelSpec(name=name)
            return models_pb2.WatchModelsResponse(
                model=models_pb2.ModelInfo(spec=spec), is_deleted=True
            )
        return models_pb2.WatchModelsResponse(model=report.model_info(entry, state))

    async def _info(self, reference: str, max_age_s: float = 0.1) -> models_pb2.ModelInfo:
        entry = self._catalogue.entry(reference)
        _, number = parse_reference(reference)
        if number is not None:
            number = self._catalogue.find(reference).definition.version
        return report.model_info(entry, await self._states.read(max_age_s), number)


def _is_news(
    change: models_pb2.WatchModelsResponse, told: models_pb2.WatchModelsResponse | None
) -> bool:
    """Tell whether more than the counters of calls differ."""
    if told is None:
        return True
    now, before = models_pb2.ModelInfo(), models_pb2.ModelInfo()
    now.CopyFrom(change.model)
    before.CopyFrom(told.model)
    for replica in (*now.replicas, *before.replicas):
        replica.num_pending = replica.num_answered = 0
    return now != before


def _check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value and value not in choices:
        raise InvalidRequestError(
            f"option {name} is wrong", name, f"one of {', '.join(choices)}", repr(value[:80])
        )


def _idle_unload_s(given: float) -> float:
    if not 0 <= given < float("inf"):
        raise InvalidRequestError(
            "option idle_unload_s is wrong", "idle_unload_s", "seconds, 0 for never", f"{given}"
        )
    return given


def _check_owner(entry: Entry) -> None:
    """Accept the owner of a model, and admins.

    Raises:
        PermissionDeniedError: If the caller is neither.
    """
    identity = caller()
    if identity.role < access_pb2.ROLE_ADMIN and identity.tenant != entry.owner:
        raise PermissionDeniedError(
            f"{entry.name} is another owner's", "model", entry.owner, identity.tenant
        )


def _of_repository(request: models_pb2.RegisterModelRequest) -> models_pb2.RegisterModelRequest:
    """Return a request with the source that serves a repository of the hub.

    Raises:
        InvalidRequestError: If it names none, or has a source beside it.
    """
    _check_option("task", request.task or "none", tuple(references.TASKS))
    found = references.find(request.repository, request.task)
    if found is None or request.source or request.init_arguments:
        raise InvalidRequestError(
            "this is no repository of the hub",
            "repository",
            "org/name or org/name@revision, without a source or init arguments",
            repr(request.repository[:100]),
        )
    filled = models_pb2.RegisterModelRequest()
    filled.CopyFrom(request)
    filled.name = request.name or found.name
    filled.source, filled.class_name = found.source, found.class_name
    filled.source_name = found.source_name
    for name, text in (
        ("repository", found.name),
        ("revision", found.revision),
        ("folder", found.folder),
    ):
        filled.init_arguments.add(name=name).value.text = text
    filled.init_arguments.add(name="remote_code").value.flag = request.allows_remote_code
    return filled


def _main_method(spec: models_pb2.ModelSpec) -> str:
    return spec.methods[0].name if len(spec.methods) == 1 else ""


def _init(
    method: models_pb2.Method, request: models_pb2.RegisterModelRequest
) -> list[tuple[str, Any]]:
    """Check what `__init__` is to be called with, and return it as executors read it, by name."""
    given = list(request.init_arguments)
    kept = [file.size_bytes for file in request.files if file.path == INIT_FILE]
    if kept and request.data:
        raise InvalidRequestError(
            "the bytes of the init arguments came twice", "data", f"either data or {INIT_FILE}"
        )
    for index, item in enumerate(given):
        check(item.value, sum(kept) or len(request.data), item.name or f"argument {index}")
    check_call(method, given)
    args = [to_node(item.value) for item in given if not item.name]
    bound = bind(method, args, {item.name: to_node(item.value) for item in given if item.name})
    if any(not name for name, _ in bound):
        raise InvalidRequestError(
            "*args of __init__ cannot be given", "init_arguments", "arguments by name"
        )
    return bound
