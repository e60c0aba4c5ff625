"""Folders of models on their way to workers on machines that do not see the gateway's.

A worker asks by an event of Dask's, which every gateway of its scheduler hears; the gateway that has the
folder sends it straight to the worker over Dask's comm, one piece after the other. What arrives is taken
when it has the name of its content, and kept for the next load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nos.errors import InvalidRequestError, LoadError, NosError, UnavailableError

from nos_backend.control.blobs import disk_errors
from nos_backend.control.folders import MAX_FILES, check_path
from nos_backend.worker.integrity import content_name, files_of, is_content_name

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_logger = logging.getLogger(__name__)

#: Dask topic of a worker's requests: `{"folder": name}`; Dask adds the worker's address as `worker`.
FOLDERS_TOPIC: Final = "nos-folders"

_PIECE_BYTES: Final = 1 << 20
#: A request is repeated when nothing came for this part of a worker's patience: a gateway may have been
#: restarted meanwhile.
_ASK_AGAIN: Final = 0.1


@dataclass(slots=True)
class _Arrival:
    """A folder that is being received."""

    #: Gets the files; renamed when all are there.
    building: Path
    done: asyncio.Future[None]
    #: When something came last, by the monotonic clock; infinite once all came.
    heard_s: float
    #: Sizes by path; empty before the gateway said them.
    sizes: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    #: Held while a file is written to: a gateway that connects again may send meanwhile.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class FolderCache:
    """Folders that a worker got from the gateway, named by their content. Belongs to one event loop.

    Nobody else may use `root`.
    """

    def __init__(
        self,
        root: Path,
        ask: Callable[[str], None],
        max_bytes: int,
        patience_s: float = 20.0,
    ) -> None:
        """Keep folders in `root`, which is made; what an earlier worker left there stays.

        Args:
            root: Executors read what is in it, and only by its name.
            ask: Called with a folder's name to have the gateway send it.
            max_bytes: What they may take together.
            patience_s: How long nothing may come before a load fails.

        Raises:
            OSError: If it cannot be made.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o711)
        for left in root.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        self.root = root
        self._ask = ask
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        #: Names of the folders that models here have, by the models' keys.
        self._used: dict[str, str] = {}
        #: Folders that were checked since this worker started.
        self._checked: set[str] = set()
        self._arrivals: dict[str, _Arrival] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: Held while room is made.
        self._lock = asyncio.Lock()

    async def find(self, key: str, folder: str) -> str:
        """Return where a model's folder is on this machine; has it sent if it is nowhere.

        Args:
            key: The model, which uses the folder until `release`.
            folder: Where it is on the gateway's machine; one that is not named by its content is
                returned as it is.

        Raises:
            LoadError: If it is too large for this worker.
            LimitExceededError: If the disk is full.
            UnavailableError: If the gateway does not send it, or the disk fails.
        """
        name = Path(folder).name
        if not is_content_name(name) or await asyncio.to_thread(Path(folder).is_dir):
            return folder
        self._used[key] = name
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._have(name), name=f"folder {name}")
            self._tasks[name].add_done_callback(lambda _: self._tasks.pop(name))
        await asyncio.shield(self._tasks[name])
        return str(self.root / name)

    def release(self, key: str) -> None:
        """Have a model no longer use its folder."""
        self._used.pop(key, None)

    async def _have(self, name: str) -> None:
        target = self.root / name
        if name not in self._checked and await asyncio.to_thread(target.is_dir):
            if await asyncio.to_thread(content_name, target) == name:
                self._checked.add(name)
            else:
                _logger.warning("the kept folder %s is damaged", name)
                await asyncio.to_thread(shutil.rmtree, target)
        if name not in self._checked:
            await self._receive(name)
        os.utime(target)

    async def _receive(self, name: str) -> None:
        building = self.root / f".{name}"
        arrival = _Arrival(building, asyncio.get_running_loop().create_future(), time.monotonic())
        self._arrivals[name] = arrival
        ask_again_s = _ASK_AGAIN * self._patience_s
        try:
            while not arrival.done.done():
                silent_s = time.monotonic() - arrival.heard_s
                if silent_s > self._patience_s:
                    raise UnavailableError(
                        f"the gateway sent nothing of the model's files for {silent_s:.0f} s",
                        "files",
                        hint="Try again when it is back",
                    )
                if not arrival.sizes or silent_s > ask_again_s:
                    self._ask(name)
                await asyncio.wait({arrival.done}, timeout=ask_again_s)
            arrival.done.result()
            self._checked.add(name)
        finally:
            arrival.done.cancel()
            del self._arrivals[name]
            await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)

    # What the gateway calls through a Dask comm; plain containers in and out, and never raising.

    async def begin(self, name: str, files: list[list[Any]]) -> dict[str, Any]:
        """Take note of which files a folder has: (path, size in bytes).

        Returns:
            How much of each is here; without `received` the folder is not wanted.
        """
        arrival = self._arrivals.get(name)
        sizes = {str(path): int(size_bytes) for path, size_bytes in files}
        if arrival is None:
            return {}
        async with arrival.lock:
            if arrival.sizes != sizes:
                try:
                    await self._prepare(arrival, sizes)
                except (NosError, OSError) as error:
                    _fail(arrival, error)
                    return {}
            arrival.heard_s = time.monotonic()
            return {"received": [arrival.received[path] for path in sizes]}

    async def piece(self, name: str, path: str, offset_bytes: int, data: bytes) -> dict[str, Any]:
        """Append to a file; `{"taken": True}` unless that is not what comes next."""
        arrival = self._arrivals.get(name)
        if arrival is None:
            return {}
        async with arrival.lock:
            end_bytes = offset_bytes + len(data)
            if arrival.received.get(path) != offset_bytes or end_bytes > arrival.sizes[path]:
                return {}
            try:
                with disk_errors("files"):
                    await asyncio.to_thread(_append, arrival.building / path, data)
            except NosError as error:
                _fail(arrival, error)
                return {}
            arrival.received[path] = end_bytes
            arrival.heard_s = time.monotonic()
        return {"taken": True}

    async def end(self, name: str) -> dict[str, Any]:
        """Take a folder, if it has all its files and these are what its name says."""
        arrival = self._arrivals.get(name)
        if arrival is None:
            return {}
        async with arrival.lock:
            if arrival.done.done() or arrival.received != arrival.sizes:
                return {}
            arrival.heard_s = math.inf  # hashing takes as long as they are large
            try:
                await asyncio.to_thread(_take, arrival.building, self.root / name)
            except (NosError, OSError) as error:
                _fail(arrival, error)
            else:
                arrival.done.set_result(None)
        return {}

    async def _prepare(self, arrival: _Arrival, sizes: dict[str, int]) -> None:
        if len(sizes) > MAX_FILES or min(sizes.values(), default=0) < 0:
            raise InvalidRequestError("these cannot be a model's files", "files")
        for path in sizes:
            check_path(path)
        arrival.sizes = {}
        async with self._lock:
            coming_bytes = sum(sum(it.sizes.values()) for it in self._arrivals.values())
            await asyncio.to_thread(self._make_room, coming_bytes + sum(sizes.values()))
            arrival.sizes, arrival.received = sizes, dict.fromkeys(sizes, 0)
        with disk_errors("files"):
            await asyncio.to_thread(_lay_out, arrival.building, sizes)

    def _make_room(self, size_bytes: int) -> None:
        """Delete folders that no model here has, the longest unused first.

        Raises:
            LoadError: If that is not enough.
        """
        used = set(self._used.values())
        kept = {it: _size_bytes(it) for it in self.root.iterdir() if is_content_name(it.name)}
        for folder in sorted(kept, key=lambda it: it.stat().st_mtime_ns):
            if sum(kept.values()) + size_bytes <= self._max_bytes:
                return
            if folder.name not in used:
                self._checked.discard(folder.name)
                shutil.rmtree(folder)
                del kept[folder]
        if sum(kept.values()) + size_bytes > self._max_bytes:
            raise LoadError(
                "the worker has no room for the model's files",
                "files",
                f"at most {self._max_bytes} bytes, of which its models use {sum(kept.values())}",
                f"{size_bytes} bytes",
                "Give its NOS_WORKER_FILES_BYTES",
            )


class FolderSender:
    """Sends folders to workers that ask for them. Belongs to one event loop."""

    def __init__(self, root: Path) -> None:
        """Send what is in `root`; each folder there is named by its content."""
        self._root = root
        #: By worker's address and folder's name.
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    def hear(self, rpc: Callable[[str], Any], asked: dict[str, Any]) -> None:
        """Start what a worker asked for, unless it is under way, or some other gateway's.

        Args:
            rpc: Gives the operations of the Dask server at an address as methods.
            asked: The event.
        """
        place = str(asked.get("worker", "")), str(asked.get("folder", ""))
        folder = self._root / place[1]
        if place in self._tasks or not is_content_name(place[1]) or not folder.is_dir():
            return
        task = asyncio.create_task(_logged(self._send(rpc(place[0]), folder), place[0]))
        self._tasks[place] = task
        task.add_done_callback(lambda _: self._tasks.pop(place))

    async def close(self) -> None:
        """End what is under way."""
        for task in list(self._tasks.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _send(self, worker: Any, folder: Path) -> None:
        files = await asyncio.to_thread(_list, folder)
        begun = await worker.nos_folder_begin(name=folder.name, files=files)
        for (path, size_bytes), received in zip(files, begun.get("received", ()), strict=False):
            offset_bytes = received
            while offset_bytes < size_bytes:
                data = await asyncio.to_thread(_read, folder / path, offset_bytes)
                taken = await worker.nos_folder_piece(
                    name=folder.name, path=path, offset_bytes=offset_bytes, data=data
                )
                if not data or not taken.get("taken"):
                    return
                offset_bytes += len(data)
        await worker.nos_folder_end(name=folder.name)


async def _logged(work: Coroutine[Any, Any, None], address: str) -> None:
    try:
        await work
    except (OSError, TimeoutError) as error:  # it asks again if it still wants it
        _logger.warning("files were not sent to %s: %s", address, error)


def _fail(arrival: _Arrival, error: Exception) -> None:
    if not arrival.done.done():
        arrival.done.set_exception(error)


def _list(folder: Path) -> list[list[Any]]:
    return [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in files_of(folder)]


def _read(path: Path, offset_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        return file.read(_PIECE_BYTES)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _lay_out(folder: Path, sizes: dict[str, int]) -> None:
    """Make the files of a folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    for path in sizes:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch(0o644)


def _take(building: Path, target: Path) -> None:
    found = content_name(building)
    if found != target.name:
        raise LoadError("the model's files came damaged", "files", target.name, found)
    building.rename(target)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))
