from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nos_backend.executor.messages import (
    Decoder,
    MalformedError,
    ShortCall,
    ShortResult,
    check_block,
    check_node,
    encode,
)


@given(st.lists(st.dictionaries(st.text(), st.integers()), max_size=5), st.integers(1, 50))
def test_messages_survive_any_cut_of_the_stream(messages: list[dict[str, Any]], step: int) -> None:
    raw = b"".join(encode(message) for message in messages)
    decoder = Decoder()
    seen = [
        message
        for start in range(0, len(raw), step)
        for message in decoder.feed(raw[start : start + step])
    ]
    assert seen == messages


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), max_size=5), st.binary())
def test_short_messages_come_out_as_they_went_in(
    number: int, freed: list[int], node: bytes
) -> None:
    call = ShortCall(number, 3, number, 9, freed)
    result = ShortResult(number, 64, 9, 0.25, True, False, node)
    assert Decoder().feed(call.encode() + encode({}) + result.encode()) == [call, {}, result]


@pytest.mark.parametrize(
    "raw",
    [ShortCall(1, 2, 0, 0, [64]).encode(), ShortResult(1, 0, 9, 0.0, False, False, b"1").encode()],
)
@pytest.mark.parametrize("num_missing", [8, 12, 30])
def test_a_short_message_that_was_cut_is_refused(raw: bytes, num_missing: int) -> None:
    body = raw[4:-num_missing]
    with pytest.raises(MalformedError):
        Decoder().feed(struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize("body", [b"[]", b"no", b"1", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedError):
        Decoder().feed(struct.pack("<I", len(body)) + body)


def test_a_message_that_claims_to_be_endless_is_refused_at_once() -> None:
    with pytest.raises(MalformedError):
        Decoder().feed(b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "node",
    [
        None,
        True,
        -(2**63),
        float("nan"),
        "text",
        {"t": ["float32", [2, 3], 40]},
        {"t": ["uint8", [0], 64]},
        {"m": ["image/png", 60, 4]},
        {"l": [1, {"u": []}]},
        {"d": [["key", {"l": []}]]},
    ],
)
def test_nodes_inside_their_block_pass(node: Any) -> None:
    check_node(node, 64)


@pytest.mark.parametrize(
    "node",
    [
        2**63,
        [],
        {},
        {"l": [], "u": []},
        {"x": []},
        {"t": ["float32", [2, 3], 41]},
        {"t": ["object", [1], 0]},
        {"t": ["uint8", [-1], 0]},
        {"t": ["uint8", [2**62, 2**62], 0]},
        {"t": ["uint8", [1] * 9, 0]},
        {"t": ["uint8", [1.0], 0]},
        {"t": ["uint8", [True], 0]},
        {"t": ["uint8", [1], -1]},
        {"t": [["uint8"], [1], 0]},
        {"m": ["image/png", 60, 5]},
        {"m": ["image/png", 0]},
        {"d": [["key"]]},
        {"d": [[1, 2]]},
        {"l": "text"},
        json.loads('{"l":[' * 33 + "]}" * 33),
    ],
)
def test_nodes_that_lie_are_refused(node: Any) -> None:
    with pytest.raises(MalformedError):
        check_node(node, 64)


@pytest.mark.parametrize("block", [None, [1], [0, 65], [-1, 1], [0, 1.0], "ab", [2**63, 1]])
def test_blocks_outside_the_arena_are_refused(block: Any) -> None:
    with pytest.raises(MalformedError):
        check_block(block, 64)
