"""When a stream's receiver gets what, and when it is told that nothing more comes."""

import pytest
from nos._results import Results
from nos.errors import UnavailableError
from nos.types import Result


def test_results_come_in_order_of_arrival():
    results = Results()
    assert [results.on_send("a"), results.on_send("a")] == [1, 2]
    results.on_result(Result(seq=1))
    results.on_result(Result(seq=2))
    assert [results.take("b").seq, results.take("b").seq] == [1, 2]


def test_who_sent_everything_is_told_the_end_once_all_has_come():
    results = Results()
    results.on_send("me")
    assert results.take("me") is None
    results.on_result(Result(seq=1))
    results.take("me")
    with pytest.raises(StopIteration):
        results.take("me")


def test_another_receiver_waits_until_the_stream_is_finished():
    results = Results()
    assert results.take("other") is None
    results.on_send("sender")
    results.on_result(Result(seq=1))
    results.take("other")
    assert results.take("other") is None
    results.is_finished = True
    with pytest.raises(StopIteration):
        results.take("other")


def test_items_do_not_end_a_frame():
    results = Results()
    results.on_send("me")
    results.on_result(Result(seq=1, more=True))
    results.take("me")
    assert results.take("me") is None


def test_loss_is_told_once_and_then_the_end():
    results = Results()
    results.on_lost(UnavailableError("gone"))
    with pytest.raises(UnavailableError):
        results.take("me")
    with pytest.raises(StopIteration):
        results.take("me")


def test_loss_after_the_finish_is_no_news():
    results = Results()
    results.is_finished = True
    results.on_lost(UnavailableError("gone"))
    with pytest.raises(StopIteration):
        results.take("me")


def test_what_nobody_took_is_pending():
    results = Results()
    results.on_send("me")
    results.on_send("me")
    results.on_result(Result(seq=1))
    assert results.num_pending == 2
