"""What batches taught: never more rows than may be, tried ever more rarely, and gone when it is over."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from nos_backend.scheduling.caps import FIRST_WAIT_S, MAX_WAIT_S, Cap, after_run, lowered

ROWS = st.integers(2, 512)


def learn(fits: int, rows: int = 64) -> Cap:
    """The cap that a device teaches on which so many rows fit."""
    cap = None
    while rows > fits:
        cap = lowered(cap, rows, 0.0)
        rows = cap.rows
    assert cap is not None
    return cap


def test_failures_halve_batches_and_each_but_a_trial_leaves_the_wait() -> None:
    cap = learn(5)
    assert (cap.rows, cap.failed_rows, cap.wait_s) == (4, 64, FIRST_WAIT_S)


def test_it_is_tried_upward_after_a_while_and_ends_where_it_began() -> None:
    cap: Cap | None = learn(20)
    seen, now_s = [], 0.0
    while cap is not None:
        seen.append(cap.rows)
        now_s += FIRST_WAIT_S
        cap = after_run(cap, cap.rows, now_s)
    assert seen == [16, 32, 64]


def test_before_its_time_nothing_changes() -> None:
    cap = learn(20)
    assert after_run(cap, 16, FIRST_WAIT_S - 1) is cap


def test_rows_that_do_not_mix_never_run_together_again() -> None:
    cap = lowered(None, 32, 0.0, is_final=True)
    assert cap.rows == 1
    for now_s in (1.0, 1e6, 1e12):
        assert after_run(cap, 32, now_s) is cap
        assert lowered(cap, 32, now_s).wait_s == float("inf")


@given(st.lists(st.tuples(st.booleans(), ROWS, st.floats(0, 1e5)), min_size=1))
def test_a_cap_is_at_least_one_row_and_at_most_what_failed(
    events: list[tuple[bool, int, float]],
) -> None:
    """A batch may be larger than the cap: it was started before."""
    cap, now_s = None, 0.0
    for is_failure, rows, passed_s in events:
        now_s += passed_s
        if is_failure:
            cap = lowered(cap, rows, now_s)
            assert cap.rows <= max(1, rows // 2)
        elif cap is not None:
            cap = after_run(cap, rows, now_s)
        if cap is not None:
            assert 1 <= cap.rows <= cap.failed_rows
            assert FIRST_WAIT_S <= cap.wait_s <= MAX_WAIT_S


@settings(max_examples=20)
@given(st.integers(1, 63), st.integers(1, 20))
def test_a_device_that_stays_small_is_tried_ever_more_rarely(fits: int, num_days: int) -> None:
    """A batch every five minutes, each as large as the cap lets it be."""
    cap, num_failures = learn(fits), 0
    for index in range(num_days * 24 * 12):
        now_s = 300.0 * index
        if cap.rows > fits:
            cap = lowered(cap, cap.rows, now_s)
            num_failures += 1
        else:
            found = after_run(cap, cap.rows, now_s)
            assert found is not None
            cap = found
    assert num_failures <= 8 + num_days


@given(st.integers(1, 63), st.floats(0, 1e6))
def test_a_device_that_has_room_again_has_no_cap_in_the_end(fits: int, since_s: float) -> None:
    cap: Cap | None = learn(fits)
    now_s, num_steps = since_s, 0
    while cap is not None:
        now_s += MAX_WAIT_S
        cap = after_run(cap, cap.rows, now_s)
        num_steps += 1
    assert num_steps <= 8
