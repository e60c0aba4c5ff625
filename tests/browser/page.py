"""A JupyterLab page in headless Chromium, driven by Lab's own commands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import BrowserContext, sync_playwright

from tests.browser.lab import TOKEN, Jupyter
from tests.servers import ROOT

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream=fps=30",
]
SCREENSHOTS = ROOT / "build" / "screenshots"
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
START_MS = 90_000
CLOSE_WIDGETS = """import sys
if widgets := sys.modules.get("ipywidgets"):
    widgets.Widget.close_all()"""


def write_notebook(server: Jupyter, name: str, cells: list[str]) -> None:
    """Put a notebook where the server finds it."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    # Without it the page asks which kernel to use, and waits.
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    folder = server.log_path.parent / "notebooks"
    nbformat.write(notebook, folder / name)


class Lab:
    """A tab, with a notebook that is open in it."""

    def __init__(self, context: BrowserContext, *, is_shooting: bool) -> None:
        self.page = context.new_page()
        self.is_shooting = is_shooting
        #: Where its notebooks are; None before the first.
        self.server: Jupyter | None = None

    def open(self, server: Jupyter, name: str) -> None:
        """Open a notebook and wait for its kernel."""
        self.shut_down()
        self.server = server
        url = f"{server.origin}{server.base_url}lab/tree/{name}?token={TOKEN}&reset"
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=START_MS)
        self.page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
        self.wait_idle()

    def shut_down(self) -> None:
        """End the kernels of its notebooks, which would follow the backend beside the next test."""
        if self.server is not None:
            for session in self.server.fetch("api/sessions").json():
                self.server.fetch(f"api/sessions/{session['id']}", method="DELETE")

    def renew(self) -> None:
        """Begin with an empty tab again."""
        context = self.page.context
        self.page.close()
        self.shut_down()
        self.page = context.new_page()

    def wait_idle(self) -> None:
        """Wait until the kernel is connected and has nothing to do."""
        self.page.wait_for_function(
            f"() => {KERNEL}?.connectionStatus === 'connected' && {KERNEL}.status === 'idle'",
            timeout=START_MS,
        )

    def run_next(self) -> None:
        """Run the cell at the cursor, wait until it ended, go to the next."""
        self.page.evaluate(
            "() => window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')"
        )
        self.wait_idle()

    def execute(self, code: str) -> str:
        """Run code in the notebook's kernel, without a cell; return what it printed or raised."""
        return str(
            self.page.evaluate(
                """async (code) => {
                const future = KERNEL.requestExecute({ code, store_history: false });
                let said = '';
                future.onIOPub = ({ header, content }) => {
                  if (header.msg_type === 'stream') said += content.text;
                  if (header.msg_type === 'error') said += content.traceback.join('\\n');
                };
                await future.done;
                return said;
                }""".replace("KERNEL", KERNEL),
                code,
            )
        )

    def start(self, server: Jupyter, name: str, cells: list[str], *later: str) -> None:
        """Run these cells, but not those that come later, in the notebook that is open, or in a new one.

        A page and a kernel take seconds to load: they serve one test after the other.
        """
        is_open = self.page.evaluate(f"() => Boolean(window.jupyterapp && {KERNEL})")
        if is_open:
            self._replace([*cells, *later])
        else:
            write_notebook(server, name, [*cells, *later])
            self.open(server, name)
        for _ in cells:
            self.run_next()

    def _replace(self, cells: list[str]) -> None:
        """Put these cells in the place of all others, and end the widgets that those made."""
        self.wait_idle()
        self.execute(CLOSE_WIDGETS)
        self.page.evaluate(
            """(cells) => {
              const { content } = window.jupyterapp.shell.currentWidget;
              const shared = content.model.sharedModel;
              shared.transact(() => {
                shared.deleteCellRange(0, shared.cells.length);
                shared.insertCells(0, cells.map((source) => ({ cell_type: 'code', source })));
              });
              content.activeCellIndex = 0;
            }""",
            cells,
        )

    def save(self) -> Path:
        """Save the notebook and wait until that is done; return its file."""
        assert self.server is not None
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        name = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.path")
        return self.server.log_path.parent / "notebooks" / name

    def shoot(self, selector: str, name: str) -> None:
        """Keep a picture of a widget for people to look at, light and dark, where that is wanted."""
        if not self.is_shooting:
            return
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for theme in ("Dark", "Light"):
            self.use_theme(f"JupyterLab {theme}")
            self.page.wait_for_timeout(200)
            path = SCREENSHOTS / f"{name}-{theme.lower()}.png"
            self.page.locator(selector).first.screenshot(path=path)

    def use_theme(self, name: str) -> None:
        """Change Lab's theme, for instance to `JupyterLab Dark`."""
        self.page.evaluate(
            "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })",
            name,
        )
        is_light = str(name.endswith("Light")).lower()
        self.page.wait_for_selector(f"body[data-jp-theme-light='{is_light}']", state="attached")


class Browser:
    """A browser with the same window for every tab."""

    def __init__(self, context: BrowserContext, *, is_shooting: bool) -> None:
        self.context = context
        self.is_shooting = is_shooting

    @contextmanager
    def tab(self) -> Iterator[Lab]:
        """Open a tab; it is closed behind its user."""
        opened = Lab(self.context, is_shooting=self.is_shooting)
        try:
            yield opened
        finally:
            opened.page.close()


@contextmanager
def browser(folder: Path, *, is_shooting: bool = False) -> Iterator[Browser]:
    """Open a browser with its profile in `folder`."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder / "profile"),
            executable_path=shutil.which("chromium"),
            headless=True,
            args=ARGUMENTS,
            viewport={"width": 1100, "height": 1300},
        )
        context.set_default_timeout(60_000)
        try:
            yield Browser(context, is_shooting=is_shooting)
        finally:
            context.close()
