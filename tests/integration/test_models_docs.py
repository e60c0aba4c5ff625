"""The examples of the README and of docs/models.md run."""

import os
import re
import subprocess
import sys

import pytest

from tests.servers import ROOT


def run(script, server, folder):
    """Run a page's code as a user of the server would."""
    settings = {
        "NOS_ADDRESS": server.address,
        "NOS_TOKEN_FILE": str(server.token_file),
        "NOS_STATE_DIR": str(server.state_dir),
    }
    file = folder / "page.py"
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, **settings},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(300)  # two models, one of 90 MB, and torch in the script
def test_examples_of_the_readme_run(server, client, tmp_path):
    text = (ROOT / "README.md").read_text()
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    script, stop, rest = script.rpartition("nos.stop()")  # it would end the server of all tests
    assert stop
    assert rest.strip().startswith("#")
    assert run(script, server, tmp_path).count("\n") == 16
    client.unregister("me/scale")


@pytest.mark.timeout(300)  # exporting a network takes a while on a busy machine
def test_examples_of_the_page_run(server, tmp_path):
    text = (ROOT / "docs" / "models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    assert run("\n".join(blocks), server, tmp_path) == "('SCALE = 2', 'def weigh')\n"
