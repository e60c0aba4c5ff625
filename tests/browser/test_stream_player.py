"""Live frames of the fake camera through a model, in a real JupyterLab."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.accept import Accept
from tests.browser.lab import Jupyter
from tests.browser.page import KERNEL, Lab

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

LOAD = "%load_ext nos"
PLAYER = ".nos-player"

#: As many frames as the figure of the player is made of.
NUM_FIGURE = 60
BUSY = "while True:\n    pass"
RUNS = """() => window.jupyterapp.shell.currentWidget.content.widgets.at(-1)
  .inputArea?.promptNode.textContent.includes('*')"""
#: What a browser says whose user refuses, or whose machine has none.
WITHOUT_CAMERA = """(name) => {
  navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', name));
}"""


def number(opened: Lab, name: str) -> float:
    return float(opened.page.locator(PLAYER).first.get_attribute(f"data-{name}") or 0)


def wait_shown(opened: Lab, count: int) -> None:
    # Playwright would look at every repaint, and so have the page repaint at 60 Hz.
    opened.page.wait_for_function(
        f"() => Number(document.querySelector('{PLAYER}').dataset.shown) >= {count}", polling=200
    )


def play_on_while_busy(opened: Lab, count: int) -> None:
    """Run the last cell, which computes until it is interrupted; wait for so many frames meanwhile."""
    opened.page.evaluate("""() => {
      const cells = window.jupyterapp.shell.currentWidget.content;
      cells.activeCellIndex = cells.widgets.length - 1;
      window.jupyterapp.commands.execute('notebook:run-cell');
    }""")
    opened.page.wait_for_function(RUNS)
    wait_shown(opened, int(number(opened, "shown")) + count)
    assert opened.page.evaluate(RUNS)
    opened.page.evaluate(f"() => {KERNEL}.interrupt()")
    opened.page.wait_for_function(RUNS.replace("=> ", "=> !"))


@pytest.mark.accept("G2")
def test_frames_of_the_camera_go_through_the_server(
    jupyter_lab: Jupyter, opened: Lab, accept: Accept
) -> None:
    opened.start(jupyter_lab, "camera.ipynb", [LOAD, "%nos stream nos/edges"], BUSY)
    page = opened.page
    page.get_by_role("button", name="Play the camera").click()
    # The first ones wait for the model.
    wait_shown(opened, 120 if accept.strict else 20)
    assert page.locator(PLAYER).get_attribute("data-road") == "server"
    # 25 per second where nothing else runs; a busy machine still shows pictures.
    accept.figure(number(opened, "fps"), 25.0, "fps", at_least=True)
    opened.shoot(PLAYER, "stream-player")
    play_on_while_busy(opened, NUM_FIGURE if accept.strict else 15)
    accept.figure(number(opened, "fps"), 25.0, "fps beside a busy cell", at_least=True)
    page.get_by_role("button", name="Stop playing").click()
    expect(page.locator(PLAYER)).to_have_attribute("data-playing", "false")
    for name, sentence in (
        ("NotAllowedError", "the browser refused the camera"),
        ("NotFoundError", "this machine has no camera"),
    ):
        page.evaluate(WITHOUT_CAMERA, name)
        page.get_by_role("button", name="Play the camera").click()
        expect(page.locator(".nos-error")).to_contain_text(sentence)
    page.evaluate("() => { delete navigator.mediaDevices.getUserMedia; }")
    page.evaluate(f"() => {KERNEL}.restart()")
    expect(page.locator(".nos-status")).to_have_text("its kernel is gone: run the cell again")


@pytest.mark.accept("G2")
def test_without_the_extension_frames_go_through_the_kernel_and_so_do_those_of_the_notebook(
    jupyter_lab: Jupyter, opened: Lab, accept: Accept
) -> None:
    images = (
        "import numpy as np\nimages = [np.full((48, 64, 3), n % 250, np.uint8) for n in range(40)]"
    )
    cells = [LOAD, images, "%nos stream nos/edges", "%nos stream nos/edges --source $images"]
    opened.start(jupyter_lab, "kernel.ipynb", cells, BUSY)
    page = opened.page
    # What a Jupyter server answers that has no extension of ours.
    page.route("**/nos/api/**", lambda route: route.fulfill(status=404))
    page.get_by_role("button", name="Play the camera").click()
    wait_shown(opened, 120 if accept.strict else 20)
    assert page.locator(PLAYER).first.get_attribute("data-road") == "kernel"
    accept.figure(number(opened, "fps"), 15, "fps", at_least=True)
    play_on_while_busy(opened, NUM_FIGURE if accept.strict else 15)
    accept.figure(number(opened, "fps"), 15, "fps beside a busy cell", at_least=True)
    page.get_by_role("button", name="Stop playing").first.click()
    second = page.locator(PLAYER).nth(1)
    second.get_by_role("button", name="Play the frames of the notebook").click()
    expect(second).to_have_attribute("data-shown", "40", timeout=60_000)
    expect(second).to_have_attribute("data-playing", "false", timeout=60_000)
    page.unroute("**/nos/api/**")
