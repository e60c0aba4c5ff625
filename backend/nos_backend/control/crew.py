"""How many workers the supervisor of this machine runs, and who tells it.

The supervisor knows no cluster and the gateway no processes; between them is a file that says which workers
there may be and how many of them there are to be. It is read at the start and at each SIGUSR1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from nos.errors import InvalidRequestError, NosError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from nos_backend.control.cluster import Cluster

_logger = logging.getLogger(__name__)

#: The file, in the folder of the run.
CREW_NAME: Final = "crew.json"

_FOLLOW_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The workers of one supervisor."""

    supervisor_pid: int
    names: list[str]
    """Of all that there may be, in the order in which they are started."""
    num_wanted: int
    """How many of them there are to be."""

    @property
    def wanted(self) -> list[str]:
        """Names of those that there are to be."""
        return self.names[: self.num_wanted]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what was written.

        Raises:
            OSError: If nothing was.
        """
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(path)


class Recruiter:
    """The gateway's part; belongs to its loop.

    Args:
        path: Of the file; None if no supervisor runs the workers.
        cluster: Drains the workers that leave, and says how many the models need.
    """

    def __init__(self, path: Path | None, cluster: Cluster) -> None:
        self._path = path
        self._cluster = cluster
        self._following: asyncio.Task[None] | None = None

    async def scale(self, low: int, high: int) -> list[str]:
        """Have so many workers, between two numbers as many as the models need; return their names.

        Raises:
            InvalidRequestError: If the numbers make no sense here, or a model needs more.
            UnavailableError: If no supervisor runs the workers, or the scheduler does not answer.
        """
        crew = self._read()
        if not crew.names:
            raise UnavailableError(
                "this server runs no workers of its own",
                hint="Start or end workers where they were started",
            )
        if not 1 <= low <= high <= len(crew.names):
            raise InvalidRequestError(
                "the numbers of workers are wrong",
                "max_workers",
                f"1 .. {len(crew.names)}",
                f"{low} to {high}",
            )
        await self.close()
        names = await self._set(min(max(crew.num_wanted, low), high))
        if low < high:
            self._following = asyncio.create_task(self._follow(low, high), name="follow models")
        return names

    async def close(self) -> None:
        """End following the models; the workers stay."""
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following

    def _read(self) -> Crew:
        crew = None
        if self._path is not None:
            with contextlib.suppress(OSError):
                crew = Crew.read(self._path)
        if crew is None or crew.supervisor_pid != os.getppid():
            raise UnavailableError(
                "this gateway has no supervisor that runs workers",
                hint="Start or end workers where they were started",
            )
        return crew

    async def _set(self, count: int) -> list[str]:
        crew = self._read()
        if count == crew.num_wanted:
            return crew.wanted
        # First the supervisor: it would start again what ends without its knowledge.
        self._write(crew, count)
        if count < crew.num_wanted:
            present = {worker["name"] for worker in (await self._cluster.state())["workers"]}
            leaving = [name for name in crew.names[count : crew.num_wanted] if name in present]
            try:
                await self._cluster.retire(leaving)
            except NosError:
                self._write(crew, crew.num_wanted)
                raise
        return crew.names[:count]

    def _write(self, crew: Crew, count: int) -> None:
        if self._path is not None:
            replace(crew, num_wanted=count).write(self._path)
        os.kill(crew.supervisor_pid, signal.SIGUSR1)

    async def _follow(self, low: int, high: int) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                needed = int((await self._cluster.state())["num_wanted_workers"])
                await self._set(min(max(needed, low), high))
            except NosError as error:
                _logger.info("the number of workers stays: %s", error)
