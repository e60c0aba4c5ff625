"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["tests.accept", "tests.servers"]

#: Their tests drive processes of several programs on whatever machine there is.
_OF_PROCESSES = ("integration", "faults", "browser")
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run a failed test of real processes once more; the summary names each (RERUN)."""
    if config.getoption("--accept") is not None:
        return
    for item in items:
        if item.path.relative_to(_HERE).parts[0] in _OF_PROCESSES:
            item.add_marker(pytest.mark.flaky(reruns=1))
