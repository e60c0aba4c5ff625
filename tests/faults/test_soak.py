"""The soak, for seconds instead of minutes: `benchmarks/soak.py` judges, this looks at its verdict."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accept import Accept
from tests.servers import ROOT, find_weights


@pytest.mark.timeout(700)
@pytest.mark.accept("B7", "B8", "B9")
@pytest.mark.long
def test_kills_no_memory_and_churn_lose_no_frame_and_leave_nothing(
    tmp_path: Path, accept: Accept
) -> None:
    seconds, slack = ("120", "1") if accept.strict else ("6", "4")
    weights = {"NOS_WEIGHTS_DIR": str(find_weights(tmp_path)), "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOS_")}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "soak.py"),
            "--seconds",
            seconds,
            "--slack",
            slack,
        ],
        env={**inherited, **weights},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    (faults,) = re.findall(r"faults injected: (\d+)", done.stdout)
    print(done.stdout)
    assert int(faults) > 2
