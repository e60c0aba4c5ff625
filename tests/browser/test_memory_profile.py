"""The memory chart in a real JupyterLab."""

from __future__ import annotations

import json
import time

import pytest

from tests.browser.lab import Jupyter
from tests.browser.page import Lab, write_notebook
from tests.servers import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

WEIGHT_BYTES = 8 << 20
REGISTER = f"""%%nos model me/heavy
import torch
class Heavy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones({WEIGHT_BYTES // 4}))
    def forward(self, x: int) -> float:
        return float(self.weight[:x].sum())"""
CELLS = ["%load_ext nos", "%nos mem --watch", REGISTER, "%nos run me/heavy {3} -o three", "three"]

#: How many pixels of the chart have the colour of the first model of the legend.
COLORED = """() => {
  const swatch = getComputedStyle(document.querySelector('.nos-swatch')).backgroundColor;
  const [red, green, blue] = swatch.match(/\\d+/g).map(Number);
  const canvas = document.querySelector('.nos-chart');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4)
    if (data[at + 3] > 200 && Math.abs(data[at] - red) < 12 && Math.abs(data[at + 1] - green) < 12
        && Math.abs(data[at + 2] - blue) < 12) count += 1;
  return count;
}"""


def used_bytes(opened: Lab) -> int:
    return int(opened.page.locator(".nos-device").get_attribute("data-used-bytes") or 0)


def test_a_cell_becomes_a_model_and_the_chart_shows_its_bytes(
    jupyter_lab: Jupyter, server: Server, opened: Lab
) -> None:
    write_notebook(jupyter_lab, "watch.ipynb", CELLS)
    opened.open(jupyter_lab, "watch.ipynb")
    page = opened.page
    opened.run_next()
    opened.run_next()
    page.wait_for_selector(".nos-mem[data-state='live'] .nos-device[data-used-bytes]")
    before = used_bytes(opened)
    opened.run_next()
    opened.run_next()
    loaded_s = time.monotonic()
    page.wait_for_selector(".nos-part-name:text-is('me/heavy')")
    seen_s = time.monotonic() - loaded_s
    opened.run_next()
    assert page.locator(".jp-OutputArea-executeResult").last.inner_text().endswith("3.0")
    assert used_bytes(opened) >= before + WEIGHT_BYTES
    assert seen_s < 2
    page.wait_for_function(f"() => ({COLORED})() > 20")
    opened.shoot(".nos-mem", "memory-profile")
    opened.execute("%nos unload me/heavy")
    page.wait_for_selector(".nos-part-name:text-is('me/heavy')", state="detached")
    opened.save()
    saved = (jupyter_lab.log_path.parent / "notebooks" / "watch.ipynb").read_text()
    assert server.token not in saved
    assert "samples" not in saved
    still, _ = json.loads(saved)["cells"][1]["outputs"]
    assert "<svg" in "".join(still["data"]["text/html"])


def test_a_key_pressed_on_the_chart_does_not_edit_the_notebook(
    jupyter_lab: Jupyter, opened: Lab
) -> None:
    write_notebook(jupyter_lab, "keys.ipynb", CELLS[:2])
    opened.open(jupyter_lab, "keys.ipynb")
    opened.run_next()
    opened.run_next()
    opened.page.wait_for_selector(".nos-device")
    before = opened.page.locator(".jp-Cell").count()
    for selector in (".nos-button", ".nos-chart"):
        opened.page.locator(selector).first.focus()
        opened.page.keyboard.press("b")
    assert opened.page.locator(".jp-Cell").count() == before
    assert opened.page.locator(".nos-chart").get_attribute("aria-label")


def test_two_charts_of_one_notebook_do_not_mix(jupyter_lab: Jupyter, opened: Lab) -> None:
    write_notebook(jupyter_lab, "two.ipynb", [*CELLS[:2], CELLS[1]])
    opened.open(jupyter_lab, "two.ipynb")
    opened.run_next()
    opened.run_next()
    opened.page.wait_for_function("() => document.querySelector('.nos-mem')?.dataset.samples > 6")
    opened.run_next()
    opened.page.wait_for_function("() => document.querySelectorAll('.nos-device').length === 2")
    first, second = (
        int(opened.page.locator(".nos-mem").nth(at).get_attribute("data-samples") or 0)
        for at in (0, 1)
    )
    assert first >= second + 5
