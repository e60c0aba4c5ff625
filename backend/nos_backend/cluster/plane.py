"""The scheduler's part: which models are wanted, where each is, and the commands that make it so.

Everything runs on the scheduler's loop, so state changes between two awaits are atomic. The plane can be
lost: a worker tells a new one what it has loaded, and the gateway's link asks again for what it wants.

::

    waiting --a worker suits--> loading --it answers--> loaded
       ^                           |    --it refuses--> failed
       `------its worker is lost---+---------------------'
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from distributed.diagnostics.plugin import SchedulerPlugin
from nos.errors import Reason
from nos.wire.v1 import errors_pb2, models_pb2

from nos_backend.scheduling.placement import Refusal, WorkerLoad, choose_worker

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from distributed import Scheduler

_logger = logging.getLogger(__name__)

#: Dask topic of our events; their form is that of `ClusterEvent`, with `name` for the worker's name, because
#: Dask puts a worker's address into `worker`.
TOPIC: Final = "nos"

#: How long a load waits for a worker that is on its way: a lost one is back after about 2 s.
_WORKER_WAIT_S: Final = 20.0
#: Workers lost while they loaded one model, before the model is taken for the cause.
_MAX_LOST_LOADS: Final = 2


class _State(enum.StrEnum):
    WAITING = "waiting"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(slots=True)
class _Model:
    """A wanted model."""

    definition: dict[str, Any]
    device: str
    need_bytes: int
    state: _State = _State.WAITING
    #: The Dask address of its worker; empty unless loading or loaded.
    address: str = ""
    #: A serialized `nos.v1.Error`; empty unless failed.
    error: bytes = b""
    #: Workers that died while they loaded it.
    num_lost_loads: int = 0
    #: Set whenever `state` is loaded or failed.
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def move(self, state: _State, *, address: str = "", error: bytes = b"") -> None:
        self.state, self.address, self.error = state, address, error
        if state in (_State.LOADED, _State.FAILED):
            self.settled.set()
        else:
            self.settled.clear()


class ServePlane(SchedulerPlugin):
    """Places models on workers; installed by `nos_backend.cluster.preload`."""

    name = "nos-plane"
    idempotent = True

    def __init__(self) -> None:
        self._scheduler: Scheduler
        #: Wanted models by key.
        self._models: dict[str, _Model] = {}
        #: Names by address of the workers that may be given models: connected, and told the public key.
        self._ready: dict[str, str] = {}
        #: Verifies tickets; empty until the gateway sent it.
        self._public_key = b""
        #: Tokens whose tickets every worker refuses, those to come included.
        self._revoked: list[str] = []
        #: Keeps tasks alive until they end.
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, scheduler: Scheduler) -> None:
        """Add the handlers that the gateway calls, and greet the workers that came before."""
        self._scheduler = scheduler
        scheduler.handlers["nos_keys"] = self.set_keys
        scheduler.handlers["nos_revoke"] = self.revoke
        scheduler.handlers["nos_load"] = self.load
        scheduler.handlers["nos_unload"] = self.unload
        scheduler.handlers["nos_state"] = self.state
        scheduler.handlers["nos_logs"] = self.logs
        for address in self._serving():
            self._spawn(self._welcome(address))

    # Handlers: called by the gateway's link through a Dask comm; plain containers in and out.

    async def set_keys(self, public_key: bytes) -> dict[str, Any]:
        """Have every worker, those to come included, verify tickets with this key."""
        self._public_key = bytes(public_key)
        await asyncio.gather(*(self._greet(address) for address in self._serving()))
        return {"num_workers": len(self._ready)}

    async def revoke(self, token_ids: list[str]) -> dict[str, Any]:
        """Have every worker, those to come included, refuse these tokens' tickets and cut their streams."""
        self._revoked = list(dict.fromkeys([*self._revoked, *token_ids]))
        commands = (
            self._command(address, "nos_revoke", token_ids=list(token_ids))
            for address in self._serving()
        )
        replies = await asyncio.gather(*commands)
        return {"num_workers": sum("error" not in reply for reply in replies)}

    async def load(self, definition: dict[str, Any]) -> dict[str, Any]:
        """Place a model, wait until it answers, and say where; or say why not."""
        key = f"{definition['name']}@v{definition['version']}"
        model = self._models.get(key)
        if model is None or model.state is _State.FAILED:
            model = self._models[key] = _new_model(definition)
        elif model.definition != definition:
            # Another option of the same version, for instance that it is pinned.
            model.definition = definition
            if model.state is _State.LOADED:
                await self._command(model.address, "nos_load", definition=definition)
        if model.state is _State.WAITING:
            refusal = self._place(key, model)
            if refusal in (Refusal.NO_DEVICE, Refusal.NO_ROOM):
                del self._models[key]
                return {"error": self._refused(key, model, refusal)}
        deadline = time.monotonic() + _WORKER_WAIT_S
        while not model.settled.is_set():
            # Loading has a limit of its own, in the worker; waiting for a worker has this one.
            try:
                await asyncio.wait_for(model.settled.wait(), 1.0)
            except TimeoutError:
                if model.state is _State.WAITING and time.monotonic() > deadline:
                    return {"error": self._refused(key, model, Refusal.NO_WORKER)}
        if model.state is _State.FAILED:
            return {"error": model.error}
        return {"worker": self._ready[model.address], **self._endpoint(model.address)}

    async def unload(self, key: str) -> dict[str, Any]:
        """Forget a model and take it off every worker that has it."""
        model = self._models.pop(key, None)
        holders = {load.address for load in self._loads() if key in load.keys}
        if model is not None:
            holders |= {model.address} & self._ready.keys()
            if not model.settled.is_set():
                message = f"model {key!r} was unloaded before it was loaded"
                model.move(_State.FAILED, error=_error(Reason.CANCELLED, message))
        replies = await asyncio.gather(
            *(self._command(address, "nos_unload", key=key) for address in holders)
        )
        return next((reply for reply in replies if "error" in reply), {})

    async def logs(self, key: str, max_lines: int) -> dict[str, Any]:
        """Return the last lines that a model printed, by worker; also where it is no longer."""
        found = {}
        for address in self._serving():
            reply = await self._command(address, "nos_logs", key=key, max_lines=max_lines)
            if reply.get("lines"):
                found[str(self._scheduler.workers[address].name)] = reply["lines"]
        return {"logs": found}

    async def state(self) -> dict[str, Any]:
        """Return workers and models as plain containers; the form stands at `ClusterLink.state`."""
        workers = [
            {
                **_plain(self._scheduler.workers[address].extra.get("nos")),
                "name": str(self._scheduler.workers[address].name),
                "status": _plain(self._scheduler.workers[address].metrics.get("nos")),
            }
            for address in self._serving()
        ]
        models = {
            key: {
                "state": str(model.state),
                "worker": self._ready.get(model.address, ""),
                "error": model.error,
            }
            for key, model in self._models.items()
        }
        return {"workers": sorted(workers, key=lambda worker: worker["name"]), "models": models}

    # Events of the scheduler: synchronous, short, and never raising.

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Greet a worker that joined."""
        if worker in self._serving():
            self._spawn(self._welcome(worker))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Place the models of a lost worker elsewhere, or have them wait for a new one."""
        try:
            self._lose(worker)
        except Exception:
            _logger.exception("could not re-place the models of %s", worker)

    async def close(self) -> None:
        """End what is under way."""
        for task in list(self._tasks):
            task.cancel()

    # Moves.

    async def _welcome(self, address: str) -> None:
        if not await self._greet(address) or address not in self._serving():
            return
        name = str(self._scheduler.workers[address].name)
        self._ready[address] = name
        self._tell("worker-joined", name=name)
        self._reconcile()

    async def _greet(self, address: str) -> bool:
        if not self._public_key:
            return True
        if self._revoked:
            # Before the key: without one a worker takes no ticket at all.
            await self._command(address, "nos_revoke", token_ids=self._revoked)
        reply = await self._command(address, "nos_keys", public_key=self._public_key)
        return "error" not in reply

    def _lose(self, address: str) -> None:
        name = self._ready.pop(address, None)
        if name is None:
            return
        self._tell("worker-lost", name=name)
        for key, model in self._models.items():
            if model.address == address:
                self._displace(key, model)
        self._reconcile()

    def _displace(self, key: str, model: _Model) -> None:
        model.num_lost_loads += model.state is _State.LOADING
        if model.num_lost_loads < _MAX_LOST_LOADS:
            model.move(_State.WAITING)
            return
        message = f"{model.num_lost_loads} workers ended while they loaded model {key!r}"
        model.move(_State.FAILED, error=_error(Reason.LOAD_FAILED, message))
        self._tell("failed", model=key, message=message)

    def _reconcile(self) -> None:
        for key, model in self._models.items():
            if model.state is _State.WAITING:
                self._place(key, model)

    def _place(self, key: str, model: _Model) -> Refusal | None:
        choice = choose_worker(key, model.device, model.need_bytes, self._loads())
        if isinstance(choice, Refusal):
            return choice
        model.move(_State.LOADING, address=choice.address)
        self._spawn(self._load(key, model, choice.address))
        return None

    async def _load(self, key: str, model: _Model, address: str) -> None:
        reply = await self._command(address, "nos_load", definition=model.definition)
        is_current = self._models.get(key) is model and model.address == address
        if not is_current or model.state is not _State.LOADING:
            return
        if reply.get("lost"):
            self._displace(key, model)
            self._reconcile()
        elif "error" in reply:
            model.move(_State.FAILED, error=reply["error"])
        else:
            model.num_lost_loads = 0
            model.move(_State.LOADED, address=address)

    # Plumbing.

    async def _command(self, address: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Have a worker do something; `lost` and `error` are set if it went away over it."""
        try:
            reply = _plain(await getattr(self._scheduler.rpc(address), operation)(**arguments))
        except (OSError, TimeoutError) as lost:
            _logger.info("%s on %s: %s", operation, address, lost)
            message = "the worker went away"
            return {"lost": True, "error": _error(Reason.UNAVAILABLE, message)}
        status = reply.pop("status", None)
        worker = self._scheduler.workers.get(address)
        if status is not None and worker is not None:
            worker.metrics["nos"] = status  # no need to wait for its next heartbeat
        return reply

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(_guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, kind: str, *, name: str = "", model: str = "", message: str = "") -> None:
        event = {"kind": kind, "name": name, "model": model, "message": message}
        self._scheduler.log_event(TOPIC, event)

    def _serving(self) -> list[str]:
        """Return the addresses of the connected workers that are ours."""
        return [
            address for address, worker in self._scheduler.workers.items() if "nos" in worker.extra
        ]

    def _loads(self) -> list[WorkerLoad]:
        return [
            self._load_of(address) for address in self._ready if address in self._scheduler.workers
        ]

    def _load_of(self, address: str) -> WorkerLoad:
        worker = self._scheduler.workers[address]
        status = _plain(worker.metrics.get("nos"))
        loaded = [
            str(model["key"]) for model in status.get("models", ()) if model["state"] != "failed"
        ]
        return WorkerLoad(
            address=address,
            device=str(_plain(worker.extra.get("nos")).get("device", "cpu")),
            capacity_bytes=int(status.get("capacity_bytes") or 0),
            used_bytes=int(status.get("used_bytes") or 0),
            num_models=sum(model.address == address for model in self._models.values()),
            num_pending=int(status.get("num_queued", 0)) + int(status.get("num_running", 0)),
            keys=frozenset(loaded),
        )

    def _endpoint(self, address: str) -> dict[str, str]:
        facts = self._scheduler.workers[address].extra["nos"]
        return {name: str(facts.get(name, "")) for name in ("address", "unix_socket", "host_id")}

    def _refused(self, key: str, model: _Model, refusal: Refusal) -> bytes:
        message = f"model {key!r} cannot be placed: {refusal.value}"
        devices = sorted({load.device for load in self._loads()})
        if refusal is Refusal.NO_WORKER:
            return _error(
                Reason.UNAVAILABLE,
                message,
                hint="A lost worker is replaced within seconds; try again",
            )
        if refusal is Refusal.NO_DEVICE:
            return _error(
                Reason.LOAD_FAILED,
                message,
                expected=f"device {model.device}",
                got=", ".join(devices),
            )
        most_bytes = max(load.capacity_bytes for load in self._loads())
        return _error(
            Reason.OUT_OF_MEMORY,
            message,
            expected=f"at most {most_bytes} bytes of weights",
            got=f"{model.need_bytes} bytes",
        )


def _new_model(definition: dict[str, Any]) -> _Model:
    spec = models_pb2.ModelSpec.FromString(definition.get("spec") or b"")
    return _Model(definition, str(definition.get("device") or "auto"), spec.weight_bytes)


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        _logger.exception("a task of the plane failed")


def _plain(found: Any) -> dict[str, Any]:
    return dict(found) if isinstance(found, dict) else {}


def _error(
    reason: Reason, message: str, expected: str = "", got: str = "", hint: str = ""
) -> bytes:
    return errors_pb2.Error(
        reason=errors_pb2.Reason.ValueType(int(reason)),
        message=message,
        expected=expected,
        got=got,
        hint=hint,
    ).SerializeToString()
