"""The smallest batch that is nearly as fast as any, and the line that times and bytes follow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nos_backend.scheduling import knee

LADDER = (1, 2, 4, 8, 16, 32, 64)


def times(t0_s: float, row_s: float) -> list[tuple[int, float]]:
    return [(rows, t0_s + row_s * rows) for rows in LADDER]


def test_a_costly_start_asks_for_the_largest_batch():
    choice = knee.choose(times(5e-3, 0.2e-3))
    assert choice.rows == 64
    assert choice.t0_s == pytest.approx(5e-3)
    assert choice.row_s == pytest.approx(0.2e-3)


def test_a_model_that_gains_nothing_runs_one_by_one():
    choice = knee.choose(times(0.0, 1e-3))
    assert choice.rows == 1
    assert "no faster" in choice.why


def test_the_knee_is_the_smallest_batch_within_ten_per_cent():
    choice = knee.choose(times(1e-3, 1e-3))
    # b / (1 + b): 64 gives 0.985, 8 gives 0.889 and 4 gives 0.8.
    assert choice.rows == 8
    assert "within 10 %" in choice.why


def test_a_size_that_falls_off_a_cliff_is_not_chosen():
    assert knee.choose([(1, 1e-3), (8, 2e-3), (16, 40e-3)]).rows == 8


@given(
    st.lists(
        st.tuples(st.sampled_from(LADDER), st.floats(1e-6, 10.0)),
        min_size=1,
        unique_by=lambda point: point[0],
    )
)
def test_the_choice_is_never_worse_than_a_tenth(points):
    choice = knee.choose(points)
    rates = {rows: rows / took_s for rows, took_s in points}
    assert rates[choice.rows] >= 0.9 * max(rates.values())
    assert choice.t0_s >= 0
    assert choice.row_s >= 0


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(1, 0.0)]])
def test_nothing_to_choose_from_is_refused(points):
    with pytest.raises(ValueError, match="no times"):
        knee.choose(points)


def test_a_line_is_fitted_and_extrapolated():
    line = knee.fit_activations([(1, 150), (2, 250), (4, 450)])
    assert line.is_linear
    assert line.at(64) == 6450


def test_points_off_the_line_are_never_undercut():
    curve = knee.fit_activations([(1, 10), (2, 400), (4, 500)])
    assert not curve.is_linear
    assert curve.at(2) >= 400
    assert curve.at(8) >= 800


def test_the_rows_within_bytes_are_the_most_that_the_fit_allows():
    line = knee.fit_activations([(1, 150), (2, 250), (4, 450)])
    assert [line.rows_within(num, 64) for num in (100, 149, 250, 1000, 10**6)] == [1, 1, 2, 9, 64]
