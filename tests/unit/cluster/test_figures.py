"""What the dashboard works out of counts."""

from __future__ import annotations

from typing import Any

import pytest
from nos_backend.cluster.figures import Figures, stacked

KEY = "m@v1"


def worker(answered: int, *, name: str = "w", queue_s: float = 0.0, batches: Any = None) -> Any:
    statistics = {
        "outcomes": {"answered": answered},
        "latencies": {20: answered},
        "batches": batches or {1: answered},
        "seconds": {"queue": queue_s},
    }
    return {"name": name, "status": {"models": [{"key": KEY, "statistics": statistics}]}}


def test_what_was_there_before_the_page_is_no_rate() -> None:
    figures = Figures()
    figures.observe([worker(1000)], 100.0)
    figures.observe([worker(1000)], 101.0)
    assert figures.now(KEY, 101.0).answers_hz == 0
    assert figures.batches() == {}


def test_rates_waits_and_latencies_are_those_of_the_last_seconds() -> None:
    figures = Figures()
    figures.observe([worker(0)], 100.0)
    figures.observe([worker(50, queue_s=1.0)], 105.0)
    now = figures.now(KEY, 105.0)
    assert (now.answers_hz, now.queue_s) == (10.0, 0.02)
    assert now.p99_s == pytest.approx(1e-5 * 2**5)
    assert figures.now(KEY, 111.0).answers_hz == 0


def test_replicas_are_added_up_and_told_apart() -> None:
    figures = Figures()
    figures.observe([worker(0, name="a")], 100.0)
    figures.observe([worker(10, name="a"), worker(20, name="b")], 105.0)
    assert figures.now(KEY, 105.0).answers_hz == 6.0
    assert figures.now(KEY, 105.0, "b").answers_hz == 4.0


def test_a_model_that_was_loaded_again_counts_from_zero() -> None:
    figures = Figures()
    figures.observe([worker(100)], 100.0)
    figures.observe([worker(5, batches={5: 1})], 105.0)
    assert figures.now(KEY, 105.0).answers_hz == 1.0
    assert figures.batches() == {KEY: {5: 1}}


def test_lines_end_with_the_model() -> None:
    figures = Figures()
    figures.observe([worker(0)], 100.0)
    figures.observe([worker(10)], 101.0)
    assert len(figures.points[KEY]) == 2
    for second in range(102, 300):
        figures.observe([], float(second))
    assert figures.points == {}


def test_parts_stand_on_each_other() -> None:
    assert stacked([("a", "x", 2), ("a", "y", 3), ("b", "x", 1)]) == [
        ("a", "x", 0, 2),
        ("a", "y", 2, 5),
        ("b", "x", 0, 1),
    ]
