"""When a stream that lost its link opens another."""

from nos._stream import PATIENCE_S, Outage


def test_the_first_loss_is_answered_at_once():
    assert Outage().on_end(10.0, 5.0, 0.0) == 0.0


def test_pauses_grow_to_a_second_and_are_spread():
    outage = Outage()
    outage.on_end(0.0, 5.0, 1.0)
    assert [outage.on_end(0.0, 0.0, 1.0) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert outage.on_end(0.0, 0.0, 0.0) == 0.5


def test_a_server_that_stays_away_is_given_up():
    outage = Outage()
    outage.on_end(0.0, 5.0, 0.0)
    assert outage.on_end(PATIENCE_S - 1, 0.0, 0.0) is not None
    assert outage.on_end(PATIENCE_S, 0.0, 0.0) is None


def test_a_link_that_lasted_ends_the_outage():
    outage = Outage()
    outage.on_end(0.0, 5.0, 0.0)
    outage.on_end(20.0, 0.1, 0.0)
    assert outage.on_end(100.0, 60.0, 0.0) == 0.0
    assert outage.on_end(100.1, 0.2, 0.0) == 0.05


def test_a_stream_that_never_opened_is_tried_for_as_long():
    outage = Outage()
    assert outage.on_end(0.0, 0.0, 0.0) == 0.0
    assert outage.on_end(0.1, 0.0, 0.0) == 0.05
