"""Who is let into a device's queue: bounds of the queue, each tenant's part of it, and deadlines.

A request that could not be answered in time is refused at once, while its sender can still go elsewhere,
instead of waiting for nothing and taking the place of one that could. What is admitted is therefore
answered in time as long as the device keeps to what was learnt of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from nos.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from nos_backend.scheduling.actions import Request
    from nos_backend.scheduling.lanes import Lane, Model

MAX_QUEUED: Final = 256
MAX_QUEUED_BYTES: Final = 512 << 20

_MAX_RETRY_AFTER_S: Final = 5.0
_MIN_RETRY_AFTER_S: Final = 0.05
#: Batches that a long queue is counted longer.
_SPARE_BATCHES: Final = 2
#: How many times its own lane's rows may go before a request in each other lane.
_OVERTAKING: Final = 2


def queued_s(
    request: Request,
    model: Model,
    lanes: Sequence[Lane],
    elsewhere: Sequence[tuple[Model, Sequence[Lane]]],
    grants: int,
) -> float:
    """Return when a request would be answered if nothing ran now, in seconds.

    Lanes take turns, so of what waits in another lane only as much goes first as is in its own, and as much
    again for what comes to that lane meanwhile. A queue of a batch and more is counted as two batches longer:
    who has just time enough would make batches small that others rely on (in virtual time at ten times the
    load: 0.99 of the peak and nothing late, against 0.76 and a third late without).

    Args:
        request: It is not in the queue yet.
        model: Its model.
        lanes: Those of its model that have requests.
        elsewhere: Other models with such lanes.
        grants: Batches that run at once on the device, each on another executor.
    """
    time = model.time
    own_rows = sum(lane.rows for lane in lanes if lane.tenant == request.tenant)
    ahead_rows = _OVERTAKING * (own_rows + request.rows)
    rows = sum(min(lane.rows, ahead_rows) for lane in lanes)
    num_others = min(rows, _num_batches(lanes, request.key))
    num_batches = 1 + max(rows // model.limits.max_rows, num_others)
    own_s = time.t0_s * num_batches + time.row_s * (rows + request.rows)
    beside_s = all_s = own_s
    for other, its_lanes in elsewhere:
        ahead_s = min(work_s(its_lanes, other), own_s * len(its_lanes))
        all_s += ahead_s
        if other.executor == model.executor:
            beside_s += ahead_s
    part_of_a_batch = min(1.0, sum(lane.rows for lane in lanes) / model.limits.max_rows)
    spare_s = _SPARE_BATCHES * part_of_a_batch * time.predict_s(model.limits.max_rows)
    return max(beside_s, all_s / grants) + spare_s


def work_s(lanes: Sequence[Lane], model: Model) -> float:
    """Return what the requests of a model's lanes take, in as few batches as may be."""
    rows = sum(lane.rows for lane in lanes)
    num_batches = max(rows / model.limits.max_rows, _num_batches(lanes, None))
    return model.time.t0_s * num_batches + model.time.row_s * rows


def _num_batches(lanes: Sequence[Lane], key: Hashable) -> int:
    """Return in how few batches the requests with other keys can run; None can never be shared."""
    keys: set[Hashable] = set()
    alone = 0
    for lane in lanes:
        keys.update(lane.keys)
        alone += lane.keys[None]
    return len(keys - {None, key}) + alone


def late(request: Request, model: Model, ends_s: float, now_s: float) -> OverloadedError | None:
    """Return the refusal of a request that would end at `ends_s`; None if that is in time, or a guess."""
    if request.deadline_s is None or ends_s <= request.deadline_s or not model.time.is_known:
        return None
    return _refusal(
        f"{request.model} has no answer in time",
        request,
        f"a deadline after {ends_s - now_s:.2g} s",
        f"{request.deadline_s - now_s:.2g} s",
        ends_s - request.deadline_s,
    )


def make_room(
    request: Request,
    own: Lane,
    others: Sequence[Lane],
    *,
    max_queued: int,
    max_queued_bytes: int,
    wait_s: float,
) -> list[Request] | OverloadedError:
    """Return what has to leave a full queue for a request, or why the request is refused.

    A tenant holds half of a model's queue at most while others wait there too. A full queue has room for
    whoever holds less than half of an equal part of it; who holds most then loses the newest that waits.

    Args:
        request: It is not in the queue yet.
        own: Its lane.
        others: The other lanes of its model that have requests.
        max_queued: Requests of the model that wait.
        max_queued_bytes: Their bytes; one larger request is admitted alone.
        wait_s: When the queue will be shorter, for the hint.
    """
    num = own.num_bounded + sum(lane.num_bounded for lane in others)
    num_bytes = own.bounded_bytes + sum(lane.bounded_bytes for lane in others)
    size = request.size_bytes
    part = 0.5 if num > own.num_bounded else 1.0
    most, most_bytes = max(1, math.ceil(part * max_queued)), int(part * max_queued_bytes)
    small = 0.5 / (len(others) + 1)
    is_small = own.num_bounded < small * max_queued
    is_small &= own.bounded_bytes + size <= small * max_queued_bytes
    is_over = own.num_bounded >= most or own.bounded_bytes + size > most_bytes
    leaving: list[Request] = []
    held: list[list[Request]] = []
    while (is_long := num >= max_queued) or (num and num_bytes + size > max_queued_bytes):
        held = held or [[it for it in lane.waiting.values() if not it.may_wait] for lane in others]
        largest = max(held, key=len if is_long else _size_bytes, default=[])
        if not is_small or not largest:
            is_over = True
            break
        victim = largest.pop()
        leaving.append(victim)
        num -= 1
        num_bytes -= victim.size_bytes
    if not is_over or not num:
        return leaving
    return _refusal(
        f"the queue of {request.model} is full",
        request,
        f"at most {most} requests and {most_bytes} bytes of one tenant",
        f"{own.num_bounded} and {own.bounded_bytes} of {num} and {num_bytes} that wait",
        wait_s,
    )


def _size_bytes(requests: Iterable[Request]) -> int:
    return sum(item.size_bytes for item in requests)


def displaced(request: Request, wait_s: float) -> OverloadedError:
    """Return the refusal of a request that leaves the queue for another tenant's."""
    return _refusal(
        f"the queue of {request.model} is full and another tenant's turn in it came",
        request,
        "",
        "",
        wait_s,
    )


def _refusal(
    message: str, request: Request, expected: str, got: str, wait_s: float
) -> OverloadedError:
    retry_after_s = min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
    hint = f"Send it again in {retry_after_s:.2g} s"
    return OverloadedError(message, request.model, expected, got, hint, "", retry_after_s)
