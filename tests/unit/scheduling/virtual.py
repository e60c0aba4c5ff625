"""An emulated device, its clients and a virtual clock around a real `DeviceQueue`.

A batch of b rows takes t0 + a b seconds; nothing here sleeps, so thousands of requests cost milliseconds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from nos.errors import OverloadedError
from nos_backend.scheduling.batching import BatchLimits
from nos_backend.scheduling.device_queue import (
    Action,
    Batch,
    DeviceQueue,
    End,
    Refuse,
    Request,
    Start,
)

T0_S, ROW_S = 5e-3, 0.2e-3


def tau_s(rows: int) -> float:
    """What a batch takes on the emulated device."""
    return T0_S + ROW_S * rows


@dataclass
class Done:
    """One request that ended."""

    request: Request
    arrived_s: float
    ended_s: float
    started_s: float | None
    is_error: bool
    is_refused: bool = False

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.arrived_s


@dataclass
class Device:
    """One grant; every model on the executor of its name."""

    models: dict[str, BatchLimits]
    grants: int = 1
    cost_s: Callable[[str, int], float] = lambda _model, rows: tau_s(rows)
    max_queued: int = 100_000
    now_s: float = 0.0
    done: list[Done] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    #: Seconds of the device by tenant.
    used_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    refused: int = 0

    def __post_init__(self) -> None:
        self.queue = DeviceQueue(max_concurrent_batches=self.grants, max_queued=self.max_queued)
        for model, limits in self.models.items():
            self.queue.open_model(model, model, now_s=0, limits=limits)
        self._ids = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._open: dict[int, tuple[Request, float, Callable[[Done], None] | None]] = {}
        self._started: dict[int, float] = {}
        self.ends: Counter[int] = Counter()

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def send(
        self,
        model: str = "a",
        *,
        tenant: str = "t",
        sender: int = 0,
        rows: int = 1,
        ttl_s: float | None = None,
        key: str | None = "k",
        may_wait: bool = True,
        weight: float = 1.0,
        then: Callable[[Done], None] | None = None,
    ) -> int:
        """A request arrives now."""
        request = Request(
            id=next(self._ids),
            model=model,
            tenant=tenant,
            sender=sender,
            rows=rows,
            key=key,
            deadline_s=None if ttl_s is None else self.now_s + ttl_s,
            may_wait=may_wait,
            weight=weight,
        )
        self._open[request.id] = request, self.now_s, then
        self._apply(self.queue.arrive(request, now_s=self.now_s))
        return request.id

    def cancel(self, request_id: int) -> None:
        """The caller leaves."""
        self._apply(self.queue.cancel(request_id, now_s=self.now_s))

    def run(self, until_s: float = float("inf")) -> None:
        """Let time pass until nothing is left to happen."""
        while True:
            wake_s = self.queue.next_wake_s()
            next_s = self._events[0][0] if self._events else float("inf")
            time_s = min(next_s, float("inf") if wake_s is None else wake_s)
            if time_s == float("inf") or time_s > until_s:
                return
            self.now_s = max(self.now_s, time_s)
            if next_s <= time_s:
                heapq.heappop(self._events)[2]()
            else:
                self._apply(self.queue.tick(now_s=self.now_s))

    def _apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(batch):
                    self._start(batch)
                case End(request_id, error):
                    self._end(
                        request_id,
                        is_error=error is not None,
                        is_refused=isinstance(error, OverloadedError),
                    )
                case Refuse(request_id, _):
                    self._end(request_id, is_error=True, is_refused=True)

    def _start(self, batch: Batch) -> None:
        self.batches.append(batch)
        took_s = self.cost_s(batch.model, batch.rows)
        for request in batch.requests:
            self._started[request.id] = self.now_s
            self.used_s[request.tenant] += took_s * request.rows / batch.rows

        def finish() -> None:
            self._apply(self.queue.finish(batch.id, batch.executor, now_s=self.now_s))

        self.at(self.now_s + took_s, finish)

    def _end(self, request_id: int, *, is_error: bool, is_refused: bool) -> None:
        self.refused += is_refused
        self.ends[request_id] += 1
        request, arrived_s, then = self._open.pop(request_id)
        started_s = self._started.pop(request_id, None)
        done = Done(request, arrived_s, self.now_s, started_s, is_error, is_refused)
        self.done.append(done)
        if then is not None:
            then(done)


def closed_loop(
    num_clients: int,
    round_trip_s: Callable[[], float],
    *,
    limits: BatchLimits | None = None,
    seconds: float = 10.0,
) -> Device:
    """Run clients that send again one round trip after each answer."""
    device = Device({"a": limits or BatchLimits()})

    def client(sender: int) -> None:
        device.send(
            sender=sender,
            then=lambda _: device.at(device.now_s + round_trip_s(), lambda: client(sender)),
        )

    for sender in range(1, num_clients + 1):
        device.at(1e-4 * sender, lambda sender=sender: client(sender))
    device.run(seconds)
    return device
