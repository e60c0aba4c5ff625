"""What an import pulls in; the static half is in `make lint`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from nos_backend.cluster.launch import DASHBOARD_ON_DEMAND

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked here")
sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """The top-level packages in `sys.modules` after `code`."""
    names = run(f"{code}\nimport sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))")
    return set(names.split())


#: Names of the package are loaded when they are first used.
ALL_OF_IT = "import nos; [getattr(nos, name) for name in nos.__all__]"


@pytest.mark.accept("A2")
def test_import_nos_needs_no_server_stack():
    heavy = {"torch", "dask", "distributed", "pydantic", "tornado", "typer", "rich", "IPython"}
    assert not loaded_by(ALL_OF_IT) & heavy


@pytest.mark.accept("A2")
def test_import_nos_is_quick(accept):
    code = f"import time; t = time.perf_counter(); {ALL_OF_IT}; print(time.perf_counter() - t)"
    accept.figure(min(float(run(code)) for _ in range(3)), 1.0, "s")


@pytest.mark.parametrize("package", ["worker", "executor", "scheduling"])
def test_package_imports_on_a_bare_machine(package):
    blocked = {"dask", "distributed", "pydantic", "pydantic_settings", "cryptography", "psutil"}
    walk = f"""
import importlib, pkgutil
package = importlib.import_module("nos_backend.{package}")
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    run(BLOCKED.format(blocked=blocked) + walk)


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("nos_backend.supervisor", {"grpc", "dask", "distributed", "torch"}),
        ("nos_backend.app", {"torch", "transformers", "safetensors"}),
        ("nos_backend.cluster.preload", {"torch", "grpc", "transformers"}),
        ("nos_backend.cluster", {"torch", "transformers", "safetensors"}),
        ("nos_backend.worker.service", {"torch", "dask", "transformers"}),
        ("nos_backend.executor.forkserver", {"grpc", "dask", "nos", "pydantic", "transformers"}),
        ("nos_backend.hub", {"torch", "transformers", "safetensors", "grpc", "nos"}),
    ],
)
def test_process_never_imports(module, never):
    assert not loaded_by(f"import {module}") & never


def test_a_scheduler_of_ours_starts_without_the_library_of_its_pages():
    told = f"import os; os.environ.update({DASHBOARD_ON_DEMAND!r})"
    assert "bokeh" not in loaded_by(f"{told}; import nos_backend.cluster.preload")
