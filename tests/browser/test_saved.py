"""Notebooks as they read when nothing runs any more."""

from __future__ import annotations

import nbformat
import pytest
from nbconvert import HTMLExporter, MarkdownExporter
from playwright.sync_api import expect

from tests.browser.lab import Jupyter
from tests.browser.page import Lab
from tests.browser.test_panels import stroke

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

CELLS = [
    "%load_ext nos",
    "import numpy as np\n%nos run nos/digits {np.zeros((2, 8, 8), np.float32)} -m labels",
    "%nos mem --watch",
    "%nos panel nos/digits",
]


@pytest.mark.accept("G4")
def test_results_and_the_last_state_of_widgets_outlive_the_kernel(
    jupyter_lab: Jupyter, opened: Lab
) -> None:
    opened.start(jupyter_lab, "saved.ipynb", CELLS)
    page = opened.page
    page.locator(".nos-scores").or_(page.locator(".nos-pad")).first.wait_for()
    stroke(opened, page.locator(".nos-pad"), [(0.5, 0.1), (0.5, 0.9)])
    page.locator(".nos-scores").wait_for()
    # Beside a live widget its still picture would say the same again.
    stills = page.locator(".nos-still")
    expect(stills.nth(1)).to_contain_text("float32 (10,)", timeout=60_000)
    expect(stills.nth(0)).to_be_hidden()
    expect(stills.nth(1)).to_be_hidden()
    path = opened.save()

    page.evaluate("async () => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    opened.open(jupyter_lab, path.name)
    expect(page.locator(".nos-w")).to_have_count(0)
    expect(stills.nth(0).locator("svg")).to_be_visible(timeout=60_000)
    expect(stills.nth(1)).to_be_visible()
    expect(stills.nth(1)).to_contain_text("float32 (10,)")
    expect(page.locator(".jp-OutputArea").nth(1)).to_contain_text("int64 (2,)")
    opened.shoot(".jp-Notebook", "saved-notebook")

    saved = nbformat.read(path, as_version=4)
    for exporter in (HTMLExporter(), MarkdownExporter()):
        text, _ = exporter.from_notebook_node(saved)
        assert "int64 (2,)" in text
        assert "<svg" in text
        assert text.count("nos-still") == 2
