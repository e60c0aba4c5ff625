"""The scheduler's part: a shell that feeds `Reconciler` and `Autoscaler` and carries out what they decide.

Everything runs on the scheduler's loop, so state changes between two awaits are atomic. The plane can be
lost: the gateway's link asks again for what it wants.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from distributed.diagnostics.plugin import SchedulerPlugin
from google.protobuf.message import DecodeError
from nos.errors import Reason
from nos.wire.v1 import errors_pb2, models_pb2

from nos_backend.cluster import refusals
from nos_backend.cluster.launch import PlaneSettings
from nos_backend.scheduling.autoscaling import Autoscaler, Sample
from nos_backend.scheduling.placement import Needs, Refusal, WorkerLoad
from nos_backend.scheduling.reconcile import (
    Drain,
    Failure,
    Load,
    Model,
    Phase,
    Reconciler,
    Retired,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from distributed import Scheduler

_logger = logging.getLogger(__name__)

#: Dask topic of our events; their form is that of `ClusterEvent`, with `name` for the worker's name, because
#: Dask puts a worker's address into `worker`.
TOPIC: Final = "nos"

#: How long a load waits for a worker that is on its way: a lost one is back after about 2 s.
_WORKER_WAIT_S: Final = 20.0
_VERSION: Final = metadata.version("nos-inference")
#: How often measurements are looked at; workers send theirs twice a second.
_TICK_S: Final = 0.5
#: A worker that sent nothing for so long is frozen: it beats twice a second, slower in clusters of hundreds.
_FROZEN_S: Final = 8.0


class ServePlane(SchedulerPlugin):
    """Places models on workers; installed by `nos_backend.cluster.preload`."""

    name = "nos-plane"
    idempotent = True

    def __init__(self, settings: PlaneSettings | None = None) -> None:
        self._scheduler: Scheduler
        self._settings = settings or PlaneSettings.from_environ(os.environ)
        self._reconciler = Reconciler()
        self._autoscaler = Autoscaler(self._settings.scale_down_s)
        #: As the gateway gave them, by key; of every model of the reconciler.
        self._definitions: dict[str, dict[str, Any]] = {}
        #: Names by address of the workers that may be given models: connected, and told the public key.
        self._ready: dict[str, str] = {}
        #: Of the connected workers, those that are taken for frozen.
        self._frozen: set[str] = set()
        #: Of the connected workers, those that are never given models, and why.
        self._excluded: dict[str, str] = {}
        #: Set and replaced whenever something was decided or heard.
        self._changed = asyncio.Event()
        #: Verifies tickets; empty until the gateway sent it.
        self._public_key = b""
        #: Tokens whose tickets every worker refuses, those to come included.
        self._revoked: list[str] = []
        #: Keeps tasks alive until they end.
        self._tasks: set[asyncio.Task[None]] = set()
        #: Dask's own idea of how many workers its tasks need; None before the start.
        self._stock_target: Any = None

    async def start(self, scheduler: Scheduler) -> None:
        """Add the handlers that the gateway calls, and greet the workers that came before.

        Again it does nothing: a scheduler that starts also starts the plugins that a preload started.
        """
        if self._stock_target is not None:
            return
        self._scheduler = scheduler
        scheduler.handlers["nos_keys"] = self.set_keys
        scheduler.handlers["nos_revoke"] = self.revoke
        scheduler.handlers["nos_load"] = self.load
        scheduler.handlers["nos_try"] = self.attempt
        scheduler.handlers["nos_unload"] = self.unload
        scheduler.handlers["nos_scale"] = self.scale
        scheduler.handlers["nos_retire"] = self.retire
        scheduler.handlers["nos_state"] = self.state
        scheduler.handlers["nos_logs"] = self.logs
        scheduler.handlers["nos_profiles"] = self.profiles
        scheduler.handlers["nos_memory"] = self.memory
        self._stock_target = scheduler.adaptive_target
        # Both: `cluster.adapt()` in this process asks the method, everybody else the handler.
        scheduler.adaptive_target = self.adaptive_target  # type: ignore[method-assign]
        scheduler.handlers["adaptive_target"] = self.adaptive_target
        for address in self._serving():
            self._spawn(self._welcome(address))
        self._spawn(self._watch())

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
        """Have a replica of a model at least, wait until it answers, and say where; or say why not."""
        before = self._definitions.get(_key(definition))
        key, needs = self._take(definition)
        model = self._reconciler.want(key, needs)
        if before is not None and before != definition:
            # Another option of the same version, for instance that it is pinned.
            for address in model.serving:
                await self._command(address, "nos_load", definition=definition)
        self._autoscaler.asked(key, time.monotonic())
        self._reconcile()
        deadline = time.monotonic() + _WORKER_WAIT_S
        while not model.serving:
            if model.failure is not None:
                return {"error": refusals.failed(model.failure)}
            if self._reconciler.models.get(key) is not model:
                message = f"model {key!r} was unloaded before it was loaded"
                return {"error": refusals.error(Reason.UNAVAILABLE, message, hint="Try again")}
            is_waiting = not model.replicas
            if is_waiting and isinstance(model.pending, Refusal) and model.pending.is_final:
                if model.min_replicas == 0:
                    self._forget(key)
                return {"error": refusals.refused(key, model, self._reconciler.workers.values())}
            if is_waiting and time.monotonic() > deadline:
                return {"error": refusals.refused(key, model, self._reconciler.workers.values())}
            # Loading has a limit of its own, in the worker; waiting for a worker has this one.
            await self._await_change()
        return {"replicas": self._endpoints(key, model)}

    async def attempt(
        self, definition: dict[str, Any], call: dict[str, Any] | None, data: bytes
    ) -> dict[str, Any]:
        """Have a worker whose device suits try a model that is not placed."""
        loads = sorted(self._reconciler.workers.items(), key=lambda it: len(it[1].keys))
        for address, load in loads:
            if address in self._ready and (definition["device"] != "cuda" or load.device != "cpu"):
                arguments = {"definition": definition, "call": call, "data": data}
                return await self._command(address, "nos_try", **arguments)
        return {"error": refusals.error(Reason.UNAVAILABLE, "no worker can try the model now")}

    async def unload(self, key: str) -> dict[str, Any]:
        """Forget a model and take it off every worker that has it."""
        model = self._forget(key)
        holders = {
            address for address, load in self._reconciler.workers.items() if key in load.keys
        }
        if model is not None:
            holders |= model.replicas.keys() & self._ready.keys()
        self._tell("replicas", model=key)
        self._wake()
        replies = await asyncio.gather(
            *(self._command(address, "nos_unload", key=key) for address in holders)
        )
        return next((reply for reply in replies if "error" in reply), {})

    async def scale(
        self, definition: dict[str, Any], min_replicas: int, max_replicas: int
    ) -> dict[str, Any]:
        """Set how many replicas a model may have; returns at once."""
        key, needs = self._take(definition)
        model = self._reconciler.scale(
            key, needs, min_replicas=min_replicas, max_replicas=max_replicas
        )
        self._tell_target(key, model)
        self._reconcile()
        return {}

    async def retire(self, names: list[str]) -> dict[str, Any]:
        """Have workers drained, then ended by Dask; returns at once."""
        addresses = [address for address, name in self._ready.items() if name in names]
        unknown = set(names) - {self._ready[address] for address in addresses}
        if unknown:
            known = ", ".join(sorted(self._ready.values()))
            message = "there is no such worker"
            return {
                "error": refusals.error(
                    Reason.INVALID_REQUEST, message, f"one of {known}", ", ".join(sorted(unknown))
                )
            }
        pinned = self._reconciler.pinned([*addresses, *self._reconciler.retiring])
        if pinned:
            key, least = next(iter(pinned.items()))
            message = f"{key} must have {least} replicas, which need a worker each"
            hint = f"Scale {key.partition('@')[0]} down first"
            return {"error": refusals.error(Reason.INVALID_REQUEST, message, hint=hint)}
        for address in addresses:
            self._tell("worker-retiring", name=self._ready[address])
        self._reconciler.retire(addresses)
        self._reconcile()
        return {}

    async def logs(self, key: str, max_lines: int) -> dict[str, Any]:
        """Return the last lines that a model printed, by worker; also where it is no longer."""
        found = {}
        for address in self._serving():
            reply = await self._command(address, "nos_logs", key=key, max_lines=max_lines)
            if reply.get("lines"):
                found[str(self._scheduler.workers[address].name)] = reply["lines"]
        return {"logs": found}

    async def memory(self) -> dict[str, Any]:
        """Return what each worker's device held: [name, device, samples]."""
        found = []
        for address in self._serving():
            reply = await self._command(address, "nos_memory")
            if "samples" in reply and (worker := self._scheduler.workers.get(address)):
                found.append([str(worker.name), reply["device"], reply["samples"]])
        return {"memory": found}

    async def profiles(self, key: str) -> dict[str, Any]:
        """Return what workers measured of a model; the form stands at `ClusterLink.profiles`."""
        replies = await asyncio.gather(
            *(self._command(address, "nos_profile", key=key) for address in self._serving())
        )
        return {"profiles": [reply for reply in replies if "profile" in reply]}

    async def state(self) -> dict[str, Any]:
        """Return what `snapshot` does."""
        return self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        """Return workers and models as plain containers; the form stands at `ClusterLink.state`."""
        workers = [
            {
                **_plain(self._scheduler.workers[address].extra.get("nos")),
                "name": str(self._scheduler.workers[address].name),
                "status": _plain(self._scheduler.workers[address].metrics.get("nos")),
                "is_retiring": address in self._reconciler.retiring,
                "note": self._note(address),
            }
            for address in self._serving()
        ]
        models = {key: self._model_state(model) for key, model in self._reconciler.models.items()}
        return {
            "workers": sorted(workers, key=lambda worker: worker["name"]),
            "models": models,
            "num_wanted_workers": self._num_wanted_workers(),
        }

    def _note(self, address: str) -> str:
        if address in self._excluded:
            return self._excluded[address]
        if address in self._frozen:
            return "it sends nothing"
        return "" if address in self._ready else "it is on its way"

    def _model_state(self, model: Model) -> dict[str, Any]:
        replicas = {
            self._ready[address]: str(phase)
            for address, phase in model.replicas.items()
            if address in self._ready
        }
        failure = model.failure
        return {
            "state": model.state,
            "replicas": replicas,
            "min_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "target": model.target,
            "why": model.why,
            "pending": refusals.why_missing(model, self._reconciler.workers.values()),
            "error": refusals.failed(failure) if failure is not None else b"",
        }

    def adaptive_target(self, target_duration: Any = None) -> int:
        """Return how many workers there should be, for Dask's tasks or for the models."""
        return max(int(self._stock_target(target_duration)), self._num_wanted_workers())

    # Events of the scheduler: synchronous, short, and never raising.

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Greet a worker that joined."""
        if worker in self._serving():
            self._spawn(self._welcome(worker))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Place the models of a lost worker elsewhere, or have them wait for a new one."""
        try:
            self._frozen.discard(worker)
            self._excluded.pop(worker, None)
            self._lose(worker)
        except Exception:
            _logger.exception("could not re-place the models of %s", worker)

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[Any]) -> list[Any]:
        """Keep Dask from closing workers that serve: only those without a replica and a stream may go."""
        held = {address for model in self._reconciler.models.values() for address in model.replicas}
        busy = ("num_streams", "num_running", "num_queued")
        return [
            worker
            for worker in workers
            if worker.address not in held
            and not any(_plain(worker.metrics.get("nos")).get(name) for name in busy)
        ]

    async def close(self) -> None:
        """End what is under way."""
        for task in list(self._tasks):
            task.cancel()

    # Moves.

    async def _welcome(self, address: str) -> None:
        name = str(self._scheduler.workers[address].name)
        version = _plain(self._scheduler.workers[address].extra.get("nos")).get("version")
        if version != _VERSION:
            why = f"it runs nos-inference {version}, and this scheduler {_VERSION}"
            self._excluded[address] = why
            self._tell("worker-refused", name=name, message=why)
            return
        if not await self._greet(address) or address not in self._serving():
            return
        self._ready[address] = name
        self._reconciler.joined(self._load_of(address), time.monotonic())
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

    def _lose(self, address: str, reason: str = "") -> None:
        name = self._ready.pop(address, None)
        if name is None:
            return
        self._tell("worker-lost", name=name, message=reason)
        for key in self._reconciler.lost(address, time.monotonic()):
            self._tell_failure(key)
        self._reconcile()

    async def _watch(self) -> None:
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(_TICK_S)
            if (
                time.monotonic() - start_s < _FROZEN_S / 4
            ):  # else it was this process that stood still
                self._find_frozen()
            for address in self._ready:
                if address in self._scheduler.workers:
                    self._reconciler.observed(self._load_of(address))
            self._scale_by_load()
            self._reconcile()

    def _find_frozen(self) -> None:
        """Give up workers that send nothing any more, and take them back when they do."""
        for address in self._serving():
            silent_s = time.time() - self._scheduler.workers[address].last_seen
            if silent_s > _FROZEN_S and address in self._ready:
                self._frozen.add(address)
                self._lose(address, f"it sent nothing for {silent_s:.0f} s")
            elif silent_s < _FROZEN_S / 2 and address in self._frozen:
                self._frozen.discard(address)
                self._spawn(self._welcome(address))

    def _scale_by_load(self) -> None:
        now_s = time.monotonic()
        stands = self._stands()
        for key, model in self._reconciler.models.items():
            if model.failure is not None or model.target == 0 or not model.is_elastic:
                continue
            found = [stands[address, key] for address in model.replicas if (address, key) in stands]
            sample = Sample(
                num_pending=sum(item["num_pending"] for item in found),
                num_busy=sum(item["num_pending"] > 0 for item in found),
                num_answered=sum(item["num_answered"] for item in found),
                num_serving=model.count(Phase.SERVING),
            )
            aim = self._autoscaler.observe(
                key,
                sample,
                now_s,
                low=model.min_replicas,
                high=model.max_replicas,
                target=model.target,
            )
            if aim is not None:
                self._reconciler.aim(key, aim.target, aim.why)
                self._tell_target(key, model)

    def _stands(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what each worker said last of each of its models."""
        return {
            (address, str(item["key"])): item
            for address in self._ready
            if address in self._scheduler.workers
            for item in self._status(address).get("models", ())
        }

    def _reconcile(self) -> None:
        for command in self._reconciler.step():
            match command:
                case Load(key, address):
                    self._spawn(self._load(key, address))
                case Drain(key, address, reason):
                    self._spawn(self._drain(key, address, reason))
                case Retired(address):
                    self._spawn(self._end(address))
        self._wake()

    async def _load(self, key: str, address: str) -> None:
        reply = await self._command(address, "nos_load", definition=self._definitions[key])
        if reply.get("lost"):
            if self._reconciler.load_lost(key, address):
                self._tell_failure(key)
        elif "error" in reply:
            said = errors_pb2.Error.FromString(reply["error"])
            if self._reconciler.refused(key, address, Failure(said.message, reply["error"])):
                self._wake()
        elif self._reconciler.loaded(key, address):
            self._tell("replicas", model=key, name=self._ready.get(address, ""))
        self._reconcile()

    async def _drain(self, key: str, address: str, reason: str) -> None:
        name = self._ready.get(address, "")
        self._tell("draining", name=name, model=key, message=reason)
        await self._command(address, "nos_unload", key=key, budget_s=self._settings.drain_s)
        self._reconciler.drained(key, address)
        self._reconcile()

    async def _end(self, address: str) -> None:
        self._tell("worker-retired", name=self._ready.get(address, ""))
        await self._scheduler.retire_workers(workers=[address], close_workers=True, remove=True)

    def _take(self, definition: dict[str, Any]) -> tuple[str, Needs]:
        key = _key(definition)
        self._definitions[key] = definition
        spec = models_pb2.ModelSpec.FromString(definition.get("spec") or b"")
        return key, Needs(
            device=spec.device or str(definition.get("device") or "auto"),
            weight_bytes=spec.weight_bytes,
            profiled_bytes=max(map(_profiled_bytes, definition.get("profiles") or ()), default=0),
            memory_bytes=spec.memory_bytes,
            has_packages=bool(spec.environment),
            is_packed=spec.placement == "pack",
        )

    def _forget(self, key: str) -> Model | None:
        self._definitions.pop(key, None)
        self._autoscaler.forget(key)
        return self._reconciler.forget(key)

    def _num_wanted_workers(self) -> int:
        """Return how many workers the models need: one for each replica of the model that has the most."""
        models = self._reconciler.models.values()
        return max((model.target for model in models if model.failure is None), default=0)

    # Plumbing.

    async def _command(self, address: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Have a worker do something; `lost` and `error` are set if it went away over it."""
        try:
            reply = _plain(await getattr(self._scheduler.rpc(address), operation)(**arguments))
        except (OSError, TimeoutError) as lost:
            _logger.info("%s on %s: %s", operation, address, lost)
            message = "the worker went away"
            return {"lost": True, "error": refusals.error(Reason.UNAVAILABLE, message)}
        status = reply.pop("status", None)
        worker = self._scheduler.workers.get(address)
        if status is not None and worker is not None:
            worker.metrics["nos"] = status  # no need to wait for its next heartbeat
            self._reconciler.observed(self._load_of(address))
        return reply

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(_guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _await_change(self) -> None:
        await self._changed.wait()

    def _tell(self, kind: str, *, name: str = "", model: str = "", message: str = "") -> None:
        event = {"kind": kind, "name": name, "model": model, "message": message}
        self._scheduler.log_event(TOPIC, event)

    def _tell_target(self, key: str, model: Model) -> None:
        self._tell("scaled", model=key, message=f"to {model.target} replicas: {model.why}")

    def _tell_failure(self, key: str) -> None:
        failure = self._reconciler.models[key].failure
        self._tell("failed", model=key, message=failure.message if failure else "")

    def _serving(self) -> list[str]:
        """Return the addresses of the connected workers that are ours."""
        return [
            address for address, worker in self._scheduler.workers.items() if "nos" in worker.extra
        ]

    def _status(self, address: str) -> dict[str, Any]:
        return _plain(self._scheduler.workers[address].metrics.get("nos"))

    def _load_of(self, address: str) -> WorkerLoad:
        worker = self._scheduler.workers[address]
        status, facts = self._status(address), _plain(worker.extra.get("nos"))
        device = str(facts.get("device", "cpu"))
        loaded = [
            str(model["key"]) for model in status.get("models", ()) if model["state"] != "failed"
        ]
        return WorkerLoad(
            address=address,
            name=str(worker.name),
            device=device,
            place=f"{facts.get('host_id') or worker.host} {device}",
            installs=bool(facts.get("installs")),
            capacity_bytes=int(status.get("capacity_bytes") or 0),
            used_bytes=int(status.get("used_bytes") or 0),
            num_pending=int(status.get("num_queued", 0)) + int(status.get("num_running", 0)),
            keys=frozenset(loaded),
        )

    def _endpoints(self, key: str, model: Model) -> list[dict[str, Any]]:
        """Return where a model answers, the least loaded first."""
        found = []
        for address in model.serving:
            facts = self._scheduler.workers[address].extra["nos"]
            names = ("address", "unix_socket", "host_id")
            load = self._reconciler.workers[address]
            found.append(
                {
                    "worker": self._ready[address],
                    **{name: str(facts.get(name, "")) for name in names},
                    "is_encrypted": bool(facts.get("is_encrypted")),
                    "num_pending": load.num_pending,
                }
            )
        return sorted(found, key=lambda item: (item["num_pending"], item["worker"]))


def _key(definition: dict[str, Any]) -> str:
    return f"{definition['name']}@v{definition['version']}"


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        _logger.exception("a task of the plane failed")


def _plain(found: Any) -> dict[str, Any]:
    return dict(found) if isinstance(found, dict) else {}


def _profiled_bytes(raw: bytes) -> int:
    """Return what a profile says that a model took; 0 for one that is damaged."""
    try:
        profile = models_pb2.Profile.FromString(raw)
    except DecodeError:
        return 0
    return profile.weight_bytes + profile.activation_bytes
