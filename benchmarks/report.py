"""Writes figures to a file, with the day and the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write_json(path: Path, figures: Any) -> None:
    """Write `figures` with today's date and this machine's description."""
    machine = [
        platform.machine(),
        f"{os.cpu_count()} cores",
        f"Python {platform.python_version()}",
        f"torch {version('torch')}",
        f"load {os.getloadavg()[0]:.1f}",
    ]
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": ", ".join(machine),
        "figures": figures,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
