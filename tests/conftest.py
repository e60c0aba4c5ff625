"""Fixtures for all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.accept", "tests.servers"]

#: Their tests drive processes of several programs on whatever machine there is.
_OF_PROCESSES = ("integration", "faults", "browser")
#: Folders whose tests run one after the other in any case.
_TOGETHER = ("browser", "gpu")
_HERE = Path(__file__).parent

# Generated examples are the same in every run of `make test`: what is red for one is red for all.
settings.register_profile(
    "nos",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nos")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that wait for minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long; run a failed test of real processes once more, and name it (RERUN)."""
    if config.getoption("--accept") is not None:
        return
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    for item in items:
        folder, *rest = item.path.relative_to(_HERE).parts
        if folder in _OF_PROCESSES:
            item.add_marker(pytest.mark.flaky(reruns=1))
        # Tests that share a server, or the one JupyterLab, stay together.
        group = folder if folder in _TOGETHER else "/".join((folder, *rest))
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """What importing the tests made is never garbage: leave it out of the collections below."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """Collect garbage behind each file, so that what it left unclosed is reported there, not elsewhere."""
    yield
    gc.collect()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests failed that passed when they were run once more."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.write_sep("_", f"first run of {report.nodeid}")
        terminalreporter.write_line(report.longreprtext[-4000:])
