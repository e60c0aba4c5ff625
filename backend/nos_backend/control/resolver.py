"""From a model's name to the workers that serve it and a ticket that opens it."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from nos.errors import OutOfDeviceMemoryError, UnavailableError

from nos_backend.control.tickets import TICKET_TTL_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos_backend.cluster.link import ClusterEvent, Placement
    from nos_backend.control.catalogue import Catalogue, Version
    from nos_backend.control.cluster import Cluster
    from nos_backend.control.tickets import TicketSigner
    from nos_backend.control.tokens import Identity
    from nos_backend.definition import ModelDefinition

_logger = logging.getLogger(__name__)

#: How long replicas and their load are believed without asking again.
_FRESH_S: Final = 1.0
#: Events after which a model's replicas are others.
_CHANGES: Final = frozenset({"replicas", "draining", "unloaded", "failed"})


@dataclass(frozen=True, slots=True)
class Way:
    """How to reach a model."""

    version: Version
    placements: tuple[Placement, ...]
    """Its replicas, at least one, the least loaded first."""
    placement: Placement
    """The one of them that was chosen."""
    ticket: bytes
    """As it travels in `nos-ticket-bin`; lasts the resolver's `ttl_s`."""


class Resolver:
    """Loads models on demand and remembers where they are; belongs to the gateway's loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        cluster: Cluster,
        signer: TicketSigner,
        ticket_ttl_s: float = TICKET_TTL_S,
        profiles: Callable[[str], list[bytes]] = lambda _: [],
    ) -> None:
        self.ticket_ttl_s = ticket_ttl_s
        #: What was measured of a version before, by key.
        self._profiles = profiles
        self._catalogue = catalogue
        self._cluster = cluster
        self._signer = signer
        #: When it was heard, and where models answered then; what contradicts a placement removes it.
        self._placements: dict[str, tuple[float, tuple[Placement, ...]]] = {}
        #: Loads under way, by key; whoever wants the same model waits for the same task.
        self._loading: dict[str, asyncio.Task[tuple[Placement, ...]]] = {}
        #: Of these, the models whose replicas changed meanwhile.
        self._changed: set[str] = set()

    async def resolve(
        self,
        reference: str,
        identity: Identity,
        choose: Callable[[Sequence[Placement]], Placement] = itemgetter(0),
    ) -> Way:
        """Return a way to the model, which is loaded first if need be.

        Args:
            reference: `name` or `name@v3`.
            identity: Who wants to go there.
            choose: Chooses among the replicas.

        Raises:
            InvalidRequestError: If the reference is malformed.
            ModelNotFoundError: If there is no such model.
            LoadError, OutOfDeviceMemoryError: If it cannot be loaded.
            UnavailableError: If there is no worker, or no answer from the scheduler.
        """
        version = self._catalogue.find(reference)
        asked_s, placements = self._placements.get(version.key, (0.0, ()))
        if not placements or time.monotonic() - asked_s > _FRESH_S:
            try:
                placements = await self.load(version)
            except UnavailableError:
                # Without a scheduler for a moment: what answered a second ago is likely to answer still.
                _, placements = self._placements.get(version.key, (0.0, ()))
                if not placements:
                    raise
        return Way(version, placements, choose(placements), self.ticket(version.key, identity))

    async def load(self, version: Version) -> tuple[Placement, ...]:
        """Load a version, or find that it is; a caller that leaves does not stop the load."""
        task = self._loading.get(version.key)
        if task is None:
            task = asyncio.create_task(self._load(version), name=f"load {version.key}")
            self._loading[version.key] = task
            # Its failure counts as seen also where every caller has left.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def attempt(
        self, definition: ModelDefinition, call: dict[str, Any] | None, data: bytes
    ) -> None:
        """Try a version before it is served; where there is no worker or no room now, it counts as good.

        Args:
            definition: Of the version.
            call: Fields of a `nos_backend.worker.arguments.Call`, its example; None for none.
            data: What its nodes' offsets count into.

        Raises:
            LoadError: If its code fails.
        """
        try:
            await self._cluster.attempt(definition, call, data)
        except (UnavailableError, OutOfDeviceMemoryError) as error:
            _logger.info("%s is taken untried: %s", definition.key, error)

    async def unload(self, key: str) -> None:
        """Take a version off its workers, after its work in flight."""
        self._forget_key(key)
        await self._cluster.unload(key)
        self._forget_key(key)

    async def scale(self, version: Version, min_replicas: int, max_replicas: int) -> None:
        """Say how many replicas a version may have.

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        await self._cluster.scale(version.definition, min_replicas, max_replicas)
        self._forget_key(version.key)

    async def logs(self, key: str, max_lines: int) -> dict[str, list[tuple[float, str]]]:
        """Return the last lines that a version printed, by worker."""
        return await self._cluster.logs(key, max_lines)

    def ticket(self, key: str, identity: Identity) -> bytes:
        """Return a fresh ticket for one model version."""
        return self._signer.sign(
            key, identity.tenant, identity.role, identity.token_id, self.ttl_s(identity)
        )

    def ttl_s(self, identity: Identity) -> float:
        """Return how long a ticket of this caller lasts: never longer than its token."""
        if not identity.expires_s:
            return self.ticket_ttl_s
        return max(0.0, min(self.ticket_ttl_s, identity.expires_s - time.time()))

    def forget(self, key: str, placement: Placement) -> None:
        """Take note that `placement` did not answer for the model."""
        asked_s, placements = self._placements.get(key, (0.0, ()))
        self._keep(key, asked_s, tuple(item for item in placements if item != placement))

    def forget_all(self) -> None:
        """Take note that nothing is known any more."""
        self._placements.clear()

    def on_event(self, event: ClusterEvent) -> list[Placement]:
        """Take note of what happened in the cluster; returns the placements on a lost worker."""
        if event.kind in _CHANGES:
            self._forget_key(event.model)
        if event.kind != "worker-lost":
            return []
        self._changed.update(self._loading)
        lost = []
        for key, (asked_s, placements) in list(self._placements.items()):
            gone = [item for item in placements if item.worker == event.worker]
            if gone:
                lost += gone
                self._keep(key, asked_s, tuple(item for item in placements if item not in gone))
        return lost

    def _keep(self, key: str, asked_s: float, placements: tuple[Placement, ...]) -> None:
        if placements:
            self._placements[key] = asked_s, placements
        else:
            self._placements.pop(key, None)

    def _forget_key(self, key: str) -> None:
        self._placements.pop(key, None)
        if key in self._loading:
            self._changed.add(key)

    async def _load(self, version: Version) -> tuple[Placement, ...]:
        key, asked_s = version.key, time.monotonic()
        self._changed.discard(key)
        try:
            definition = replace(version.definition, profiles=self._profiles(key))
            placements = tuple(await self._cluster.load(definition))
        finally:
            del self._loading[key]
        if key not in self._changed:
            self._keep(key, asked_s, placements)
        return placements
