"""Carries out what the device's queue decides: hands requests to executors and answers to their callers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from nos.errors import ExecutorLostError, InternalError, NosError, OutOfDeviceMemoryError

from nos_backend.scheduling import device_queue
from nos_backend.scheduling.batching import divided
from nos_backend.scheduling.device_queue import (
    Batch,
    CancelCall,
    Capped,
    Culprit,
    DeviceQueue,
    Drained,
    End,
    Held,
    KillExecutor,
    PutBack,
    Refuse,
    Start,
)
from nos_backend.worker import batches, shares
from nos_backend.worker.culprits import Culprits
from nos_backend.worker.division import Division
from nos_backend.worker.inputs import Input
from nos_backend.worker.requests import Request, Run, failure, request_ids
from nos_backend.worker.rescues import Rescues
from nos_backend.worker.statistics import ModelStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos.wire.v1 import models_pb2

    from nos_backend.scheduling.caps import Cap
    from nos_backend.worker.executors import Block, Blocks, Executor, Reply
    from nos_backend.worker.limits import WorkLimits
    from nos_backend.worker.memory import DeviceMemory

__all__ = ["Dispatcher", "Request", "failure"]

_logger = logging.getLogger(__name__)


class Dispatcher:
    """The requests of one device. Everything runs on one event loop."""

    def __init__(
        self,
        *,
        max_concurrent_batches: int,
        on_lost: Callable[[str, Executor, str], None],
        memory: DeviceMemory,
        on_capped: Callable[[str, Cap | None], None],
        limits: WorkLimits,
    ) -> None:
        """Make a dispatcher without executors.

        Args:
            max_concurrent_batches: Batches that run at once.
            on_lost: Called with (slot, executor, reason) when a call finds its executor dead; has to
                call `lost`.
            memory: Knows whose weights are on the device, and is told what runs.
            on_capped: Called with a model and what its batches keep to by what they taught.
            limits: How many requests may wait.
        """
        self._queue = DeviceQueue(
            max_concurrent_batches=max_concurrent_batches,
            max_queued=limits.max_queued,
            max_queued_bytes=limits.max_queued_bytes,
            may_start=memory.may_start,
        )
        self._on_lost = on_lost
        self._memory = memory
        self._on_capped = on_capped
        self._loop = asyncio.get_running_loop()
        #: The living executor of each slot.
        self._executors: dict[str, Executor] = {}
        #: Every request without an end, by id.
        self._requests: dict[int, Request] = {}
        #: Terminal replies that the queue has yet to let pass, by request.
        self._replies: dict[int, Reply] = {}
        #: Decided and not yet carried out.
        self._actions: deque[device_queue.Action] = deque()
        self._is_applying = False
        #: Ends that their callers have yet to hear of, since the next batch starts first.
        self._ended: deque[tuple[Request, Reply]] = deque()
        self._statistics: dict[str, ModelStatistics] = {}
        #: How calls are joined, by (model, method).
        self._plans: dict[tuple[str, str], batches.Plan] = {}
        #: Those whose first batch is yet to be compared with its calls alone.
        self._unchecked: set[tuple[str, str]] = set()
        #: What runs on each slot.
        self._runs: dict[str, Run] = {}
        self._culprits = Culprits()
        #: Requests that run in pieces, by their id.
        self._divisions: dict[int, Division] = {}
        #: (model, method) of which results of pieces cannot be joined, or rows depend on each other.
        self._undivided: set[tuple[str, str]] = set()
        #: Set while an executor is lost of which nobody knows yet what ended it.
        self._is_searching = False
        self._held: dict[str, asyncio.Future[None]] = {}
        self._drained: dict[str, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        #: By model: what its batches keep to since one did not go together; outlives a reload.
        self._caps: dict[str, Cap] = {}
        self._rescues = Rescues(memory, self._executors.get)

    # What the manager may ask.

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return self._queue.num_queued

    @property
    def num_running(self) -> int:
        """Batches that run."""
        return self._queue.num_running

    def num_pending(self, model: str) -> int:
        """Requests of a model that wait or run."""
        return self._queue.num_pending(model)

    def num_answered(self, model: str) -> int:
        """Requests of a model that ended in an answer, errors of its code included."""
        outcomes = self._of(model).outcomes
        return outcomes["answered"] + outcomes["failed"]

    def statistics(self, model: str) -> dict[str, Any]:
        """Return what became of a model's requests; see `ModelStatistics`."""
        return self._of(model).to_plain()

    def _of(self, model: str) -> ModelStatistics:
        found = self._statistics.get(model)
        if found is None:
            found = self._statistics[model] = ModelStatistics()
        return found

    def recent(self, model: str) -> tuple[int, float, float]:
        """Return how many batches of a model ran, and the mean rows and seconds of the last of them."""
        return self._queue.recent(model)

    def running_model(self, slot: str) -> str | None:
        """Which model a slot's executor runs at the moment."""
        return self._queue.running_model(slot)

    # Executors and models.

    def attach(self, slot: str, executor: Executor) -> None:
        """Use `executor` for the slot from now on."""
        self._executors[slot] = executor

    def detach(self, slot: str) -> None:
        """Forget the slot's executor, which has no model left."""
        self._executors.pop(slot, None)

    def lost(self, slot: str, reason: str) -> bool:
        """The slot's executor died; its models wait until they are opened again.

        Returns:
            Whether the call that ended it is being looked for among those of a batch.
        """
        self._executors.pop(slot, None)
        self._is_searching = False
        self._apply(self._queue.executor_lost(slot, reason, now_s=self._loop.time()))
        self._runs.pop(slot, None)
        self._resolve(self._held.pop(slot, None))
        return self._is_searching

    def open(
        self,
        model: str,
        slot: str,
        call_timeout_s: float,
        spec: models_pb2.ModelSpec | None = None,
    ) -> None:
        """Let a model's requests run on a slot; a timeout of 0 means none, without `spec` each runs alone."""
        limits = None
        if spec is not None:
            limits = batches.limits(spec)
            for method, plan in batches.plans(spec).items():
                if plan.is_checked and (model, method) not in self._plans:
                    self._unchecked.add((model, method))
                self._plans[model, method] = plan
        actions = self._queue.open_model(
            model,
            slot,
            now_s=self._loop.time(),
            call_timeout_s=call_timeout_s,
            limits=limits,
            cap=self._caps.get(model),
        )
        self._apply(actions)

    def advise(
        self, model: str, max_rows: int, times: list[tuple[int, float]], memory_rows: int
    ) -> None:
        """Take what a profile says of an open model; see `DeviceQueue.advise`."""
        self._queue.advise(model, max_rows, times, memory_rows)

    def recall(self, model: str, cap: Cap) -> None:
        """Take what batches of a model taught elsewhere or before; what they taught here counts more."""
        self._caps.setdefault(model, cap)

    def cap(self, model: str) -> Cap | None:
        """Return what a model's batches keep to since one did not go together; None if all did."""
        return self._caps.get(model)

    def close(self, model: str, error: NosError) -> None:
        """End what waits for a model."""
        self._apply(self._queue.close_model(model, error, now_s=self._loop.time()))
        self._statistics.pop(model, None)
        self._culprits.forget(model)
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] != model}
        self._undivided = {key for key in self._undivided if key[0] != model}
        self._resolve(self._drained.pop(model, None))

    def refuse_waiting(self, model: str, error: NosError) -> None:
        """End what waits for a model, which stays open."""
        self._apply(self._queue.refuse_waiting(model, error, now_s=self._loop.time()))

    def look_again(self) -> None:
        """Start what may start by now: weights came to the device."""
        self._apply(self._queue.tick(now_s=self._loop.time()))

    async def drain(self, model: str) -> None:
        """Admit nothing more for a model and wait until nothing of it is left."""
        future = self._drained.get(model)
        if future is None:
            future = self._drained[model] = self._loop.create_future()
            self._apply(self._queue.drain(model, now_s=self._loop.time()))
        await asyncio.shield(future)

    async def hold(self, slot: str) -> None:
        """Wait until the slot's executor is idle, and keep it so until `release`."""
        future = self._held[slot] = self._loop.create_future()
        self._apply(self._queue.hold(slot, now_s=self._loop.time()))
        await future

    def release(self, slot: str) -> None:
        """Take back `hold`."""
        self._held.pop(slot, None)
        self._apply(self._queue.release(slot, now_s=self._loop.time()))

    # Requests.

    def submit(self, request: Request) -> None:
        """Queue a request; its sink hears of a refusal at once."""
        now_s = request.arrived_s = self._loop.time()
        if self._culprits.has(request.model) and not self._may_run(request):
            return
        plan = self._plans.get((request.model, request.method))
        part = request.part = plan.part(request.arguments) if plan else None
        if plan and part and part.num_rows > 1 and self._divide(request, plan, part):
            return
        self._requests[request.id] = request
        wanted = device_queue.Request(
            id=request.id,
            model=request.model,
            tenant=request.tenant,
            size_bytes=request.input.view.nbytes if request.input else 0,
            deadline_s=request.deadline_s,
            may_wait=request.may_wait,
            key=(request.method, part.key) if part else None,
            rows=part.num_rows if part else 1,
            sender=request.sender,
            weight=request.weight,
            is_bulk=request.is_bulk,
        )
        self._apply(self._queue.arrive(wanted, now_s=now_s))

    def _divide(self, request: Request, plan: batches.Plan, part: batches.Part) -> bool:
        """Run a request that has more rows than a batch may have in pieces; return whether it has."""
        most = self._queue.whole_rows(request.model, is_bulk=request.is_bulk)
        is_whole = request.is_piece or (request.model, request.method) in self._undivided
        if part.num_rows <= most or is_whole:
            return False
        division = Division(request, plan, part, divided(part.num_rows, most), self._on_divided)
        self._divisions[request.id] = division
        for piece in division.pieces:
            if division.is_over:
                break
            self.submit(piece)
        return True

    def _on_divided(self, division: Division, reply: Reply | None) -> None:
        request = division.request
        del self._divisions[request.id]
        if reply is None:
            self._undivided.add((request.model, request.method))
            self.submit(request)
            return
        for piece in division.pieces if reply.error is not None else ():
            self.cancel(piece.id)
        self._requests[request.id] = request
        self._end(request.id, reply)
        self._deliver()

    def cancel(self, request_id: int) -> None:
        """End a request early; an ended one is left alone."""
        division = self._divisions.get(request_id)
        if division is not None:
            for piece in division.pieces:
                self.cancel(piece.id)
            return
        self._apply(self._queue.cancel(request_id, now_s=self._loop.time()))

    def end_all(self, error: NosError) -> None:
        """End every request there is, and stop keeping time."""
        for request_id in list(self._requests):
            self._end(request_id, failure(error))
        self._deliver()
        if self._timer is not None:
            self._timer.cancel()
        self._rescues.close()

    def _may_run(self, request: Request) -> bool:
        """Whether a request is not known to end its executor; else it has ended."""
        try:
            self._culprits.check(request.model, request.method, request.digest())
        except NosError as error:
            request.turn_away(error)
            return False
        return True

    # Carrying out.

    def _apply(self, actions: list[device_queue.Action]) -> None:
        """Carry out actions in order; those that follow from one of them come after the rest."""
        self._actions.extend(actions)
        if self._is_applying:
            return
        self._is_applying = True
        try:
            while self._actions:
                self._carry_out(self._actions.popleft())
        finally:
            self._is_applying = False
        self._keep_time()
        self._deliver()

    def _deliver(self) -> None:
        """Tell callers of the ends of their requests; they may send others at once."""
        while self._ended:
            request, reply = self._ended.popleft()
            request.sink(reply)

    def _carry_out(self, action: device_queue.Action) -> None:
        match action:
            case Start(batch):
                self._start(batch)
            case End(request_id, None):
                self._end(request_id, self._replies.pop(request_id))
            case End(request_id, NosError() as error) | Refuse(request_id, error):
                unwanted = self._replies.pop(request_id, None)
                if unwanted is not None:
                    unwanted.release()
                self._end(request_id, failure(error))
            case PutBack(batch):
                self._put_back(batch)
            case Culprit(request_id):
                self._blame(request_id)
            case CancelCall(request_id, slot) if slot in self._executors:
                self._executors[slot].cancel(request_id)
            case KillExecutor(slot, reason) if slot in self._executors:
                self._executors[slot].kill(reason)
            case Capped(model, cap):
                self._cap(model, cap)
            case Held(slot):
                self._resolve(self._held.get(slot))
            case Drained(model):
                self._resolve(self._drained.get(model))

    def _cap(self, model: str, cap: Cap | None) -> None:
        self._caps.pop(model, None)
        if cap is not None:
            self._caps[model] = cap
        rows = f"at most {cap.rows} rows" if cap else "as many rows as before"
        _logger.warning("batches of %s have %s from now on", model, rows)
        self._on_capped(model, cap)

    def _start(self, batch: Batch) -> None:
        self._memory.started(batch.model)
        try:
            self._hand_over(batch)
        except Exception:  # whatever it is, the device is not to stay granted to it
            _logger.exception("a batch of %s was not started by a defect", batch.model)
            self._give_up(batch)

    def _give_up(self, batch: Batch) -> None:
        """End a batch of which no call reached its executor."""
        run = self._runs.get(batch.executor)
        if run is not None and run.batch is batch:
            for block in run.blocks:
                if block is not None:
                    block.release()
            run.open.clear()
            run.blocks.clear()
        for item in batch.requests:
            if item.id not in self._replies and item.id in self._requests:
                self._settle(self._requests[item.id], failure(_defect(batch.model)))
        self._finish(batch)

    def _hand_over(self, batch: Batch) -> None:
        run = Run(batch, self._executors[batch.executor], [], self._loop.time(), [])
        self._runs[batch.executor] = run
        now_s = self._loop.time()
        for request in [self._requests[item.id] for item in batch.requests]:
            request.granted_s = now_s
            if request.trace:
                name, size = run.executor.name, len(batch.requests)
                _logger.debug(
                    "frame %s runs on executor %s with %d more", request.trace, name, size - 1
                )
            request.batch_wait_s = min(batch.gather_s, now_s - request.arrived_s)
            if batch.is_suspect and len(batch.requests) == 1:
                run.digest = request.digest()
            taken, request.input = request.input, None
            try:
                block = taken.hand_over(run.executor) if taken else None
            except NosError as error:
                if taken is not None:
                    taken.release()
                self._settle(request, failure(error))
            else:
                run.open.append(request)
                run.blocks.append(block)
        if len(run.open) < len(batch.requests):
            self._queue.separated(batch.id, batch.executor)
        if len(run.open) > 1 and not batch.is_train:
            self._call_as_one(run)
        else:
            self._call_each(run)

    def _put_back(self, batch: Batch) -> None:
        """Keep the input of a batch's requests, which will be started again on another executor."""
        run = self._runs[batch.executor]
        for request, block in zip(run.open, run.blocks, strict=True):
            if block is not None and self._queue.is_live(request.id):
                request.input = Input.copy_of(block.view)
        if batch.is_train:  # the one that ended it is known
            return
        self._is_searching = True
        _logger.warning(
            "a batch of %d requests of %s ended its executor: looking for the one that does",
            len(batch.requests),
            batch.model,
        )

    def _blame(self, request_id: int) -> None:
        """Refuse a request from now on that ended an executor alone, as its batch had."""
        request, found = next(
            (request, run.digest)
            for run in self._runs.values()
            for request in run.open
            if request.id == request_id
        )
        self._culprits.add(request.model, found)
        _logger.warning(
            "a call of %s (%s) ended its executor alone, and is refused from now on: %s",
            request.model,
            request.method,
            found,
        )

    def _call_as_one(self, run: Run) -> None:
        head = run.open[0]
        members = [
            batches.Member(request.arguments, request.part, block)
            for request, block in zip(run.open, run.blocks, strict=True)
            if request.part is not None  # all: only such share a batch
        ]
        arguments, run.joined = batches.join(self._plans[head.model, head.method], members)
        self._call_joined(run, run.joined, arguments)

    def _call_joined(self, run: Run, joined: Blocks, arguments: list[list[Any]]) -> None:
        run.executor.call(
            next(request_ids),
            run.batch.model,
            run.open[0].method,
            arguments,
            joined,
            partial(self._on_joined_reply, run, joined, arguments),
            is_each=run.open[0].part is not None and run.open[0].part.is_item,
        )

    def _on_joined_reply(
        self, run: Run, joined: Blocks, arguments: list[list[Any]], reply: Reply
    ) -> None:
        if reply.kind == "item":  # of a method that said it was no generator
            reply.release()
            return
        if self._rescues.can_help(run, reply):
            again = partial(self._call_joined, run, joined, arguments)
            self._rescues.start(
                run, reply, again, partial(self._on_joined_reply, run, joined, arguments)
            )
            return
        if isinstance(reply.error, ExecutorLostError):
            self._lose(run, reply, reply.error)
            joined.release()
            return
        parts = [request.part for request in run.open if request.part is not None]
        plan = self._plans.get((run.batch.model, run.open[0].method))
        exact_rows = plan.exact_rows if plan else 0
        try:
            replies = shares.split(reply, parts, exact_rows, is_cut=bool(plan and plan.is_cut))
        except (NosError, shares.WrongRowsError) as error:
            _logger.info("a batch of %s failed: %s", run.batch.model, type(error).__name__)
            run.ran_out = isinstance(error, OutOfDeviceMemoryError)
            reply.release()
            self._retry(run, joined)
            return
        method = run.batch.model, run.open[0].method
        if method in self._unchecked:
            self._unchecked.discard(method)
            run.is_mixed = False
            run.compared = {
                request.id: part for request, part in zip(run.open, replies, strict=True)
            }
            self._retry(run, joined)
            return
        joined.release()
        for request, part in zip(run.open, replies, strict=True):
            self._settle(request, part)
        self._finish(run.batch)

    def _retry(self, run: Run, joined: Blocks) -> None:
        """Run each request of a failed batch alone, so that one that fails fails for itself."""
        self._queue.separated(run.batch.id, run.batch.executor)
        if joined.is_kept:
            # A model refers to the blocks, which the calls would give back at their end.
            copies: list[Block | None] = []
            try:
                copies.extend(block and run.executor.copy(block) for block in run.blocks)
            except NosError as error:
                for request in run.open:
                    self._settle(request, failure(error))
                for block in copies:
                    if block is not None:
                        block.release()
                run.open.clear()
                copies.clear()
            run.blocks = copies
            joined.release()
        live = []
        for request, block in zip(run.open, run.blocks, strict=True):
            if self._queue.is_live(request.id):
                live.append((request, block))
            elif block is not None:
                block.release()
        run.open = [request for request, _ in live]
        run.blocks = [block for _, block in live]
        self._call_each(run)

    def _call_each(self, run: Run) -> None:
        if not run.open:
            self._finish(run.batch)
            return
        with run.executor.corked():
            for request, block in list(zip(run.open, run.blocks, strict=True)):
                self._call_one(run, request, block)

    def _call_one(self, run: Run, request: Request, block: Block | None) -> None:
        try:
            self._send_one(run, request, block)
        except Exception:  # others of its batch may have been sent
            _logger.exception("a call of %s was not sent by a defect", request.model)
            if block is not None:
                block.release()
            run.drop(request)
            self._settle(request, failure(_defect(request.model)))
            if not run.open:
                self._finish(run.batch)

    def _send_one(self, run: Run, request: Request, block: Block | None) -> None:
        plan = self._plans.get((request.model, request.method))
        arguments: list[list[Any]] = request.arguments
        data: Block | Blocks | None = block
        is_exact = plan is not None and plan.exact_rows > 0 and request.part is not None
        if plan is not None and request.part is not None and is_exact:
            member = batches.Member(request.arguments, request.part, block)
            arguments, data = batches.join(plan, [member])
            data.release()  # the call has it alone
        run.executor.call(
            request.id,
            request.model,
            request.method,
            arguments,
            data,
            partial(self._on_reply, run, request, block),
            recurs=request.recurs and not is_exact,
        )

    def _on_reply(self, run: Run, request: Request, block: Block | None, reply: Reply) -> None:
        if reply.kind == "item":
            run.streaming.add(request.id)
            if self._queue.is_live(request.id):
                request.sink(reply)
            else:
                reply.release()
            return
        if isinstance(reply.error, ExecutorLostError):
            self._lose(run, reply, reply.error)
            return
        batch = run.batch
        plan = self._plans.get((request.model, request.method))
        can_rescue = self._rescues.can_help(run, reply) and not (plan and plan.exact_rows)
        if can_rescue and request.id not in run.streaming:
            again = partial(self._call_one, run, request, block)
            self._rescues.start(run, reply, again, partial(self._on_reply, run, request, block))
            return
        reply = request.with_rows(reply, plan)
        if isinstance(reply.error, OutOfDeviceMemoryError):
            reply = self._rescues.no_room(request, block, reply, reply.error)
        run.has_culprit |= reply.error is not None
        run.compare(request, reply)
        run.drop(request)
        self._settle(request, reply)
        if run.open:
            now_s = self._loop.time()
            if batch.is_train:
                run.open[0].granted_s = now_s
                self._apply(self._queue.answered(batch.id, batch.executor, request.id, now_s=now_s))
            else:
                self._queue.progressed(batch.id, batch.executor, now_s=now_s)
            return
        did_not_go = run.ran_out or not run.has_culprit if run.is_mixed is None else run.is_mixed
        if run.joined is not None and did_not_go:
            # Nothing was wrong with any of them: together they are too many, or do not mix.
            if run.is_mixed:
                self._undivided.add((request.model, request.method))
            learnt = self._queue.failed_together(
                batch.model, batch.rows, now_s=self._loop.time(), is_final=run.is_mixed is True
            )
            self._apply(learnt)
        self._finish(batch)

    def _lose(self, run: Run, reply: Reply, error: ExecutorLostError) -> None:
        reply.release()
        self._on_lost(run.batch.executor, run.executor, error.got or str(error))

    def _settle(self, request: Request, reply: Reply) -> None:
        """Keep a terminal reply until the queue lets it pass."""
        if self._queue.is_live(request.id):
            self._replies[request.id] = reply
        else:
            reply.release()

    def _finish(self, batch: Batch) -> None:
        self._memory.finished(batch.model)
        run = self._runs.get(batch.executor)
        if run is not None and run.batch is batch:  # else its executor died
            del self._runs[batch.executor]
            for unread in run.compared.values():
                unread.release()
            self._of(batch.model).ran(batch, self._loop.time() - run.started_s)
        self._apply(self._queue.finish(batch.id, batch.executor, now_s=self._loop.time()))

    def _end(self, request_id: int, reply: Reply) -> None:
        request = self._requests.pop(request_id, None)
        if request is None:
            reply.release()
            return
        self._count(request, reply)
        if request.input is not None:
            request.input.release()
            request.input = None
        self._ended.append((request, reply))

    def _count(self, request: Request, reply: Reply) -> None:
        if request.is_piece:
            return
        statistics = self._of(request.model)
        if reply.error is not None:
            statistics.ended(reply.error)
            return
        statistics.answered(
            self._loop.time() - request.arrived_s, request.queue_s, request.batch_wait_s
        )

    def _keep_time(self) -> None:
        """Have a timer that fires in time; one that fires too early does no harm and is cheaper."""
        wake_s = self._queue.next_wake_s()
        if wake_s is None or (self._timer is not None and self._timer.when() <= wake_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(wake_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._apply(self._queue.tick(now_s=self._loop.time()))

    @staticmethod
    def _resolve(future: asyncio.Future[None] | None) -> None:
        if future is not None and not future.done():
            future.set_result(None)


def _defect(model: str) -> NosError:
    return InternalError(f"a call of {model} could not be handed to its executor")
