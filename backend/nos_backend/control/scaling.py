"""How many replicas there may be of each version: said to the cluster, kept, and said again at each start."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from nos.errors import ModelNotFoundError

if TYPE_CHECKING:
    from nos_backend.control.catalogue import Catalogue, Version
    from nos_backend.control.registry import Actor, Limits, Registry
    from nos_backend.control.resolver import Resolver

_logger = logging.getLogger(__name__)


class Scaler:
    """The limits that somebody set; belongs to the gateway's loop."""

    def __init__(self, catalogue: Catalogue, registry: Registry, resolver: Resolver) -> None:
        self._catalogue = catalogue
        self._registry = registry
        self._resolver = resolver
        #: By key, those of versions that are gone included.
        self._limits = registry.read_limits()

    async def restore(self) -> None:
        """Say to a cluster that knows nothing yet what was said before.

        Raises:
            UnavailableError: If it does not answer.
        """
        for key, limits in list(self._limits.items()):
            try:
                version = self._catalogue.find(key)
            except ModelNotFoundError:
                _logger.info("%s is gone, and its replicas with it", key)
                continue
            await self._apply(version, limits)

    async def scale(self, version: Version, wish: Limits, actor: Actor) -> None:
        """Set the limits of a version; what the wish leaves open stays as it was.

        Raises:
            UnavailableError: If the scheduler does not answer, or it cannot be kept.
            LimitExceededError: If the disk is full.
        """
        before = self._limits.get(version.key, wish)
        limits = replace(
            wish,
            device=wish.device or before.device,
            memory_bytes=before.memory_bytes if wish.memory_bytes is None else wish.memory_bytes,
            placement=wish.placement or before.placement,
        )
        await self._registry.set_limits(version.key, limits, actor)
        self._limits[version.key] = limits
        await self._apply(version, limits)

    async def forget(self, key: str, actor: Actor) -> None:
        """Forget the limits of a version that is unloaded.

        Raises:
            UnavailableError: If that cannot be kept.
            LimitExceededError: If the disk is full.
        """
        if key in self._limits:
            await self._registry.set_limits(key, None, actor)
            del self._limits[key]

    async def _apply(self, version: Version, limits: Limits) -> None:
        version = self._catalogue.constrain(version, limits)
        await self._resolver.scale(version, limits.min_replicas, limits.max_replicas)
