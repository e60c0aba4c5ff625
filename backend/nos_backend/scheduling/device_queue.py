"""Who runs next on a device: a state machine. Events and the time go in, actions come out.

Requests wait in lanes, one per (model, tenant). A grant lets one batch run on one executor; a device has
`max_concurrent_batches` grants, and an executor runs one batch at a time. The next lane is the one with
the least virtual time (start-time fair queueing, Goyal et al. 1996, in seconds of the device by weight),
so a saturated lane gets its turn and no more. Its first request leads a batch that requests of the same
key from all lanes of the model join, each at its own lane's cost (`nos_backend.scheduling.batching`).

The shell (`nos_backend.worker.manager`) carries the actions out in the order given, and delivers a
result only when told so by `End` without an error. That makes this the one place that decides how a
request ends: every admitted request gets exactly one `End`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from nos.errors import (
    CancelledError,
    DeadlineExceededError,
    ExecutorLostError,
    NosError,
    OverloadedError,
    UnavailableError,
)

from nos_backend.scheduling.actions import (
    Action,
    Batch,
    CancelCall,
    Drained,
    End,
    Held,
    KillExecutor,
    Refuse,
    Request,
    Start,
)
from nos_backend.scheduling.batching import (
    BatchLimits,
    BatchTime,
    Gatherer,
    form,
    gather_window_s,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Action",
    "Batch",
    "BatchLimits",
    "CancelCall",
    "DeviceQueue",
    "Drained",
    "End",
    "Held",
    "KillExecutor",
    "Refuse",
    "Request",
    "Start",
]

MAX_QUEUED: Final = 256
MAX_QUEUED_BYTES: Final = 512 << 20

#: Share of the newest sample in a model's mean time per request.
_SMOOTHING = 0.3
#: What a batch is charged at least, so that lanes take turns whatever the clock's grain.
_LEAST_CHARGE_S = 1e-6
_MAX_RETRY_AFTER_S = 5.0
_MIN_RETRY_AFTER_S = 0.05
#: Idle lanes and stale deadlines kept before they are swept.
_SLACK = 64


@dataclass(slots=True, eq=False)
class _Lane:
    model: str
    tenant: str
    #: Where the lane stands in virtual time; never decreases.
    virtual_time: float = 0.0
    #: Tells lanes of equal virtual time apart: which became active first.
    order: int = 0
    waiting: OrderedDict[int, Request] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class _Model:
    executor: str
    call_timeout_s: float
    #: Whether batches may start; false while its executor is lost or starting.
    is_ready: bool = True
    is_draining: bool = False
    num_waiting: int = 0
    waiting_bytes: int = 0
    waiting_rows: int = 0
    num_running: int = 0
    #: Smoothed time per request; 0 until one ended.
    mean_s: float = 0.0
    limits: BatchLimits = field(default_factory=BatchLimits)
    time: BatchTime = field(default_factory=BatchTime)
    gatherer: Gatherer = field(default_factory=Gatherer)
    #: Since when it could run and waits for more requests; None while it does not.
    gathering_s: float | None = None


@dataclass(slots=True, eq=False)
class _Running:
    batch: Batch
    model: _Model
    started_s: float
    #: When the executor is killed for it; None for never, or once that was asked.
    kill_s: float | None
    #: Its requests that have had no `End` yet.
    live: set[int]
    #: What it was expected to take, as it was charged.
    charged_s: float
    #: Who pays: lanes and their parts of each second.
    payers: list[tuple[_Lane, float]]


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    arrived_s: float
    #: Whether its executor died before while it waited.
    was_requeued: bool = False


@dataclass(slots=True, eq=False)
class _Executor:
    running: _Running | None = None
    is_held: bool = False


class DeviceQueue:
    """The queue of one device. Single-threaded; `now_s` must not decrease from event to event."""

    def __init__(
        self,
        *,
        max_concurrent_batches: int,
        max_queued: int = MAX_QUEUED,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        may_start: Callable[[str], bool] = lambda _model: True,
    ) -> None:
        """Make an empty queue.

        Args:
            max_concurrent_batches: Grants of the device.
            max_queued: Waiting requests per model.
            max_queued_bytes: Their bytes per model; one larger request is admitted alone.
            may_start: Whether a model's weights are on the device; `tick` after it has changed.
        """
        self.max_concurrent_batches = max_concurrent_batches
        self.max_queued = max_queued
        self.max_queued_bytes = max_queued_bytes
        self._may_start = may_start
        self._models: dict[str, _Model] = {}
        self._executors: dict[str, _Executor] = {}
        #: Lanes with waiting requests, and idle ones whose virtual time is still ahead.
        self._lanes: dict[tuple[str, str], _Lane] = {}
        #: Waiting requests, each also in its lane, in order of arrival.
        self._waiting: dict[int, _Waiting] = {}
        #: Requests that were started and have had no `End` yet: which executor runs them.
        self._running: dict[int, str] = {}
        #: (deadline, request); stale entries are skipped.
        self._deadlines: list[tuple[float, int]] = []
        self._virtual_now = 0.0
        #: When a batch that waits for more requests starts without them; None if none does.
        self._gathered_s: float | None = None
        self._sequence = itertools.count(1)

    # What the shell may ask.

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Batches that run; never above `max_concurrent_batches`."""
        return sum(executor.running is not None for executor in self._executors.values())

    def num_pending(self, model: str) -> int:
        """Requests of a model that wait or run."""
        found = self._models.get(model)
        return found.num_waiting + found.num_running if found else 0

    def is_live(self, request_id: int) -> bool:
        """Whether an admitted request has had no `End` yet."""
        return request_id in self._waiting or request_id in self._running

    def running_model(self, executor: str) -> str | None:
        """Which model's batch an executor runs."""
        found = self._executors.get(executor)
        return found.running.batch.model if found and found.running else None

    def next_wake_s(self) -> float | None:
        """When `tick` is due at the latest; None if nothing is timed."""
        while self._deadlines and not self.is_live(self._deadlines[0][1]):
            heapq.heappop(self._deadlines)
        times = [self._deadlines[0][0]] if self._deadlines else []
        times += [running.kill_s for running in self._busy() if running.kill_s is not None]
        if self._gathered_s is not None:
            times.append(self._gathered_s)
        return min(times, default=None)

    # Events.

    def open_model(
        self,
        model: str,
        executor: str,
        *,
        now_s: float,
        call_timeout_s: float = 0.0,
        limits: BatchLimits | None = None,
    ) -> list[Action]:
        """A model can run on an executor, for the first time or again; 0 means no timeout.

        `limits` count the first time only, so that what `shrink` learnt stays.
        """
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = _Model(executor, call_timeout_s)
            found.limits = limits or found.limits
        found.executor, found.call_timeout_s = executor, call_timeout_s
        found.is_ready = True
        self._executors.setdefault(executor, _Executor())
        return self._advance(now_s)

    def close_model(self, model: str, error: NosError, *, now_s: float) -> list[Action]:
        """A model is gone: what waits ends with `error`; what runs may finish."""
        waiting = [item.request for item in self._waiting.values() if item.request.model == model]
        actions: list[Action] = [self._end_waiting(request, error) for request in waiting]
        self._models.pop(model, None)
        return actions + self._advance(now_s)

    def refuse_waiting(self, model: str, error: NosError, *, now_s: float) -> list[Action]:
        """End what waits for a model, which stays open."""
        waiting = [item.request for item in self._waiting.values() if item.request.model == model]
        actions: list[Action] = [self._end_waiting(request, error) for request in waiting]
        return actions + self._drained(model) + self._advance(now_s)

    def drain(self, model: str, *, now_s: float) -> list[Action]:
        """Admit nothing more for a model; `Drained` follows when nothing is left of it."""
        found = self._models.get(model)
        if found is None:
            return [Drained(model)]
        found.is_draining = True
        actions = self._advance(now_s)
        return actions if Drained(model) in actions else actions + self._drained(model)

    def hold(self, executor: str, *, now_s: float) -> list[Action]:
        """Give an executor no new batch, for instance while it loads; `Held` follows when idle."""
        found = self._executors.setdefault(executor, _Executor())
        found.is_held = True
        return [*self._advance(now_s), *([] if found.running else [Held(executor)])]

    def release(self, executor: str, *, now_s: float) -> list[Action]:
        """Take back `hold`."""
        self._executors.setdefault(executor, _Executor()).is_held = False
        return self._advance(now_s)

    def arrive(self, request: Request, *, now_s: float) -> list[Action]:
        """A request wants to run: it is refused at once, or admitted."""
        error = self._obstacle(request)
        if error is not None:
            return [Refuse(request.id, error)]
        lane = self._lanes.get((request.model, request.tenant))
        if lane is None:
            lane = _Lane(request.model, request.tenant)
            self._lanes[request.model, request.tenant] = lane
        if not lane.waiting:
            lane.virtual_time = max(lane.virtual_time, self._virtual_now)
            lane.order = next(self._sequence)
        lane.waiting[request.id] = request
        self._waiting[request.id] = _Waiting(request, now_s)
        model = self._models[request.model]
        model.gatherer.arrived(request.sender, now_s)
        model.num_waiting += 1
        model.waiting_rows += request.rows
        model.waiting_bytes += request.size_bytes
        if request.deadline_s is not None:
            self._sweep_deadlines()
            heapq.heappush(self._deadlines, (request.deadline_s, request.id))
        return self._advance(now_s)

    def cancel(self, request_id: int, *, now_s: float) -> list[Action]:
        """The caller lost interest. Unknown and ended requests are left alone."""
        actions = self._end_early(request_id, CancelledError("cancelled by the caller"))
        return actions + self._advance(now_s)

    def finish(self, batch_id: int, executor: str, *, now_s: float) -> list[Action]:
        """An executor ended its batch, well or not; a batch that is not the running one is ignored."""
        found = self._executors.get(executor)
        if found is None or found.running is None or found.running.batch.id != batch_id:
            return []
        running, model = found.running, found.running.model
        batch, took_s = running.batch, now_s - running.started_s
        each_s = took_s / len(batch.requests)
        model.mean_s += (_SMOOTHING if model.mean_s else 1.0) * (each_s - model.mean_s)
        model.time.observe(batch.rows, took_s)
        for lane, part in running.payers:
            lane.virtual_time += part * (max(took_s, _LEAST_CHARGE_S) - running.charged_s)
        live = self._clear(executor, found)
        senders = [item.sender for item in batch.requests if item.id in live]
        model.gatherer.answered(senders, now_s, gather_window_s(model.time))
        ends: list[Action] = [End(item, None) for item in live]
        return ends + self._after_run(running, executor) + self._advance(now_s)

    def progressed(self, batch_id: int, executor: str, *, now_s: float) -> None:
        """A batch that failed as a whole runs item by item, and one is done: its time starts again."""
        found = self._executors.get(executor)
        if found is None or found.running is None or found.running.batch.id != batch_id:
            return
        running = found.running
        if running.kill_s is not None:
            running.kill_s = now_s + running.model.call_timeout_s

    def shrink(self, model: str, max_rows: int) -> int:
        """Let a model's batches have fewer rows, for as long as it is open; return how many at most."""
        found = self._models.get(model)
        if found is None:
            return 1
        rows = max(1, min(max_rows, found.limits.max_rows))
        found.limits = replace(found.limits, max_rows=rows)
        return rows

    def executor_lost(self, executor: str, reason: str, *, now_s: float) -> list[Action]:
        """An executor died: what ran there fails, what waits for it waits on, but only once.

        Its models start no batch until `open_model` says that they can.
        """
        found = self._executors.pop(executor, None)
        actions: list[Action] = []
        if found is not None and found.running is not None:
            running = found.running
            lost = ExecutorLostError(
                "the executor died while it ran this request",
                running.batch.model,
                got=reason,
                hint="Send it again if it may run twice",
            )
            actions += [End(item, lost) for item in self._clear(executor, found)]
            actions += self._after_run(running, executor)
        for model in self._models.values():
            if model.executor == executor:
                model.is_ready = False
        for waiting in list(self._waiting.values()):
            request = waiting.request
            if self._models[request.model].executor != executor:
                continue
            if waiting.was_requeued:
                error = ExecutorLostError(
                    "the executor died twice while this request waited", request.model, got=reason
                )
                actions += [self._end_waiting(request, error), *self._drained(request.model)]
            waiting.was_requeued = True
        return actions + self._advance(now_s)

    def tick(self, *, now_s: float) -> list[Action]:
        """Time passed."""
        return self._advance(now_s)

    # Decisions.

    def _obstacle(self, request: Request) -> NosError | None:
        model = self._models.get(request.model)
        if model is None or model.is_draining:
            state = "is being unloaded" if model else "is not loaded"
            return UnavailableError(
                f"{request.model} {state} on this worker", "model", hint="Resolve it again"
            )
        if request.may_wait:
            return None
        total_bytes = model.waiting_bytes + request.size_bytes
        if model.num_waiting >= self.max_queued:
            expected, got = f"at most {self.max_queued} requests", f"{model.num_waiting} waiting"
        elif model.num_waiting and total_bytes > self.max_queued_bytes:
            expected, got = f"at most {self.max_queued_bytes} bytes", f"{total_bytes}"
        else:
            return None
        wait_s = model.num_waiting * model.mean_s
        retry_after_s = min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
        return OverloadedError(
            f"the queue of {request.model} is full",
            request.model,
            expected,
            got,
            f"Send it again in {retry_after_s:.2g} s",
            "",
            retry_after_s,
        )

    def _advance(self, now_s: float) -> list[Action]:
        """Do what has become due or possible."""
        actions: list[Action] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            actions += self._end_early(request_id, self._too_late(request_id))
        for running in self._busy():
            if running.kill_s is not None and running.kill_s <= now_s:
                actions += self._time_out(running)
        self._gathered_s = None
        while self.num_running < self.max_concurrent_batches:
            lane = self._next_lane(now_s)
            if lane is None:
                break
            actions.append(self._start(lane, now_s))
        return actions

    def _next_lane(self, now_s: float) -> _Lane | None:
        """Return whose turn it is; None if nobody can run, or who can waits for more requests."""
        lanes = sorted(self._runnable(), key=lambda item: (item.virtual_time, item.order))
        is_contended = any(lane.model != lanes[0].model for lane in lanes[1:])
        gathering: set[str] = set()
        for lane in lanes:
            if lane.model in gathering:
                continue
            model = self._models[lane.model]
            until_s = self._gather_until_s(lane, model, now_s, is_contended=is_contended)
            if until_s <= now_s:
                return lane
            gathering.add(lane.model)
            if model.gathering_s is None:
                model.gathering_s = now_s
            self._gathered_s = min(until_s, self._gathered_s or until_s)
        return None

    def _gather_until_s(
        self, lane: _Lane, model: _Model, now_s: float, *, is_contended: bool
    ) -> float:
        """Return when the batch of a lane that could run is to start at the latest."""
        head = next(iter(lane.waiting.values()))
        limits = model.limits
        if head.key is None or model.is_draining or model.waiting_rows >= limits.max_rows:
            return now_s
        if limits.queue_delay_s is not None:
            until_s = self._oldest_s(lane.model) + limits.queue_delay_s
        else:
            until_s = 0.0 if is_contended else model.gatherer.until_s()
        if until_s > now_s and self._deadlines:
            deadlines = [
                item.deadline_s
                for other in self._lanes_of(lane.model)
                for item in other.waiting.values()
                if item.deadline_s is not None
            ]
            slack_s = min(deadlines, default=until_s) - model.time.predict_s(model.waiting_rows)
            until_s = min(until_s, slack_s)
        return until_s

    def _oldest_s(self, model: str) -> float:
        """Return when the oldest waiting request of a model that has one came."""
        heads = (next(iter(lane.waiting)) for lane in self._lanes_of(model))
        return min(self._waiting[head].arrived_s for head in heads)

    def _lanes_of(self, model: str) -> list[_Lane]:
        """Return the lanes of a model that have waiting requests."""
        return [lane for lane in self._lanes.values() if lane.waiting and lane.model == model]

    def _runnable(self) -> Iterator[_Lane]:
        for lane in self._lanes.values():
            if lane.waiting:
                model = self._models[lane.model]
                executor = self._executors.get(model.executor)
                is_free = executor and not executor.running and not executor.is_held
                if model.is_ready and is_free and self._may_start(lane.model):
                    yield lane

    def _start(self, lane: _Lane, now_s: float) -> Start:
        model = self._models[lane.model]
        head = next(iter(lane.waiting.values()))
        companions = [
            (item.virtual_time, item.order, item.waiting.values())
            for item in self._lanes_of(lane.model)
        ]
        requests = form(head, companions, model.limits, model.time, now_s)
        self._virtual_now = max(self._virtual_now, lane.virtual_time)
        gather_s = 0.0 if model.gathering_s is None else now_s - model.gathering_s
        model.gathering_s = None
        rows = sum(item.rows for item in requests)
        charged_s = max(model.time.predict_s(rows), _LEAST_CHARGE_S)
        payers: list[tuple[_Lane, float]] = []
        for item in requests:
            payer = self._lanes[item.model, item.tenant]
            part = item.rows / rows / item.weight
            payer.virtual_time += part * charged_s
            payers.append((payer, part))
            self._forget_waiting(item)
            self._running[item.id] = model.executor
        if len(self._lanes) > _SLACK:
            self._sweep_lanes()
        model.num_running += len(requests)
        batch = Batch(
            id=next(self._sequence),
            model=lane.model,
            executor=model.executor,
            requests=tuple(requests),
            rows=rows,
            gather_s=gather_s,
        )
        self._executors[model.executor].running = _Running(
            batch=batch,
            model=model,
            started_s=now_s,
            kill_s=now_s + model.call_timeout_s if model.call_timeout_s else None,
            live={item.id for item in requests},
            charged_s=charged_s,
            payers=payers,
        )
        return Start(batch)

    def _time_out(self, running: _Running) -> list[Action]:
        batch = running.batch
        running.kill_s = None
        limit_s = running.model.call_timeout_s
        error = DeadlineExceededError(
            "the call ran too long and its executor was ended",
            batch.model,
            f"at most {limit_s:g} s",
            hint="Raise call_timeout_s of the model if its calls take that long",
        )
        ends: list[Action] = [End(item, error) for item in sorted(running.live)]
        for item in running.live:
            del self._running[item]
        running.live.clear()
        reason = f"a call of {batch.model} ran longer than {limit_s:g} s"
        return [*ends, KillExecutor(batch.executor, reason)]

    def _too_late(self, request_id: int) -> NosError:
        where = "ran" if request_id in self._running else "waited in the queue"
        return DeadlineExceededError(f"the deadline passed while the request {where}")

    def _end_early(self, request_id: int, error: NosError) -> list[Action]:
        """End a request that waits or runs; its executor may still be busy with it."""
        if request_id in self._waiting:
            request = self._waiting[request_id].request
            return [self._end_waiting(request, error), *self._drained(request.model)]
        executor = self._running.pop(request_id, None)
        if executor is None:
            return []
        running = self._executors[executor].running
        if running is not None:
            running.live.discard(request_id)
        return [End(request_id, error), CancelCall(request_id, executor)]

    def _end_waiting(self, request: Request, error: NosError) -> End:
        self._forget_waiting(request)
        return End(request.id, error)

    # Bookkeeping.

    def _busy(self) -> list[_Running]:
        return [item.running for item in self._executors.values() if item.running]

    def _forget_waiting(self, request: Request) -> None:
        del self._waiting[request.id]
        del self._lanes[request.model, request.tenant].waiting[request.id]
        model = self._models[request.model]
        model.num_waiting -= 1
        model.waiting_rows -= request.rows
        if not model.num_waiting:
            model.gathering_s = None
        model.waiting_bytes -= request.size_bytes

    def _clear(self, executor: str, found: _Executor) -> list[int]:
        """Take the batch off an executor; return its requests that have had no end."""
        running = found.running
        if running is None:
            return []
        found.running = None
        running.model.num_running -= len(running.batch.requests)
        live = sorted(running.live)
        for item in live:
            del self._running[item]
        return live

    def _after_run(self, running: _Running, executor: str) -> list[Action]:
        found = self._executors.get(executor)
        held: list[Action] = [Held(executor)] if found and found.is_held else []
        return held + self._drained(running.batch.model)

    def _drained(self, model: str) -> list[Action]:
        found = self._models.get(model)
        is_over = found is not None and found.is_draining and not self.num_pending(model)
        return [Drained(model)] if is_over else []

    def _sweep_lanes(self) -> None:
        """Forget idle lanes that would start at the present anyway."""
        self._lanes = {
            key: lane
            for key, lane in self._lanes.items()
            if lane.waiting or lane.virtual_time > self._virtual_now
        }

    def _sweep_deadlines(self) -> None:
        """Forget deadlines of requests that have ended, once they are the most."""
        if len(self._deadlines) > 2 * (len(self._waiting) + len(self._running)) + _SLACK:
            self._deadlines = [item for item in self._deadlines if self.is_live(item[1])]
            heapq.heapify(self._deadlines)
