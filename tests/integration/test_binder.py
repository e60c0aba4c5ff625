"""What mybinder.org does with `binder/`: its steps, in an environment of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nos
import psutil
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.accept import Accept
from tests.browser.lab import isolated
from tests.servers import ROOT, find_weights

BINDER = ROOT / "binder"
DEMO = "examples/01-quickstart.ipynb"
MAX_BYTES = 2 << 30


@contextmanager
def session(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of one visitor's container; its backend ends behind it."""
    try:
        # Visitors have the weights from the model hub, which no test needs.
        yield {**isolated(folder), "NOS_WEIGHTS_DIR": str(find_weights(folder / "weights"))}
    finally:
        nos.stop(state_dir=folder / "nos")


@pytest.mark.timeout(300)
def test_start_has_a_backend_ready_and_hands_over_to_what_it_is_given(tmp_path: Path) -> None:
    with session(tmp_path) as environment:
        code = "import nos, sys; print(nos.connect().status().state, *sys.argv[1:])"
        done = subprocess.run(
            [BINDER / "start", sys.executable, "-c", code, "two words", "$x"],
            env={**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
    assert done.stdout == "ready two words $x\n"


def test_the_image_has_a_python_that_we_run_on_and_the_demo_is_there() -> None:
    environment = yaml.safe_load((BINDER / "environment.yml").read_text())
    (python,) = [it for it in environment["dependencies"] if str(it).startswith("python=")]
    assert SpecifierSet(">=3.11").contains(python.partition("=")[2])
    assert DEMO in (BINDER / "postBuild").read_text()
    assert (ROOT / DEMO).exists()


class Usage(threading.Thread):
    """Notes the most memory that processes hold at once, shared pages counted once."""

    def __init__(self, root: psutil.Process, state_dir: Path) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._state_dir = state_dir
        self._ended = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._ended.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, self._look())

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _look(self) -> int:
        from nos.wire.local import read_backend

        roots = [self._root]
        if record := read_backend(self._state_dir):
            roots.append(psutil.Process(record.pid))
        total = 0
        for root in roots:
            for process in (root, *_children(root)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
        return total


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def run_demo(environment: dict[str, str], state_dir: Path) -> int:
    """Run the demo notebook as a visitor does; return the most bytes that all of it held at once."""
    command = ["jupyter", "execute", "--timeout=120", DEMO]
    process = subprocess.Popen([BINDER / "start", *command], cwd=ROOT, env=environment)
    usage = Usage(psutil.Process(process.pid), state_dir)
    usage.start()
    try:
        assert process.wait(400) == 0
    finally:
        process.kill()
        usage.stop()
    return usage.peak_bytes


@pytest.mark.accept("G5")
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_image_is_built_and_its_notebook_runs_in_two_gigabytes(
    tmp_path: Path, accept: Accept
) -> None:
    # A venv in the place of conda's environment: postBuild asks for nothing else of it.
    target = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", target], check=True, timeout=120)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with session(tmp_path) as mine:
        environment = {**clean, **mine, "PATH": f"{target / 'bin'}:{os.environ['PATH']}"}
        environment["PYTHONPATH"] = ""
        subprocess.run([BINDER / "postBuild"], cwd=ROOT, env=environment, check=True, timeout=900)
        peak_bytes = run_demo(environment, tmp_path / "nos")
    assert peak_bytes > 200 << 20, "nothing was measured"
    accept.figure(peak_bytes / 2**30, MAX_BYTES / 2**30, "GiB")
