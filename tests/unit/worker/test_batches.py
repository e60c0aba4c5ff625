"""Calls joined to one and its result split, in headers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nos.errors import ModelError
from nos.wire.v1 import models_pb2
from nos_backend.control.describe import describe
from nos_backend.executor.arena import Arena
from nos_backend.worker import batches
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


def spec(batch: str = "True") -> models_pb2.ModelSpec:
    return describe(SOURCE.format(batch=batch))[0].spec


def plan(method: str) -> batches.Plan:
    return batches.plans(spec())[method]


def tensor(*shape: int, offset: int = 0) -> dict[str, Any]:
    return {"t": ["float32", list(shape), offset]}


def test_methods_batch_where_their_author_says_so() -> None:
    assert set(batches.plans(spec())) == {"rows", "leading", "texts"}
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
    replies = batches.split(Reply("result", tensor(8, 2), whole), [item.part for item in members])
    for reply, array in zip(replies, arrays, strict=True):
        _, shape, offset = reply.node["t"]
        np.testing.assert_array_equal(
            np.frombuffer(reply.block[offset:], np.float32).reshape(shape), array
        )
        assert reply.batch_size == 3


def test_the_result_is_released_with_its_last_share() -> None:
    released: list[int] = []
    whole = Reply.shared(
        {"l": ["a", "b", "c"]}, memoryview(b""), 0.0, 1, lambda: released.append(1)
    )
    parts = [batches.Part("k", (1,), 1), batches.Part("k", (2,), 2)]
    first, second = batches.split(whole, parts)
    assert (first.node, second.node) == ({"l": ["a"]}, {"l": ["b", "c"]})
    first.release()
    first.release()
    assert not released
    second.release()
    assert released == [1]


@pytest.mark.parametrize("node", [tensor(3, 2), {"l": [1]}, 1.0, None, {"d": [["x", "text"]]}])
def test_a_result_of_other_rows_is_not_split(node: Any) -> None:
    parts = [batches.Part("k", (1,), 1)] * 2
    with pytest.raises(batches.WrongRowsError):
        batches.split(Reply("result", node), parts)


def test_a_failed_batch_has_nothing_to_split() -> None:
    with pytest.raises(ModelError):
        batches.split(Reply("error", error=ModelError("raised")), [batches.Part("k", (1,), 1)])
