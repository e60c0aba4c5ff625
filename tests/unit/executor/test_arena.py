from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nos_backend.executor.arena import Allocator, Arena, ArenaFullError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fd() -> Iterator[int]:
    fd = Arena.create_fd(64 << 20)
    yield fd
    os.close(fd)


@given(st.lists(st.one_of(st.integers(0, 3000), st.integers(-8, -1)), max_size=60))
def test_blocks_never_overlap_and_everything_freed_is_one_gap(steps: list[int]) -> None:
    allocator = Allocator(16 << 10)
    blocks: dict[int, int] = {}
    for step in steps:
        if step >= 0:
            try:
                offset = allocator.allocate(step)
            except ArenaFullError:
                continue
            assert offset % 64 == 0
            assert offset + step <= 16 << 10
            assert all(
                offset + max(step, 1) <= other or other + size <= offset
                for other, size in blocks.items()
            )
            blocks[offset] = max(step, 1)
        elif blocks:
            offset = sorted(blocks)[step % len(blocks)]
            del blocks[offset]
            allocator.free(offset)
    for offset in blocks:
        allocator.free(offset)
    assert allocator.allocate(16 << 10) == 0


def test_the_lowest_address_is_used_again() -> None:
    allocator = Allocator(1024)
    first, _second = allocator.allocate(64), allocator.allocate(64)
    allocator.free(first)
    assert allocator.allocate(10) == first


def test_a_block_is_freed_once() -> None:
    allocator = Allocator(1024)
    offset = allocator.allocate(1)
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)


def test_both_sides_see_the_same_bytes(fd: int) -> None:
    ours, theirs = Arena(fd), Arena(fd, writable=False)
    offset = ours.allocate(5)
    ours.view[offset : offset + 5] = b"hello"
    assert bytes(theirs.view[offset : offset + 5]) == b"hello"
    assert theirs.view.readonly
    ours.close()
    theirs.close()


def test_nobody_can_shrink_or_grow_it(fd: int) -> None:
    for size in (0, 128 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_large_blocks_give_their_pages_back_and_small_ones_stay(fd: int) -> None:
    arena = Arena(fd)
    small, large = arena.allocate(1 << 20), arena.allocate(16 << 20)
    np.frombuffer(arena.view, np.uint8)[: 17 << 20] = 1
    assert used_bytes(fd) == 17 << 20
    arena.free(small)
    arena.free(large)
    assert used_bytes(fd) == 1 << 20
    arena.close()


def test_a_view_outlives_the_arena(fd: int) -> None:
    arena = Arena(fd)
    view = arena.view[:4]
    arena.close()
    assert bytes(view) == bytes(4)


def used_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512 // mmap.PAGESIZE * mmap.PAGESIZE
