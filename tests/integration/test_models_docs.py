"""The examples of docs/models.md run."""

import os
import re
import subprocess
import sys

import pytest

from tests.servers import ROOT


@pytest.mark.timeout(300)  # exporting a network takes a while on a busy machine
def test_examples_of_the_page_run(server, tmp_path):
    text = (ROOT / "docs" / "models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    settings = {"NOS_ADDRESS": server.address, "NOS_TOKEN_FILE": str(server.token_file)}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "('SCALE = 2', 'def weigh')\n"
