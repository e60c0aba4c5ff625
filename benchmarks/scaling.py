"""Calls per second and their p99 by the number of replicas, time to a new replica, time of a reconciliation.

Usage: `python benchmarks/scaling.py [--seconds S] [--json FILE]`.

- `cpu`: a model that computes for some 18 ms on one core, on 1 and 2 workers pinned to a core each.
- `sleep`: a model that sleeps 20 ms, as the host of a GPU does, on 1 to 8 workers; a client process for every
  four replicas.
- `new replica`: from `client.scale` to its first answer, under traffic.
- `reconcile`: the pure state machine with 1,000 models and 50 simulated workers.

Each client keeps four calls per replica under way. Efficiency is calls per second over those of one replica,
by the number of replicas. Numbers of replicas are measured in turn, three times; figures are medians, and
efficiencies are taken within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nos
import psutil
from nos_backend.scheduling.placement import Needs, WorkerLoad
from nos_backend.scheduling.reconcile import Load, Reconciler
from report import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

NUM_WORKERS: Final = 8
CALLS_PER_REPLICA: Final = 4
REPLICAS_PER_CLIENT: Final = 4
WAIT_S: Final = 90.0
NUM_ROUNDS: Final = 3

MODELS: Final = """
import hashlib
import os
import time

BLOCK = bytes(1 << 20)


class Busy:
    def __call__(self) -> int:
        digest = hashlib.sha256()
        for _ in range(24):
            digest.update(BLOCK)
        return os.getpid()


class Sleep:
    def __call__(self) -> int:
        time.sleep(0.02)
        return os.getpid()
"""


@dataclass(kw_only=True)
class Row:
    """One number of replicas."""

    model: str
    num_replicas: int
    num_clients: int
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    efficiency: float = 1.0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Poll until it gives something true, and return that."""
    deadline_s = time.monotonic() + WAIT_S
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {WAIT_S:g} s: {what}")
        time.sleep(0.01)
    return value


class Calls:
    """Calls that are always under way, from this process."""

    def __init__(self, model: Any, num_calls: int) -> None:
        self._model = model
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._open = num_calls
        self._done = threading.Event()
        self.pids: set[int] = set()
        self.latencies_s: list[float] = []
        self.errors: list[BaseException] = []
        for _ in range(num_calls):
            self._send()

    def _send(self) -> None:
        sent_s = time.perf_counter()
        self._model.submit().add_done_callback(lambda call: self._take(call, sent_s))

    def _take(self, call: Future[int], sent_s: float) -> None:
        error = call.exception()
        with self._lock:
            if error is not None:
                self.errors.append(error)
            else:
                self.pids.add(call.result())
                self.latencies_s.append(time.perf_counter() - sent_s)
            if self._is_over.is_set() or error is not None:
                self._open -= 1
                if self._open == 0:
                    self._done.set()
                return
        self._send()

    def stop(self) -> None:
        """Let the last calls end; any that failed ends the program."""
        self._is_over.set()
        self._done.wait(WAIT_S)
        if self.errors:
            raise SystemExit(f"calls failed: {self.errors[0]!r}")


def client_main(arguments: argparse.Namespace) -> None:
    """Call a model until standard input ends; say what happened between two lines."""
    with nos.connect(arguments.address, token_file=arguments.token_file) as client:
        load = Calls(client.model(arguments.model), arguments.num_calls)
        wait_for(lambda: len(load.pids) == arguments.num_replicas or load.errors, "all replicas")
        print("ready", flush=True)
        sys.stdin.readline()
        first = len(load.latencies_s)
        start_s = time.perf_counter()
        sys.stdin.readline()
        took_s, seen = time.perf_counter() - start_s, load.latencies_s[first:]
        load.stop()
        print(json.dumps({"calls_per_s": len(seen) / took_s, "latencies_s": seen}), flush=True)


def measure(client: nos.Client, place: list[str], model: str, count: int, seconds: float) -> Row:
    """Measure a model with so many replicas."""
    scale(client, model, count)
    num_clients = -(-count // REPLICAS_PER_CLIENT)
    num_calls = CALLS_PER_REPLICA * count // num_clients
    command = [sys.executable, __file__, "--client", *place]
    command += ["--model", model, "--num-calls", str(num_calls), "--num-replicas", str(count)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(num_clients)
    ]
    pipes = [(child.stdin, child.stdout) for child in children]
    for _, said in pipes:
        if said is None or said.readline() != "ready\n":
            raise SystemExit("a client did not start")
    for moment in (0.0, seconds):
        time.sleep(moment)
        for told, _ in pipes:
            if told is not None:
                told.write("\n")
                told.flush()
    found = [json.loads(child.communicate()[0]) for child in children]
    latencies_s = sorted(it for item in found for it in item["latencies_s"])
    return Row(
        model=model,
        num_replicas=count,
        num_clients=num_clients,
        calls_per_s=sum(item["calls_per_s"] for item in found),
        p50_ms=1e3 * latencies_s[len(latencies_s) // 2],
        p99_ms=1e3 * latencies_s[int(0.99 * len(latencies_s))],
    )


def measure_rounds(
    client: nos.Client, place: list[str], model: str, counts: Sequence[int], seconds: float
) -> list[Row]:
    """Measure numbers of replicas in turn, so that each round compares within itself; return medians."""
    rounds: list[list[Row]] = []
    for _ in range(NUM_ROUNDS):
        rows = []
        for count in counts:
            if model == "bench/busy":
                scale(client, model, count)
                pin(client, model)
            rows.append(measure(client, place, model, count, seconds))
            rows[-1].efficiency = rows[-1].calls_per_s / rows[0].calls_per_s / count
        rounds.append(rows)
    client.scale(model, min=0, max=1)
    medians = []
    for found in zip(*rounds, strict=True):
        row = replace(found[0])
        for name in ("calls_per_s", "p50_ms", "p99_ms", "efficiency"):
            setattr(row, name, statistics.median(getattr(it, name) for it in found))
        medians.append(row)
        print(
            f"{model:12} {row.num_replicas} replicas {row.num_clients} clients"
            f" {row.calls_per_s:8.1f} calls/s p50 {row.p50_ms:7.1f} p99 {row.p99_ms:7.1f} ms"
            f" efficiency {row.efficiency:.2f}",
            flush=True,
        )
    return medians


def scale(client: nos.Client, model: str, count: int) -> None:
    """Have so many replicas, and wait for them."""
    client.scale(model, replicas=count)
    phases = ["serving"] * count
    wait_for(lambda: [it.phase for it in client.info(model).replicas] == phases, f"{count} serve")


def pin(client: nos.Client, model: str) -> None:
    """Give each worker that has the model, with its executors, one core."""
    pids = {worker.name: worker.pid for worker in client.status().workers}
    for number, replica in enumerate(client.info(model).replicas):
        root = psutil.Process(pids[replica.worker])
        for process in (root, *root.children(recursive=True)):
            process.cpu_affinity([number % (os.cpu_count() or 1)])


def new_replica_s(client: nos.Client, model: str, rounds: int) -> list[float]:
    """Return the seconds from asking for a second replica to its first answer."""
    took_s = []
    for _ in range(rounds):
        scale(client, model, 1)
        load = Calls(client.model(model), CALLS_PER_REPLICA)
        wait_for(lambda load=load: load.pids, "the first answers")
        start_s = time.perf_counter()
        client.scale(model, replicas=2)
        wait_for(lambda load=load: len(load.pids) == 2, "the new one answers")
        took_s.append(time.perf_counter() - start_s)
        load.stop()
    return took_s


def reconcile_ms() -> dict[str, float]:
    """Return the milliseconds of one `step`, the median of 5, with 1,000 models on 50 workers."""
    found: dict[str, list[float]] = {"place all": [], "nothing to do": [], "a worker is lost": []}
    for _ in range(5):
        plane = Reconciler()
        for number in range(50):
            load = WorkerLoad(
                address=f"w{number:02}",
                device="cuda:0",
                place=f"host{number // 4}",
                capacity_bytes=1 << 34,
            )
            plane.joined(load, 0.0)
        for number in range(1000):
            needs = Needs(weight_bytes=1 << 24, memory_bytes=1 << 30, is_packed=number % 2 == 0)
            plane.scale(f"m{number}@v1", needs, min_replicas=1 + number % 2, max_replicas=4)
        for name in found:
            if name == "a worker is lost":
                plane.lost("w00", 1.0)
            start_s = time.perf_counter()
            commands = plane.step()
            found[name].append(1e3 * (time.perf_counter() - start_s))
            for command in commands:
                if isinstance(command, Load):
                    plane.loaded(command.key, command.address)
    return {name: statistics.median(times) for name, times in found.items()}


def run(folder: Path, seconds: float) -> dict[str, Any]:
    """Measure a server of its own."""
    command = [sys.executable, "-m", "nos_backend", "serve", "--json", "--port", "0"]
    command += ["--state-dir", str(folder), "--device", "cpu", "--workers", str(NUM_WORKERS)]
    server = subprocess.Popen(
        [*command, "--profile-s", "0", "--idle-shutdown-s", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        record = json.loads(server.stdout.readline() if server.stdout else "")
        place = ["--address", record["address"], "--token-file", record["token_file"]]
        with nos.connect(record["address"], token_file=record["token_file"]) as client:
            for name in ("Busy", "Sleep"):
                client.register(MODELS, class_name=name, name=f"bench/{name.lower()}")
            rows = [
                row
                for model, counts in (("bench/busy", (1, 2)), ("bench/sleep", (1, 2, 4, 8)))
                for row in measure_rounds(client, place, model, counts, seconds)
            ]
            first_s = new_replica_s(client, "bench/sleep", 3)
    finally:
        server.terminate()
        server.wait(60)
    return {"throughput": [asdict(row) for row in rows], "new_replica_s": first_s}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    for name in ("--address", "--token-file", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--num-calls", "--num-replicas"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        client_main(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends, too
    figures: dict[str, Any] = {"reconcile_ms": reconcile_ms()}
    print(figures["reconcile_ms"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures |= run(Path(folder), arguments.seconds)
    print(f"new replica: {[round(it, 2) for it in figures['new_replica_s']]} s")
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
