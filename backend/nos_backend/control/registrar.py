"""Changes of the catalogue that are to stay: first on the disk, then served."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from nos_backend.control.catalogue import Catalogue, Version
    from nos_backend.control.describe import Description
    from nos_backend.control.registry import Actor, Registry
    from nos_backend.definition import ModelDefinition

T = TypeVar("T")


class Registrar:
    """Registers and deletes, one change after the other; belongs to the gateway's loop.

    A caller that leaves does not undo its change: what is on the disk is also served.
    """

    def __init__(self, catalogue: Catalogue, registry: Registry) -> None:
        self._catalogue = catalogue
        self._registry = registry
        self._lock = asyncio.Lock()

    async def register(
        self, definition: ModelDefinition, description: Description, actor: Actor
    ) -> Version:
        """Make a source a model's newest version; the same one again changes nothing.

        Raises:
            NosError: As `Catalogue.prepare` and `Registry.add_version` do; then nothing is changed.
        """
        return await whole(self._register(definition, description, actor))

    async def delete(self, name: str, actor: Actor) -> list[Version]:
        """Forget a model; returns its versions.

        Raises:
            ModelNotFoundError: If there is none.
            NosError: As `Registry.delete_model` does; then nothing is changed.
        """
        return await whole(self._delete(name, actor))

    async def _register(
        self, definition: ModelDefinition, description: Description, actor: Actor
    ) -> Version:
        async with self._lock:
            version = self._catalogue.prepare(definition, description)
            entry = self._catalogue.get(definition.name)
            if entry is None or version.definition.version not in entry.versions:
                await self._registry.add_version(version.definition, actor)
                self._catalogue.publish(version)
            return version

    async def _delete(self, name: str, actor: Actor) -> list[Version]:
        async with self._lock:
            entry = self._catalogue.entry(name)
            await self._registry.delete_model(entry.name, actor)
            return self._catalogue.delete(entry.name)


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, also where the caller is cancelled."""
    task = asyncio.ensure_future(work)
    # Its failure counts as seen also where the caller has left.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)
