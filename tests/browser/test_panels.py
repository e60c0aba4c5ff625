"""The panels of the control room in a real JupyterLab: run, browse, register."""

from __future__ import annotations

import statistics
from pathlib import Path

import nos
import pytest
from playwright.sync_api import Locator, expect

from tests.accept import Accept
from tests.browser.lab import Jupyter, free_port
from tests.browser.page import Lab
from tests.servers import start_server

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

LOAD = "%load_ext nos"
#: Notes when the pointer went up, and when the last result was there.
WATCH_RUNS = """() => {
  const calls = document.querySelector('.nos-calls');
  window.upAt = window.shownAt = 0;
  calls.addEventListener('pointerup', () => { window.upAt = performance.now(); }, true);
  new MutationObserver(() => { window.shownAt = performance.now(); })
    .observe(calls, { attributes: true, attributeFilter: ['data-runs'] });
}"""
SHOWN = """() => {
  const calls = document.querySelector('.nos-calls');
  return window.shownAt > window.upAt && calls.dataset.call === 'idle';
}"""
DROP = """([selector, name, type, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, { type }));
  const event = new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer: data });
  document.querySelector(selector).dispatchEvent(event);
}"""
#: How many different grey levels a canvas shows.
LEVELS = """(canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return new Set(data.filter((_, at) => at % 4 === 0)).size;
}"""
DOUBLER = """%%nos model me/doubler
class Doubler:
    def __call__(self, x: int) -> int:
        if x < 0:
            raise ValueError("x is negative")
        return 2 * x
    def weigh(self, data: bytes) -> int:
        return data.count(7)
    def hear(self, data: bytes) -> bytes:
        assert data[:4] == b"RIFF" and len(data) > 44 + 2 * 16000
        return data"""
FINDER = """%%nos model me/finder
import numpy as np
from PIL import Image
class Finder:
    def __call__(self, image: Image.Image) -> dict:
        width, height = image.size
        masks = np.zeros((1, height, width), np.uint8)
        masks[:, height // 2 :] = 1
        boxes = np.array([[8.0, 40.0, width - 8.0, height - 8.0]])
        return {"boxes": boxes, "masks": masks, "labels": ["all of it"], "scores": [0.75]}"""
#: Gives a file of 25 MiB to a field.
UPLOAD = """(selector) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(25 << 20).fill(7)], 'large.bin'));
  const field = document.querySelector(selector);
  field.files = data.files;
  field.dispatchEvent(new Event('change'));
}"""
#: What a canvas shows at a place: red, green, blue.
PIXEL = "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)]"


def stroke(opened: Lab, pad: Locator, points: list[tuple[float, float]]) -> None:
    """Draw a line through points given as shares of the pad's sides."""
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    assert box is not None
    mouse = opened.page.mouse
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    mouse.move(*at[0])
    mouse.down()
    for x, y in at[1:]:
        mouse.move(x, y, steps=4)
    mouse.up()


@pytest.mark.accept("G2")
def test_a_drawn_digit_is_recognised_at_once(
    jupyter_lab: Jupyter, opened: Lab, accept: Accept
) -> None:
    opened.start(jupyter_lab, "draw.ipynb", [LOAD, "panel = %nos panel nos/digits\npanel"])
    page = opened.page
    pad = page.locator(".nos-pad")
    pad.wait_for()
    stroke(opened, pad, [(0.5, 0.1), (0.5, 0.9)])
    scores = page.locator(".nos-scores")
    scores.wait_for()
    page.evaluate(WATCH_RUNS)
    elapsed_s = []
    for _ in range(7):
        stroke(opened, pad, [(0.5, 0.1), (0.5, 0.9)])
        page.wait_for_function(SHOWN)
        elapsed_s.append(page.evaluate("() => (window.shownAt - window.upAt) / 1000"))
    assert page.locator(".nos-score").count() == 10
    assert scores.get_attribute("data-best") == "1"
    assert opened.execute("print(panel.value.shape)").strip() == "(10,)"
    opened.shoot(".nos-panel", "inference-panel")
    accept.figure(statistics.median(elapsed_s), 0.2, "s")


@pytest.mark.accept("G2")
def test_the_browser_shows_what_is_registered_and_runs_it(
    jupyter_lab: Jupyter, opened: Lab, accept: Accept
) -> None:
    stamp = "import time\nregistered_s = time.time()"
    opened.start(jupyter_lab, "browse.ipynb", [LOAD, "%nos browse"], DOUBLER, stamp)
    page = opened.page
    page.wait_for_selector(".nos-model[data-name='nos/digits']")
    page.evaluate("""() => new MutationObserver((_, observer) => {
      if (!document.querySelector(".nos-model[data-name='me/doubler']")) return;
      window.seenAt = Date.now();
      observer.disconnect();
    }).observe(document.querySelector('.nos-browser'), { childList: true, subtree: true })""")
    opened.run_next()
    opened.run_next()
    row = page.locator(".nos-model[data-name='me/doubler']")
    row.wait_for()
    registered_s = float(opened.execute("print(registered_s)"))
    accept.figure(page.evaluate("() => window.seenAt / 1000") - registered_s, 2.0, "s")

    row.get_by_role("button", name="Load me/doubler").click()
    expect(row).to_have_attribute("data-state", "device", timeout=60_000)
    row.get_by_role("button", name="Open").click()
    page.locator(".nos-opened .nos-field").fill("21")
    page.get_by_role("button", name="Run the model").click()
    expect(page.locator(".nos-result")).to_contain_text("42", timeout=60_000)
    page.locator(".nos-opened .nos-field").fill("-1")
    page.get_by_role("button", name="Run the model").click()
    expect(page.locator(".nos-error")).to_contain_text("x is negative", timeout=60_000)
    page.locator(".nos-opened .nos-field").fill("4")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".nos-result")).to_contain_text("8", timeout=60_000)
    page.locator(".nos-search").fill("nos/")
    expect(row).to_be_hidden()
    opened.shoot(".nos-browser", "model-browser")
    page.locator(".nos-search").fill("")

    form = page.locator(".nos-opened")
    form.get_by_role("button", name="weigh").click()
    page.evaluate(UPLOAD, ".nos-opened .nos-file")
    form.get_by_role("button", name="Run the model").click()
    expect(form.locator(".nos-result")).to_contain_text(str(25 << 20), timeout=60_000)
    form.get_by_role("button", name="hear").click()
    listen = form.get_by_role("button", name="Record sound")
    listen.click()
    expect(listen).to_contain_text("Stop (1 s)", timeout=60_000)
    listen.click()
    form.get_by_role("button", name="Run the model").click()
    expect(form.locator(".nos-result audio")).to_be_visible(timeout=60_000)
    row.get_by_role("button", name="Unload me/doubler").click()
    expect(row).to_have_attribute("data-state", "registered", timeout=60_000)
    opened.execute("%nos unregister me/doubler")
    row.wait_for(state="detached")


@pytest.mark.accept("G2")
def test_a_form_registers_code_and_an_image_comes_from_camera_or_file(
    jupyter_lab: Jupyter, opened: Lab
) -> None:
    opened.start(jupyter_lab, "form.ipynb", [LOAD, "%nos register", "%nos panel nos/edges"])
    page = opened.page
    form = page.locator(".nos-register")
    submit = form.get_by_role("button", name="Register the model")
    expect(submit).to_be_enabled(timeout=60_000)
    form.locator(".nos-code").first.fill("class Half")
    expect(form.locator(".nos-wrong").first).to_contain_text("does not compile: line 1")
    form.locator(".nos-code").first.fill(
        "class Half:\n    def __call__(self, x: float) -> float:\n        return x / 2"
    )
    expect(submit).to_be_enabled(timeout=60_000)
    submit.click()
    form.locator(".nos-form .nos-field").fill("5")
    form.get_by_role("button", name="Run the model").click()
    expect(form.locator(".nos-result")).to_contain_text("2.5", timeout=60_000)
    opened.shoot(".nos-register", "register-model")

    edges = page.locator(".nos-panel")
    page.evaluate(DROP, [".nos-panel .nos-zone", "notes.txt", "text/plain", "hello"])
    expect(edges.locator(".nos-wrong")).to_contain_text("notes.txt (text/plain) is no image")
    edges.get_by_role("button", name="Use the camera").click()
    edges.get_by_role("button", name="Take the picture").click()
    edges.get_by_role("button", name="Run the model").click()
    edges.locator(".nos-result canvas").wait_for()
    assert edges.locator(".nos-result canvas").evaluate(LEVELS) > 3
    opened.shoot(".nos-panel", "inference-panel-image")
    page.evaluate(
        """async () => {
      // Noise does not compress: some 25 MB.
      const canvas = new OffscreenCanvas(2900, 2900);
      const image = new ImageData(2900, 2900);
      for (let at = 0; at < image.data.length; at += 65536)
        crypto.getRandomValues(image.data.subarray(at, at + 65536));
      for (let at = 3; at < image.data.length; at += 4) image.data[at] = 255;
      canvas.getContext('2d').putImageData(image, 0, 0);
      const file = new File([await canvas.convertToBlob()], 'large.png', { type: 'image/png' });
      const data = new DataTransfer();
      data.items.add(file);
      const zone = document.querySelector('.nos-panel .nos-zone');
      zone.dispatchEvent(new DragEvent('drop', { bubbles: true, dataTransfer: data }));
    }"""
    )
    expect(edges.locator(".nos-form")).to_contain_text("large.png has 2", timeout=60_000)
    edges.get_by_role("button", name="Run the model").click()
    page.wait_for_function(
        "() => document.querySelector('.nos-panel .nos-result canvas')?.width === 2900"
    )


@pytest.mark.accept("G2")
@pytest.mark.long
def test_a_backend_that_dies_is_said_and_found_again(
    jupyter_lab: Jupyter, opened: Lab, tmp_path: Path
) -> None:
    port = str(free_port())
    first = start_server(tmp_path, "--port", port)
    connect = f"%nos connect {first.address} --token-file {first.token_file}"
    widgets = ["%nos mem --watch", "%nos panel nos/echo", "%nos cluster"]
    cells = [LOAD, connect, "%nos load nos/echo", *widgets]
    opened.start(jupyter_lab, "dies.ipynb", cells)
    page = opened.page
    cluster = page.locator(".nos-cluster")
    row = cluster.locator(".nos-scaled[data-name^='nos/echo@']")
    expect(row).to_contain_text("1 of 1", timeout=60_000)
    live = "() => document.querySelectorAll(\".nos-w[data-state='live']\").length === 3"
    page.wait_for_function(live)
    first.stop()
    page.wait_for_function(live.replace("live", "lost"))
    assert "retrying" in page.locator(".nos-mem .nos-status").inner_text()
    panel = page.locator(".nos-panel")
    panel.locator(".nos-area").fill("hello")
    panel.get_by_role("button", name="Run the model").click()
    expect(panel.locator(".nos-error")).to_contain_text("backend")
    row.get_by_role("button", name="set").click()
    expect(cluster.locator(".nos-error")).to_contain_text("UnavailableError")
    opened.shoot(".nos-cluster", "cluster-panel-lost")
    again = start_server(tmp_path, "--port", port)
    try:
        page.wait_for_function(live)
        panel.get_by_role("button", name="Try again").click()
        expect(panel.locator(".nos-result")).to_contain_text("hello", timeout=60_000)
        cluster.get_by_role("button", name="Try again").click()
        expect(cluster.locator(".nos-error")).to_have_count(0, timeout=60_000)
        expect(row).to_contain_text("1 of 1", timeout=60_000)
    finally:
        # The next test begins with a kernel that uses the run's server again.
        opened.renew()
        again.stop()


@pytest.mark.accept("G2")
def test_the_cluster_is_shown_and_scaled(
    jupyter_lab: Jupyter, opened: Lab, client: nos.Client
) -> None:
    client.scale("nos/echo", replicas=1)
    opened.start(jupyter_lab, "cluster.ipynb", [LOAD, "panel = %nos cluster\npanel"])
    panel = opened.page.locator(".nos-cluster")
    row = panel.locator(".nos-scaled[data-name^='nos/echo@']")
    expect(row).to_contain_text("1 of 1", timeout=60_000)
    expect(panel.locator(".nos-worker")).to_have_count(len(client.status().workers))
    row.get_by_label("at least").fill("3")
    row.get_by_label("at most").fill("2")
    row.get_by_role("button", name="set").click()
    error = panel.locator(".nos-error")
    expect(error).to_contain_text("at least 3", timeout=60_000)
    error.get_by_role("button", name="Try again").click()
    expect(error).to_contain_text("at least 3", timeout=60_000)
    # The fields show what is in force again.
    expect(row.get_by_label("at least")).to_have_value("1", timeout=60_000)
    row.get_by_label("at least").fill("2")
    row.get_by_label("at most").fill("2")
    row.get_by_role("button", name="set").click()
    expect(error).to_have_count(0, timeout=60_000)
    expect(row).to_contain_text("1 of 2", timeout=60_000)
    expect(row).to_contain_text("every worker that could has a replica already")
    scaling = client.info("nos/echo").scaling
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 2)
    expect(panel.locator(".nos-events")).to_contain_text("to 2 replicas")
    assert panel.get_by_role("link", name="dashboard").get_attribute("href", timeout=60_000)
    opened.shoot(".nos-cluster", "cluster-panel")
    client.scale("nos/echo", replicas=1)


def test_keys_typed_into_a_widget_stay_there(jupyter_lab: Jupyter, opened: Lab) -> None:
    cells = [LOAD, "%nos panel nos/echo", "%nos browse", "%nos mem --watch"]
    opened.start(jupyter_lab, "typed.ipynb", cells)
    page = opened.page
    page.wait_for_selector(".nos-mem .nos-device")
    before = page.locator(".jp-Cell").count()
    buttons = (".nos-panel .nos-button", ".nos-mem .nos-button", ".nos-chart")
    for selector in (*buttons, ".nos-panel .nos-area", ".nos-search"):
        page.locator(selector).first.focus()
        page.keyboard.press("b")
    assert page.locator(".jp-Cell").count() == before
    assert page.locator(".nos-panel .nos-area").input_value() == "b"
    assert page.locator(".nos-chart").get_attribute("aria-label")


@pytest.mark.accept("G2")
def test_what_a_model_found_is_drawn_over_the_picture_and_recorded(
    jupyter_lab: Jupyter, opened: Lab, client: nos.Client
) -> None:
    cells = [LOAD, FINDER, "%nos panel me/finder", "%nos stream me/finder"]
    opened.start(jupyter_lab, "finds.ipynb", cells)
    page = opened.page
    panel = page.locator(".nos-panel")
    panel.get_by_role("button", name="Draw the image by hand").click()
    panel.get_by_role("button", name="Run the model").click()
    drawn = panel.locator(".nos-result canvas")
    drawn.wait_for()
    assert drawn.get_attribute("data-found") == "1"
    assert drawn.get_attribute("aria-label") == "1 found: all of it"
    assert drawn.evaluate(PIXEL, [100, 40]) == [76, 141, 214]
    white, tinted = (drawn.evaluate(PIXEL, [100, y]) for y in (80, 200))
    assert white == [255, 255, 255]
    assert tinted[0] < tinted[2] < 255
    opened.shoot(".nos-panel", "inference-panel-found")

    # What browsers lack that are a few years old.
    page.evaluate("() => { window.kept = window.VideoFrame; window.VideoFrame = undefined; }")
    player = page.locator(".nos-player")
    player.get_by_role("button", name="Play the camera").click()
    screen = player.locator(".nos-screen[data-found='1']")
    screen.wait_for()
    player.get_by_role("button", name="Record what is shown").click()
    enough = "(count) => Number(document.querySelector('.nos-player').dataset.shown) > count"
    page.wait_for_function(enough, arg=int(player.get_attribute("data-shown") or 0) + 15)
    with page.expect_download() as download:
        player.get_by_role("button", name="End the recording and save it").click()
    assert download.value.suggested_filename == "me-finder.webm"
    assert Path(download.value.path()).stat().st_size > 1000
    player.get_by_role("button", name="Stop playing").click()
    page.evaluate("() => { window.VideoFrame = window.kept; }")
    client.unregister("me/finder")
