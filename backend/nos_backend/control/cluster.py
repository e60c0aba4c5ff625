"""What the gateway asks of the cluster, and its state as last heard."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from nos.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nos_backend.cluster.link import ClusterEvent, Placement
    from nos_backend.definition import ModelDefinition

_logger = logging.getLogger(__name__)

#: As `Cluster.state` returns it.
State: TypeAlias = dict[str, Any]

_FRESH_S: Final = 0.1


class Cluster(Protocol):
    """The part of `nos_backend.cluster.link.ClusterLink` that serving needs; see there."""

    on_reconnected: Callable[[], Awaitable[None]] | None
    address: str
    dashboard_url: str

    async def revoke(self, token_id: str) -> None:
        """Have every worker refuse a token's tickets and cut its streams."""
        ...

    async def load(self, definition: ModelDefinition) -> list[Placement]:
        """Place a model and wait until it answers; returns its replicas, the least loaded first."""
        ...

    async def attempt(
        self, definition: ModelDefinition, call: dict[str, Any] | None, data: bytes
    ) -> None:
        """Have a worker make a model and one call of it, and forget it."""
        ...

    async def scale(
        self, definition: ModelDefinition, min_replicas: int, max_replicas: int
    ) -> None:
        """Say how many replicas a model may have."""
        ...

    async def retire(self, names: list[str]) -> None:
        """Have workers leave, each once what it serves is served elsewhere."""
        ...

    async def unload(self, key: str) -> None:
        """Take a model off every worker."""
        ...

    async def logs(self, key: str, max_lines: int) -> dict[str, list[tuple[float, str]]]:
        """Return the last lines that a model printed, by worker."""
        ...

    async def memory_history(self) -> list[tuple[str, str, list[dict[str, Any]]]]:
        """Return what each worker's device held: its name, its device, and the samples."""
        ...

    async def profiles(self, key: str) -> list[dict[str, Any]]:
        """Return what workers measured of a model."""
        ...

    async def state(self) -> State:
        """Return how the cluster stands."""
        ...

    def subscribe(self, callback: Callable[[ClusterEvent], None]) -> Callable[[], None]:
        """Have `callback` called for each event."""
        ...


class StateCache:
    """The cluster's state for many readers: at most ten questions a second reach the scheduler."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._state: State = {"workers": [], "models": {}, "num_wanted_workers": 0}
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[State] | None = None

    async def read(self, max_age_s: float = _FRESH_S) -> State:
        """Return the state; empty while the scheduler does not answer.

        Args:
            max_age_s: How old it may be; 0 for one that was asked for after this call.
        """
        if time.monotonic() - self._asked_s < max_age_s:
            return self._state
        if self._asking is None or max_age_s == 0:
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> State:
        asked_s = time.monotonic()
        try:
            state = await self._cluster.state()
        except UnavailableError as error:
            _logger.debug("the scheduler does not answer: %s", error)
            state = {"workers": [], "models": {}, "num_wanted_workers": 0}
        finally:
            self._asking = None
        self._state, self._asked_s = state, asked_s
        return state
