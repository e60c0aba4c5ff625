"""Counts tests towards the rows of `docs/acceptance.md`.

A test carries `@pytest.mark.accept("A5")` and may report a figure through the fixture `accept`. With
`--accept` (by `make accept`) only such tests run, bounds are strict, and the table is printed and written
to `build/accept.json`. `python -m tests.accept` (by `make format`) links the tests in the table; with
`--check` (by `make lint`) it compares instead.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "acceptance.md"
REPORT = ROOT / "build" / "accept.json"
#: How much wider a bound is in an ordinary run, so that a busy machine never turns it red.
SLACK = 10.0


@dataclass(kw_only=True)
class Figure:
    """A measured value beside its bound."""

    row: str
    value: float
    bound: float
    unit: str
    at_least: bool

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.value:.4g} {sign} {self.bound:.4g} {self.unit}".rstrip()


@dataclass
class Row:
    """One row of the table and what its tests said."""

    name: str
    promise: str
    outcomes: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Passed only when all its tests passed; a skip is not a pass."""
        outcomes = set(self.outcomes.values())
        if not outcomes:
            return "no test yet"
        if "failed" in outcomes:
            return "failed"
        return "skipped" if "skipped" in outcomes else "passed"


class Accept:
    """What the fixture `accept` gives to a test."""

    def __init__(self, rows: list[str], figures: list[Figure], *, strict: bool) -> None:
        self._rows = rows
        self._figures = figures
        self.strict = strict

    def figure(self, value: float, bound: float, unit: str = "", *, at_least: bool = False) -> None:
        """Record `value` and assert that it keeps its bound, ten times as wide in an ordinary run.

        Raises:
            AssertionError: If it does not.
        """
        for row in self._rows or [""]:
            figure = Figure(
                row=row, value=float(value), bound=float(bound), unit=unit, at_least=at_least
            )
            self._figures.append(figure)
        slack = 1.0 if self.strict else SLACK
        kept = value >= bound / slack if at_least else value <= bound * slack
        assert kept, f"{figure}" + ("" if self.strict else f" (and not within {SLACK:g} times)")


def rows_of(item: pytest.Item) -> list[str]:
    """Return the rows that a test counts towards."""
    return [str(row) for mark in item.iter_markers("accept") for row in mark.args]


def read_table(path: Path = TABLE) -> list[Row]:
    """Return the rows of the acceptance table, in order."""
    lines = path.read_text().splitlines()
    found = (re.match(r"\|\s*([A-Z]\d+)\s*\|\s*([^|]+?)\s*\|", line) for line in lines)
    return [Row(match[1], match[2]) for match in found if match]


def wanted(row: str, rows: list[str]) -> bool:
    """Whether a row was asked for: `A` asks for all of A, `B4` for itself, nothing for all."""
    return not rows or row in rows or row[0] in rows


class AcceptPlugin:
    """Selects, records and reports."""

    def __init__(self, config: pytest.Config) -> None:
        asked = config.getoption("--accept")
        self.strict = asked is not None
        self.asked = [name.strip().upper() for name in (asked or "").split(",") if name.strip()]
        self.figures: list[Figure] = []
        self.outcomes: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        known = {row.name for row in read_table()}
        for item in items:
            unknown = set(rows_of(item)) - known
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: no acceptance row {', '.join(unknown)}")
        if self.strict:
            chosen = [
                item for item in items if any(wanted(row, self.asked) for row in rows_of(item))
            ]
            config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
            items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        for row in rows_of(item):
            outcomes = self.outcomes[row]
            if report.when == "call" or report.outcome != "passed":
                worse = outcomes.get(item.nodeid) != "failed"
                outcomes[item.nodeid] = report.outcome if worse else "failed"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Any:
        result = yield
        if not self.strict:
            return result
        rows = self.rows()
        REPORT.parent.mkdir(exist_ok=True)
        report = [{**asdict(row), "state": row.state} for row in rows]
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            failed = any(row.state == "failed" for row in rows)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK
        return result

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.strict:
            return
        marks = {"passed": "green", "failed": "red", "skipped": "yellow", "no test yet": "light"}
        terminalreporter.section("acceptance")
        rows = self.rows()
        for row in rows:
            figures = "; ".join(map(str, row.figures))
            terminalreporter.write(f"{row.name:5}")
            terminalreporter.write(f"{row.state:13}", **{marks[row.state]: True})
            terminalreporter.write_line(f"{row.promise}{': ' if figures else ''}{figures}")
        states = [row.state for row in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in marks)
        terminalreporter.write_line(f"{counts}; written to {REPORT.relative_to(ROOT)}")

    def rows(self) -> list[Row]:
        """Return the rows that were asked for, with what is known of them."""
        rows = [row for row in read_table() if wanted(row.name, self.asked)]
        for row in rows:
            row.outcomes = self.outcomes.get(row.name, {})
            row.figures = [figure for figure in self.figures if figure.row == row.name]
        return rows


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accept",
        metavar="ROWS",
        nargs="?",
        const="",
        help="run the tests of these acceptance rows (A,B4; default all) with strict bounds",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(AcceptPlugin(config), "nos-accept")


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> Accept:
    """Records figures for the rows of this test."""
    plugin = request.config.pluginmanager.get_plugin("nos-accept")
    assert isinstance(plugin, AcceptPlugin)
    return Accept(rows_of(request.node), plugin.figures, strict=plugin.strict)


def tests_of_rows() -> dict[str, list[Path]]:
    """Return the test files of each row, from the markers in them."""
    found: dict[str, set[Path]] = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for arguments in re.findall(r"mark\.accept\(([^)]*)\)", path.read_text()):
            for row in re.findall(r'"([A-Z]\d+)"', arguments):
                found[row].add(path)
    return {row: sorted(paths) for row, paths in found.items()}


def with_links(table: str) -> str:
    """Return the text of the table with its last column filled in."""
    tests = tests_of_rows()
    lines = table.splitlines()
    for number, line in enumerate(lines):
        if match := re.match(r"\|\s*([A-Z]\d+)\s*\|", line):
            links = ", ".join(
                f"[{path.stem}]({os.path.relpath(path, TABLE.parent)})"
                for path in tests.get(match[1], [])
            )
            lines[number] = f"{line.rstrip().rstrip('|').rpartition('|')[0]}| {links} |"
    return "\n".join(lines) + "\n"


def main() -> None:
    before = TABLE.read_text()
    after = with_links(before)
    if "--check" not in sys.argv[1:]:
        TABLE.write_text(after)
    elif after != before:
        sys.exit("docs/acceptance.md does not link the tests that there are; run `make format`")


if __name__ == "__main__":
    main()
