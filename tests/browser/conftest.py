"""One JupyterLab and one browser for all tests of this folder; both end behind the last of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.browser.lab import Jupyter, jupyter
from tests.browser.page import Browser, Lab, browser
from tests.servers import Server

FAILED = pytest.StashKey[bool]()


def flags_for(server: Server) -> tuple[str, ...]:
    """Return the flags that make a JupyterLab use a backend and let tests drive it."""
    return (
        f"--NosApp.address={server.address}",
        f"--NosApp.token_file={server.token_file}",
        "--LabApp.expose_app_in_browser=True",
        "--NosApp.dask_dashboard=True",
    )


@pytest.fixture(scope="package")
def jupyter_lab(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Jupyter]:
    """A JupyterLab whose server extension hands the run's server to its kernels."""
    with jupyter(tmp_path_factory.mktemp("lab"), *flags_for(server), app="lab") as running:
        yield running


@pytest.fixture(scope="package")
def chromium(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Browser]:
    """A browser, which takes pictures of the widgets in `make accept`."""
    is_shooting = request.config.getoption("--accept") is not None
    with browser(tmp_path_factory.mktemp("browser"), is_shooting=is_shooting) as opened:
        yield opened


@pytest.fixture(scope="package")
def tab(chromium: Browser) -> Iterator[Lab]:
    """A tab for all tests."""
    with chromium.tab() as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Note which tests failed."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture
def opened(tab: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The tab; behind a test that failed it is made anew."""
    yield tab
    if request.node.stash.get(FAILED, False):
        tab.renew()
