"""Values survive the wire, and what has no wire form is refused by name."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nos.errors import InvalidRequestError, InvalidTensorError, LimitExceededError
from nos.types import Media
from nos.wire import frames, values
from nos.wire.v1 import inference_pb2, values_pb2


def round_trip(value):
    nodes, payload = values.write_arguments([("x", value)])
    message = inference_pb2.StreamRequest(seq=1)
    message.frame.arguments.extend(nodes)
    raw = frames.join(message, payload.buffers, payload.size)
    parsed, data = frames.split(inference_pb2.StreamRequest, raw)
    node = parsed.frame.arguments[0].value
    values.check(node, data.nbytes, "x")
    return values.read(node, data)


DTYPES = [name for name in values.DTYPE_NUMBERS if name != "bfloat16"]


@pytest.mark.accept("A8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", range(9))
def test_every_dtype_and_rank_survives(dtype, rank):
    array = np.arange(2**rank).reshape((2,) * rank).astype(dtype)
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.accept("A8")
@settings(max_examples=100, deadline=None)
@given(hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=8, max_side=3)))
def test_any_array_survives_bit_for_bit(array):
    assert round_trip(array).tobytes() == array.tobytes()


@pytest.mark.accept("A8")
def test_bfloat16_survives():
    array = np.array([[1.5, -2.0], [np.inf, 0.25]], ml_dtypes.bfloat16)
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@pytest.mark.accept("A8")
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(10)[::-2],
        np.arange(4, dtype=">f4"),
        np.zeros((0, 5), np.uint8),
        np.float64(3.5),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
    ],
    ids=["transposed", "reversed", "big-endian", "empty", "scalar", "column-major"],
)
def test_odd_layouts_survive_by_value(array):
    np.testing.assert_array_equal(round_trip(array), array)


TREE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=12,
)


@pytest.mark.accept("A8")
@settings(max_examples=150, deadline=None)
@given(TREE)
def test_any_tree_survives(tree):
    assert repr(round_trip(tree)) == repr(tree)


def test_tuples_and_order_of_keys_are_kept():
    value = {"b": (1, [2]), "a": ()}
    assert list(round_trip(value).items()) == list(value.items())


def test_an_encoded_image_arrives_as_it_was():
    image = Media.from_bytes(b"\x89PNG\r\n\x1a\n rest")
    assert round_trip(image) == image


def test_a_torch_tensor_arrives_as_an_array():
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(
        round_trip(torch.arange(6).reshape(2, 3).T), [[0, 3], [1, 4], [2, 5]]
    )
    assert round_trip(torch.ones(2, dtype=torch.bfloat16)).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("lead", "is_kept"), [(0, True), (1, False)])
def test_arrays_are_adopted_bytes_where_these_are_aligned(lead, is_kept):
    sent = np.arange(1 << 14, dtype=np.float64)
    node = values_pb2.Value()
    values.write(sent, node, values.Payload(), "x")
    node.tensor.offset_bytes = lead
    data = values.adopt(memoryview(bytes(lead) + sent.tobytes()))
    read = values.read(node, data, copy=data.readonly)
    np.testing.assert_array_equal(read, sent)
    assert read.flags.writeable
    assert np.shares_memory(read, data) is is_kept


def test_a_small_part_of_a_message_does_not_keep_the_rest():
    parts = [np.zeros(1 << 16, np.uint8), np.ones(7, np.uint8)]
    node, payload = values_pb2.Value(), values.Payload()
    values.write(parts, node, payload, "x")
    data = values.adopt(memoryview(b"".join(payload.buffers)))
    large, small = values.read(node, data, copy=data.readonly)
    assert np.shares_memory(large, data)
    assert not np.shares_memory(small, data)
    np.testing.assert_array_equal(small, parts[1])


def test_results_are_the_readers_own_memory():
    back = round_trip(np.zeros(3))
    back += 1
    assert back.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (np.array([object()]), InvalidTensorError, "dtype object"),
        (np.array(["a"]), InvalidTensorError, ".tolist()"),
        (np.zeros((1,) * 9), InvalidTensorError, "at most 8, got 9"),
        (2**63, InvalidRequestError, "64 bits"),
        ({1: 2}, InvalidRequestError, "str keys, got 1"),
        ({"a": [open]}, InvalidRequestError, "builtin_function_or_method"),
        ("\ud800", InvalidRequestError, "not UTF-8"),
    ],
)
def test_what_has_no_wire_form_is_refused_by_name(value, error, says):
    with pytest.raises(error) as caught:
        values.write_arguments([("x", value)])
    assert says in str(caught.value)
    assert caught.value.field.startswith("x")
    assert len(str(caught.value)) < 500


def test_deep_nesting_is_refused():
    value = []
    for _ in range(40):
        value = [value]
    with pytest.raises(LimitExceededError, match="at most 32 levels"):
        values.write_arguments([("x", value)])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": 12, "shape": [4], "offset_bytes": 0}, "16 bytes at 0, got 8 in all"),
        ({"dtype": 12, "shape": [2], "offset_bytes": 1}, "8 bytes at 1"),
        ({"dtype": 12, "shape": [-1]}, "negative dimension"),
        ({"dtype": 99, "shape": [1]}, "unknown dtype"),
        ({"dtype": 12, "shape": [1] * 9}, "at most 8, got 9"),
        ({"dtype": 12, "shape": [2**30, 2**30]}, "not all there"),
        ({"dtype": 12, "shape": [2**62, 2**62]}, "the dimensions are too large"),
        ({"dtype": 12, "shape": [0, 2**61]}, "the dimensions are too large"),
    ],
)
def test_a_hostile_tensor_is_refused(fields, says):
    node = values_pb2.Value(tensor=values_pb2.Tensor(**fields))
    with pytest.raises(InvalidTensorError, match=says):
        values.check(node, 8, "x")
