"""How acceptance rows are counted."""

from __future__ import annotations

import pytest

from tests.accept import Accept, Row, read_table, wanted, with_links


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([], "no test yet"),
        (["passed", "passed"], "passed"),
        (["passed", "skipped"], "skipped"),
        (["passed", "failed", "skipped"], "failed"),
    ],
)
def test_row_passes_when_all_its_tests_pass(outcomes, state):
    row = Row("A1", "promise", {str(index): outcome for index, outcome in enumerate(outcomes)})
    assert row.state == state


@pytest.mark.parametrize(
    ("strict", "value", "at_least", "kept"),
    [
        (True, 1.0, False, True),
        (True, 1.1, False, False),
        (False, 9.9, False, True),
        (False, 10.1, False, False),
        (True, 0.9, True, False),
        (False, 0.11, True, True),
        (False, 0.09, True, False),
    ],
)
def test_bound_is_ten_times_as_wide_unless_strict(strict, value, at_least, kept):
    figures = []
    accept = Accept(["A1"], figures, strict=strict)
    if kept:
        accept.figure(value, 1.0, "s", at_least=at_least)
    else:
        with pytest.raises(AssertionError):
            accept.figure(value, 1.0, "s", at_least=at_least)
    assert [figure.value for figure in figures] == [value]


def test_rows_are_chosen_by_letter_or_name():
    assert [name for name in ("A1", "B4", "B5") if wanted(name, ["A", "B4"])] == ["A1", "B4"]
    assert wanted("H6", [])


def test_table_has_every_row_once():
    names = [row.name for row in read_table()]
    assert len(names) == len(set(names))
    assert {name[0] for name in names} == set("ABCDEFGH")


def test_links_fill_the_last_column_only():
    table = "| A2 | light client | check | heavy deps |  |\n| A99 | none | x | y | old |\n"
    linked = with_links(table).splitlines()
    assert linked[0].startswith("| A2 | light client | check | heavy deps | [")
    assert linked[1] == "| A99 | none | x | y |  |"
