"""Classes, functions and what they need, from real notebooks to a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jupyter_client import KernelManager

from tests.browser.lab import isolated
from tests.integration.test_magics import REPLY_S, Kernel
from tests.servers import Server


@pytest.fixture(scope="module")
def kernel(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel in a folder of its own, with `client` connected to the run's server."""
    folder = tmp_path_factory.mktemp("notebook")
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=isolated(tmp_path_factory.mktemp("kernel")), cwd=str(folder))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=REPLY_S)
    kernel = Kernel(manager, client)
    kernel.good(
        "import time, nos, json\n"
        f"client = nos.connect({server.address!r}, token_file={str(server.token_file)!r})"
    )
    yield kernel
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def ask(kernel: Kernel) -> Callable[[str], Any]:
    """Evaluate an expression in the kernel."""
    return lambda expression: json.loads(kernel.good(f"print(json.dumps({expression}))").stdout)


FIRST = """
class Scorer:
    def __call__(self, x: int) -> int:
        return weigh(x)

    def count(self, upto: int):
        for number in range(upto):
            yield [FACTOR, number]
"""


@pytest.mark.accept("F1")
def test_class_of_a_cell_is_served_redefined_and_served_anew(kernel, ask, accept):
    kernel.good("FACTOR = 2\ndef weigh(x):\n    return FACTOR * x")
    kernel.good(FIRST)
    kernel.good("client.register(Scorer, name='warm-up'); client.model('warm-up')(1)")
    kernel.good(
        "begin = time.monotonic()\n"
        "made = client.register(Scorer, name='cell/scorer')\n"
        "old = client.model('cell/scorer')\n"
        "answer = old(21)\n"
        "took_s = time.monotonic() - begin"
    )
    assert ask("[made.version, answer, old.count(1).__next__()]") == [1, 42, [2, 0]]
    assert ask("made.collected") == ["FACTOR = 2", "def weigh"]
    accept.figure(ask("took_s"), 1.5, "s to register and answer")
    kernel.good("running = old.count(3)\nfirst = next(running)")
    kernel.good("FACTOR = 3")
    kernel.good(FIRST.replace("weigh(x)", "weigh(x) + 1"))
    kernel.good(
        "begin = time.monotonic()\n"
        "made = client.register(Scorer, name='cell/scorer')\n"
        "took_s = time.monotonic() - begin\n"
        "new = client.model('cell/scorer')"
    )
    assert ask("[made.version, new(21)]") == [2, 64]
    assert ask("[first, *running]") == [[2, 0], [2, 1], [2, 2]]
    assert ask("client.model('cell/scorer@v1')(21)") == 42
    accept.figure(ask("took_s"), 1.0, "s to register again")


def test_traceback_points_at_the_lines_of_the_cell(kernel):
    kernel.good("def fail(x):\n    y = x\n    raise KeyError(y)")
    number = int(kernel.good("get_ipython().execution_count - 2").text)
    kernel.good(
        "# the first line\n\nclass Failing:\n    def __call__(self, x: int):\n        fail(x)"
    )
    kernel.good("client.register(Failing, name='cell/failing')")
    shown = kernel.good(
        "try:\n    client.model('cell/failing')(7)\n"
        "except nos.errors.ModelError as error:\n    print(error.remote_traceback)"
    ).stdout
    assert f'File "<cell {number + 2}>", line 5, in __call__\n    fail(x)' in shown
    assert f'File "<cell {number}>", line 3, in fail\n    raise KeyError(y)' in shown


def test_live_object_is_refused_by_its_name_with_the_ways_out(kernel):
    kernel.good("import sqlite3\ndb = sqlite3.connect(':memory:')")
    kernel.good("class Reader:\n    def __call__(self):\n        return db.total_changes")
    refused = kernel.run("client.register(Reader, name='cell/reader')")
    told = "\n".join(refused.error)
    assert not refused.ok
    for part in ("Reader needs db", "sqlite3.Connection", "init=", "pickle=True"):
        assert part in told


def test_modules_of_the_notebooks_folder_travel_as_files(kernel, ask):
    kernel.good(
        "from pathlib import Path\n"
        "Path('shapes').mkdir(); Path('shapes/__init__.py').write_text('from shapes.side import SIDE')\n"
        "Path('shapes/side.py').write_text('import lengths\\nSIDE = lengths.TWO')\n"
        "Path('lengths.py').write_text('TWO = 2')\n"
        "import shapes"
    )
    kernel.good("class Area:\n    def __call__(self) -> int:\n        return shapes.SIDE ** 2")
    kernel.good("made = client.register(Area, name='cell/area')")
    assert ask("client.model('cell/area')()") == 4
    assert ask("made.collected") == [
        "import shapes",
        "file lengths.py",
        "file shapes/__init__.py",
        "file shapes/side.py",
    ]


def test_text_gets_the_names_of_a_namespace(kernel, ask):
    kernel.good("OFFSET = 5")
    kernel.good(
        "text = 'class Adder:\\n    def __call__(self, x: int):\\n        return x + OFFSET'"
    )
    kernel.good("client.register(text, name='cell/adder', namespace=globals())")
    assert ask("client.model('cell/adder')(1)") == 6


@pytest.mark.accept("F1")
def test_cell_magic_brings_what_its_class_needs_of_the_notebook(kernel, ask, server):
    kernel.good(f"%load_ext nos\n%nos connect {server.address} --token-file {server.token_file}")
    kernel.good("STEP = 10\ndef up(x):\n    return x + STEP")
    cell = "%%nos model cell/stepper\nclass Stepper:\n    def __call__(self, x: int):\n        return up(x)\n"
    kernel.good(cell)
    assert ask("client.model('cell/stepper')(1)") == 11
    kernel.good(cell.replace("up(x)", "up(up(x))"))
    assert ask("client.model('cell/stepper')(1)") == 21
