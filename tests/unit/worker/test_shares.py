"""A result as one for each call, and the results of a call's pieces as one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nos.errors import ModelError
from nos_backend.scheduling.batching import divided
from nos_backend.worker import shares
from nos_backend.worker.batches import Part
from nos_backend.worker.replies import Reply


def tensor(*shape: int, offset: int = 0) -> dict[str, Any]:
    return {"t": ["float32", list(shape), offset]}


def read(node: Any, block: memoryview) -> np.ndarray[Any, Any]:
    dtype, shape, offset = node["t"]
    return np.frombuffer(block[offset:], dtype, math.prod(shape)).reshape(shape)


def test_the_result_is_released_with_its_last_share() -> None:
    released: list[int] = []
    whole = Reply.shared(
        {"l": ["a", "b", "c"]}, memoryview(b""), 0.0, 1, lambda: released.append(1)
    )
    parts = [Part("k", (1,), 1), Part("k", (2,), 2)]
    first, second = shares.split(whole, parts)
    assert (first.node, second.node) == ({"l": ["a"]}, {"l": ["b", "c"]})
    first.release()
    first.release()
    assert not released
    second.release()
    assert released == [1]


@pytest.mark.parametrize("node", [tensor(3, 2), {"l": [1]}, 1.0, None, {"d": [["x", "text"]]}])
def test_a_result_of_other_rows_is_not_split(node: Any) -> None:
    parts = [Part("k", (1,), 1)] * 2
    with pytest.raises(shares.WrongRowsError):
        shares.split(Reply("result", node), parts)


def test_a_failed_batch_has_nothing_to_split() -> None:
    with pytest.raises(ModelError):
        shares.split(Reply("error", error=ModelError("raised")), [Part("k", (1,), 1)])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.sampled_from([(), (3,)]))
def test_pieces_of_a_call_have_its_rows_and_their_results_are_its_result(
    num_rows: int, max_rows: int, row: tuple[int, ...]
) -> None:
    leading = (2, num_rows // 2) if num_rows % 2 == 0 else (num_rows,)
    x = np.random.default_rng(num_rows).random((*leading, *row), np.float32)
    texts = [str(number) for number in range(num_rows)]
    data = memoryview(b"\0" * 64 + x.tobytes())
    arguments = [["x", tensor(*x.shape, offset=64)], ["texts", {"l": texts}], ["scale", 2.0]]
    part = Part("k", leading, num_rows)
    sizes = divided(num_rows, max_rows)
    replies, released = [], []
    for (cut, block), size in zip(
        shares.pieces(arguments, [True, True, False], part, data, sizes), sizes, strict=True
    ):
        rows = read(cut[0][1], block)
        assert rows.shape == (size, *row)
        assert cut[2] == ["scale", 2.0]
        node = {
            "d": [["x", tensor(*rows.shape)], ["pair", {"u": [cut[1][1], tensor(*rows.shape)]}]]
        }
        doubled = memoryview((2 * rows).tobytes())
        replies.append(Reply.shared(node, doubled, 0.5, 1, lambda: released.append(1)))
    whole = shares.whole(replies, part)
    (_, found), (_, pair) = whole.node["d"]
    np.testing.assert_array_equal(read(found, whole.block), 2 * x)
    np.testing.assert_array_equal(read(pair["u"][1], whole.block), 2 * x)
    assert pair["u"][0] == {"l": texts}
    assert whole.compute_s == 0.5 * len(sizes)
    assert len(released) == len(sizes)


@pytest.mark.parametrize(
    "nodes",
    [
        [1.0, 1.0],
        [tensor(1, 2), tensor(1, 3)],
        [tensor(1, 2), {"t": ["float64", [1, 2], 0]}],
        [tensor(1, 2), {"l": [1]}],
        [{"d": [["x", tensor(1)]]}, {"d": [["y", tensor(1)]]}],
        [{"d": [["version", 3]]}, {"d": [["version", 3]]}],
        [{"u": [tensor(1)]}, {"u": []}],
    ],
)
def test_results_without_rows_are_not_put_together(nodes: list[Any]) -> None:
    replies = [Reply("result", node, memoryview(bytes(64))) for node in nodes]
    with pytest.raises(shares.WrongRowsError):
        shares.whole(replies, Part("k", (2,), 2))


def test_a_result_whose_rows_have_another_length_is_not_cut() -> None:
    parts = [Part("k", (1,), 1, length) for length in (2, 3)]
    with pytest.raises(shares.WrongRowsError, match="for 3"):
        shares.split(Reply("result", tensor(2, 4), memoryview(bytes(64))), parts, is_cut=True)
