"""Calls joined to one and its result split, in headers alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nos.wire.v1 import models_pb2
from nos_backend.control.describe import describe
from nos_backend.executor.arena import Arena
from nos_backend.worker import batches, shares
from nos_backend.worker.executors import Block, Reply

SOURCE = """
import nos
from typing import Annotated
import torch
Rows = Annotated[torch.Tensor, "float32[batch, 2]"]
Any_ = Annotated[torch.Tensor, "float32[*batch, 2]"]
@nos.model(name="m", batch={batch})
class Model:
    def rows(self, x: Rows, scale: float = 1.0) -> Rows: ...
    def leading(self, x: Any_, y: Any_) -> Any_: ...
    def texts(self, texts: list[str]) -> list[str]: ...
    def one(self, x: Annotated[torch.Tensor, "float32[2]"]) -> Rows: ...
    def mixed(self, x: Rows) -> float: ...
    def images(self, x: Rows, image: bytes) -> Rows: ...
    def weighed(self, x: Rows, w: Annotated[torch.Tensor, "float32[2, 2]"]) -> Rows: ...
    def stream(self, x: Rows):
        yield x
"""
PADDED = """
import nos
from typing import Annotated
import torch
Texts = Annotated[torch.Tensor, "float32[batch, length, 2]"]
@nos.model(name="m", pad="length")
class Model:
    def __call__(
        self, x: Texts, mask: Annotated[torch.Tensor, "bool[batch, length]"] | None = None
    ) -> Texts: ...
"""


def spec(batch: str = "True") -> models_pb2.ModelSpec:
    return describe(SOURCE.format(batch=batch))[0].spec


def plan(method: str) -> batches.Plan:
    return batches.plans(spec())[method]


def tensor(*shape: int, offset: int = 0) -> dict[str, Any]:
    return {"t": ["float32", list(shape), offset]}


def read(reply: Reply) -> np.ndarray[Any, Any]:
    dtype, shape, offset = reply.node["t"]
    return np.frombuffer(reply.block[offset:], dtype, math.prod(shape)).reshape(shape)


def test_methods_batch_where_their_author_says_so() -> None:
    assert set(batches.plans(spec())) == {"rows", "leading", "texts", "one"}
    assert set(batches.plans(spec("None"))) == {"rows", "leading"}
    assert batches.limits(spec("16")).max_rows == 16
    assert batches.plans(spec("False")) == {}


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ([["x", tensor(1, 2)]], [["x", tensor(3, 2)]], True),
        ([["x", tensor(1, 2)]], [["x", {"t": ["float64", [1, 2], 0]}]], False),
        ([["x", tensor(1, 2)]], [["x", tensor(1, 3)]], False),
        ([["x", tensor(1, 2)], ["scale", 1.0]], [["x", tensor(1, 2)], ["scale", 2.0]], False),
        ([["x", tensor(1, 2)]], [["x", tensor(1, 2)], ["scale", 1.0]], False),
    ],
)
def test_calls_of_equal_key_differ_in_their_rows_only(
    one: list[list[Any]], other: list[list[Any]], *, is_same: bool
) -> None:
    parts = [plan("rows").part(one), plan("rows").part(other)]
    assert parts[0] is not None
    assert parts[1] is not None
    assert (parts[0].key == parts[1].key) == is_same


@pytest.mark.parametrize(
    "arguments",
    [
        [["x", tensor(0, 2)]],
        [["x", {"m": ["image/png", 0, 10]}]],
        [["x", tensor(1, 2)], ["scale", tensor(1)]],
    ],
)
def test_calls_without_rows_or_with_bytes_elsewhere_run_alone(arguments: list[list[Any]]) -> None:
    assert plan("rows").part(arguments) is None


def test_tensors_of_different_leading_dimensions_run_alone() -> None:
    arguments = [["x", tensor(2, 3, 2)], ["y", tensor(2)]]
    assert plan("leading").part(arguments) is None


@pytest.fixture
def arena() -> Arena:
    return Arena(Arena.create_fd(1 << 16))


def member(arena: Arena, found: batches.Plan, *arrays: np.ndarray[Any, Any]) -> batches.Member:
    block = Block(arena, sum(array.nbytes for array in arrays))
    arguments, offset = [], 0
    for name, array in zip("xy", arrays, strict=False):
        block.view[offset : offset + array.nbytes] = array.tobytes()
        arguments.append([name, tensor(*array.shape, offset=offset)])
        offset += array.nbytes
    part = found.part(arguments)
    assert part is not None
    return batches.Member(arguments, part, block)


@pytest.mark.parametrize(
    "num_rows", [(1, 2, 3), (8, 8, 8)]
)  # (8, 2) float32 fills 64 bytes: adjacent
def test_joined_rows_are_those_of_all_calls_in_order(
    arena: Arena, num_rows: tuple[int, ...]
) -> None:
    found = plan("rows")
    arrays = [np.random.default_rng(n).random((n, 2), np.float32) for n in num_rows]
    members = [member(arena, found, array) for array in arrays]
    arguments, joined = batches.join(found, members)
    block = arena.gather([list(piece) for piece in joined.pieces], joined.size)
    dtype, shape, offset = arguments[0][1]["t"]
    together = np.frombuffer(block[offset:], dtype).reshape(shape)
    np.testing.assert_array_equal(together, np.concatenate(arrays))
    is_in_place = np.shares_memory(together, np.frombuffer(arena.view, np.uint8))
    assert is_in_place == (num_rows == (8, 8, 8))


def test_leading_dimensions_are_joined_to_rows_and_given_back(arena: Arena) -> None:
    found = plan("leading")
    shapes = [(2,), (1, 2), (2, 3, 2)]
    arrays = [np.random.default_rng(len(shape)).random(shape, np.float32) for shape in shapes]
    members = [member(arena, found, array, array + 1) for array in arrays]
    arguments, joined = batches.join(found, members)
    block = arena.gather([list(piece) for piece in joined.pieces], joined.size)
    x, y = (
        np.frombuffer(block[node["t"][2] :], np.float32, 16).reshape(node["t"][1])
        for _, node in arguments
    )
    np.testing.assert_array_equal(x + 1, y)
    whole = memoryview(x.tobytes())
    replies = shares.split(Reply("result", tensor(8, 2), whole), [item.part for item in members])
    for reply, array in zip(replies, arrays, strict=True):
        _, shape, offset = reply.node["t"]
        np.testing.assert_array_equal(
            np.frombuffer(reply.block[offset:], np.float32).reshape(shape), array
        )
        assert reply.batch_size == 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(5, 6)), min_size=1, max_size=6))
def test_rows_of_different_lengths_are_filled_up_and_cut_again(
    shapes: list[tuple[int, int]],
) -> None:
    arena = Arena(Arena.create_fd(1 << 16))
    arena.view[:] = b"\xff" * len(arena.view)  # what was there before is nobody's padding
    found = batches.plans(describe(PADDED)[0].spec)["__call__"]
    arrays = [
        np.random.default_rng(n).random((*shape, 2), np.float32) for n, shape in enumerate(shapes)
    ]
    members = [member(arena, found, array) for array in arrays]
    assert len({item.part.key for item in members}) == 1
    arguments, joined = batches.join(found, members)
    block = arena.gather([list(piece) for piece in joined.pieces], joined.size)
    longest = max(length for _, length in shapes)
    _, shape, offset = arguments[0][1]["t"]
    assert shape == [sum(rows for rows, _ in shapes), longest, 2]
    together = np.frombuffer(block[offset:], np.float32, math.prod(shape)).reshape(shape)
    real = np.concatenate(
        [np.arange(longest) < np.full((rows, 1), length) for rows, length in shapes]
    )
    assert not together[~real].any()
    assert (len(arguments) == 2) == (not real.all())
    if len(arguments) == 2:
        name, node = arguments[1]
        mask = np.frombuffer(block[node["t"][2] :], np.bool_, real.size).reshape(real.shape)
        assert name == "mask"
        np.testing.assert_array_equal(mask, real)
    whole = Reply("result", tensor(*shape), memoryview((2 * together).tobytes()))
    parts = [item.part for item in members]
    for reply, array in zip(shares.split(whole, parts, is_cut=found.is_cut), arrays, strict=True):
        np.testing.assert_array_equal(read(reply), 2 * array)


def test_a_caller_that_gives_a_mask_runs_alone() -> None:
    found = batches.plans(describe(PADDED)[0].spec)["__call__"]
    mask = {"t": ["bool", [1, 5], 64]}
    assert found.part([["x", tensor(1, 5, 2)], ["mask", mask]]) is None
    parts = [found.part([["x", tensor(1, length, 2)]]) for length in (5, 6, 7)]
    keys = [part.key for part in parts if part is not None]
    assert keys[0] == keys[1] != keys[2]


def test_single_items_lie_side_by_side_where_they_came(arena: Arena) -> None:
    found = plan("one")
    arrays = [np.random.default_rng(n).random(2 + n, np.float32) for n in range(3)]
    arena.allocate(64)
    members = [member(arena, found, array) for array in arrays]
    arguments, joined = batches.join(found, members)
    block = arena.gather([list(piece) for piece in joined.pieces], joined.size)
    for [[name, node]], array in zip(arguments, arrays, strict=True):
        _, shape, offset = node["t"]
        found_array = np.frombuffer(block[offset:], np.float32, shape[0])
        assert name == "x"
        np.testing.assert_array_equal(found_array, array)
        assert np.shares_memory(found_array, np.frombuffer(arena.view, np.uint8))
    listed = Reply("result", {"l": [1.5, "two", {"l": [3]}]})
    parts = [item.part for item in members]
    assert [it.node for it in shares.split(listed, parts)] == [1.5, "two", {"l": [3]}]
