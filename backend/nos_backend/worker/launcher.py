"""Starting executors: from the fork server of their environment where there is one, else on their own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from typing import TYPE_CHECKING

from nos.errors import ExecutorLostError, LoadError, NosError

from nos_backend.worker.executors import Executor, ForkServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos_backend.worker.environments import Environments

_logger = logging.getLogger(__name__)


class Launcher:
    """Starts executors. Belongs to one event loop."""

    def __init__(
        self,
        *,
        num_threads: int,
        use_forkserver: bool,
        environments: Environments | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        """Make a launcher; `on_line` hears each line that a model prints, with the model's key."""
        self._num_threads = num_threads
        self._use_forkserver = use_forkserver
        self._environments = environments
        self._on_line = on_line
        #: The fork server of each interpreter, in the making or made.
        self._forkservers: dict[str, asyncio.Task[ForkServer]] = {}
        self._counter = itertools.count(1)

    def prepare(self, python: str = sys.executable) -> None:
        """Begin to start the fork server, so that the first executor is there in milliseconds."""
        if self._use_forkserver and python not in self._forkservers:
            starting = ForkServer.start(python)
            self._forkservers[python] = asyncio.create_task(starting, name="start fork server")

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

    async def start(self, name: str, device: str, requirements: Sequence[str] = ()) -> Executor:
        """Return a fresh executor; a number is added to `name`.

        Raises:
            LoadError: If its environment cannot be built.
            NosError: If it does not start at all.
        """
        python = await self.python(requirements)
        numbered = f"{name}-{next(self._counter)}"
        forkserver = await self._living_forkserver(python)
        try:
            return await self._start(numbered, device, python, forkserver)
        except ExecutorLostError:
            if forkserver is None or forkserver.is_alive:
                raise
        return await self._start(numbered, device, python, await self._living_forkserver(python))

    async def _start(
        self, name: str, device: str, python: str, forkserver: ForkServer | None
    ) -> Executor:
        return await Executor.start(
            name,
            device=device,
            num_threads=self._num_threads,
            forkserver=forkserver,
            python=python,
            on_line=self._on_line,
        )

    async def _living_forkserver(self, python: str) -> ForkServer | None:
        """Return the fork server, a new one if it has died, None if there is none to be had.

        All its executors die with it, so many want a new one at once: each alone would import torch anew.
        """
        for _ in range(2):
            self.prepare(python)
            starting = self._forkservers.get(python)
            if starting is None:
                return None
            try:
                forkserver = await asyncio.shield(starting)
            except (NosError, OSError) as error:
                _logger.warning("no fork server, so executors start slowly: %s", error)
                self._forget(python, starting)
                return None
            if forkserver.is_alive:
                return forkserver
            if self._forget(python, starting):
                await forkserver.close()
        return None

    def _forget(self, python: str, starting: asyncio.Task[ForkServer]) -> bool:
        if self._forkservers.get(python) is not starting:
            return False
        del self._forkservers[python]
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
