"""The gateway's way to the cluster: one Dask client, which loads and unloads models and hears of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from distributed import Client, Security
from nos.errors import NosError, UnavailableError
from nos.wire.status import from_message
from nos.wire.v1 import errors_pb2

from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.folders import FOLDERS_TOPIC, FolderSender

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from nos_backend.definition import ModelDefinition

_logger = logging.getLogger(__name__)

_TOPIC: Final = "nos"
#: How often a lost connection is looked for; no message is sent for it.
_WATCH_S: Final = 0.5
_RETRY_S: Final = 0.3
_CONNECT_S: Final = 5.0
_HINT: Final = "It is restarted within seconds; try again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a loaded model answers."""

    worker: str
    """The worker's name."""
    address: str
    """Where its data plane listens, `host:port`."""
    unix_socket: str = ""
    """Where it listens for clients of its host; empty if nowhere."""
    host_id: str = ""
    """Names its host and that host's boot."""
    is_encrypted: bool = False
    """Whether `address` takes TLS only."""
    num_pending: int = field(default=0, compare=False)
    """Calls that waited or ran on its worker when last heard of."""


@dataclass(slots=True)
class _Wanted:
    """What the plane is asked again after it was lost."""

    definition: ModelDefinition
    #: Whether it answered.
    is_loaded: bool = False
    #: The fewest and most replicas; None if nobody said.
    limits: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """Something that happened in the cluster."""

    time_s: float
    """When, in seconds since 1970, by the scheduler's clock."""
    kind: str
    """`worker-joined`, `worker-refused`, `worker-lost`, `worker-retiring`, `worker-retired`, `loading`,
    `loaded`, `unloaded`, `failed`, `executor-lost`, `scaled`, `draining`, `replicas` (a model's replicas are
    others now)."""
    model: str = ""
    """The model's key, `name@v3`; may be empty."""
    worker: str = ""
    """The worker's name; may be empty."""
    message: str = ""
    """One sentence for people."""


class ClusterLink:
    """Talks to the `ServePlane` of a Dask scheduler; all methods belong to one asyncio loop.

    It outlives the scheduler: after a restart it connects again, sends the key again, asks again for every
    model that was loaded through it and calls `on_reconnected`.
    """

    def __init__(
        self,
        on_reconnected: Callable[[], Awaitable[None]] | None = None,
        *,
        folders: Path | None = None,
    ) -> None:
        """Make an unconnected link.

        Args:
            on_reconnected: Called after a lost scheduler was found again.
            folders: Where models' folders are, named by their content, for workers that do not see them.
        """
        self._sender = FolderSender(folders) if folders is not None else None
        self.on_reconnected = on_reconnected
        #: Where the Dask dashboard listens, an URL; empty before `connect` or if there is none.
        self.dashboard_url = ""
        #: The scheduler's address; empty before `connect`.
        self.address = ""
        self._security: Security | None = None
        #: None while there is no connection.
        self._client: Client | None = None
        #: The comm that `_client` began with: Dask reconnects silently, to a scheduler that knows nothing.
        self._comm: Any = None
        self._watcher: asyncio.Task[None] | None = None
        self._public_key = b""
        #: Tokens to be refused, to say so again after the scheduler was lost.
        self._revoked: list[str] = []
        #: What was asked for, by key, to ask again after the scheduler was lost.
        self._wanted: dict[str, _Wanted] = {}
        self._callbacks: dict[object, Callable[[ClusterEvent], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_connected(self) -> bool:
        """Whether the scheduler answers at the moment."""
        client = self._client
        return (
            client is not None
            and self._comm is not None
            and client.status == "running"
            and not self._comm.comm.closed()
            and client.scheduler_comm is self._comm
        )

    async def connect(
        self, address: str, tls_dir: Path | None = None, timeout_s: float = 30.0
    ) -> None:
        """Connect, waiting for a scheduler that is still starting.

        Args:
            address: The scheduler's, `tls://127.0.0.1:8786`.
            tls_dir: Folder with `ca.pem`, `cert.pem`, `key.pem`; None for a scheduler without TLS.
            timeout_s: How long to try.

        Raises:
            UnavailableError: If it does not answer in time, or has no ServePlane.
        """
        self.address = address
        if tls_dir is not None:
            files = TlsFiles(tls_dir)
            self._security = Security(
                tls_ca_file=str(files.ca),
                tls_client_cert=str(files.cert),
                tls_client_key=str(files.key),
                require_encryption=True,
            )
        deadline = time.monotonic() + timeout_s
        while not await self._try_connect():
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "no Dask scheduler with the NOS plane answers",
                    expected=f"one at {address}",
                    hint="Start it with `dask scheduler --preload nos_backend.cluster.preload`",
                )
            await asyncio.sleep(_RETRY_S)
        self._watcher = asyncio.create_task(self._watch())

    async def set_keys(self, public_key: bytes) -> None:
        """Tell every worker, those to come included, which key signs tickets.

        Raises:
            UnavailableError: If the scheduler does not answer; the key is sent when it does again.
        """
        self._public_key = public_key
        await self._ask("nos_keys", public_key=public_key)

    async def revoke(self, token_id: str) -> None:
        """Have every worker, those to come included, refuse a token's tickets and cut its streams.

        Raises:
            UnavailableError: If the scheduler does not answer; it is told when it does again.
        """
        self._revoked.append(token_id)
        await self._ask("nos_revoke", token_ids=[token_id])

    async def load(self, definition: ModelDefinition) -> list[Placement]:
        """Place a model and wait until it answers; at once if it already does.

        Returns:
            All its replicas that answer, the least loaded first.

        Raises:
            LoadError: If it cannot be loaded.
            OutOfDeviceMemoryError: If no worker has room.
            UnavailableError: If there is no worker, or the scheduler does not answer.
        """
        reply = await self._ask("nos_load", definition=definition.to_dict())
        wanted = self._wanted.setdefault(definition.key, _Wanted(definition))
        wanted.definition, wanted.is_loaded = definition, True
        return [
            Placement(
                worker=str(replica["worker"]),
                address=str(replica["address"]),
                unix_socket=str(replica["unix_socket"]),
                host_id=str(replica["host_id"]),
                is_encrypted=bool(replica["is_encrypted"]),
                num_pending=int(replica["num_pending"]),
            )
            for replica in reply["replicas"]
        ]

    async def attempt(
        self, definition: ModelDefinition, call: dict[str, Any] | None, data: bytes
    ) -> None:
        """Have a worker make a model and one call of it, and forget it.

        Args:
            definition: Of a model that need not be served.
            call: Fields of a `nos_backend.worker.arguments.Call`; None for none.
            data: What its nodes' offsets count into.

        Raises:
            LoadError: If its code fails.
            OutOfDeviceMemoryError: If that worker has no room.
            UnavailableError: If there is no worker, or the scheduler does not answer.
        """
        await self._ask("nos_try", definition=definition.to_dict(), call=call, data=data)

    async def scale(
        self, definition: ModelDefinition, min_replicas: int, max_replicas: int
    ) -> None:
        """Say how many replicas a model may have; the plane sees to it from then on.

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        await self._ask(
            "nos_scale",
            definition=definition.to_dict(),
            min_replicas=min_replicas,
            max_replicas=max_replicas,
        )
        wanted = self._wanted.setdefault(definition.key, _Wanted(definition))
        wanted.limits = (min_replicas, max_replicas)

    async def retire(self, names: list[str]) -> None:
        """Have workers leave, each once what it serves is served elsewhere.

        Raises:
            InvalidRequestError: If there is no such worker, or a model could not have the replicas that
                were asked for.
            UnavailableError: If the scheduler does not answer.
        """
        await self._ask("nos_retire", names=names)

    async def unload(self, key: str) -> None:
        """Take a model off every worker, after its work in flight; nothing happens if it is on none.

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        self._wanted.pop(key, None)
        await self._ask("nos_unload", key=key)

    async def logs(self, key: str, max_lines: int) -> dict[str, list[tuple[float, str]]]:
        """Return the last lines that a model printed, by worker: (seconds since 1970, text).

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        reply = await self._ask("nos_logs", key=key, max_lines=max_lines)
        return {
            str(worker): [(float(time_s), str(text)) for time_s, text in lines]
            for worker, lines in reply["logs"].items()
        }

    async def memory_history(self) -> list[tuple[str, str, list[dict[str, Any]]]]:
        """Return what each worker's device held: its name, its device, and the samples.

        ::

            {"time_s", "used_bytes", "models": {key: bytes}}

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        reply = await self._ask("nos_memory")
        return [(str(name), str(device), list(found)) for name, device, found in reply["memory"]]

    async def profiles(self, key: str) -> list[dict[str, Any]]:
        """Return what the workers that have a model measured of it.

        ::

            [{"state": "none" | "waits for a call" | "pending" | "ready",
              "profile": bytes (a nos.v1.Profile; empty unless ready), "note": why there is none}]

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        reply = await self._ask("nos_profiles", key=key)
        return [dict(profile) for profile in reply["profiles"]]

    async def state(self) -> dict[str, Any]:
        """Return how the cluster stands, as plain containers.

        ::

            {"workers": [{"name", "address", "pid", "device", "product", "capacity_bytes", "status",
                          "is_retiring", "note": why it is given no models; empty if it is}],
             "models": {key: {"state": "idle" | "waiting" | "loading" | "loaded" | "failed",
                              "replicas": {worker's name: "loading" | "serving" | "draining"},
                              "min_replicas", "max_replicas", "target", "why", "pending": text,
                              "error": bytes (a nos.v1.Error) }},
             "num_wanted_workers": how many the models need}

        A worker's `status` is its `ModelManager.status()`, about a second old.

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        return await self._ask("nos_state")

    def subscribe(self, callback: Callable[[ClusterEvent], None]) -> Callable[[], None]:
        """Have `callback` called on the loop for each event; returns what ends that."""
        ticket = object()
        self._callbacks[ticket] = callback
        return lambda: self._callbacks.pop(ticket, None) and None

    async def close(self) -> None:
        """Disconnect; models stay where they are."""
        for task in (self._watcher, *self._tasks):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._sender is not None:
            await self._sender.close()
        await self._drop()

    async def _ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        if self._client is None or not self.is_connected:
            raise UnavailableError("the Dask scheduler does not answer", hint=_HINT)
        try:
            reply = dict(await getattr(self._scheduler_of(self._client), operation)(**arguments))
        except (OSError, TimeoutError) as lost:
            raise UnavailableError("the Dask scheduler went away", hint=_HINT) from lost
        if "error" in reply:
            raise from_message(errors_pb2.Error.FromString(reply["error"]))
        return reply

    @staticmethod
    def _scheduler_of(client: Client) -> Any:
        """Return what takes the plane's operations as methods; Dask's annotations do not know them."""
        return client.scheduler

    async def _try_connect(self) -> bool:
        client = Client(
            self.address,
            asynchronous=True,
            set_as_default=False,
            security=self._security,
            timeout=_CONNECT_S,
        )
        try:
            await client
            await self._scheduler_of(client).nos_state()
        except (OSError, TimeoutError, ValueError, AttributeError) as error:
            # Dask answers an unknown operation with a ValueError or AttributeError: no plane (yet).
            _logger.debug("no scheduler at %s: %s", self.address, error)
            with contextlib.suppress(OSError, TimeoutError):
                await client.close(timeout=1)
            return False
        self._client, self._comm = client, client.scheduler_comm
        client.subscribe_topic(_TOPIC, self._hear)
        if self._sender is not None:
            client.subscribe_topic(FOLDERS_TOPIC, self._hear_of_folder)
        self.dashboard_url = client.dashboard_link or ""
        return True

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        time_s, said = event
        heard = ClusterEvent(
            time_s=time_s,
            kind=str(said.get("kind", "")),
            model=str(said.get("model", "")),
            worker=str(said.get("name", "")),
            message=str(said.get("message", "")),
        )
        for callback in list(self._callbacks.values()):
            callback(heard)

    def _hear_of_folder(self, event: tuple[float, dict[str, Any]]) -> None:
        if self._sender is not None and self._client is not None:
            self._sender.hear(self._client.rpc, event[1])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if self.is_connected:
                continue
            _logger.warning("the Dask scheduler at %s went away", self.address)
            await self._drop()
            while not await self._try_connect():  # noqa: ASYNC110 - nothing tells that it is back
                await asyncio.sleep(_RETRY_S)
            _logger.info("the Dask scheduler at %s is back", self.address)
            with contextlib.suppress(NosError):
                await self._restore()

    async def _restore(self) -> None:
        if self._revoked:
            await self._ask("nos_revoke", token_ids=self._revoked)
        if self._public_key:
            await self._ask("nos_keys", public_key=self._public_key)
        for wanted in list(self._wanted.values()):
            task = asyncio.create_task(self._reload(wanted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self.on_reconnected is not None:
            await self.on_reconnected()

    async def _reload(self, wanted: _Wanted) -> None:
        try:
            if wanted.limits is not None:
                await self.scale(wanted.definition, *wanted.limits)
            if wanted.is_loaded:
                await self.load(wanted.definition)
        except NosError as error:
            _logger.warning("model %s was not loaded again: %s", wanted.definition.key, error)

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await client.close(timeout=1)
