"""Every error has one class, one reason, one status, and survives each road."""

import pickle

import grpc
import pytest
from nos import errors
from nos.wire import status
from nos.wire.limits import ERROR_KEY
from nos.wire.v1 import errors_pb2


def test_reasons_equal_the_proto():
    ours = {f"REASON_{reason.name}": int(reason) for reason in errors.Reason}
    assert ours == dict(errors_pb2.Reason.items())


def test_every_reason_has_a_class_and_a_status():
    assert set(status.TABLE) == set(errors.Reason) - {errors.Reason.UNSPECIFIED}


@pytest.mark.parametrize("cls", [cls for cls, _ in status.TABLE.values()])
def test_every_class_survives_pickling_and_the_wire(cls):
    facts = (
        ("boom", "x", "1", "2", "Do it")
        if cls is not errors.ModelError
        else ("boom", "E", "t", "tb", "7")
    )
    error = cls(*facts)
    for back in (pickle.loads(pickle.dumps(error)), status.from_message(status.to_message(error))):
        assert type(back) is cls
        assert str(back) == str(error)


def test_the_sentence_names_both_sides():
    error = errors.InvalidTensorError("wrong dtype", "x", "float32", "int64", "Cast it")
    assert str(error) == "wrong dtype: expected float32, got int64. Cast it"


def test_a_failed_rpc_gives_its_error_back():
    error = errors.ModelNotFoundError("no model named 'a'", "model")
    metadata = [(ERROR_KEY, status.to_message(error).SerializeToString())]
    back = status.from_status(grpc.StatusCode.NOT_FOUND, "", metadata)
    assert (type(back), back.field) == (errors.ModelNotFoundError, "model")


def test_a_status_of_grpc_itself_is_typed_too():
    back = status.from_status(grpc.StatusCode.UNAVAILABLE, "connection refused", None)
    assert isinstance(back, errors.UnavailableError)
    assert back.retryable
