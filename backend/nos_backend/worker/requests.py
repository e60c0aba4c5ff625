"""One call on its way through a worker, and the batch that it runs in."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nos.errors import ModelError

from nos_backend.worker import batches, shares
from nos_backend.worker.comparison import is_same
from nos_backend.worker.culprits import digest
from nos_backend.worker.executors import Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos.errors import NosError

    from nos_backend.scheduling.device_queue import Batch
    from nos_backend.worker.executors import Block, Blocks, Executor
    from nos_backend.worker.inputs import Input

#: Of calls to executors too, which have no request of their own where they stand for several.
request_ids = itertools.count(1)


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One call on its way through a worker. Exactly one terminal reply reaches its sink."""

    model: str
    """The version, as `name@v3`."""
    method: str
    tenant: str
    """For whom it runs; fairness is between tenants."""
    weight: float = 1.0
    """That tenant's share of the device, against those of others."""
    arguments: list[list[Any]]
    """JSON nodes, checked."""
    sink: Callable[[Reply], None]
    """Called on the loop with items, then with one terminal reply; has to release each."""
    input: Input | None = None
    """The bytes that the arguments count into; the dispatcher's from `submit` on."""
    deadline_s: float | None = None
    """When the answer is worth nothing any more, on the loop's clock."""
    may_wait: bool = False
    """Its sender is held back by a window, so that a full queue need not refuse it."""
    sender: int = 0
    """Names the stream that it came by; 0 for none."""
    is_bulk: bool = False
    """Others go first."""
    is_piece: bool = False
    """It is some rows of another, and counts with it."""
    recurs: bool = False
    """Whether `arguments` is the very list of other requests, for the method."""
    trace: str = ""
    """Names its stream and frame in logs; empty where nobody reads them."""
    id: int = field(default_factory=request_ids.__next__, init=False)
    arrived_s: float = field(default=0.0, init=False)
    granted_s: float = field(default=0.0, init=False)
    """When the device was granted to it; 0 until then."""
    batch_wait_s: float = field(default=0.0, init=False)
    """How long of that it waited for others to run with."""
    part: batches.Part | None = field(default=None, init=False)
    """What it is to a batch; None if it runs alone."""

    @property
    def queue_s(self) -> float:
        """How long it waited for the device, others to run with apart."""
        return max(0.0, self.granted_s - self.arrived_s - self.batch_wait_s)

    def digest(self) -> str:
        """Return what tells it from all other calls of its model, as long as it waits."""
        view = self.input.view if self.input is not None else memoryview(b"")
        return digest(self.method, self.arguments, view)

    def turn_away(self, error: NosError) -> None:
        """End it before it was queued."""
        if self.input is not None:
            self.input.release()
            self.input = None
        self.sink(failure(error))

    def with_rows(self, reply: Reply, plan: batches.Plan | None) -> Reply:
        """Return its result with the rows that it has, or the error that the model gave others."""
        if reply.kind != "result" or self.part is None:
            return reply
        try:
            if plan is not None and plan.exact_rows:
                return shares.split(reply, [self.part], plan.exact_rows)[0]
            shares.check(reply, self.part)
        except shares.WrongRowsError as error:
            reply.release()
            text = f"{self.model} gave another number of rows than it got: {error}"
            return failure(ModelError(text, "WrongRowsError", str(error)))
        return reply


def failure(error: NosError) -> Reply:
    """Return the terminal reply that carries `error`."""
    return Reply("error", error=error)


@dataclass(slots=True, eq=False)
class Run:
    """A batch on its executor."""

    batch: Batch
    executor: Executor
    #: Those that an answer is awaited for: all, or after a failure each that runs alone.
    open: list[Request]
    started_s: float
    #: Of each request in `open`.
    blocks: list[Block | None]
    #: The input of all.
    joined: Blocks | None = None
    #: What each call's result was in the batch, while it is compared with the result alone.
    compared: dict[int, Reply] = field(default_factory=dict)
    #: Whether that found a difference; None while nothing was compared.
    is_mixed: bool | None = None
    #: Names what runs, where that may be what ended an executor.
    digest: str = ""
    #: Whether one failed that ran alone.
    has_culprit: bool = False
    #: Whether all together found no room.
    ran_out: bool = False
    #: How often a model had to leave the device for it.
    num_rescues: int = 0
    #: Those of `open` that gave items already, and cannot be repeated.
    streaming: set[int] = field(default_factory=set)

    def drop(self, request: Request) -> None:
        """Await nothing more of a request."""
        index = self.open.index(request)
        del self.open[index], self.blocks[index]

    def compare(self, request: Request, reply: Reply) -> None:
        """See whether a call's result alone is what it was in the batch, where that is asked."""
        in_batch = self.compared.pop(request.id, None)
        if in_batch is not None:
            if reply.error is None and not is_same(in_batch, reply):
                self.is_mixed = True
            in_batch.release()
