"""Who runs next on a device: a state machine. Events and the time go in, actions come out.

Requests wait in lanes, one per (model, tenant). A grant lets one batch run on one executor; a device has
`max_concurrent_batches` grants, and an executor runs one batch at a time. The next lane is the one with
the least virtual time (start-time fair queueing, Goyal et al. 1996, in seconds of the device by weight),
so a saturated lane gets its turn and no more. Its first request leads a batch that requests of the same
key from all lanes of the model join, each at its own lane's cost (`nos_backend.scheduling.batching`).
A request that runs alone and is short takes those behind it in its lane along while no other lane has
work: a train, whose calls are all handed to the executor, so that it need not wait for the next.
Bulk requests have lanes of their own, which pay more for each second; they join no batch that another
leads, and the batches that they lead keep to the quantum.

The shell (`nos_backend.worker.manager`) carries the actions out in the order given, and delivers a
result only when told so by `End` without an error. That makes this the one place that decides how a
request ends: every admitted request gets exactly one `End`.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nos.errors import (
    CancelledError,
    DeadlineExceededError,
    ExecutorLostError,
    NosError,
    UnavailableError,
)

from nos_backend.scheduling.actions import (
    Action,
    Batch,
    CancelCall,
    Capped,
    Culprit,
    Drained,
    End,
    Held,
    KillExecutor,
    PutBack,
    Refuse,
    Request,
    Start,
)
from nos_backend.scheduling.admission import (
    MAX_QUEUED,
    MAX_QUEUED_BYTES,
    displaced,
    late,
    make_room,
    queued_s,
    work_s,
)
from nos_backend.scheduling.batching import (
    MAX_BATCH_ROWS,
    BatchLimits,
    form,
    gather_window_s,
    is_doomed,
)
from nos_backend.scheduling.caps import after_run, lowered
from nos_backend.scheduling.lanes import Lane, Lanes, Model
from nos_backend.scheduling.suspects import Incident, Suspects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nos_backend.scheduling.caps import Cap

__all__ = [
    "Action",
    "Batch",
    "BatchLimits",
    "CancelCall",
    "Capped",
    "Culprit",
    "DeviceQueue",
    "Drained",
    "End",
    "Held",
    "KillExecutor",
    "PutBack",
    "Refuse",
    "Request",
    "Start",
]

#: What a batch is charged at least, so that lanes take turns whatever the clock's grain.
_LEAST_CHARGE_S: Final = 1e-6
#: The longest batch while another model has work: a running batch is not interrupted.
QUANTUM_S: Final = 50e-3
#: A train is expected to take no longer, and has no more requests.
_TRAIN_S: Final = 4e-3
_MAX_TRAIN: Final = 8
#: Of each of its requests at most: their input is needed again if the executor dies before they run, and
#: larger blocks lose theirs with it.
_TRAIN_BYTES: Final = 4 << 20
#: Of the device, for bulk requests of a tenant while others have work.
_BULK_SHARE: Final = 1 / 16
#: Stale deadlines kept before they are swept.
_SLACK: Final = 64


@dataclass(slots=True, eq=False)
class _Running:
    batch: Batch
    model: Model
    started_s: float
    #: When the executor is killed for it; None for never, or once that was asked.
    kill_s: float | None
    #: Its requests that have had no `End` yet.
    live: set[int]
    #: What it was expected to take, as it was charged.
    charged_s: float
    #: Who pays: lanes and their parts of each second.
    payers: list[tuple[Lane, float]]
    #: Whether its requests run one after the other, after they failed together.
    is_separate: bool = False
    #: Whether one of them was ended because it ran too long.
    is_timed_out: bool = False


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
        quantum_s: float = QUANTUM_S,
        may_start: Callable[[str], bool] = lambda _model: True,
    ) -> None:
        """Make an empty queue.

        Args:
            max_concurrent_batches: Grants of the device.
            max_queued: Waiting requests per model whose senders do not wait for them.
            max_queued_bytes: Their bytes per model; one larger request is admitted alone.
            quantum_s: Of a batch at most while another model has work, if it can be made smaller.
            may_start: Whether a model's weights are on the device; `tick` after it has changed.
        """
        self.max_concurrent_batches = max_concurrent_batches
        self.max_queued = max_queued
        self.max_queued_bytes = max_queued_bytes
        self.quantum_s = quantum_s
        self._may_start = may_start
        self._models: dict[str, Model] = {}
        self._executors: dict[str, _Executor] = {}
        self._lanes = Lanes()
        self._suspects = Suspects()
        #: Batches that ended their executor and whose requests do not, for the next ones to be smaller.
        self._unexplained: list[Incident] = []
        #: What runs, by executor.
        self._busy: dict[str, _Running] = {}
        #: Requests that were started and have had no `End` yet: which executor runs them.
        self._running: dict[int, str] = {}
        #: (deadline, request); stale entries are skipped.
        self._deadlines: list[tuple[float, int]] = []
        #: When a batch that waits for more requests starts without them; None if none does.
        self._gathered_s: float | None = None
        self._sequence = itertools.count(1)

    # What the shell may ask.

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._lanes)

    @property
    def num_running(self) -> int:
        """Batches that run; never above `max_concurrent_batches`."""
        return len(self._busy)

    def num_pending(self, model: str) -> int:
        """Requests of a model that wait or run."""
        found = self._models.get(model)
        return self._lanes.num_of(model) + found.num_running if found else 0

    def is_live(self, request_id: int) -> bool:
        """Whether an admitted request has had no `End` yet."""
        return request_id in self._lanes or request_id in self._running

    def running_model(self, executor: str) -> str | None:
        """Which model's batch an executor runs."""
        found = self._executors.get(executor)
        return found.running.batch.model if found and found.running else None

    def recent(self, model: str) -> tuple[int, float, float]:
        """Return how many batches of a model ran, and the mean rows and seconds of the last of them."""
        found = self._models.get(model)
        return (found.time.num_samples, *found.time.recent()) if found else (0, 0.0, 0.0)

    def next_wake_s(self) -> float | None:
        """When `tick` is due at the latest; None if nothing is timed."""
        while self._deadlines and not self.is_live(self._deadlines[0][1]):
            heapq.heappop(self._deadlines)
        times = [self._deadlines[0][0]] if self._deadlines else []
        times += [item.kill_s for item in self._busy.values() if item.kill_s is not None]
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
        cap: Cap | None = None,
    ) -> list[Action]:
        """A model can run on an executor, for the first time or again; 0 means no timeout.

        `limits` and `cap`, which was learnt before, count the first time only.
        """
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = Model(model, executor, call_timeout_s)
            found.keep_to(limits or found.advised, cap)
            found.declared_rows = found.advised.max_rows
        found.executor, found.call_timeout_s = executor, call_timeout_s
        found.is_ready = True
        self._executors.setdefault(executor, _Executor())
        return self._advance(now_s)

    def close_model(self, model: str, error: NosError, *, now_s: float) -> list[Action]:
        """A model is gone: what waits ends with `error`; what runs may finish."""
        actions = self._end_all(model, error)
        self._models.pop(model, None)
        return actions + self._advance(now_s)

    def refuse_waiting(self, model: str, error: NosError, *, now_s: float) -> list[Action]:
        """End what waits for a model, which stays open."""
        actions = self._end_all(model, error)
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
        verdict = self._admit(request, now_s)
        if isinstance(verdict, NosError):
            return [Refuse(request.id, verdict)]
        model = self._models[request.model]
        model.gatherer.arrived(request.sender, now_s)
        if self._is_free_for(request, model, now_s):
            lane = self._lanes.pass_through(request, next(self._sequence))
            return [*self._fall_due(now_s), self._launch(model, [request], [lane], now_s)]
        self._lanes.enter(request, now_s, next(self._sequence))
        if request.deadline_s is not None:
            self._sweep_deadlines()
            heapq.heappush(self._deadlines, (request.deadline_s, request.id))
        return verdict + self._advance(now_s)

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
        model.time.observe(batch.rows, took_s)
        for lane, part in running.payers:
            lane.virtual_time += part * (max(took_s, _LEAST_CHARGE_S) - running.charged_s)
        live = self._clear(executor, found)
        senders = [item.sender for item in batch.requests if item.id in live]
        model.gatherer.answered(senders, now_s, gather_window_s(model.time))
        ends: list[Action] = [End(item, None) for item in live]
        if batch.is_suspect:
            self._clear_suspects(batch.requests)
        elif not (running.is_separate or batch.is_train):
            ends += self._went_together(model, batch, now_s)
        return ends + self._after_run(running, executor) + self._advance(now_s)

    def separated(self, batch_id: int, executor: str) -> None:
        """A batch that failed as a whole runs item by item from now on."""
        found = self._executors.get(executor)
        if found is not None and found.running and found.running.batch.id == batch_id:
            found.running.is_separate = True

    def progressed(self, batch_id: int, executor: str, *, now_s: float) -> None:
        """One of the items of such a batch is done: its time starts again."""
        found = self._executors.get(executor)
        if found is None or found.running is None or found.running.batch.id != batch_id:
            return
        running = found.running
        if running.kill_s is not None:
            running.kill_s = now_s + running.model.call_timeout_s

    def answered(
        self, batch_id: int, executor: str, request_id: int, *, now_s: float
    ) -> list[Action]:
        """A request of a train has ended, and others of it have not: it need not wait for them."""
        self.progressed(batch_id, executor, now_s=now_s)
        if self._running.pop(request_id, None) is None:
            return []
        self._busy[executor].live.discard(request_id)
        return [End(request_id, None)]

    def whole_rows(self, model: str, *, is_bulk: bool) -> int:
        """Return how many rows one request of a model may run with; 1 if it is not open."""
        found = self._models.get(model)
        return self._in_quantum(found, found.whole_rows, is_bulk=is_bulk) if found else 1

    def failed_together(
        self, model: str, rows: int, *, now_s: float, is_final: bool = False
    ) -> list[Action]:
        """A batch of so many rows failed as a whole: the next ones have fewer; one row each if `is_final`."""
        found = self._models.get(model)
        if found is None:
            return []
        found.keep_to(found.advised, lowered(found.cap, rows, now_s, is_final=is_final))
        return [Capped(model, found.cap)]

    @staticmethod
    def _went_together(model: Model, batch: Batch, now_s: float) -> list[Action]:
        """A batch of a model that has a cap went well: see whether larger ones may be tried."""
        if model.cap is None:
            return []
        rows = batch.rows if len(batch.requests) > 1 else 0
        cap = after_run(model.cap, rows, now_s)
        if cap is model.cap:
            return []
        model.keep_to(model.advised, cap)
        return [Capped(model.name, cap)]

    def advise(
        self,
        model: str,
        max_rows: int,
        times: Iterable[tuple[int, float]],
        memory_rows: int = MAX_BATCH_ROWS,
    ) -> None:
        """Take what a profile says of a model that is open.

        Args:
            model: Which.
            max_rows: Its best batch; 0: none.
            times: Seconds by rows.
            memory_rows: Of a request that the device has memory for.
        """
        found = self._models.get(model)
        if found is None:
            return
        found.memory_rows = memory_rows
        if max_rows:
            found.keep_to(replace(found.advised, max_rows=max_rows), found.cap)
        for rows, took_s in times:
            found.time.observe(rows, took_s)

    def executor_lost(self, executor: str, reason: str, *, now_s: float) -> list[Action]:
        """An executor died: what ran there alone fails, what waits for it waits on, but only once.

        Of a batch nobody knows which request it was: its requests are started again in halves, which ends
        with those that end an executor alone. Its models start no
        batch until `open_model` says that they can.
        """
        found = self._executors.pop(executor, None)
        actions: list[Action] = []
        is_incident = False
        if found is not None and found.running is not None and found.running.batch.is_train:
            actions += self._lose_train(found.running, executor, found, reason, now_s)
        elif found is not None and found.running is not None:
            running = found.running
            is_incident = running.batch.is_suspect
            again = self._cleared(executor, found)
            if again:
                is_incident = True
                actions.append(PutBack(running.batch))
                for request in reversed(again):
                    self._lanes.enter_first(request, now_s, next(self._sequence))
            lost = _lost(running.batch.model, reason)
            for item in () if again else running.batch.requests:
                if running.batch.is_suspect and len(running.batch.requests) == 1:
                    actions.append(Culprit(item.id))
                if item.id in running.live:
                    actions.append(End(item.id, lost))
            if running.batch.is_suspect and not again:
                self._clear_suspects(running.batch.requests)
            actions += self._after_run(running, executor)
        for model in self._models.values():
            if model.executor == executor:
                model.is_ready = False
        if not is_incident:
            actions += self._requeue(executor, reason)
        return actions + self._advance(now_s)

    def tick(self, *, now_s: float) -> list[Action]:
        """Time passed."""
        return self._advance(now_s)

    # Decisions.

    def _lose_train(
        self, running: _Running, executor: str, found: _Executor, reason: str, now_s: float
    ) -> list[Action]:
        """End the one that an executor died of, which is the first without an end; the others wait again."""
        live = self._clear(executor, found)
        rest = [item for item in running.batch.requests if item.id in live]
        num_lost = 0 if running.is_timed_out else 1
        if running.batch.model not in self._models:
            num_lost = len(rest)
        lost = _lost(running.batch.model, reason)
        actions: list[Action] = [End(item.id, lost) for item in rest[:num_lost]]
        if again := rest[num_lost:]:
            actions.append(PutBack(running.batch))
        for request in reversed(again):
            self._lanes.enter_first(request, now_s, next(self._sequence))
        return actions + self._after_run(running, executor)

    def _cleared(self, executor: str, found: _Executor) -> list[Request]:
        """Take the batch off a dead executor; return those of its requests that are to run again."""
        running = found.running
        if running is None:
            return []
        live = self._clear(executor, found)
        requests = [item for item in running.batch.requests if item.id in live]
        is_open = running.batch.model in self._models
        if running.is_separate or not is_open:
            return []
        return self._suspects.died(running.batch, requests)

    def _requeue(self, executor: str, reason: str) -> list[Action]:
        """Let what waits for a dead executor wait on; end what did so before."""
        actions: list[Action] = []
        for waiting in self._lanes.all():
            request = waiting.request
            if self._models[request.model].executor != executor:
                continue
            if waiting.was_requeued:
                error = ExecutorLostError(
                    "the executor died twice while this request waited", request.model, got=reason
                )
                actions += [self._end_waiting(request, error), *self._drained(request.model)]
            waiting.was_requeued = True
        return actions

    def _clear_suspects(self, requests: Iterable[Request]) -> None:
        """See whether each request of a batch that ended an executor is harmless by itself."""
        self._unexplained += self._suspects.clear(requests, self.is_live)

    def _learn(self, now_s: float) -> list[Action]:
        """Have batches smaller than those that ended executors although none of their requests does."""
        actions: list[Action] = []
        unexplained, self._unexplained = self._unexplained, []
        for incident in unexplained:
            model = self._models.get(incident.model)
            if model is not None:
                model.num_unexplained += 1
                if (
                    model.num_unexplained > 1
                ):  # once may be anything: a signal, the machine's memory
                    actions += self.failed_together(incident.model, incident.rows, now_s=now_s)
        return actions

    def _admit(self, request: Request, now_s: float) -> NosError | list[Action]:
        """Return why a request is refused, or what ends because it is admitted."""
        model = self._models.get(request.model)
        if model is None or model.is_draining:
            state = "is being unloaded" if model else "is not loaded"
            return UnavailableError(
                f"{request.model} {state} on this worker", "model", hint="Resolve it again"
            )
        if request.may_wait:
            return []
        own = self._lanes.lane(request)
        lanes = [
            lane for lane in self._lanes.of(request.model) if request.is_bulk or not lane.is_bulk
        ]
        if request.deadline_s is not None and (lanes or model.num_running):
            elsewhere = [
                (other, its_lanes)
                for name, other in self._models.items()
                if other is not model and (its_lanes := self._lanes.of(name))
            ]
            wait_s = queued_s(request, model, lanes, elsewhere, self.max_concurrent_batches)
            error = late(request, model, self._free_s(model, now_s) + wait_s, now_s)
            if error is not None:
                return error
        wait_s = work_s(lanes, model)
        leaving = make_room(
            request,
            own,
            [lane for lane in lanes if lane is not own],
            max_queued=self.max_queued,
            max_queued_bytes=self.max_queued_bytes,
            wait_s=wait_s,
        )
        if isinstance(leaving, NosError):
            return leaving
        return [self._end_waiting(item, displaced(item, wait_s)) for item in leaving]

    def _free_s(self, model: Model, now_s: float) -> float:
        """Return when a model's executor and a grant are expected to be free."""
        ends = [max(now_s, item.started_s + item.charged_s) for item in self._busy.values()]
        free_s = min(ends) if len(ends) >= self.max_concurrent_batches else now_s
        executor = self._executors.get(model.executor)
        running = executor.running if executor else None
        return max(free_s, running.started_s + running.charged_s) if running else free_s

    def _is_free_for(self, request: Request, model: Model, now_s: float) -> bool:
        """Whether a request that just came runs at once: nothing waits, or is worth waiting for."""
        if self._lanes or request.deadline_s is not None or not model.is_ready:
            return False
        executor = self._executors.get(model.executor)
        is_taken = executor is None or executor.running or executor.is_held
        if is_taken or len(self._busy) >= self.max_concurrent_batches:
            return False
        limits = model.limits
        may_grow = request.key is not None and request.rows < limits.max_rows
        if may_grow and (limits.queue_delay_s is not None or model.gatherer.until_s() > now_s):
            return False
        return self._may_start(request.model)

    def _advance(self, now_s: float) -> list[Action]:
        """Do what has become due or possible."""
        actions = self._fall_due(now_s)
        most = min(self.max_concurrent_batches, len(self._executors))
        while self._lanes and len(self._busy) < most:
            lane = self._next_lane(now_s)
            if lane is None:
                break
            actions.append(self._start(lane, now_s))
        return actions

    def _fall_due(self, now_s: float) -> list[Action]:
        """Do what has become due."""
        actions = self._learn(now_s) if self._unexplained else []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            actions += self._end_early(request_id, self._too_late(request_id))
        for running in self._busy.values():
            if running.kill_s is not None and running.kill_s <= now_s:
                actions += self._time_out(running)
        self._gathered_s = None
        return actions

    def _next_lane(self, now_s: float) -> Lane | None:
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
        self, lane: Lane, model: Model, now_s: float, *, is_contended: bool
    ) -> float:
        """Return when the batch of a lane that could run is to start at the latest."""
        head = next(iter(lane.waiting.values()))
        limits = model.limits
        rows = self._lanes.rows_of(lane.model)
        if head.key is None or model.is_draining or rows >= limits.max_rows:
            return now_s
        if limits.queue_delay_s is not None:
            until_s = self._lanes.oldest_s(lane.model) + limits.queue_delay_s
        else:
            until_s = 0.0 if is_contended else model.gatherer.until_s()
        if until_s > now_s and self._deadlines:
            deadlines = [
                item.deadline_s
                for other in self._lanes.of(lane.model)
                for item in other.waiting.values()
                if item.deadline_s is not None
            ]
            slack_s = min(deadlines, default=until_s) - model.time.predict_s(rows)
            until_s = min(until_s, slack_s)
        return until_s

    def _runnable(self) -> Iterator[Lane]:
        for lane in self._lanes.active():
            model = self._models[lane.model]
            executor = self._executors.get(model.executor)
            is_free = executor and not executor.running and not executor.is_held
            if model.is_ready and is_free and self._may_start(lane.model):
                yield lane

    def _start(self, lane: Lane, now_s: float) -> Start:
        model = self._models[lane.model]
        waiting = lane.waiting.values()
        head = next(iter(waiting))
        if is_doomed(head, model.time, now_s):
            head = next((item for item in waiting if not is_doomed(item, model.time, now_s)), head)
        companions = [
            (item.virtual_time, item.order, item.waiting.values())
            for item in self._lanes.of(lane.model)
            if head.is_bulk or not item.is_bulk
        ]
        limits = self._limits(model, is_bulk=head.is_bulk)
        requests = form(head, companions, limits, model.time, now_s)
        if head.key is None:
            requests = self._train(head, lane, model)
        gather_s = 0.0 if model.gathering_s is None else now_s - model.gathering_s
        model.gathering_s = None
        lanes = [self._leave(item) for item in requests]
        return self._launch(model, requests, lanes, now_s, gather_s)

    def _train(self, head: Request, lane: Lane, model: Model) -> list[Request]:
        """Return a request that runs alone, and those behind it that run with it."""
        if self._lanes.num_active > 1 or not model.time.is_known:
            return [head]
        most = min(_MAX_TRAIN, int(_TRAIN_S / max(model.time.predict_s(1), _LEAST_CHARGE_S)))
        train: list[Request] = []
        for item in lane.waiting.values():
            is_plain = item.key is None and item.rows == 1 and item.deadline_s is None
            is_small = item.size_bytes <= _TRAIN_BYTES
            if len(train) >= most or not (is_plain and is_small) or item.id in self._suspects:
                break
            train.append(item)
        return train if train and train[0] is head else [head]

    def _launch(
        self,
        model: Model,
        requests: list[Request],
        lanes: list[Lane],
        now_s: float,
        gather_s: float = 0.0,
    ) -> Start:
        """Have a batch start for which an executor and a grant are free.

        Args:
            model: Whose batch it is.
            requests: What it runs, none of which waits any more; the first leads it.
            lanes: Of each, which pay for it.
            now_s: The time.
            gather_s: How long it could have run already.
        """
        self._lanes.virtual_now = max(self._lanes.virtual_now, lanes[0].virtual_time)
        rows = sum(item.rows for item in requests)
        charged_s = max(model.time.predict_s(rows), _LEAST_CHARGE_S)
        payers: list[tuple[Lane, float]] = []
        for item, payer in zip(requests, lanes, strict=True):
            share = _BULK_SHARE if item.is_bulk else 1.0
            part = item.rows / rows / (item.weight * share)
            payer.virtual_time += part * charged_s
            payers.append((payer, part))
            self._running[item.id] = model.executor
        self._lanes.sweep()
        model.num_running += len(requests)
        batch = Batch(
            id=next(self._sequence),
            model=model.name,
            executor=model.executor,
            requests=tuple(requests),
            rows=rows,
            gather_s=gather_s,
            is_suspect=requests[0].id in self._suspects,
            is_train=len(requests) > 1 and requests[0].key is None,
        )
        running = self._busy[model.executor] = _Running(
            batch=batch,
            model=model,
            started_s=now_s,
            kill_s=now_s + model.call_timeout_s if model.call_timeout_s else None,
            live={item.id for item in requests},
            charged_s=charged_s,
            payers=payers,
        )
        self._executors[model.executor].running = running
        return Start(batch)

    def _limits(self, model: Model, *, is_bulk: bool) -> BatchLimits:
        """Return the limits of a model's next batch."""
        rows = self._in_quantum(model, model.limits.max_rows, is_bulk=is_bulk)
        return (
            replace(model.limits, max_rows=rows) if rows < model.limits.max_rows else model.limits
        )

    def _in_quantum(self, model: Model, rows: int, *, is_bulk: bool) -> int:
        """Return as many of `rows` as take no longer than the quantum: of bulk, or while others have work."""
        time = model.time
        if not time.row_s or time.predict_s(rows) <= self.quantum_s:
            return rows
        if not is_bulk and all(lane.model == model.name for lane in self._lanes.active()):
            return rows
        return max(1, min(int((self.quantum_s - time.t0_s) / time.row_s), rows))

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
        running.is_timed_out = True
        expired = sorted(running.live)
        if batch.is_train:  # only the first of them runs
            expired = [item.id for item in batch.requests if item.id in running.live][:1]
        ends: list[Action] = [End(item, error) for item in expired]
        for item in expired:
            del self._running[item]
        running.live.difference_update(expired)
        reason = f"a call of {batch.model} ran longer than {limit_s:g} s"
        return [*ends, KillExecutor(batch.executor, reason)]

    def _too_late(self, request_id: int) -> NosError:
        where = "ran" if request_id in self._running else "waited in the queue"
        return DeadlineExceededError(f"the deadline passed while the request {where}")

    def _end_early(self, request_id: int, error: NosError) -> list[Action]:
        """End a request that waits or runs; its executor may still be busy with it."""
        if request_id in self._lanes:
            request = self._lanes[request_id].request
            return [self._end_waiting(request, error), *self._drained(request.model)]
        executor = self._running.pop(request_id, None)
        if executor is None:
            return []
        running = self._executors[executor].running
        if running is not None:
            running.live.discard(request_id)
        return [End(request_id, error), CancelCall(request_id, executor)]

    def _end_waiting(self, request: Request, error: NosError) -> End:
        self._leave(request)
        if request.id in self._suspects:
            self._clear_suspects((request,))
        return End(request.id, error)

    def _end_all(self, model: str, error: NosError) -> list[Action]:
        """End what waits for a model."""
        waiting = [item.request for item in self._lanes.all() if item.request.model == model]
        return [self._end_waiting(request, error) for request in waiting]

    # Bookkeeping.

    def _leave(self, request: Request) -> Lane:
        """A request waits no more; return its lane."""
        lane = self._lanes.leave(request)
        model = self._models[request.model]
        if model.gathering_s is not None and not self._lanes.of(request.model):
            model.gathering_s = None
        return lane

    def _clear(self, executor: str, found: _Executor) -> list[int]:
        """Take the batch off an executor; return its requests that have had no end."""
        running = found.running
        if running is None:
            return []
        found.running = None
        del self._busy[executor]
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

    def _sweep_deadlines(self) -> None:
        """Forget deadlines of requests that have ended, once they are the most."""
        if len(self._deadlines) > 2 * (len(self._lanes) + len(self._running)) + _SLACK:
            self._deadlines = [item for item in self._deadlines if self.is_live(item[1])]
            heapq.heapify(self._deadlines)


def _lost(model: str, reason: str) -> ExecutorLostError:
    return ExecutorLostError(
        "the executor died while it ran this request",
        model,
        got=reason,
        hint="Send it again if it may run twice",
    )
