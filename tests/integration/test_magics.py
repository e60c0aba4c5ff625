"""`%nos` in real kernels against a real backend."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import nos
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from nbclient import NotebookClient
from nos.errors import ModelNotFoundError

from tests.browser.lab import isolated
from tests.servers import FAKE_MODELS, ROOT, Server, wait_for

REPLY_S = 60.0


@dataclass(kw_only=True)
class Outcome:
    """What a cell did."""

    ok: bool
    stdout: str = ""
    stderr: str = ""
    error: list[str] = field(default_factory=list)
    bundle: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return str(self.bundle.get("text/plain", ""))


class Kernel:
    """A kernel and the client of a front end."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    def run(self, code: str) -> Outcome:
        outcome = Outcome(ok=False)

        def take(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                name = content["name"]
                setattr(outcome, name, getattr(outcome, name) + content["text"])
            elif message["msg_type"] == "execute_result":
                outcome.bundle = content["data"]
            elif message["msg_type"] == "error":
                outcome.error = content["traceback"]

        reply = self.client.execute_interactive(code, output_hook=take, timeout=REPLY_S)
        outcome.ok = reply["content"]["status"] == "ok"
        return outcome

    def good(self, code: str) -> Outcome:
        outcome = self.run(code)
        assert outcome.ok, (outcome.error, outcome.stderr)
        return outcome

    def complete(self, code: str) -> list[str]:
        reply = self.client.complete(code, len(code), reply=True, timeout=REPLY_S)
        return list(reply["content"]["matches"])


@pytest.fixture(scope="module")
def make_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Kernel]]:
    kernels = []

    def make() -> Kernel:
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(env=isolated(tmp_path_factory.mktemp("kernel")))
        client = manager.blocking_client()
        client.start_channels()
        kernels.append(Kernel(manager, client))
        client.wait_for_ready(timeout=REPLY_S)
        return kernels[-1]

    yield make
    for kernel in kernels:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)
        kernel.manager.cleanup_resources()


@pytest.fixture(scope="module")
def kernel(make_kernel: Callable[[], Kernel], server: Server) -> Kernel:
    """A kernel that uses the run's server."""
    started = make_kernel()
    started.good("%load_ext nos")
    started.good(f"%nos connect {server.address} --token-file {server.token_file}")
    return started


@pytest.fixture(scope="module")
def lonely(make_kernel: Callable[[], Kernel]) -> Kernel:
    """A kernel that finds no backend."""
    started = make_kernel()
    started.good("%load_ext nos")
    return started


ADDER = """%%nos model me/adder
class Adder:
    def __call__(self, a: int, b: int = 1) -> int:
        return a + b"""
NOTEBOOK = [
    "%load_ext nos",
    f"%nos start --models {FAKE_MODELS}",
    "%nos status",
    "%nos models",
    "%nos load nos/digits",
    "import numpy as np\nimages = np.zeros((3, 8, 8), np.float32)",
    "%nos run nos/digits {images} -o scores",
    "assert scores.shape == (3, 10), scores",
    "%nos map nos/digits $images -o rows",
    "assert [row.shape for row in rows] == [(10,)] * 3, rows",
    "%nos info nos/digits",
    "%nos profile nos/digits",
    "%nos stream nos/edges",
    "%nos mem",
    ADDER,
    "%nos run me/adder {41} -o answer",
    "assert answer == 42, answer",
    "%nos scale me/adder 1",
    "class Twice:\n    def __call__(self, x: int) -> int:\n        print('saw', x)\n        return 2 * x",
    "%nos register $Twice --name me/twice",
    "%nos run me/twice {4}",
    "%nos logs me/twice",
    "%nos unload nos/digits",
    "%nos stop",
    "import sys\nassert 'torch' not in sys.modules",
]
WRONG = "%nos wxyz"
RAISES = """%%nos model me/x
class A:
    def __init__(self):
        1 / 0
    def __call__(self) -> int:
        return 1"""
EXAMPLES = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.accept("G1")
def test_a_notebook_starts_uses_and_stops_a_backend(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(code) for code in [*NOTEBOOK, WRONG]]
    cells[-1].metadata["tags"] = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    runner = NotebookClient(notebook, timeout=90, kernel_name="python3")
    runner.execute(env=isolated(tmp_path))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "execute_result" or "text/html" in output.data, cell.source
    said = {cell.source: "".join(map(str, cell.outputs)) for cell in cells}
    assert "ready" in said["%nos status"]
    assert "nos/digits" in said["%nos models"]
    assert "chosen" in said["%nos profile nos/digits"]
    (wrong,) = cells[-1].outputs
    assert wrong.text.strip() == "UsageError: no command 'wxyz'; %nos help lists the commands"
    assert not list((tmp_path / "nos").rglob("backend.json"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[dict[str, str]]:
    """The environment of somebody whose server runs already, so that `%nos start` joins it."""
    yield {**isolated(tmp_path_factory.mktemp("reader")), "NOS_STATE_DIR": str(server.state_dir)}
    with (
        nos.connect(server.address, token_file=str(server.token_file)) as client,
        contextlib.suppress(ModelNotFoundError),
    ):
        client.unregister("me/templates")


@pytest.mark.accept("G4")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda it: it.stem)
def test_every_example_runs_and_reads_well_as_saved(path: Path, reader: dict[str, str]) -> None:
    saved = nbformat.read(path, as_version=4)
    assert "widgets" not in saved.metadata
    for cell in saved.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            if output.output_type in ("execute_result", "display_data"):
                assert "text/plain" in output.data
                assert "application/vnd.jupyter.widget-view+json" not in output.data
                assert "text/html" in output.data or "%nos" not in cell.source
    runner = NotebookClient(nbformat.from_dict(saved), timeout=90, kernel_name="python3")
    runner.execute(env=reader)
    for book in (saved, runner.nb):
        assert not re.search(r"nos_[\w-]{32}", nbformat.writes(book))


def test_what_the_list_of_examples_links_is_there() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    names = re.findall(r"\]\(([^)]+)\)", listed)
    assert "02-your-own-model.ipynb" in names
    assert [name for name in names if not (ROOT / "examples" / name).exists()] == []


@pytest.mark.accept("G1")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%nos load", "required: MODEL. Usage: %nos load [-h] MODEL"),
        ("%nos run nos/nothing {1}", "nos/nothing"),
        ("%nos run nos/digits {'a text'}", "images"),
        ("%nos run nos/digits {undefined}", "{undefined}: NameError"),
        ("%nos run nos/digits -m nothing", "nothing"),
        (
            "%nos load fake/broken-init",
            "cannot be loaded: OSError: weights are missing. %nos debug",
        ),
        ("%nos run fake/raise ValueError text", "ModelError: ValueError: text. %nos debug"),
        ("%%nos model me/x\nclass A", "the cell does not compile: line 2"),
        ("%%nos model me/x\na = 1", "the cell defines no class"),
        ("%%nos model me/x\nclass A: pass\nclass B: pass", "--class NAME"),
        (RAISES, "ZeroDivisionError: division by zero"),
        ("%%nos status\nx", "takes no cell"),
        ("%nos bench nos/echo {1} --concurrency many", "expected numbers as 1,4,16, got 'many'"),
        ("%nos bench nos/echo {1} --concurrency 0", "1 to 1024"),
        ("%nos bench nos/echo {1} -n 0", "nothing to measure"),
        ("%nos bench fake/raise ValueError text", "ModelError: ValueError: text. %nos debug"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kernel: Kernel, line: str, says: str) -> None:
    outcome = kernel.run(line)
    told = (outcome.stderr or "".join(outcome.error)).strip()
    assert not outcome.ok
    assert says in told
    assert "\n" not in told


@pytest.mark.accept("G1")
def test_no_backend_is_said_at_once_with_the_next_step(lonely: Kernel) -> None:
    begin_s = time.monotonic()
    (line,) = lonely.run("%nos status").error
    assert time.monotonic() - begin_s < 15
    assert "\n" not in line
    assert "nos.start()" in line or "nos serve" in line


def test_completion_never_waits_for_a_backend_that_is_not_there(lonely: Kernel) -> None:
    lonely.complete("%nos load a")  # the first one loads the other completers
    begin_s = time.monotonic()
    assert "nos/digits" not in lonely.complete("%nos load nos/")
    assert time.monotonic() - begin_s < 15


@pytest.mark.accept("G1")
def test_models_and_commands_complete(kernel: Kernel) -> None:
    wait_for(lambda: kernel.complete("%nos load nos/di") == ["nos/digits"], "the name is offered")
    assert kernel.complete("%nos con") == ["connect"]


def test_results_are_objects_with_html_and_text(kernel: Kernel) -> None:
    outcome = kernel.good("models = %nos models nos/\nmodels")
    assert {"text/plain", "text/html"} <= set(outcome.bundle)
    assert kernel.good("[model.name for model in models]").text.startswith("['nos/digits'")


@pytest.mark.parametrize("line", ["%nos status", "%nos models", "%nos info nos/echo", "%nos mem"])
def test_the_text_of_a_result_is_for_people_too(kernel: Kernel, line: str) -> None:
    bundle = kernel.good(line).bundle
    assert "<table" in bundle["text/html"]
    assert "=" not in bundle["text/plain"].partition("\n")[0]


def test_loaded_models_are_told_from_the_others(kernel: Kernel) -> None:
    def loaded() -> str:
        return kernel.good("%nos models nos/ --loaded").text

    kernel.good("%nos load nos/edges")
    wait_for(lambda: "nos/edges" in loaded(), "the model counts as loaded")
    kernel.good("%nos unload nos/edges")
    wait_for(lambda: "nos/edges" not in loaded(), "the model no longer counts as loaded")


def test_a_semicolon_hides_what_a_command_gave(kernel: Kernel) -> None:
    assert not kernel.good("%nos status;").bundle
    assert kernel.good("%nos status").bundle


def test_where_to_connect_may_come_from_the_notebook(
    kernel: Kernel, server: Server, tmp_path: Path
) -> None:
    kernel.good(f"where, key = {server.address!r}, {str(server.token_file)!r}")
    (tmp_path / "wrong").write_text("nos_wrong")
    (line,) = kernel.run(f"%nos connect $where --token-file {tmp_path / 'wrong'}").error
    assert line.startswith("UnauthenticatedError: ")
    assert "\n" not in line
    assert "ready" in kernel.good("%nos connect $where --token-file {key}").text


def test_a_cell_is_the_first_argument_of_run(kernel: Kernel) -> None:
    kernel.good("%%nos run nos/echo -o heard\nhello {name} $5")
    assert kernel.good("heard").text == "'hello {name} $5'"


def test_a_redefined_cell_answers_with_its_new_code(kernel: Kernel) -> None:
    cell = (
        "%%nos model me/constant\nclass Constant:\n    def __call__(self) -> int:\n        return "
    )
    for number in (1, 2):
        kernel.good(f"{cell}{number}")
        kernel.good("%nos run me/constant -o number")
        assert kernel.good("number").text == str(number)


def test_a_models_error_is_one_line_and_its_traceback_counts_the_cells_lines(
    kernel: Kernel,
) -> None:
    kernel.good(
        "%%nos model me/raises\nclass Raises:\n    def __call__(self) -> int:\n        return 1 // 0"
    )
    outcome = kernel.run("%nos run me/raises")
    (line,) = outcome.error
    assert "ModelError" in line
    assert "ZeroDivisionError" in line
    traceback = kernel.good("%nos debug").text
    assert "line 4, in __call__" in traceback
    assert "<cell " in traceback


def test_interrupting_ends_the_call_and_leaves_the_kernel_usable(
    kernel: Kernel, client: nos.Client
) -> None:
    def running() -> int:
        return sum(worker.num_running for worker in client.status().workers)

    request = kernel.client.execute("%nos run fake/slow-alone {8.0}")
    wait_for(running, "the model runs")
    kernel.manager.interrupt_kernel()
    interrupted_s = time.monotonic()
    while (reply := kernel.client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != request:
        pass
    assert time.monotonic() - interrupted_s < 6
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert reply["content"]["traceback"] == [
        "KeyboardInterrupt: interrupted; the call is cancelled"
    ]
    kernel.good("%nos run nos/echo {1}")


def test_an_interrupted_map_says_how_far_it_is_and_keeps_what_there_is(kernel: Kernel) -> None:
    request = kernel.client.execute("%nos map fake/slow-alone {[0.0] * 3 + [8.0]} -o part")
    said = ""
    while "3 of 4" not in said:
        message = kernel.client.get_iopub_msg(timeout=REPLY_S)
        if message["parent_header"].get("msg_id") == request:
            said = message["content"].get("data", {}).get("text/plain", "")
    kernel.manager.interrupt_kernel()
    while (reply := kernel.client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != request:
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.good("len(part)").text == "3"


@pytest.mark.accept("G1")
def test_loading_the_extension_twice_changes_nothing(kernel: Kernel) -> None:
    kernel.good("%reload_ext nos")
    kernel.good("%load_ext nos")
    assert "ready" in kernel.good("%nos").text


def test_two_notebooks_and_a_terminal_use_one_backend(
    kernel: Kernel,
    make_kernel: Callable[[], Kernel],
    server: Server,
    client: nos.Client,
    tmp_path: Path,
) -> None:
    people = {"ann": "author", "bob": "author", "carol": "viewer"}
    tokens = {name: client.create_token(name, role=role) for name, role in people.items()}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token.secret)
    ann, bob = kernel, make_kernel()
    bob.good("%load_ext nos")
    connect = f"%nos connect {server.address} --token-file {tmp_path}"
    ann.good(f"{connect}/ann")
    bob.good(f"{connect}/bob")

    def carol(*words: str) -> subprocess.CompletedProcess[str]:
        where = ["--address", server.address, "--token-file", str(tmp_path / "carol")]
        command = [sys.executable, "-m", "nos.cli", *where, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    try:
        ann.good(ADDER.replace("me/adder", "ann/adder"))
        bob.good(ADDER.replace("me/adder", "bob/adder"))
        for notebook, others in ((ann, "bob/adder"), (bob, "ann/adder")):
            assert others in notebook.good("%nos models").text
            assert "42" in notebook.good(f"%nos run {others} {{41}}").text
            assert "another owner's" in notebook.run(f"%nos unregister {others}").error[0]
        listed = carol("models")
        assert listed.returncode == 0, listed.stderr
        assert {"ann/adder", "bob/adder"} <= set(re.findall(r"\w+/\w+", listed.stdout))
        refused = carol("unload", "ann/adder")
        assert refused.returncode != 0
        assert "viewer" in refused.stderr
        for notebook in (ann, bob):
            assert notebook.good("import sys\n'torch' in sys.modules").text == "False"
            pid = notebook.good("import os\nos.getpid()").text
            # Who holds device memory has the driver mapped.
            assert "nvidia" not in Path(f"/proc/{pid}/maps").read_text()
    finally:
        kernel.good(f"%nos connect {server.address} --token-file {server.token_file}")
        for name in ("ann/adder", "bob/adder"):
            kernel.run(f"%nos unregister {name}")
        for token in tokens.values():
            client.revoke_token(token.info.token_id)


def test_help_lists_the_commands(kernel: Kernel) -> None:
    text = kernel.good("%nos help").stdout
    assert "join this user's backend" in text
    assert "-o NAME" in kernel.good("%nos help run").stdout


def test_a_load_that_takes_time_says_so_in_one_line_that_is_updated(kernel: Kernel) -> None:
    updates: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] in ("display_data", "update_display_data"):
            updates.append(message["content"]["data"]["text/plain"])

    kernel.client.execute_interactive("%nos load fake/slow-load", output_hook=take, timeout=REPLY_S)
    kernel.good("%nos unload fake/slow-load")
    assert len(updates) > 3
    assert updates[0].startswith("loading fake/slow-load ... ")
    assert updates[-1].startswith("loading fake/slow-load done ")


@pytest.mark.accept("G1")
def test_items_are_mapped_and_what_a_model_prints_and_did_is_shown(kernel: Kernel) -> None:
    kernel.good(
        "%%nos model me/printer\nclass Printer:\n    def __call__(self, x: int) -> int:\n"
        "        print('saw', x)\n        return x + 1"
    )
    mapped = kernel.good("%nos map me/printer {[1, 2, 3]} -o numbers")
    assert "3 results" in mapped.text
    assert "text/html" in mapped.bundle
    assert kernel.good("numbers").text == "[2, 3, 4]"
    wait_for(lambda: "saw 3" in kernel.good("%nos logs me/printer").text, "the line is kept")
    assert "me/printer" in kernel.good("%nos stats").text
    assert "me/printer" in kernel.good("%nos scale me/printer 1").text
    bench = kernel.good("%nos bench me/printer {1} -n 6 --concurrency 1,3 -o bench")
    assert "p99 ms" in bench.text
    assert "<table" in bench.bundle["text/html"]
    counts = "[(it.concurrency, len(it.latencies_s), it.rate_hz > 0) for it in bench.points]"
    assert kernel.good(counts).text == "[(1, 6, True), (3, 6, True)]"
    kernel.good("%nos unregister me/printer")
    assert "me/printer" not in kernel.good("%nos models me/").text


@pytest.mark.parametrize("line", ["%nos browse", "%nos register", "%nos panel nos/digits"])
def test_widgets_have_a_form_for_saved_notebooks(kernel: Kernel, line: str) -> None:
    assert {"text/plain", "text/html"} <= set(kernel.good(line).bundle)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%nos panel nos/none", "nos/none"),
        ("%nos stream nos/digits", "takes no image"),
        ("%nos stream nos/edges --source text", "expects images"),
        ("%nos map nos/digits text", "expects a list"),
    ],
)
def test_a_widget_that_cannot_be_is_refused_in_one_line(
    kernel: Kernel, line: str, says: str
) -> None:
    outcome = kernel.run(line)
    told = (outcome.stderr or "".join(outcome.error)).strip()
    assert not outcome.ok
    assert says in told
    assert "\n" not in told
