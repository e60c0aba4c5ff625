"""Host copies: exact, sealed, within a budget, and back from their file only if they are intact."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from pathlib import Path

import pytest
from nos.errors import LoadError, OutOfDeviceMemoryError
from nos_backend.worker.host_store import HostCopy, HostStore

SIZE = 100_000


def filled(store: HostStore, key: str = "m@v1", seed: int = 1) -> HostCopy:
    copy = store.create(key, SIZE, 10)
    os.pwrite(copy.weights_fd, random.Random(seed).randbytes(SIZE), 0)
    os.pwrite(copy.skeleton_fd, b"0123456789", 0)
    store.seal(copy)
    return copy


def num_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def weights(copy: HostCopy) -> bytes:
    return os.pread(copy.weights_fd, SIZE, 0)


def test_a_sealed_copy_cannot_be_written_or_resized() -> None:
    copy = filled(HostStore())
    for change in (lambda fd: os.pwrite(fd, b"x", 0), lambda fd: os.ftruncate(fd, 5)):
        with pytest.raises(PermissionError):
            change(copy.weights_fd)


def test_a_copy_that_its_writer_keeps_mapped_is_refused() -> None:
    store = HostStore()
    copy = store.create("m@v1", SIZE, 10)
    with mmap.mmap(copy.weights_fd, SIZE), pytest.raises(LoadError, match="open for writing"):
        store.seal(copy)


def test_the_budget_counts_what_is_in_memory() -> None:
    store = HostStore(budget_bytes=3 * SIZE)
    copies = [filled(store) for _ in range(2)]
    assert store.used_bytes == 2 * (SIZE + 10)
    assert store.missing_bytes(SIZE) == 20
    store.release(copies[0])
    assert store.missing_bytes(SIZE) == 0


def test_what_never_fits_is_refused_with_both_figures() -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="expected at most 50 bytes"):
        HostStore(budget_bytes=50).missing_bytes(51)


def test_releasing_gives_the_descriptors_back() -> None:
    store = HostStore()
    before = num_fds()
    store.release(filled(store))
    filled(store)
    store.close()
    assert num_fds() == before
    assert store.used_bytes == 0


def test_a_parked_copy_comes_back_as_it_was(tmp_path: Path) -> None:
    async def run() -> None:
        store = HostStore(folder=tmp_path)
        copy = filled(store)
        expected = weights(copy)
        await store.park(copy)
        assert (copy.is_in_memory, store.used_bytes) == (False, 0)
        assert [path.stat().st_mode & 0o777 for path in files(tmp_path)] == [0o600]
        await store.fetch(copy)
        assert weights(copy) == expected
        with pytest.raises(PermissionError):
            os.pwrite(copy.weights_fd, b"x", 0)
        store.release(copy)
        assert not files(tmp_path)

    asyncio.run(run())


@pytest.mark.accept("B10")
def test_any_flipped_bit_of_a_parked_copy_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        store = HostStore(folder=tmp_path)
        copy, other = filled(store), filled(store, "other@v1", seed=2)
        await store.park(copy)
        await store.park(other)
        (path,) = (path for path in files(tmp_path) if copy.sha256 in path.name)
        intact = path.read_bytes()
        chance = random.Random(3)
        for _ in range(20):
            damaged = bytearray(intact)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(LoadError, match="damaged"):
                await store.fetch(copy)
        path.write_bytes(intact[:-1])
        with pytest.raises(LoadError, match="gone"):
            await store.fetch(copy)
        await store.fetch(other)
        assert other.is_in_memory
        path.write_bytes(intact)
        await store.fetch(copy)
        assert copy.is_in_memory

    asyncio.run(run())
