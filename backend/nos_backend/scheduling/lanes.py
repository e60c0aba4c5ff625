"""Requests that wait for a device: in lanes, one per model, tenant and class, each with a virtual time."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nos_backend.scheduling.batching import MAX_BATCH_ROWS, BatchLimits, BatchTime, Gatherer

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from nos_backend.scheduling.actions import Request
    from nos_backend.scheduling.caps import Cap

#: Idle lanes kept before they are swept.
_SLACK = 64


@dataclass(slots=True, eq=False)
class Model:
    """What the queue knows of a model besides its requests that wait."""

    name: str
    executor: str
    call_timeout_s: float
    #: Whether batches may start; false while its executor is lost or starting.
    is_ready: bool = True
    is_draining: bool = False
    num_running: int = 0
    #: Batches that ended their executor although none of their requests does.
    num_unexplained: int = 0
    #: What its author or its profile says of batches.
    advised: BatchLimits = field(default_factory=BatchLimits)
    #: What its batches taught since; None while all went well.
    cap: Cap | None = None
    time: BatchTime = field(default_factory=BatchTime)
    gatherer: Gatherer = field(default_factory=Gatherer)
    #: Since when it could run and waits for more requests; None while it does not.
    gathering_s: float | None = None
    #: What batches keep to, by `advised` and `cap`.
    limits: BatchLimits = field(init=False)
    #: Rows of a request that runs as a whole at most, by its author's limit and the device's memory.
    declared_rows: int = MAX_BATCH_ROWS
    memory_rows: int = MAX_BATCH_ROWS

    def __post_init__(self) -> None:
        self.keep_to(self.advised, self.cap)

    def keep_to(self, advised: BatchLimits, cap: Cap | None) -> None:
        """Have the next batches keep to both."""
        self.advised, self.cap = advised, cap
        rows = min(advised.max_rows, cap.rows) if cap else advised.max_rows
        self.limits = replace(advised, max_rows=rows)

    @property
    def whole_rows(self) -> int:
        """Rows of a request that runs as a whole at most; a batch of several has no more than `limits`."""
        rows = min(self.declared_rows, self.memory_rows)
        return max(self.limits.max_rows, min(rows, self.cap.rows) if self.cap else rows)


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits."""

    request: Request
    arrived_s: float
    #: Whether its executor died before while it waited.
    was_requeued: bool = False


@dataclass(slots=True, eq=False)
class Lane:
    """One tenant's requests to one model, the oldest first."""

    model: str
    tenant: str
    is_bulk: bool = False
    #: Where the lane stands in virtual time; never decreases.
    virtual_time: float = 0.0
    #: Tells lanes of equal virtual time apart: which became active first.
    order: int = 0
    waiting: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    #: Of `waiting`.
    rows: int = 0
    #: How many of them have each key.
    keys: Counter[Hashable] = field(default_factory=Counter)
    #: Of those of `waiting` that the queue's bounds count: whose senders do not wait for them.
    num_bounded: int = 0
    bounded_bytes: int = 0


class Lanes:
    """All lanes of a device."""

    def __init__(self) -> None:
        #: By model, then tenant and whether it is bulk. Idle lanes stay while their virtual time is ahead.
        self._lanes: dict[str, dict[tuple[str, bool], Lane]] = {}
        self._num_lanes = 0
        #: Those with requests.
        self._active: dict[Lane, None] = {}
        #: Waiting requests in order of arrival, each also in its lane.
        self._waiting: dict[int, Waiting] = {}
        #: Where the device stands: the greatest virtual time at which a batch was started.
        self.virtual_now = 0.0

    def __len__(self) -> int:
        """Return how many requests wait."""
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        """Return whether a request waits."""
        return request_id in self._waiting

    def __getitem__(self, request_id: int) -> Waiting:
        """Return a request that waits."""
        return self._waiting[request_id]

    def all(self) -> list[Waiting]:
        """Return what waits, in order of arrival."""
        return list(self._waiting.values())

    def active(self) -> Iterator[Lane]:
        """Return the lanes with requests."""
        return iter(self._active)

    @property
    def num_active(self) -> int:
        """How many lanes have requests."""
        return len(self._active)

    def of(self, model: str) -> list[Lane]:
        """Return the lanes of a model that have requests."""
        return [lane for lane in self._lanes.get(model, {}).values() if lane.waiting]

    def lane(self, request: Request) -> Lane:
        """Return the lane that a request belongs to, made if it is not there."""
        lanes = self._lanes.setdefault(request.model, {})
        name = (request.tenant, request.is_bulk)
        found = lanes.get(name)
        if found is None:
            found = lanes[name] = Lane(request.model, *name)
            self._num_lanes += 1
        return found

    def num_of(self, model: str) -> int:
        """Return how many requests of a model wait."""
        return sum(len(lane.waiting) for lane in self.of(model))

    def rows_of(self, model: str) -> int:
        """Return how many rows of a model wait."""
        return sum(lane.rows for lane in self.of(model))

    def oldest_s(self, model: str) -> float:
        """Return when the oldest waiting request of a model that has one came."""
        heads = (next(iter(lane.waiting)) for lane in self.of(model))
        return min(self._waiting[head].arrived_s for head in heads)

    def enter(self, request: Request, now_s: float, order: int) -> None:
        """A request waits from now on, behind those of its lane."""
        lane = self.lane(request)
        if not lane.waiting:
            lane.virtual_time = max(lane.virtual_time, self.virtual_now)
            lane.order = order
            self._active[lane] = None
        lane.waiting[request.id] = request
        lane.rows += request.rows
        lane.keys[request.key] += 1
        if not request.may_wait:
            lane.num_bounded += 1
            lane.bounded_bytes += request.size_bytes
        self._waiting[request.id] = Waiting(request, now_s)

    def pass_through(self, request: Request, order: int) -> Lane:
        """Return the lane of a request that need not wait, as it stands when that is its turn."""
        lane = self.lane(request)
        lane.virtual_time = max(lane.virtual_time, self.virtual_now)
        lane.order = order
        return lane

    def enter_first(self, request: Request, now_s: float, order: int) -> None:
        """A request waits again, before all others of its lane."""
        self.enter(request, now_s, order)
        self.lane(request).waiting.move_to_end(request.id, last=False)

    def leave(self, request: Request) -> Lane:
        """A request waits no more; return the lane that it was in."""
        del self._waiting[request.id]
        lane = self._lanes[request.model][request.tenant, request.is_bulk]
        del lane.waiting[request.id]
        if not lane.waiting:
            del self._active[lane]
        lane.rows -= request.rows
        lane.keys[request.key] -= 1
        if not lane.keys[request.key]:
            del lane.keys[request.key]
        if not request.may_wait:
            lane.num_bounded -= 1
            lane.bounded_bytes -= request.size_bytes
        return lane

    def sweep(self) -> None:
        """Forget idle lanes that would start at the present anyway, once there are many."""
        if self._num_lanes <= _SLACK:
            return
        kept: dict[str, dict[tuple[str, bool], Lane]] = {}
        for model, lanes in self._lanes.items():
            for name, lane in lanes.items():
                if lane.waiting or lane.virtual_time > self.virtual_now:
                    kept.setdefault(model, {})[name] = lane
        self._lanes = kept
        self._num_lanes = sum(map(len, kept.values()))
