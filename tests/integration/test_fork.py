"""Runs `fork_checks.py` in an interpreter of its own.

What is forked has to be like a user's process, with clients only. Other tests leave gRPC servers
behind in this one, and no process that holds one survives a fork.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.timeout(300)
@pytest.mark.long
def test_clients_survive_a_fork_of_their_process():
    checks = Path(__file__).with_name("fork_checks.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        checks,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
