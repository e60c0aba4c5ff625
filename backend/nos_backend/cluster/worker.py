"""The worker's part: a Dask worker that carries a device's `ModelManager` and data plane.

Import-light on purpose: the nanny imports this module before it sets the environment of its child, and a
nanny needs no grpc.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dask.config
from distributed import Worker
from distributed.diagnostics.plugin import WorkerPlugin
from nos.errors import ConfigError, InternalError, NosError, UnavailableError

from nos_backend import hub
from nos_backend.cluster.device import WorkerSettings, describe_device, free_bytes, split_paths
from nos_backend.cluster.launch import WORKER_DEFAULTS
from nos_backend.definition import ModelDefinition
from nos_backend.own_memory import hide_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from nos.wire.v1 import access_pb2

    from nos_backend.cluster.device import Device
    from nos_backend.cluster.folders import FolderCache
    from nos_backend.control.tickets import TicketVerifier
    from nos_backend.worker.arguments import Call
    from nos_backend.worker.manager import ModelManager
    from nos_backend.worker.service import DataPlane

_logger = logging.getLogger(__name__)

# So that `dask worker --worker-class` by hand needs no configuration: this module is imported before the
# nanny reads it, and what a user configured wins.
dask.config.update_defaults(dask.config.collect_env(WORKER_DEFAULTS))

_TOPIC: Final = "nos"
#: A thread that holds the interpreter lock gives it up after this long, not after 5 ms: else small requests
#: wait behind Dask's threads (p50 of 6 ms instead of 1.3 ms was measured).
_SWITCH_INTERVAL_S: Final = 0.0005
_DRAIN_S: Final = 8.0
#: How often a device is looked for: one that fell off its bus answers no call, and NVML lists it no more.
_DEVICE_CHECK_S: Final = 2.0
#: Of a CUDA device's memory; the rest is for contexts and activations, until those are measured.
_USABLE_SHARE: Final = 0.85


class ServingWorker(Worker):
    """A Dask worker bound to one device: `dask worker --worker-class nos_backend.cluster.ServingWorker`."""

    def __init__(self, *args: Any, plugins: tuple[WorkerPlugin, ...] = (), **kwargs: Any) -> None:
        self._nos_host = HostPlugin(WorkerSettings.from_environ(os.environ))
        #: Whether it was one of the cluster's; before, its nanny waits to hear why it is not.
        self._has_joined = False
        super().__init__(*args, plugins=(*plugins, self._nos_host), **kwargs)

    async def start_unsafe(self) -> ServingWorker:
        """Start and register; then leave word for the supervisor where it asked for that."""
        await super().start_unsafe()  # type: ignore[no-untyped-call]
        self._has_joined = True
        self._nos_host.announce()
        return self

    async def close(self, *args: Any, **kwargs: Any) -> str | None:  # type: ignore[override]
        """Close as any worker does; where a nanny started this process, end it with that."""
        closed = await super().close(*args, **kwargs)
        if closed and self.nanny and self._has_joined:
            # Nothing is left to do, and Dask would wait 2 s for a word of the nanny's that does not come.
            asyncio.get_running_loop().call_soon(os._exit, 0)
        return closed


class HostPlugin(WorkerPlugin):
    """Starts the data plane before the worker registers, so that a worker that cannot serve never joins."""

    name = "nos-host"
    idempotent = True

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._device: Device
        self._folders: FolderCache
        self._worker: Worker
        self._manager: ModelManager
        self._plane: DataPlane
        #: Checks tickets; None until the gateway's key came, and until then every call is refused.
        self._verifier: TicketVerifier | None = None
        #: Tokens whose tickets are refused, whichever key signed them.
        self._revoked: set[str] = set()
        #: The manager's last status; replaced whole, so that any thread may read it.
        self._status: dict[str, Any] = {}
        self._is_refreshing = False
        #: Ends the worker when its device is gone; None for the processor, which cannot go.
        self._device_watch: asyncio.Task[None] | None = None

    async def setup(self, worker: Worker) -> None:
        """Start the data plane and add the handlers that the scheduler calls."""
        from nos.wire.host import host_id, is_loopback

        from nos_backend.cluster.folders import FOLDERS_TOPIC, FolderCache
        from nos_backend.worker.service import DataPlane

        hide_memory()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        device = describe_device(self._settings.device, os.environ)
        self._worker, self._device = worker, device
        self._folders = FolderCache(
            Path(self._settings.files_dir or Path(worker.local_directory, "files")),
            lambda name: worker.log_event(FOLDERS_TOPIC, {"folder": name}),
            self._settings.files_bytes,
        )
        host = self._settings.host or worker.ip
        tls = None if is_loopback(host) else _tls_of(worker)
        self._plane = DataPlane(
            self._make_manager,
            self._verify,
            host,
            max_streams=self._settings.max_streams,
            max_tenant_streams=self._settings.max_tenant_streams,
            tls=tls,
        )
        await asyncio.to_thread(self._plane.start)
        try:
            await self._refresh()
        except asyncio.CancelledError as ended:
            # Dask takes only an Exception for a failed setup.
            raise InternalError("the data plane ended while it started") from ended
        # What is there now stays; a collection that walked all of it held every stream up for tens of ms.
        gc.freeze()
        information = {
            "address": self._plane.address,
            "is_encrypted": tls is not None,
            "unix_socket": self._plane.unix_socket,
            "host_id": host_id(),
            "pid": os.getpid(),
            "version": metadata.version("nos-inference"),
            "device": device.name,
            "product": device.product,
            "installs": bool(self._settings.environments_dir),
            "capacity_bytes": self._status.get("capacity_bytes") or device.memory_bytes,
        }
        if device.name != "cpu":
            self._device_watch = asyncio.create_task(self._watch_device(), name="watch device")
        worker.startup_information["nos"] = lambda _: information
        worker.metrics["nos"] = self._measure
        worker.handlers["nos_keys"] = self.set_keys
        worker.handlers["nos_revoke"] = self.revoke
        worker.handlers["nos_load"] = self.load
        worker.handlers["nos_try"] = self.attempt
        worker.handlers["nos_unload"] = self.unload
        worker.handlers["nos_state"] = self.state
        worker.handlers["nos_logs"] = self.logs
        worker.handlers["nos_profile"] = self.profile
        worker.handlers["nos_memory"] = self.memory
        worker.handlers["nos_folder_begin"] = self._folders.begin
        worker.handlers["nos_folder_piece"] = self._folders.piece
        worker.handlers["nos_folder_end"] = self._folders.end

    async def teardown(self, worker: Worker) -> None:
        """Finish what is in flight, then stop the data plane and the executors."""
        if self._device_watch is not None:
            self._device_watch.cancel()
        await asyncio.to_thread(self._plane.stop, _DRAIN_S)

    def announce(self) -> None:
        """Write the data plane's address into the ready file, by rename."""
        if self._settings.ready_file:
            path = Path(self._settings.ready_file)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(self._plane.address, encoding="utf-8")
            temporary.replace(path)

    # Handlers: called by the ServePlane through a Dask comm; plain containers in and out, and never raising.

    async def set_keys(self, public_key: bytes) -> dict[str, Any]:
        """Verify tickets with this key from now on."""
        from nos_backend.control.tickets import TicketVerifier

        verifier = TicketVerifier(bytes(public_key))
        verifier.revoke(self._revoked)
        self._verifier = verifier
        return {}

    async def revoke(self, token_ids: list[str]) -> dict[str, Any]:
        """Refuse the tickets of these tokens from now on, and cut their streams."""
        self._revoked.update(token_ids)
        if self._verifier is not None:
            self._verifier.revoke(token_ids)
        self._plane.revoke(token_ids)
        return {}

    async def load(self, definition: dict[str, Any]) -> dict[str, Any]:
        """Load a model; returns the status when it answers, `{"error": nos.v1.Error}` when it cannot."""
        return await self._attempt(self._load(ModelDefinition.from_dict(definition)))

    async def attempt(
        self, definition: dict[str, Any], call: dict[str, Any] | None, data: bytes
    ) -> dict[str, Any]:
        """Make a model and one call of it, and forget it; `{"error": nos.v1.Error}` when that fails."""
        from nos_backend.worker.arguments import Call

        made = Call(**call) if call else None
        return await self._attempt(self._try(ModelDefinition.from_dict(definition), made, data))

    async def unload(self, key: str, budget_s: float = 0.0) -> dict[str, Any]:
        """Unload a model once its streams have moved on and its work in flight is done.

        Args:
            key: The model.
            budget_s: How long streams may stay that do not heed it; 0 for the usual time.
        """
        work = self._on_plane(lambda: self._plane.unload(key, budget_s or None))
        reply = await self._attempt(work)
        self._folders.release(key)
        return reply

    async def state(self) -> dict[str, Any]:
        """Return the manager's status as of now."""
        await self._refresh()
        return self._status

    async def memory(self) -> dict[str, Any]:
        """Return what the device held, from change to change."""

        async def read() -> list[dict[str, Any]]:
            return self._manager.timeline()

        samples = await asyncio.wrap_future(self._plane.submit_coroutine(read))
        return {"device": self._device.name, "samples": samples}

    async def profile(self, key: str) -> dict[str, Any]:
        """Return how far a model's profile is; empty if the model is not here."""

        async def read() -> dict[str, Any]:
            return self._manager.profile(key)

        return await asyncio.wrap_future(self._plane.submit_coroutine(read))

    async def logs(self, key: str, max_lines: int) -> dict[str, Any]:
        """Return the last lines that a model printed here."""

        async def read() -> list[tuple[float, str]]:
            return self._manager.logs(key, max_lines)

        lines = await asyncio.wrap_future(self._plane.submit_coroutine(read))
        return {"lines": [list(line) for line in lines]}

    async def _load(self, definition: ModelDefinition) -> None:
        here = await self._with_files(definition.key, definition)
        try:
            await self._on_plane(lambda: self._plane.load(here))
        except BaseException:
            self._folders.release(definition.key)
            raise

    async def _try(self, definition: ModelDefinition, call: Call | None, data: bytes) -> None:
        key = f"{definition.key} tried"
        try:
            here = await self._with_files(key, definition)
            await self._on_plane(lambda: self._manager.attempt(here, call, data))
        finally:
            self._folders.release(key)

    async def _with_files(self, key: str, definition: ModelDefinition) -> ModelDefinition:
        """Return a definition with the places that its files have on this machine."""
        here = await asyncio.to_thread(hub.find_here, definition)
        return replace(here, folder=await self._folders.find(key, here.folder))

    async def _on_plane(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await asyncio.wrap_future(self._plane.submit_coroutine(work))

    async def _attempt(self, work: Coroutine[Any, Any, None]) -> dict[str, Any]:
        from nos.wire.status import to_message

        error: NosError
        try:
            await work
            await self._refresh()
        except NosError as failure:
            error = failure
        except Exception:
            error_id = os.urandom(6).hex()
            _logger.exception("error id %s", error_id)
            error = InternalError("the worker failed", error_id=error_id)
        else:
            return {"status": self._status}
        return {"error": to_message(error).SerializeToString()}

    # Called on the data plane's thread.

    def _make_manager(self) -> ModelManager:
        from nos_backend.worker.bounds import BoundsOptions, Confinement
        from nos_backend.worker.environments import EnvironmentOptions, Environments
        from nos_backend.worker.limits import WorkLimits
        from nos_backend.worker.manager import ModelManager
        from nos_backend.worker.memory import MemoryOptions
        from nos_backend.worker.profiles import ProfileOptions
        from nos_backend.worker.surroundings import Probes

        settings, capacity_bytes = self._settings, self._settings.capacity_bytes
        if capacity_bytes is None and self._device.name != "cpu":
            usable_bytes = int(self._device.memory_bytes * _USABLE_SHARE)
            capacity_bytes = usable_bytes // settings.num_sharing
        memory = MemoryOptions(
            capacity_bytes=capacity_bytes,
            headroom_bytes=settings.headroom_bytes,
            eviction=settings.eviction,
            max_models=settings.max_models or None,
            idle_unload_s=settings.idle_unload_s or None,
            host_bytes=settings.host_bytes,
            folder=Path(settings.weights_dir) if settings.weights_dir else None,
        )
        profiles = None
        if settings.profile_s:
            profiles = ProfileOptions(self._device.product, settings.profile_s)
        confinement = Confinement(
            BoundsOptions(
                is_off=settings.confinement == "off",
                closed=[
                    *split_paths(settings.closed_paths),
                    *_key_files(self._worker),
                    self._folders.root,
                ],
                readable=[*split_paths(settings.readable_paths), self._folders.root],
                homes=Path(settings.homes_dir) if settings.homes_dir else None,
                memory_bytes=settings.executor_bytes,
            )
        )
        environments = None
        if settings.environments_dir:
            folder = Path(settings.environments_dir)
            environments = Environments(EnvironmentOptions(folder=folder))
            environments.collect()
        self._manager = ModelManager(
            device=self._device.name,
            memory=memory,
            environments=environments,
            confinement=confinement,
            profiles=profiles,
            on_event=self._tell,
            probes=Probes(device_room_bytes=partial(free_bytes, self._device.name, os.environ)),
            limits=WorkLimits(
                max_queued=settings.max_queued,
                max_queued_bytes=settings.max_queued_bytes,
                load_timeout_s=settings.load_timeout_s,
                max_frame_bytes=settings.max_frame_bytes,
                max_image_pixels=settings.max_image_pixels,
                max_log_lines=settings.max_log_lines,
            ),
        )
        return self._manager

    async def _watch_device(self) -> None:
        while True:
            await asyncio.sleep(_DEVICE_CHECK_S)
            try:
                await asyncio.to_thread(describe_device, self._device.name, os.environ)
            except ConfigError:
                _logger.error("%s is gone", self._device.name)  # noqa: TRY400 - a sentence, not a traceback
                # Not from here: the teardown ends this task.
                self._worker.loop.add_callback(self._worker.close, reason="nos-device-gone")
                return

    def _verify(self, raw: bytes) -> access_pb2.Ticket:
        if self._verifier is None:
            raise UnavailableError("the worker knows no key yet", hint="Try again in a second")
        return self._verifier.verify(raw, time.time())

    def _tell(self, kind: str, model: str, message: str) -> None:
        event = {"kind": kind, "name": str(self._worker.name), "model": model, "message": message}
        with contextlib.suppress(
            RuntimeError
        ):  # the worker's loop is closed: nobody listens any more
            self._worker.loop.add_callback(self._worker.log_event, _TOPIC, event)

    # The status: asked for on the data plane's loop, kept here, handed to each heartbeat.

    def _measure(self, worker: Worker) -> dict[str, Any]:
        if not self._is_refreshing:
            self._is_refreshing = True
            try:
                refresh = self._plane.submit_coroutine(self._take_status)
            except (
                RuntimeError
            ):  # its loop is closed: without it the worker is of no use, and is replaced
                worker.loop.add_callback(worker.close, reason="nos-data-plane-ended")
            else:
                refresh.add_done_callback(self._refreshed)
        return self._status

    def _refreshed(self, _: object) -> None:
        self._is_refreshing = False

    async def _refresh(self) -> None:
        await asyncio.wrap_future(self._plane.submit_coroutine(self._take_status))

    async def _take_status(self) -> None:
        self._status = {
            **self._manager.status(),
            "num_streams": self._plane.num_streams,
            "streams": self._plane.streams_by_tenant,
        }


def _key_files(worker: Worker) -> list[Path]:
    """Return where the key of a worker's Dask comms is: with it, one runs code on the whole cluster."""
    security: Any = worker.security
    texts = (security.tls_worker_key, security.tls_worker_cert)
    return [Path(text).absolute() for text in texts if text and "\n" not in text]


def _tls_of(worker: Worker) -> tuple[bytes, bytes] | None:
    """Return the key and the certificate of a worker's Dask comms, for its other port; None if it has none.

    Raises:
        ConfigError: If clients would not accept them.
    """
    from nos_backend.cluster.certificates import check_worker_certificate

    security: Any = worker.security
    if not security.tls_worker_cert:
        return None
    # Dask takes the PEM text itself, too, and a key in the file of its certificate.
    given = (security.tls_worker_key or security.tls_worker_cert, security.tls_worker_cert)
    try:
        key, cert = (text.encode() if "\n" in text else Path(text).read_bytes() for text in given)
    except OSError as error:
        raise ConfigError(
            "the worker's certificate cannot be read", "tls_cert", got=str(error)
        ) from error
    check_worker_certificate(cert)
    return key, cert
