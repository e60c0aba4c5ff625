"""Which of a model's replicas a call goes to. No I/O, no clock; whoever owns it holds a lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Streams of one client to one model; among more replicas every client takes its own few.
MAX_LINKS: Final = 8
#: A replica that could not be reached is left alone for so long.
AVOID_S: Final = 10.0


class Lane(Protocol):
    """What is needed of a link."""

    @property
    def takes_frames(self) -> bool:
        """Whether a frame may be submitted."""

    @property
    def was_welcomed(self) -> bool:
        """Whether the server ever accepted the stream."""

    @property
    def num_pending(self) -> int:
        """How many frames have no end."""


L = TypeVar("L", bound=Lane)


class Replicas(dict[L, str]):
    """Links to the replicas of one model version, each with its worker's name; empty until it is known."""

    def __init__(self) -> None:
        super().__init__()
        #: The workers that the server named, the least loaded first.
        self.workers: tuple[str, ...] = ()
        #: When to ask the server again, monotonic; None before it was asked.
        self.ask_at_s: float | None = None
        #: Workers that could not be reached, and until when they are left alone.
        self._avoid: dict[str, float] = {}
        self._num_picks = 0
        self._picked: dict[L, int] = {}

    def pick(self) -> L | None:
        """Return the link with the fewest frames, in turn where there are several; None if there is none."""
        best: L | None = None
        best_rank = (True, 0, 0)
        for link in self:
            if not link.takes_frames:
                continue
            rank = (not link.was_welcomed, link.num_pending, self._picked.get(link, 0))
            if best is None or rank < best_rank:
                best, best_rank = link, rank
        if best is not None:
            self._num_picks += 1
            self._picked[best] = self._num_picks
        return best

    def missing(self, now_s: float) -> list[str]:
        """Return the workers to open further links to: once one is open, each that has none."""
        if not any(link.was_welcomed for link in self):
            return []
        linked = {worker for link, worker in self.items() if link.takes_frames}
        if "" in linked:
            return []
        wanted = [
            worker
            for worker in self.workers
            if worker not in linked and self._avoid.get(worker, 0.0) <= now_s
        ]
        return wanted[: max(0, MAX_LINKS - len(linked))]

    def is_due(self, now_s: float) -> bool:
        """Return whether to ask the server which replicas there are."""
        if self.ask_at_s is not None:
            return now_s >= self.ask_at_s
        return any(link.was_welcomed for link in self)

    def heard(self, workers: Iterable[str], refresh_s: float, now_s: float) -> list[L]:
        """Take note of the replicas; return the links that lead to none of them."""
        self.workers = tuple(workers)
        self.ask_at_s = now_s + refresh_s if refresh_s > 0 else float("inf")
        return [link for link, worker in self.items() if worker and worker not in self.workers]

    def ended(self, link: L, now_s: float, *, is_failure: bool) -> None:
        """Forget a link."""
        worker = self.pop(link, "")
        self._picked.pop(link, None)
        if is_failure and worker:
            self._avoid[worker] = now_s + AVOID_S
