"""Our server beside the best-known Python inference servers: one load generator, one table.

Usage: `python benchmarks/peers/table.py [--peers NAME ...] [--seconds S] [--rounds N] [--json FILE]`.

Every peer serves the same three workloads with one process for the model and one thread in it, in an
environment of its own under `build/peers` that is made at the first run; one that cannot be made is named
with the reason. They run one after the other, ours first; a round goes through all of them. Figures are
medians over rounds. `server_us` is processor time of the whole tree of the server's processes per request,
`client_us` that of the load generator: where the machine is shared, these two say most. With `--rows FILE`
the figures of earlier runs that are in the file count too, so that a long run can be taken in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
from peers import HERE, PEERS, ROOT, VENV_OF, WORKLOADS, install, python_of, version_of
from tqdm import tqdm

sys.path.insert(0, str(HERE.parent))
from report import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peers import Peer, Road

_START_S: Final = 120.0
_STOP_S: Final = 12.0
#: Callers by workload; batches want more of them.
CALLERS: Final = {"echo": (1, 16), "frame": (1, 16), "mlp": (1, 32)}
COLUMNS: Final = (
    *("workload", "callers", "peer", "road", "rate_hz", "p50_ms", "p99_ms", "server_us"),
    *("client_us", "memory_mb", "start_s", "num_errors", "num_wrong"),
)


class Tree:
    """A server's process and all that it started, those included that ended since."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[int, psutil.Process] = {}
        #: Processor time of each, as seen last.
        self._used_s: dict[int, float] = {}

    def living(self) -> list[psutil.Process]:
        """Return the processes that there are."""
        try:
            for process in (self._root, *self._root.children(recursive=True)):
                self._seen.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._seen.values() if _lives(process)]

    def used_s(self) -> float:
        """Return the processor time of all of them."""
        for process in self.living():
            try:
                times = process.cpu_times()
                self._used_s[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return sum(self._used_s.values())

    def memory_bytes(self) -> int:
        """Return their memory, what they share counted once."""
        total = 0
        for process in self.living():
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return total

    def stop(self) -> None:
        """End them all."""
        processes = self.living()
        if self._root.is_running():
            self._root.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=_STOP_S)
        for process in {*alive, *self.living()}:
            process.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_ports(num: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for it in sockets:
            it.bind(("127.0.0.1", 0))
        return [it.getsockname()[1] for it in sockets]


def generate(
    road: Road, workload: str, ports: Sequence[int], folder: str, callers: int, seconds: float
) -> dict[str, Any]:
    """Run the load generator; an outcome without answers says why."""
    command = [str(python_of("load")), str(HERE / "load.py"), "--client", road.client]
    command += ["--workload", workload, "--port", str(ports[road.port]), "--path", road.path]
    command += ["--folder", folder, "--callers", str(callers), "--seconds", str(seconds)]
    command += ["--warm-s", str(min(0.5, seconds))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "sdk")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds + 30,
            check=False,
        )
        outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"rate_hz": 0.0, "num_sent": 0, "num_errors": 1, "error": "no end"}
    except (IndexError, ValueError):
        return {"rate_hz": 0.0, "num_sent": 0, "num_errors": 1, "error": done.stderr[-300:]}
    return outcome


@contextmanager
def running(peer: Peer, workload: str, ports: Sequence[int]) -> Iterator[tuple[Tree, str, Path]]:
    """Run a peer's server in a folder of its own, which is gone with it."""
    with tempfile.TemporaryDirectory(prefix="p", ignore_cleanup_errors=True) as folder:
        python = python_of(peer.venv)
        command = shlex.split(peer.command.format(*ports, folder=folder))
        environment = {
            **os.environ,
            **{it: value.format(*ports) for it, value in peer.environment.items()},
            "PEER_WORKLOAD": workload,
            "PYTHONPATH": f"{HERE}:{HERE / 'servers'}",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": folder,
            "VIRTUAL_ENV": str(python.parent.parent),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }
        log = Path(folder) / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(python), *command],
                cwd=HERE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        tree = Tree(process.pid)
        try:
            yield tree, folder, log
        finally:
            tree.stop()
            process.wait()


def measure(name: str, workload: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Start a peer, yield what every road to it does, and stop it."""
    peer = PEERS[name]
    roads = {it: road for it, road in peer.roads.items() if workload in road.workloads}
    if not roads:
        return
    ports, begun_s = free_ports(4), time.perf_counter()
    row = {"workload": workload, "peer": name}
    with running(peer, workload, ports) as (tree, folder, log):
        probe = next(iter(roads.values()))
        while True:
            found = generate(probe, workload, ports, folder, 1, 0.2)
            if found["rate_hz"] and not found["num_errors"]:
                break
            if time.perf_counter() - begun_s > _START_S or not tree.living():
                says = log.read_text(errors="replace").strip()[-300:]
                yield {**row, "error": f"it does not answer: {found.get('error')}; {says}"}
                return
            time.sleep(0.3)
        start_s = time.perf_counter() - begun_s
        for road_name, road in roads.items():
            for callers in CALLERS[workload]:
                before_s = tree.used_s()
                found = generate(road, workload, ports, folder, callers, seconds)
                server_us = (tree.used_s() - before_s) / max(1, found.pop("num_sent")) * 1e6
                memory_mb = tree.memory_bytes() / 1e6
                yield {
                    **row,
                    "road": road_name,
                    "callers": callers,
                    "server_us": server_us,
                    "memory_mb": memory_mb,
                    "start_s": start_s,
                    **found,
                }


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each point, sorted as in the table; failures count only where nothing else is."""
    points: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("rate_hz"):
            key = tuple(row[it] for it in ("workload", "callers", "peer", "road"))
            points[key].append(row)
    found = []
    for same in points.values():
        middle = dict(same[0])
        for column, value in middle.items():
            if isinstance(value, float):
                middle[column] = statistics.median(it[column] for it in same)
        middle["num_rounds"] = len(same)
        for column in ("num_errors", "num_wrong"):
            middle[column] = sum(it[column] for it in same)
        found.append(middle)
    order = list(WORKLOADS)
    found.sort(key=lambda it: (order.index(it["workload"]), it["callers"], -it["rate_hz"]))
    return found


def show(rows: Sequence[dict[str, Any]], versions: dict[str, str]) -> None:
    """Print the table."""
    cells = [COLUMNS, *([_text(row[it]) for it in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    before = None
    for row, line in zip([None, *rows], cells, strict=True):
        point = row and (row["workload"], row["callers"])
        if before is not None and point != before:
            print()
        before = point
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print("\n" + ", ".join(f"{name} {it}" for name, it in versions.items()))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


def main() -> None:
    """Install what is missing, measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--workloads", nargs="*", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each point")
    parser.add_argument("--rounds", type=int, default=1, help="how often all is run")
    parser.add_argument(
        "--rows", type=Path, help="add every figure to this file, and use what is there"
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    # Servers are stopped also where this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    missing = {name: why for name in VENV_OF if (why := _missing(name, options.peers))}
    if "load" in missing:
        raise SystemExit(f"the load generator cannot be installed: {missing['load']}")
    rows: list[dict[str, Any]] = []
    if options.rows and options.rows.exists():
        rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    peers = [name for name in options.peers if PEERS[name].venv not in missing]
    turns = [
        (it, name) for _ in range(options.rounds) for it in options.workloads for name in peers
    ]
    for workload, name in tqdm(turns, desc="servers", file=sys.stderr):
        for row in measure(name, workload, options.seconds):
            rows.append(row)
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    table = medians(rows)
    versions = {name: version_of(name) for name in PEERS if any(name == it["peer"] for it in table)}
    show(table, versions)
    for row in rows:
        if row.get("error"):
            print(f"! {row['peer']}, {row.get('road', '-')}, {row['workload']}: {row['error']}")
    for name, why in missing.items():
        print(f"! {name} cannot be installed here: {why}")
    if options.json:
        write_json(options.json, {"table": table, "versions": versions, "missing": missing})


def _missing(venv: str, names: Sequence[str]) -> str:
    """Make an environment that is needed; return why there is none."""
    needed = venv == "load" or any(PEERS[name].venv == venv for name in names)
    return install(venv) if needed else ""


if __name__ == "__main__":
    main()
