"""One JupyterLab for all browser tests, and one browser for each module of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.lab import Jupyter, jupyter
from tests.browser.page import Browser, Lab, browser
from tests.servers import Server


def flags_for(server: Server) -> tuple[str, ...]:
    """Return the flags that make a JupyterLab use a backend and let tests drive it."""
    return (
        f"--NosApp.address={server.address}",
        f"--NosApp.token_file={server.token_file}",
        "--LabApp.expose_app_in_browser=True",
        "--NosApp.dask_dashboard=True",
    )


@pytest.fixture(scope="session")
def jupyter_lab(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Jupyter]:
    """A JupyterLab whose server extension hands the run's server to its kernels."""
    with jupyter(tmp_path_factory.mktemp("lab"), *flags_for(server), app="lab") as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser."""
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Lab]:
    """An empty tab."""
    with chromium.tab() as tab:
        yield tab
