"""What models need, as workers measured it: kept for good, told to whoever asks and to the next worker."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError
from nos.errors import InvalidRequestError, NosError, UnavailableError
from nos.wire.v1 import models_pb2

if TYPE_CHECKING:
    from nos_backend.cluster.link import ClusterEvent
    from nos_backend.control.catalogue import Version
    from nos_backend.control.cluster import Cluster
    from nos_backend.control.registry import Registry
    from nos_backend.control.resolver import Resolver

_logger = logging.getLogger(__name__)

#: A profile takes about 2 s where the device is quiet.
_PATIENCE_S: Final = 60.0
_POLL_S: Final = 0.2


class Profiles:
    """Belongs to the gateway's loop.

    Args:
        registry: Keeps them.
        cluster: Knows those that workers made.
    """

    def __init__(self, registry: Registry, cluster: Cluster) -> None:
        self._registry = registry
        self._cluster = cluster
        #: By key, then by device and product.
        self._known: dict[str, dict[tuple[str, str], models_pb2.Profile]] = {}
        for profile in registry.read_profiles():
            self._known.setdefault(profile.model, {})[_place(profile)] = profile
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, key: str) -> list[bytes]:
        """Return what is known of a version, serialized, for the worker that loads it."""
        return [profile.SerializeToString() for profile in self._known.get(key, {}).values()]

    def on_event(self, event: ClusterEvent) -> None:
        """Fetch what a worker has just measured."""
        if event.kind == "profiled":
            task = asyncio.create_task(self._take(event.model), name=f"profile {event.model}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def get(self, version: Version, resolver: Resolver) -> models_pb2.Profile:
        """Return the newest profile of a version; loads it and waits for one if there is none.

        Raises:
            InvalidRequestError: If none is made: the model is to be called first, or cannot be measured.
            UnavailableError: If the device is busy for too long, or the cluster does not answer.
            LoadError: If it cannot be loaded.
        """
        key = version.key
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self._measured(key):
            await resolver.load(version)
            found = await self._fetch(key)
            if self._measured(key):
                break
            states = {str(item.get("state")) for item in found}
            if "waits for a call" in states:
                raise InvalidRequestError(
                    f"{key} is measured with its first call: its signature leaves sizes open",
                    "model",
                    hint="Call it once, or declare sizes: Annotated[torch.Tensor, 'float32[batch, 3]']",
                )
            if states == {"none"}:
                notes = "; ".join(filter(None, (str(item.get("note", "")) for item in found)))
                raise InvalidRequestError(f"{key} has no profile", "model", got=notes)
            if time.monotonic() > deadline_s:
                raise UnavailableError(
                    f"{key} has no profile yet", "model", hint="The device is busy; try again later"
                )
            await asyncio.sleep(_POLL_S)
        return max(self._measured(key), key=lambda profile: profile.time_s)

    def _measured(self, key: str) -> list[models_pb2.Profile]:
        """Return the profiles of a version that say more than what its batches taught."""
        return [profile for profile in self._known.get(key, {}).values() if profile.methods]

    def forget(self, name: str) -> None:
        """A model was deleted, with all its versions."""
        for key in [key for key in self._known if key.rpartition("@")[0] == name]:
            del self._known[key]

    async def _fetch(self, key: str) -> list[dict[str, Any]]:
        """Keep what workers measured of a version; returns what they say."""
        found = await self._cluster.profiles(key)
        for item in found:
            raw = item.get("profile")
            try:
                profile = models_pb2.Profile.FromString(raw if isinstance(raw, bytes) else b"")
            except DecodeError:
                _logger.warning("a worker's profile of %s is damaged", key)
                continue
            if profile.model == key and self._known.get(key, {}).get(_place(profile)) != profile:
                self._known.setdefault(key, {})[_place(profile)] = profile
                await self._registry.add_profile(profile)
        return found

    async def _take(self, key: str) -> None:
        try:
            await self._fetch(key)
        except NosError as error:
            _logger.warning("the profile of %s is not kept: %s", key, error)


def _place(profile: models_pb2.Profile) -> tuple[str, str]:
    return profile.device.partition(":")[0], profile.product
