"""From a fresh clone to a served model, with nothing but Python and make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: A model hub that answers nobody.
CLOSED = "http://127.0.0.1:9"


def make(folder: Path, *arguments: str) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NOS_", "VIRTUAL_ENV", "PYTHON", "MAKE", "PYTEST"))
    }
    python = f"PYTHON={sys.base_prefix}/bin/python3"
    done = subprocess.run(
        ["make", python, *arguments],
        cwd=folder,
        env={**kept, "HF_ENDPOINT": CLOSED, "HF_HOME": str(folder / "no-cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.accept("A1")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_clone_runs_the_demo_and_its_tests_without_a_model_hub(tmp_path, accept):
    if not accept.strict:
        pytest.skip("installs everything anew; `make accept` does")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    said = make(clone, "demo")
    for name in ("nos/digits", "nos/edges", "sentence-transformers/all-MiniLM"):
        assert name in said
    assert (clone / "build" / "demo" / "edges.png").is_file()
    assert " passed" in make(clone, "test", "ARGS=tests/unit tests/integration/test_models.py -q")
