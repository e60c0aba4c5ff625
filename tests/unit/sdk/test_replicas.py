"""Which of a model's replicas a call goes to."""

from __future__ import annotations

from dataclasses import dataclass

from nos._replicas import AVOID_S, MAX_LINKS, Replicas


@dataclass(eq=False)
class Lane:
    """A link in a state."""

    num_pending: int = 0
    takes_frames: bool = True
    was_welcomed: bool = True


def replicas(**lanes: Lane) -> Replicas[Lane]:
    made = Replicas[Lane]()
    for worker, lane in lanes.items():
        made[lane] = worker
    return made


def test_calls_go_in_turn_and_to_whoever_has_fewer():
    a, b = Lane(), Lane()
    both = replicas(a=a, b=b)
    assert [both.pick() for _ in range(4)] == [a, b, a, b]
    a.num_pending = 1
    assert [both.pick() for _ in range(2)] == [b, b]


def test_a_link_that_was_not_welcomed_yet_comes_last():
    fresh, busy = Lane(was_welcomed=False), Lane(num_pending=9)
    assert replicas(a=fresh, b=busy).pick() is busy
    assert replicas(a=fresh).pick() is fresh


def test_a_link_that_takes_nothing_more_is_left():
    assert replicas(a=Lane(takes_frames=False)).pick() is None


def test_further_links_are_opened_once_one_is_open():
    first = Lane(was_welcomed=False)
    found = replicas(a=first)
    found.heard(["a", "b", "c"], 2.0, 0.0)
    assert found.missing(0.0) == []
    first.was_welcomed = True
    assert found.missing(0.0) == ["b", "c"]


def test_one_client_opens_so_many_and_no_more():
    found = replicas(w0=Lane())
    found.heard([f"w{number}" for number in range(50)], 2.0, 0.0)
    assert len(found.missing(0.0)) == MAX_LINKS - 1


def test_a_replica_that_cannot_be_reached_is_left_alone_for_a_while():
    lost = Lane(was_welcomed=False)
    found = replicas(a=Lane(), b=lost)
    found.heard(["a", "b"], 2.0, 0.0)
    found.ended(lost, 1.0, is_failure=True)
    assert found.missing(1.0) == []
    assert found.missing(1.0 + AVOID_S) == ["b"]


def test_links_to_replicas_that_are_gone_are_named():
    gone = Lane()
    found = replicas(a=Lane(), b=gone)
    assert found.heard(["a", "c"], 2.0, 0.0) == [gone]


def test_the_server_says_when_to_ask_again():
    found = replicas(a=Lane(was_welcomed=False))
    assert not found.is_due(0.0)
    found.heard(["a"], 2.0, 0.0)
    assert not found.is_due(1.9)
    assert found.is_due(2.0)
    found.heard(["a"], 0.0, 2.0)
    assert not found.is_due(1e9)
