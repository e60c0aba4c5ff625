"""Refused callers: written to the audit log, and made to wait where one peer tries often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from nos.errors import NosError

from nos_backend.control.registry import Actor

if TYPE_CHECKING:
    from nos_backend.control.registry import Registry

_logger = logging.getLogger(__name__)

#: Failures that one peer has free, and in how many seconds it gets them back.
MAX_FAILURES: Final = 10
PERIOD_S: Final = 60.0
MIN_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 30.0

_MAX_PEERS: Final = 10_000
#: Answers held back at once; those beyond come at once, so that nobody fills the server with waiting calls.
_MAX_WAITING: Final = 200


class Failures:
    """Counts per peer; pure. A count falls by `MAX_FAILURES` in each period."""

    def __init__(self, max_failures: float = MAX_FAILURES) -> None:
        self._max_failures = max_failures
        #: Count and when it was so, by peer; the one that failed last is last.
        self._peers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def add(self, peer: str, now_s: float) -> float:
        """Count a failure; returns for how long its answer is to be held back, in seconds."""
        count, then_s = self._peers.pop(peer, (0.0, now_s))
        count = max(0.0, count - (now_s - then_s) * MAX_FAILURES / PERIOD_S) + 1.0
        self._peers[peer] = (count, now_s)
        if len(self._peers) > _MAX_PEERS:
            self._peers.popitem(last=False)
        over = count - self._max_failures
        if over <= 0:
            return 0.0
        return float(min(MAX_DELAY_S, MIN_DELAY_S * 2 ** min(over - 1, 10)))


class Logins:
    """Takes note of refused calls; belongs to the gateway's loop."""

    def __init__(self, registry: Registry, failures: Failures | None = None) -> None:
        self._registry = registry
        self._logins = failures or Failures()
        #: Of lines in the audit log, which refused calls must not fill.
        self._lines = Failures()
        self._num_unwritten = 0
        self._num_waiting = 0
        self._writing: set[asyncio.Task[None]] = set()

    async def failed(self, peer: str, method: str, error: NosError) -> None:
        """Take note of a wrong token, and wait for as long as its answer is to be held back."""
        self.refused(Actor(token_id="", peer=peer), method, error)
        delay_s = self._logins.add(_host(peer), time.monotonic())
        if delay_s and self._num_waiting < _MAX_WAITING:
            self._num_waiting += 1
            try:
                await asyncio.sleep(delay_s)
            finally:
                self._num_waiting -= 1

    def refused(self, actor: Actor, method: str, error: NosError) -> None:
        """Write that a call was refused, unless the peer has had many such lines."""
        if self._lines.add(_host(actor.peer), time.monotonic()):
            self._num_unwritten += 1
            return
        more = f", after {self._num_unwritten} more refused calls" if self._num_unwritten else ""
        self._num_unwritten = 0
        task = asyncio.ensure_future(self._write(actor, method, f"{error.message}{more}"))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, actor: Actor, method: str, outcome: str) -> None:
        try:
            await self._registry.record(actor, "refused", method, outcome)
        except (NosError, RuntimeError) as error:  # refusing goes on where the disk does not
            _logger.warning("a refused call of %s is not in the audit log: %s", actor.peer, error)


def _host(peer: str) -> str:
    """Return the peer without its port."""
    return peer.rpartition(":")[0] or peer
