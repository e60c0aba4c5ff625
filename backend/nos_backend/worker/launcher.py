"""Starting executors: from the fork server where there is one, else as processes of their own."""

from __future__ import annotations

import asyncio
import itertools
import logging

from nos.errors import ExecutorLostError, NosError

from nos_backend.worker.executors import Executor, ForkServer

_logger = logging.getLogger(__name__)


class Launcher:
    """Starts executors. Belongs to one event loop."""

    def __init__(self, *, num_threads: int, use_forkserver: bool) -> None:
        self._num_threads = num_threads
        self._use_forkserver = use_forkserver
        #: The fork server in the making, or made; None where there is to be none.
        self._forkserver: asyncio.Task[ForkServer] | None = None
        self._counter = itertools.count(1)

    def prepare(self) -> None:
        """Begin to start the fork server, so that the first executor is there in milliseconds."""
        if self._use_forkserver and self._forkserver is None:
            self._forkserver = asyncio.create_task(ForkServer.start(), name="start fork server")

    async def start(self, name: str, device: str) -> Executor:
        """Return a fresh executor; a number is added to `name`.

        Raises:
            NosError: If it does not start at all.
        """
        numbered = f"{name}-{next(self._counter)}"
        forkserver = await self._living_forkserver()
        try:
            return await self._start(numbered, device, forkserver)
        except ExecutorLostError:
            if forkserver is None or forkserver.is_alive:
                raise
        return await self._start(numbered, device, await self._living_forkserver())

    async def _start(self, name: str, device: str, forkserver: ForkServer | None) -> Executor:
        return await Executor.start(
            name, device=device, num_threads=self._num_threads, forkserver=forkserver
        )

    async def _living_forkserver(self) -> ForkServer | None:
        """Return the fork server, a new one if it has died, None if there is none to be had.

        All its executors die with it, so many want a new one at once: each alone would import torch anew.
        """
        for _ in range(2):
            self.prepare()
            starting = self._forkserver
            if starting is None:
                return None
            try:
                forkserver = await asyncio.shield(starting)
            except (NosError, OSError) as error:
                _logger.warning("no fork server, so executors start slowly: %s", error)
                if self._forkserver is starting:
                    self._forkserver = None
                return None
            if forkserver.is_alive:
                return forkserver
            if self._forkserver is starting:
                self._forkserver = None
                await forkserver.close()
        return None

    async def close(self) -> None:
        """End the fork server."""
        task, self._forkserver = self._forkserver, None
        if task is None:
            return
        if not task.done():
            task.cancel()
        try:
            forkserver = await task
        except (NosError, OSError, asyncio.CancelledError):
            return
        await forkserver.close()
