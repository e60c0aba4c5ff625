"""How long calls of a method take from here, and how many a second there are."""

from __future__ import annotations

import functools
import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nos.errors import InvalidRequestError
from nos.types import _Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    #: A call that ended, and how long it took, in seconds.
    Timed = tuple[Future[Any], float]

MAX_CONCURRENCY: Final = 1024
_FEW_HZ: Final = 10
_HEADER: Final = ("at once", "calls", "p50 ms", "p90 ms", "p99 ms", "calls/s")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPoint:
    """What calls took with so many of them under way at once."""

    concurrency: int
    latencies_s: tuple[float, ...]
    """From call to answer, sorted; at least one."""
    took_s: float
    """From the first call until the last answer."""

    @property
    def rate_hz(self) -> float:
        """Calls per second."""
        return len(self.latencies_s) / max(self.took_s, 1e-9)

    def quantile_s(self, share: float) -> float:
        """Return the seconds that this share of the calls, 0 to 1, kept to (nearest rank)."""
        rank = round(share * (len(self.latencies_s) - 1))
        return self.latencies_s[rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench(_Table):
    """Latency and rate of one method by how many calls are under way at once, measured by this client."""

    model: str
    """The version, as `name@v3`."""
    method: str
    points: tuple[BenchPoint, ...] = ()

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            (
                str(point.concurrency),
                str(len(point.latencies_s)),
                *(f"{point.quantile_s(share) * 1e3:.3g}" for share in (0.5, 0.9, 0.99)),
                f"{point.rate_hz:,.0f}" if point.rate_hz >= _FEW_HZ else f"{point.rate_hz:.2g}",
            )
            for point in self.points
        ]
        return _HEADER, rows, f"{self.model} {self.method}, from this client"


def measure(
    submit: Callable[[], Future[Any]], num_calls: int, concurrency: Sequence[int]
) -> tuple[BenchPoint, ...]:
    """Make the same call again and again; one before it counts, so that the model is loaded.

    Args:
        submit: Starts a call.
        num_calls: How many, for each number in `concurrency`.
        concurrency: How many are under way at once, one after the other.

    Raises:
        InvalidRequestError: If the numbers make no sense.
        NosError: What ended a call; those under way are withdrawn.
    """
    if num_calls < 1:
        raise InvalidRequestError("nothing to measure", "num_calls", "1 or more", str(num_calls))
    wrong = [count for count in concurrency if not 1 <= count <= MAX_CONCURRENCY]
    if wrong or not concurrency:
        raise InvalidRequestError(
            "calls under way at once", "concurrency", f"1 to {MAX_CONCURRENCY}", f"{concurrency}"
        )
    submit().result()
    return tuple(_measure(submit, max(num_calls, count), count) for count in concurrency)


def _measure(submit: Callable[[], Future[Any]], num_calls: int, concurrency: int) -> BenchPoint:
    ended: queue.SimpleQueue[Timed] = queue.SimpleQueue()
    under_way: set[Future[Any]] = set()
    latencies_s: list[float] = []
    num_begun = 0
    first_s = time.perf_counter()
    try:
        while len(latencies_s) < num_calls:
            while len(under_way) < concurrency and num_begun < num_calls:
                begin_s = time.perf_counter()
                call = submit()
                under_way.add(call)
                call.add_done_callback(functools.partial(_note, ended, begin_s))
                num_begun += 1
            call, elapsed_s = ended.get()
            call.result()
            under_way.remove(call)
            latencies_s.append(elapsed_s)
    finally:
        for call in under_way:
            call.cancel()
    return BenchPoint(
        concurrency=concurrency,
        latencies_s=tuple(sorted(latencies_s)),
        took_s=time.perf_counter() - first_s,
    )


def _note(ended: queue.SimpleQueue[Timed], begin_s: float, call: Future[Any]) -> None:
    """Note the moment of an answer where it arrives, not when somebody looks at it."""
    ended.put((call, time.perf_counter() - begin_s))
