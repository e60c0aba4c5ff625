"""Folders on their way to workers: whole or not at all, resumed, kept, and no more than may be kept."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from nos.errors import InvalidRequestError, LoadError, UnavailableError
from nos_backend.cluster.folders import FolderCache, FolderSender
from nos_backend.definition import folder_name

pytestmark = pytest.mark.asyncio

MIB = 1 << 20


def made(root: Path, **files: bytes) -> Path:
    """Make a folder as the gateway has it."""
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    folder = root / folder_name(digests)
    (folder / "part").mkdir(parents=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return folder


def read(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


class Wire:
    """What a worker's Dask server does with a sender's calls; may break once."""

    def __init__(self, cache: FolderCache, breaks_at: int = -1) -> None:
        self._cache = cache
        self.breaks_at, self.num_pieces = breaks_at, 0
        self.nos_folder_begin, self.nos_folder_end = cache.begin, cache.end

    async def nos_folder_piece(self, **piece: Any) -> dict[str, Any]:
        self.num_pieces += 1
        if self.num_pieces == self.breaks_at:
            raise OSError("the comm is closed")
        return await self._cache.piece(**piece)


class Site:
    """A gateway's folders and a worker that cannot see them."""

    def __init__(self, tmp_path: Path, max_bytes: int = 1 << 30, **options: Any) -> None:
        self.here, self.there = tmp_path / "gateway", tmp_path / "worker"
        self.here.mkdir(exist_ok=True)
        self.sender = FolderSender(self.here)
        self.asked: list[str] = []
        self.cache = FolderCache(self.there, self.ask, max_bytes, **options)
        self.wire = Wire(self.cache)

    def ask(self, name: str) -> None:
        self.asked.append(name)
        self.sender.hear(lambda _address: self.wire, {"worker": "tls://w:1", "folder": name})

    async def find(self, folder: Path, key: str = "m@v1") -> str:
        return await self.cache.find(key, f"/not/here/{folder.name}")


async def test_a_folder_is_sent_once_and_kept(tmp_path):
    site = Site(tmp_path)
    files = {"net.py": b"x = 1", "part/weights": bytes(range(256)) * 8192 + b"end", "empty": b""}
    folder = made(site.here, **files)
    both = await asyncio.gather(site.find(folder), site.find(folder, "other@v1"))
    assert set(both) == {str(site.there / folder.name)}
    assert read(both[0]) == files
    assert site.wire.num_pieces == 1 + 3
    later = Site(tmp_path)
    assert await later.find(folder) == both[0]
    assert later.asked == []


async def test_what_this_machine_sees_or_what_no_digest_names_is_left_alone(tmp_path):
    site = Site(tmp_path)
    folder = made(tmp_path / "shared", a=b"1")
    for seen in (str(folder), "", "/home/ann/models"):
        assert await site.cache.find("m@v1", seen) == seen
    assert site.asked == []


async def test_a_broken_connection_costs_one_piece(tmp_path):
    site = Site(tmp_path, patience_s=4)
    site.wire.breaks_at = 3
    folder = made(site.here, weights=b"w" * (4 * MIB))
    assert read(await site.find(folder)) == {"weights": b"w" * (4 * MIB)}
    assert site.wire.num_pieces == 4 + 1
    assert len(site.asked) > 1


async def test_a_kept_folder_that_was_damaged_is_sent_again(tmp_path):
    site = Site(tmp_path)
    folder = made(site.here, a=b"right")
    (Path(await site.find(folder)) / "a").write_bytes(b"wrong")
    later = Site(tmp_path)
    assert read(await later.find(folder)) == {"a": b"right"}
    assert later.asked == [folder.name]


async def test_files_that_are_not_what_the_name_says_are_refused_and_not_kept(tmp_path):
    site = Site(tmp_path)
    folder = made(site.here, a=b"right")
    (folder / "a").write_bytes(b"wrong")
    with pytest.raises(LoadError, match="came damaged"):
        await site.find(folder)
    assert list(site.there.iterdir()) == []


async def test_a_gateway_that_sends_nothing_is_not_waited_for_for_ever(tmp_path):
    site = Site(tmp_path, patience_s=0.05)
    with pytest.raises(UnavailableError, match="the gateway sent nothing"):
        await site.cache.find("m@v1", f"/not/here/{'0' * 64}")
    assert site.asked
    assert list(site.there.iterdir()) == []


async def test_unused_folders_make_room_the_longest_unused_first(tmp_path):
    site = Site(tmp_path, max_bytes=3 * MIB)
    first, second, third, fourth = (made(site.here, a=bytes([n]) * MIB) for n in range(4))
    for folder, key in ((first, "used@v1"), (second, "b@v1"), (third, "c@v1")):
        await site.find(folder, key)
    for key in ("b@v1", "c@v1"):
        site.cache.release(key)
    await site.find(fourth, "d@v1")
    assert {it.name for it in site.there.iterdir()} == {first.name, third.name, fourth.name}
    with pytest.raises(LoadError, match="no room for the model's files: expected at most 3145728"):
        await site.find(made(site.here, b=b"x" * (2 * MIB)), "e@v1")
    assert first.name in {it.name for it in site.there.iterdir()}


@pytest.mark.parametrize("path", ["../escaped", "/escaped", "a/../../escaped", ""])
async def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, path):
    begun: list[asyncio.Task[dict[str, Any]]] = []

    def ask(name: str) -> None:
        begun.append(asyncio.create_task(cache.begin(name, [[path, 3]])))

    cache = FolderCache(tmp_path / "worker", ask, MIB)
    with pytest.raises(InvalidRequestError, match="cannot be a file's path"):
        await cache.find("m@v1", f"/not/here/{'0' * 64}")
    assert await begun[0] == {}
    assert not (tmp_path / "escaped").exists()


async def test_what_nobody_asked_for_is_not_taken(tmp_path):
    site = Site(tmp_path)
    name = made(site.here, a=b"1").name
    assert await site.cache.begin(name, [["a", 1]]) == {}
    assert await site.cache.piece(name, "a", 0, b"1") == {}
    assert await site.cache.end(name) == {}
    assert list(site.there.iterdir()) == []
