"""The memory chart in a real JupyterLab."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import nos
import pytest
from nos.errors import ModelNotFoundError
from playwright.sync_api import expect

from tests.accept import Accept
from tests.browser.lab import Jupyter
from tests.browser.page import Lab
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
WATCH = "%nos mem --watch"
CELLS = ["%load_ext nos", WATCH, REGISTER, "%nos run me/heavy {3} -o three", "three", WATCH]

#: Whether the chart has some pixels in the colour that a model has in the legend.
COLORED = """(name) => {
  const part = [...document.querySelectorAll('.nos-part')]
    .find((it) => it.querySelector('.nos-part-name')?.textContent === name);
  const swatch = getComputedStyle(part.querySelector('.nos-swatch')).backgroundColor;
  const [red, green, blue] = swatch.match(/\\d+/g).map(Number);
  const canvas = document.querySelector('.nos-chart');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4)
    if (data[at + 3] > 200 && Math.abs(data[at] - red) < 12 && Math.abs(data[at + 1] - green) < 12
        && Math.abs(data[at + 2] - blue) < 12) count += 1;
  return count > 20;
}"""


def used_bytes(opened: Lab) -> int:
    shown = opened.page.locator(".nos-device").first
    return int(shown.get_attribute("data-used-bytes") or 0)


@pytest.fixture
def forgotten(client: nos.Client) -> Iterator[None]:
    """Take what the test registers away again."""
    yield
    with contextlib.suppress(ModelNotFoundError):
        client.unregister("me/heavy")


@pytest.mark.accept("G2")
@pytest.mark.usefixtures("forgotten")
def test_a_cell_becomes_a_model_and_the_chart_shows_its_bytes(
    jupyter_lab: Jupyter, server: Server, opened: Lab, client: nos.Client, accept: Accept
) -> None:
    client.load("nos/digits")
    opened.start(jupyter_lab, "watch.ipynb", CELLS[:2], *CELLS[2:])
    page = opened.page
    page.wait_for_selector(".nos-mem[data-state='live'] .nos-device[data-used-bytes]")
    before = used_bytes(opened)
    opened.run_next()
    opened.run_next()
    loaded_s = time.monotonic()
    page.wait_for_selector(".nos-part-name:text-is('me/heavy')")
    accept.figure(time.monotonic() - loaded_s, 2.0, "s until the chart shows a model")
    opened.run_next()
    assert page.locator(".jp-OutputArea-executeResult").last.inner_text().endswith("3.0")
    assert used_bytes(opened) >= before + WEIGHT_BYTES
    page.wait_for_function(COLORED, arg="me/heavy")
    opened.shoot(".nos-mem", "memory-profile")

    # A second chart of the same notebook begins with what it saw itself.
    page.wait_for_function("() => document.querySelector('.nos-mem')?.dataset.samples > 6")
    opened.run_next()
    page.wait_for_function("() => document.querySelectorAll('.nos-device').length === 2")
    first, second = (
        int(page.locator(".nos-mem").nth(at).get_attribute("data-samples") or 0) for at in (0, 1)
    )
    assert first >= second + 5

    page.get_by_role("button", name="What nos/digits needs").first.click()
    breakdown = page.locator(".nos-breakdown[data-model='nos/digits']")
    expect(breakdown.locator(".nos-modules tbody tr").first).to_be_visible(timeout=60_000)
    profile = client.profile("nos/digits").methods[0]
    sizes = breakdown.locator(".nos-sizes").first.locator("tbody tr")
    expect(sizes).to_have_count(len(profile.points))
    expect(sizes.filter(has_text="chosen")).to_contain_text(f"{profile.chosen_rows}, chosen")
    opened.shoot(".nos-mem", "memory-breakdown")
    page.get_by_role("button", name="Close the breakdown").click()
    opened.execute("%nos unload me/heavy")
    expect(page.locator(".nos-part-name:text-is('me/heavy')")).to_have_count(0, timeout=60_000)
    saved = opened.save().read_text()
    assert server.token not in saved
    assert "samples" not in saved
    still, _ = json.loads(saved)["cells"][1]["outputs"]
    assert "<svg" in "".join(still["data"]["text/html"])
