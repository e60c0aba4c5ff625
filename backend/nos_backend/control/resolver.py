"""From a model's name to a worker that serves it and a ticket that opens it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nos_backend.control.tickets import TICKET_TTL_S

if TYPE_CHECKING:
    from nos_backend.cluster.link import ClusterEvent, Placement
    from nos_backend.control.catalogue import Catalogue, Version
    from nos_backend.control.cluster import Cluster
    from nos_backend.control.tickets import TicketSigner
    from nos_backend.control.tokens import Identity


@dataclass(frozen=True, slots=True)
class Way:
    """How to reach a model."""

    version: Version
    placement: Placement
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
    ) -> None:
        self.ticket_ttl_s = ticket_ttl_s
        self._catalogue = catalogue
        self._cluster = cluster
        self._signer = signer
        #: Where models answered when last heard of; what contradicts an entry removes it.
        self._placements: dict[str, Placement] = {}
        #: Loads under way, by key; whoever wants the same model waits for the same task.
        self._loading: dict[str, asyncio.Task[Placement]] = {}

    async def resolve(self, reference: str, identity: Identity) -> Way:
        """Return a way to the model, which is loaded first if need be.

        Raises:
            InvalidRequestError: If the reference is malformed.
            ModelNotFoundError: If there is no such model.
            LoadError, OutOfDeviceMemoryError: If it cannot be loaded.
            UnavailableError: If there is no worker, or no answer from the scheduler.
        """
        version = self._catalogue.find(reference)
        placement = self._placements.get(version.key)
        if placement is None:
            placement = await self.load(version)
        return Way(version, placement, self.ticket(version.key, identity))

    async def load(self, version: Version) -> Placement:
        """Load a version, or find that it is; a caller that leaves does not stop the load."""
        task = self._loading.get(version.key)
        if task is None:
            task = asyncio.create_task(self._load(version), name=f"load {version.key}")
            self._loading[version.key] = task
            # Its failure counts as seen also where every caller has left.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def unload(self, key: str) -> None:
        """Take a version off its workers, after its work in flight."""
        self._placements.pop(key, None)
        await self._cluster.unload(key)
        self._placements.pop(key, None)

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
        if self._placements.get(key) == placement:
            del self._placements[key]

    def forget_all(self) -> None:
        """Take note that nothing is known any more."""
        self._placements.clear()

    def on_event(self, event: ClusterEvent) -> list[Placement]:
        """Take note of what happened in the cluster; returns the placements on a lost worker."""
        if event.kind in {"unloaded", "failed"}:
            self._placements.pop(event.model, None)
        if event.kind != "worker-lost":
            return []
        lost = {
            key: placement
            for key, placement in self._placements.items()
            if placement.worker == event.worker
        }
        for key in lost:
            del self._placements[key]
        return list(lost.values())

    async def _load(self, version: Version) -> Placement:
        try:
            placement = await self._cluster.load(version.definition)
            self._placements[version.key] = placement
        finally:
            del self._loading[version.key]
        return placement
