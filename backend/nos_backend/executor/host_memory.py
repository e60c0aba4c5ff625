"""What memory this machine has left, asked of the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def host_memory_bytes() -> int:
    """Return what this machine, or the cgroup this process is in, can still give.

    The least of MemAvailable and of limit minus use of every cgroup (v1 or v2) from ours to the root.
    """
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_room(Path("/proc/self/cgroup").read_text().splitlines())])


def _cgroup_room(lines: Sequence[str]) -> list[int]:
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, use_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_name, use_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for level in (folder, *folder.parents):
            limit, use = _read_number(level / limit_name), _read_number(level / use_name)
            if limit is not None and use is not None:
                found.append(max(0, limit - use))
            if level == root:
                break
    return found


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
