"""Row E8: our page in the Dask dashboard shows what a known load did."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.launch import scheduler_command

from tests.browser.lab import TOKEN, free_port
from tests.browser.page import SCREENSHOTS
from tests.servers import wait_for

pytestmark = [pytest.mark.browser, pytest.mark.accept("E8")]

MODEL = '''
from typing import Annotated

import torch

Rows = Annotated[torch.Tensor, "float32[batch, 4]"]


class Doubles:
    """Twice what it got."""

    def __init__(self) -> None:
        self.weight = torch.full((1 << 20,), 2.0)

    def __call__(self, x: Rows) -> Rows:
        return x * self.weight[0]
'''
DATA = """(name) => {
  const source = window.Bokeh?.documents?.[0]?.get_model_by_name(name);
  if (!source) return null;
  return Object.fromEntries(
    Object.entries(source.data).map(([key, values]) => [key, Array.from(values)]));
}"""


class Shown:
    """What the page shows, as its scripts have it."""

    def __init__(self, page, url):
        self.page = page
        self.errors = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        wait_for(lambda: self.rows("lines") is not None, "the page is connected")

    def rows(self, name):
        """Return one of its sources as a list of rows, None before it is there."""
        found = self.page.evaluate(DATA, f"nos-{name}")
        if found is None:
            return None
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    def of(self, name, model):
        return [row for row in self.rows(name) if row["model"] == model]

    def table(self, name):
        """Return the rows of a table as people see them, by title of the column."""
        titles = self.page.locator(f"table.nos-{name} th").all_inner_texts()
        cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        rows = self.page.locator(f"table.nos-{name} tbody tr").evaluate_all(cells)
        return [dict(zip(titles, row, strict=True)) for row in rows]

    def replicas(self, model):
        return [row for row in self.table("replicas") if row["Model"] == model]

    @property
    def note(self):
        return self.page.evaluate("Bokeh.documents[0].get_model_by_name('nos-note').text")


@pytest.fixture
def doubles(client):
    """The key of a model that nobody else calls, in one replica."""
    info = client.register(MODEL, name="doubles")
    client.scale("doubles", replicas=1)
    wait_for(
        lambda: [it.phase for it in client.info("doubles").replicas] == ["serving"], "it serves"
    )
    yield info.spec.key
    client.unregister("doubles")


def test_the_page_shows_what_a_known_load_did_behind_a_prefix(
    opened, jupyter_lab, client, doubles, accept
):
    url = f"{jupyter_lab.origin}{jupyter_lab.base_url}nos/dask/nos?token={TOKEN}"
    shown = Shown(opened.page, url)
    wait_for(lambda: shown.replicas(doubles), "the replica is listed")
    model = client.model("doubles")
    for _ in range(30):
        model(np.ones((1, 4), np.float32))
    ended_s = time.monotonic()
    wait_for(lambda: shown.replicas(doubles)[0]["Answered"] == "30", "all 30 answers")
    accept.figure(time.monotonic() - ended_s, 2.0, "s until the page shows them")

    [replica] = shown.replicas(doubles)
    info = client.info("doubles").replicas[0]
    assert (replica["Worker"], replica["Device"]) == (info.worker, info.device)
    assert (replica["State"], replica["Pending"]) == ("serving", "0")
    assert (replica["Mean batch"], replica["Device MiB"]) == ("1.0", "4.0")
    assert info.device_bytes == 4 << 20

    def batches():
        return {row["size"]: row["count"] for row in shown.of("batches", doubles)}

    wait_for(lambda: batches() == {"1": 30}, "all 30 batches")
    [part] = shown.of("memory", doubles)
    assert (part["worker"], part["bytes"]) == (info.worker, info.device_bytes)
    assert part["end"] - part["start"] == info.device_bytes
    wait_for(lambda: max(shown.of("lines", doubles)[0]["answers"]) > 0, "the line rises")
    scaled = [
        row["Why"]
        for row in shown.table("events")
        if (row["Event"], row["Model"]) == ("scaled", doubles)
    ]
    assert [said.partition(":")[0] for said in scaled[:1]] == ["to 1 replicas"]
    opened.page.set_viewport_size({"width": 1400, "height": 1000})
    opened.page.wait_for_timeout(500)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    opened.page.screenshot(path=SCREENSHOTS / "dashboard.png")
    assert shown.errors == []


def test_a_scheduler_without_workers_has_the_page_and_lists_its_plots(tmp_path, opened):
    port = free_port()
    command = scheduler_command(
        host="127.0.0.1",
        port=free_port(),
        dashboard_port=port,
        tls=TlsFiles.create(tmp_path / "tls"),
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command.arguments, env={**os.environ, **command.environ}, stdout=log, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{port}"
        plots = wait_for(lambda: plots_of(address), (tmp_path / "log").read_text(), 60)
        assert plots["Individual Nos Memory"] == "/individual-nos-memory"
        assert sum(path.startswith("/individual-nos-") for path in plots.values()) == 7
        shown = Shown(opened.page, f"{address}/nos")
        assert "No worker is here" in shown.note
        assert shown.table("replicas") == shown.rows("memory") == []
        assert opened.page.locator("a[href='nos']").count() == 1
        assert shown.errors == []
    finally:
        process.terminate()
        process.wait(30)


def plots_of(address):
    try:
        with urllib.request.urlopen(f"{address}/individual-plots.json", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None
