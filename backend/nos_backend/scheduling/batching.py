"""How requests form a batch: what may run together, how long that takes, and for whom to wait.

A free device takes what waits, up to the limits: batch while busy, without a timer. Its mean latency in
open loop has a closed form (Inoue 2021, arXiv 1912.06322), which the tests hold it to. Senders that
wait for their answers before they send again fall into half batches by that alone: one half runs while
the other is on its way back. So a device that falls free waits for those it has just answered, if their
past says that they come back at once, and if nobody else has use for it.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from nos_backend.scheduling.actions import Request

MAX_BATCH_ROWS: Final = 64
MAX_BATCH_BYTES: Final = 32 << 20
#: The longest that a device waits for senders to come back.
MAX_GATHER_S: Final = 10e-3
#: What part of a batch's own cost waiting may take. Two half batches cost t0 more than a full one, so that
#: waiting pays below 1; the rest is for the senders that do not come.
_WORTH: Final = 0.75

#: Weight of all that was known of a batch's time when one more was seen.
_FORGETTING: Final = 0.99
#: A batch that took so many times the predicted time says something about the machine, not about its rows.
_OUTLIER: Final = 4.0
_FEW_SAMPLES: Final = 8
#: What a batch takes is known while predictions are wrong by no more than this, on average of the last ten.
_KNOWN: Final = 0.5
_MISS_SMOOTHING: Final = 0.1
#: Share of the newest sample in a sender's mean gap.
_SMOOTHING: Final = 0.3
#: A gap longer than so many windows counts as that, so that one pause of a sender is soon forgotten.
_LONG_GAP: Final = 2.0
#: A sender is due this many times its mean gap after its answer.
_PATIENCE: Final = 1.5
_MAX_SENDERS: Final = 1024
#: Of one request; beyond it they have more rows than a batch may have.
_MAX_PIECES: Final = 1024
#: Answers of one sender whose successors are awaited; more than any stream's window.
_MAX_OWED: Final = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """What a model's batches keep to."""

    max_rows: int = MAX_BATCH_ROWS
    """Rows of a batch; a single request with more runs alone."""
    max_bytes: int = MAX_BATCH_BYTES
    """Bytes of its requests; a single larger one runs alone."""
    queue_delay_s: float | None = None
    """How long the oldest request waits for a full batch; None waits only for senders that are due."""

    def __post_init__(self) -> None:
        if self.max_rows < 1 or self.max_bytes < 1:
            raise ValueError(f"a batch of nothing: {self}")
        if self.queue_delay_s is not None and not 0 <= self.queue_delay_s < float("inf"):
            raise ValueError(f"not a delay: {self.queue_delay_s}")


class BatchTime:
    """Learns that a batch of b rows takes t0 + a b seconds.

    Least squares with exponential forgetting, kept as five weighted sums: the same estimate as the
    recursive form (Ljung 1999, 11.2) without its covariance, which grows without bound where all
    batches are alike.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        #: Of a batch whatever its size; 0 until something is known.
        self.t0_s = 0.0
        #: Of each row.
        self.row_s = 0.0
        #: Smoothed error of predictions, relative to them.
        self._miss = 0.0
        #: Of 1, b, b^2, t and b t.
        self._sums = (0.0,) * 5

    def observe(self, rows: int, took_s: float) -> None:
        """A batch ran. The first one is not typical: it warms up what the others find warm."""
        self.num_samples += 1
        expected_s = self.predict_s(rows)
        if self.num_samples == 2:  # noqa: PLR2004 - the first was all there was
            self._sums = (0.0,) * 5
        elif expected_s:
            miss = min(abs(took_s - expected_s) / expected_s, _OUTLIER)
            self._miss += _MISS_SMOOTHING * (miss - self._miss)
        if self.num_samples > _FEW_SAMPLES and expected_s:
            took_s = min(took_s, _OUTLIER * expected_s)
        n, x, xx, y, xy = self._sums
        self._sums = (
            _FORGETTING * n + 1.0,
            _FORGETTING * x + rows,
            _FORGETTING * xx + rows * rows,
            _FORGETTING * y + took_s,
            _FORGETTING * xy + rows * took_s,
        )
        self._solve()

    @property
    def is_known(self) -> bool:
        """Whether predictions come true, so that a request may be turned away because of one."""
        return self.num_samples >= _FEW_SAMPLES and self._miss < _KNOWN

    def recent(self) -> tuple[float, float]:
        """Return the mean rows of the last batches, about a hundred, and the mean seconds that they took."""
        n, rows, _, took_s, _ = self._sums
        return (rows / n, took_s / n) if n else (0.0, 0.0)

    def predict_s(self, rows: int) -> float:
        """Return how long a batch of so many rows takes; 0 if nothing is known."""
        return self.t0_s + self.row_s * rows

    def _solve(self) -> None:
        n, x, xx, y, xy = self._sums
        spread = n * xx - x * x
        if spread > 1e-3 * xx * n:
            self.row_s = max(0.0, (n * xy - x * y) / spread)
            self.t0_s = (y - self.row_s * x) / n
            if self.t0_s < 0:
                self.t0_s, self.row_s = 0.0, xy / xx
        else:
            # All batches were alike: nobody knows what is due to the rows. Between the extremes.
            self.t0_s, self.row_s = 0.5 * y / n, 0.5 * y / x


@dataclass(slots=True, eq=False)
class _Sender:
    #: Smoothed time from an answer to the next request; infinite until one came.
    gap_s: float = float("inf")
    #: When answers left that no request has followed yet.
    owed: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_OWED))


class Gatherer:
    """Knows which senders of one model come straight back, and how long to wait for them."""

    def __init__(self) -> None:
        #: By sender, the one answered last at the end.
        self._senders: dict[int, _Sender] = {}
        #: Of the last batch: how many requests of each sender are on their way back.
        self._due: dict[int, int] = {}
        self._num_due = 0
        #: When those that are due have come or will not.
        self._until_s = 0.0
        self._window_s = 0.0

    def arrived(self, sender: int, now_s: float) -> None:
        """A request came; 0 for a sender that is not known."""
        known = self._senders.get(sender)
        if known is None:
            return
        if known.owed:
            longest_s = _LONG_GAP * (self._window_s or MAX_GATHER_S)
            gap_s = min(now_s - known.owed.popleft(), longest_s)
            is_first = known.gap_s == float("inf")
            known.gap_s = gap_s if is_first else known.gap_s + _SMOOTHING * (gap_s - known.gap_s)
        if self._due.get(sender):
            self._due[sender] -= 1
            self._num_due -= 1

    def answered(self, senders: Iterable[int], now_s: float, window_s: float) -> None:
        """A batch ended: see who of its senders will be back within `window_s`."""
        self._due.clear()
        self._window_s = window_s
        self._num_due, longest_s = 0, 0.0
        for sender in senders:
            if not sender:
                continue
            known = self._senders.pop(sender, None) or _Sender()
            self._senders[sender] = known
            known.owed.append(now_s)
            if known.gap_s <= window_s:
                self._due[sender] = self._due.get(sender, 0) + 1
                self._num_due += 1
                longest_s = max(longest_s, known.gap_s)
        self._until_s = now_s + min(_PATIENCE * longest_s, window_s)
        while len(self._senders) > _MAX_SENDERS:
            del self._senders[next(iter(self._senders))]

    def until_s(self) -> float:
        """Return until when it is worth waiting; 0 when all that were due are here."""
        return self._until_s if self._num_due else 0.0


def gather_window_s(time: BatchTime) -> float:
    """Return how long waiting for senders can pay."""
    return min(_WORTH * time.t0_s, MAX_GATHER_S)


def form(
    head: Request,
    lanes: Iterable[tuple[float, int, Collection[Request]]],
    limits: BatchLimits,
    time: BatchTime,
    now_s: float,
) -> list[Request]:
    """Return the batch that `head` leads: requests of equal key, within all limits.

    No request is added that would make another one late, but for those that are late anyway.

    Args:
        head: The first request of the lane whose turn it is; in whatever way it breaks limits, it runs.
        lanes: Of the same model: (virtual time, order, its requests from the oldest on). They take turns.
        limits: Of the model.
        time: Of the model's batches.
        now_s: When the batch would start.
    """
    batch = [head]
    if head.key is None:
        return batch
    rows, size_bytes = head.rows, head.size_bytes
    deadline_s = _deadline(head)
    leaves_doomed = not is_doomed(head, time, now_s)
    # Who would be late after one more batch goes first, in half of this one at most: it was admitted because
    # there was time for it, and newer requests of other lanes went before it since.
    soon_s = now_s + 4 * time.predict_s(limits.max_rows) if leaves_doomed else 0.0
    hurried_rows = 0
    turns: list[tuple[bool, float, int, float, Request, Iterator[Request]]] = []

    def next_of(virtual_time: float, order: int, waiting: Iterator[Request]) -> None:
        for item in waiting:
            is_left = item is head or (leaves_doomed and is_doomed(item, time, now_s))
            if item.key == head.key and not is_left:
                has_time = _deadline(item) >= soon_s
                turn = virtual_time if has_time else _deadline(item)
                heapq.heappush(turns, (has_time, turn, order, virtual_time, item, waiting))
                return

    for virtual_time, order, requests in lanes:
        is_of_head = next(iter(requests), None) is head
        spent_s = _step_s(head, time) if is_of_head else 0.0
        next_of(virtual_time + spent_s, order, iter(requests))
    while turns and rows < limits.max_rows:
        has_time, _, order, virtual_time, request, waiting = heapq.heappop(turns)
        if not has_time and 2 * hurried_rows >= limits.max_rows:
            heapq.heappush(turns, (True, virtual_time, order, virtual_time, request, waiting))
            continue
        more_rows, more_bytes = rows + request.rows, size_bytes + request.size_bytes
        if more_rows > limits.max_rows or more_bytes > limits.max_bytes:
            continue  # its lane keeps its order: nothing behind it goes first
        first_deadline_s = min(deadline_s, _deadline(request))
        ends_s = now_s + time.predict_s(more_rows)
        if ends_s > first_deadline_s >= now_s + time.predict_s(rows):
            continue
        hurried_rows += 0 if has_time else request.rows
        rows, size_bytes, deadline_s = more_rows, more_bytes, first_deadline_s
        batch.append(request)
        next_of(virtual_time + _step_s(request, time), order, waiting)
    return batch


def bucket(length: int) -> int:
    """Return the greatest length of rows that share a batch with those of `length`: two steps per octave.

    Rows are filled up to the longest of their batch, a third more at most; finer steps would make batches of
    fewer rows where lengths differ.
    """
    power = 1 << (length - 1).bit_length()
    return 3 * power // 4 if length <= 3 * power // 4 else power


def divided(num_rows: int, max_rows: int) -> list[int]:
    """Return the rows of each piece of a request that has too many: full ones, then the rest."""
    most = max(max_rows, -(-num_rows // _MAX_PIECES))
    full, rest = divmod(num_rows, most)
    return [most] * full + [rest] * bool(rest)


def is_doomed(request: Request, time: BatchTime, now_s: float) -> bool:
    """Whether a request is late even if it starts now and alone, as far as is known."""
    if request.deadline_s is None or not time.is_known:
        return False
    return now_s + time.predict_s(request.rows) > request.deadline_s


def _step_s(request: Request, time: BatchTime) -> float:
    """Return what a request adds to a batch; more than nothing even where rows cost nothing."""
    return max(time.row_s, 1e-9) * request.rows / request.weight


def _deadline(request: Request) -> float:
    return float("inf") if request.deadline_s is None else request.deadline_s
