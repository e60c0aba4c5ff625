"""The data plane imports where only its few packages are, and never imports torch."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
BANNED = {"torch", "dask", "distributed", "pydantic", "cryptography", "tornado"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise ImportError(f"the data plane imports {name}")
sys.meta_path.insert(0, Refuse())
import nos_backend.worker.service
import nos_backend.scheduling.device_queue
assert not BANNED & set(sys.modules)
"""


def test_the_data_plane_imports_without_torch_dask_pydantic_and_cryptography() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
