"""Starting executors: from the fork server of their environment where there is one, else on their own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from nos.errors import ExecutorLostError, LoadError, NosError

from nos_backend.executor.confinement import Bounds
from nos_backend.worker.executors import Executor, ForkServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos_backend.worker.bounds import Confinement
    from nos_backend.worker.environments import Environments
    from nos_backend.worker.limits import WorkLimits

_logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What executors of one fork server have in common."""

    python: str
    owner: str
    """Empty where the interpreter has the server's packages only."""


class Launcher:
    """Starts executors. Belongs to one event loop."""

    def __init__(
        self,
        *,
        num_threads: int,
        use_forkserver: bool,
        environments: Environments | None = None,
        confinement: Confinement | None = None,
        on_line: Callable[[str, str], None] | None = None,
        limits: WorkLimits | None = None,
    ) -> None:
        """Make a launcher; `on_line` hears each line that a model prints, with the model's key."""
        self._num_threads = num_threads
        self._use_forkserver = use_forkserver
        self._environments = environments
        self._confinement = confinement
        self._on_line = on_line
        self._limits = limits
        #: The fork server of each interpreter, in the making or made. That of the server's own packages
        #: has nobody's bounds; others run what an author chose, so each owner has one.
        self._forkservers: dict[_Kind, asyncio.Task[ForkServer]] = {}
        self._counter = itertools.count(1)

    def prepare(self) -> None:
        """Begin to start the fork server, so that the first executor is there in milliseconds."""
        self._prepare(_Kind(sys.executable, ""))

    def _prepare(self, kind: _Kind) -> None:
        if self._use_forkserver and kind not in self._forkservers:
            starting = self._start_forkserver(kind)
            self._forkservers[kind] = asyncio.create_task(starting, name="start fork server")

    async def _start_forkserver(self, kind: _Kind) -> ForkServer:
        if not kind.owner:
            return await ForkServer.start(kind.python)
        bounds, rules_fd = self._bounds(kind.owner)
        return await ForkServer.start(kind.python, bounds, rules_fd)

    def _bounds(self, owner: str) -> tuple[Bounds, int | None]:
        """Return what an owner's executors are held to, and a descriptor of the rules."""
        if self._confinement is None:
            return Bounds(), None
        bounds = self._confinement.bounds(owner)
        return bounds, self._confinement.rules(bounds)

    async def python(self, requirements: Sequence[str]) -> str:
        """Return the interpreter that has these packages besides the server's; builds it if need be.

        Raises:
            LoadError: If it cannot be built.
        """
        if not requirements:
            return sys.executable
        if self._environments is None:
            raise LoadError("this worker has no folder for environments", "env", "none", "some")
        return await self._environments.python(requirements)

    async def start(
        self, name: str, owner: str, device: str, requirements: Sequence[str] = ()
    ) -> Executor:
        """Return a fresh executor of an owner's; a number is added to `name`.

        Raises:
            LoadError: If its environment cannot be built.
            NosError: If it does not start at all.
        """
        python = await self.python(requirements)
        numbered = f"{name}-{next(self._counter)}"
        kind = _Kind(python, owner if python != sys.executable else "")
        forkserver = await self._living_forkserver(kind)
        try:
            return await self._start(numbered, owner, device, kind, forkserver)
        except ExecutorLostError:
            if forkserver is None or forkserver.is_alive:
                raise
        forkserver = await self._living_forkserver(kind)
        return await self._start(numbered, owner, device, kind, forkserver)

    async def _start(
        self, name: str, owner: str, device: str, kind: _Kind, forkserver: ForkServer | None
    ) -> Executor:
        bounds, rules_fd = Bounds(), None
        if not kind.owner or forkserver is None:  # else it has its fork server's
            try:
                bounds, rules_fd = self._bounds(owner)
            except OSError as error:
                raise ExecutorLostError(f"executor {name} has no bounds", got=str(error)) from error
        try:
            return await Executor.start(
                name,
                device=device,
                num_threads=self._num_threads,
                forkserver=forkserver,
                python=kind.python,
                bounds=bounds,
                rules_fd=rules_fd,
                on_line=self._on_line,
                limits=self._limits,
            )
        finally:
            if rules_fd is not None:
                os.close(rules_fd)

    async def _living_forkserver(self, kind: _Kind) -> ForkServer | None:
        """Return the fork server, a new one if it has died, None if there is none to be had.

        All its executors die with it, so many want a new one at once: each alone would import torch anew.
        """
        for _ in range(2):
            self._prepare(kind)
            starting = self._forkservers.get(kind)
            if starting is None:
                return None
            try:
                forkserver = await asyncio.shield(starting)
            except (NosError, OSError) as error:
                _logger.warning("no fork server, so executors start slowly: %s", error)
                self._forget(kind, starting)
                return None
            if forkserver.is_alive:
                return forkserver
            if self._forget(kind, starting):
                await forkserver.close()
        return None

    def _forget(self, kind: _Kind, starting: asyncio.Task[ForkServer]) -> bool:
        if self._forkservers.get(kind) is not starting:
            return False
        del self._forkservers[kind]
        return True

    async def close(self) -> None:
        """End the fork servers and the builds."""
        tasks = list(self._forkservers.values())
        self._forkservers.clear()
        if self._environments is not None:
            await self._environments.close()
        for task in tasks:
            if not task.done():
                task.cancel()
            try:
                forkserver = await task
            except (NosError, OSError, asyncio.CancelledError):
                continue
            await forkserver.close()
