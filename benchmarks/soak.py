"""Keeps a server under mixed load while executors are killed, memory runs out and models come and go.

`python benchmarks/soak.py --seconds 1200`; exit code 1 if a frame has no end or two, an answer is wrong, an
error has no type or none that the faults explain, or processes hold more at the end than at the beginning:
memory (anonymous pages), descriptors, threads, memfds. Prints how many faults it injected; none fails too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nos
import numpy as np
import psutil
from nos.errors import (
    ExecutorLostError,
    NosError,
    OutOfDeviceMemoryError,
    OverloadedError,
    UnavailableError,
)
from nos.wire.local import LOG_FOLDER_NAME, read_backend

if TYPE_CHECKING:
    from collections.abc import Callable

#: Less than the models need together, so that they make room for one another all the time.
CAPACITY = "100MiB"
#: One of an owner is killed at most once in so long: three crashes of a model within 60 s quarantine it.
KILL_S = 31.0
#: Executors of one model that are younger may construct it: one that is killed is its model's failure.
SERVING_S = 20.0
LINE_S = 60.0
#: Load before what is held is looked at first: allocators and caches fill.
WARM_UP_S = 20.0
SETTLE_S = 60.0
#: How much more may be held at the end than at the beginning.
GROWTH = 0.05
GROWTH_BYTES = 64 << 20
GROWTH_FDS = 16
GROWTH_THREADS = 8
#: What tells the processes of a server apart, the first that fits.
ROLES = {
    "forkserver": "fork server",
    "resource_tracker": "resource tracker",
    "multiprocessing": "worker",
    "dask_worker": "nanny",
    "dask_scheduler": "scheduler",
    "nos_backend.app": "gateway",
    "nos": "supervisor",
}
#: What faults explain; anything else is a defect.
EXPLAINED = (ExecutorLostError, OutOfDeviceMemoryError, OverloadedError, UnavailableError)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TIGHT = """
from typing import Annotated
import nos, torch

@nos.model(name="NAME")
class Tight:
    \"\"\"Says that there is no memory as often as it is told to.\"\"\"

    def __init__(self):
        self.weight = torch.full((8 << 18,), FACTOR)
        self.left = 0

    def arm(self, times: int):
        self.left = times

    def __call__(
        self, x: Annotated[torch.Tensor, "float32[batch, 4]"]
    ) -> Annotated[torch.Tensor, "float32[batch, 4]"]:
        if self.left > 0:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return x * self.weight[-1]
"""
OWNERS = ("nos", "local")
BUILT_IN = ("nos/echo", "nos/digits", "nos/edges", MINILM)
FACTORS = {"soak/two": 2.0, "soak/three": 3.0, "soak/five": 5.0}


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process holds, or several together."""

    anonymous_bytes: int = 0
    """Of a page that several processes share, as executors do with their fork server, each its part."""
    fds: int = 0
    threads: int = 0
    memfds: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.anonymous_bytes + other.anonymous_bytes,
            self.fds + other.fds,
            self.threads + other.threads,
            self.memfds + other.memfds,
        )

    def __str__(self) -> str:
        return (
            f"{self.anonymous_bytes / 2**20:6.1f} MiB anonymous, {self.fds:3} fds,"
            f" {self.threads:3} threads, {self.memfds:2} memfds"
        )


@dataclass(frozen=True, slots=True)
class Held:
    """What a server's processes hold."""

    by_process: dict[str, Usage]
    """By role and process, as `worker 4711`."""

    @property
    def is_resting(self) -> bool:
        """Whether each owner has its one executor, and none is there to construct or to measure."""
        executors = [name for name in self.by_process if name.startswith("nos:")]
        return sum("forkserver" not in name for name in executors) == len(OWNERS)

    @property
    def total(self) -> Usage:
        """All together."""
        return sum(self.by_process.values(), Usage())

    def __str__(self) -> str:
        lines = [f"  {name:32}{use}" for name, use in sorted(self.by_process.items())]
        return "\n".join([*lines, f"  {'all':32}{self.total}"])


def role_of(process: psutil.Process) -> str:
    """Return what a process of a server is for: executors by their owner, the others by their program."""
    if process.name().startswith("nos:"):
        return process.name()
    words = " ".join(process.cmdline())
    for mark, role in ROLES.items():
        if mark in words:
            return role
    return process.name()


def usage(supervisor: psutil.Process) -> Held:
    """Return what is held now; a process that just ended counts as nothing."""
    found = {}
    for process in [supervisor, *supervisor.children(recursive=True)]:
        # A zombie has no rollup, and what it held is gone.
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            shared_kib = next(line for line in rollup if line.startswith("Pss_Anon:")).split()[1]
            links = []
            for path in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    links.append(str(path.readlink()))
            found[f"{role_of(process)} {process.pid}"] = Usage(
                int(shared_kib) * 1024,
                len(links),
                process.num_threads(),
                sum("memfd:nos-weights" in link for link in links),
            )
    return Held(found)


class Load:
    """Threads that call until told to stop, and check every answer."""

    def __init__(self, client: nos.Client) -> None:
        self._client = client
        self._stop = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.defects: list[str] = []
        self._threads = [
            threading.Thread(target=self._repeat, args=(one,))
            for one in (
                self._stream_digests,
                self._stream_digests,
                self._digits,
                self._sentences,
                self._tight,
                self._tight,
                self._churn,
            )
        ]

    def start(self) -> None:
        """Begin to call."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish what is under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def touch_all(self) -> None:
        """Call every model once, so that the same ones are loaded."""
        for one in (self._stream_digests, self._digits, self._sentences, self._edges):
            one()
        for name in FACTORS:
            self._client.model(name)(np.ones((1, 4), np.float32))

    def _repeat(self, one: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                one()
            except EXPLAINED as error:
                self.counts[f"calls ended by {type(error).__name__}"] += 1
            except Exception as error:  # noqa: BLE001 - whatever else comes is what is looked for
                self.defects.append(f"{one.__name__}: {type(error).__name__}: {error}")

    def _stream_digests(self) -> None:
        rng = np.random.default_rng()
        frames = [rng.bytes(int(size)) for size in rng.integers(1, 500_000, 32)]
        wanted: dict[int, str] = {}
        with self._client.model("nos/echo").stream("digest") as stream:
            for frame in frames:
                wanted[stream.send(frame)] = hashlib.sha256(frame).hexdigest()
            stream.finish()
            for result in stream:
                digest = wanted.pop(result.seq, None)
                if digest is None:
                    self.defects.append(f"frame {result.seq} has two ends")
                elif result.error is None and result.value != digest:
                    self.defects.append(f"frame {result.seq} has another's answer")
                elif result.error is not None and not isinstance(result.error, EXPLAINED):
                    self.defects.append(f"frame {result.seq}: {result.error!r}")
                else:
                    self.counts[
                        "frames" if result.error is None else "frames lost with a word"
                    ] += 1
        if wanted:
            self.defects.append(f"{len(wanted)} frames without an end")

    def _digits(self) -> None:
        images = np.zeros((8, 8, 8), np.float32)
        assert self._client.model("nos/digits")(images).shape == (8, 10)
        self.counts["digits"] += 1

    def _sentences(self) -> None:
        encode = self._client.model(MINILM)
        assert encode(["one sentence", "and another"]).shape == (2, 384)
        self.counts["sentences"] += 1
        self._stop.wait(0.05)

    def _tight(self) -> None:
        name = random.choice(list(FACTORS))
        model = self._client.model(name)
        times = random.choice([0, 0, 1, 3, 30])
        if times:
            model.arm(times)
            self.faults["out of memory"] += 1
        x = np.random.default_rng().random((random.randint(1, 4), 4), np.float32)
        try:
            futures = [model.submit(x) for _ in range(4)]
            for future in futures:
                assert np.array_equal(future.result(30), x * np.float32(FACTORS[name]))
                self.counts["tight"] += 1
        finally:
            if times:
                model.arm(0)

    def _edges(self) -> None:
        image = np.zeros((48, 64, 3), np.uint8)
        assert self._client.model("nos/edges")(image).shape == (48, 64)

    def _churn(self) -> None:
        for name in ("nos/edges", "soak/five"):
            self._client.unload(name)
            self.faults["unloads"] += 1
        self._edges()
        self._stop.wait(0.5)


class Killer:
    """Kills executors, of each owner at most one in `KILL_S`."""

    def __init__(self, supervisor: psutil.Process, faults: collections.Counter[str]) -> None:
        self._supervisor = supervisor
        self._faults = faults
        #: By owner, as their processes are called.
        self._killed_s: dict[str, float] = {}

    def kill_one(self) -> None:
        """Kill a random executor that may be killed now."""
        found = []
        for process in self._supervisor.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = process.name()
                if not name.startswith("nos:") or "forkserver" in name:
                    continue
                owner, _, its_model = name.partition("-")[0].partition("/")
                is_young = time.time() - process.create_time() < SERVING_S
                last_s = self._killed_s.get(owner, float("-inf"))
                if time.monotonic() - last_s > KILL_S and not (its_model and is_young):
                    found.append((owner, process.pid))
        if found:
            owner, pid = random.choice(found)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                self._killed_s[owner] = time.monotonic()
                self._faults["kills"] += 1


def grown(before: Usage, after: Usage, slack: float) -> list[str]:
    """Return in words what is held more than at the beginning."""
    memory_bytes = before.anonymous_bytes * GROWTH + GROWTH_BYTES
    limits = {
        "anonymous_bytes": before.anonymous_bytes + slack * memory_bytes,
        "fds": before.fds + slack * GROWTH_FDS,
        "threads": before.threads + slack * GROWTH_THREADS,
        "memfds": before.memfds,
    }
    now = asdict(after)
    return [
        f"{name}: {now[name]}, at most {limit:.0f} were expected"
        for name, limit in limits.items()
        if now[name] > limit
    ]


def settled(client: nos.Client, load: Load, supervisor: psutil.Process) -> Held:
    """Return what is held at rest: all models loaded afresh, and nobody measures them any more.

    A model that was blamed for two kills has an executor of its own until it is unloaded.
    """
    deadline = time.monotonic() + SETTLE_S
    for name in [*FACTORS, *BUILT_IN]:
        client.unload(name)
    while True:
        try:
            load.touch_all()
        except EXPLAINED:  # the last faults are still being repaired
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
            continue
        time.sleep(1.0)
        found = usage(supervisor)
        if found.is_resting or time.monotonic() > deadline:
            return found


def soak(client: nos.Client, supervisor: psutil.Process, seconds: float, slack: float) -> list[str]:
    """Run load and faults; return what was wrong."""
    load = Load(client)
    for name, factor in FACTORS.items():
        client.register(TIGHT.replace("NAME", name).replace("FACTOR", str(factor)))
    warm_up = Load(client)
    warm_up.start()
    time.sleep(min(WARM_UP_S, seconds / 2))
    warm_up.stop()
    before = settled(client, load, supervisor)
    killer = Killer(supervisor, load.faults)
    end_s, next_line_s = time.monotonic() + seconds, time.monotonic() + LINE_S
    load.start()
    try:
        while time.monotonic() < end_s:
            time.sleep(min(random.uniform(1.0, 5.0), max(0.1, end_s - time.monotonic())))
            killer.kill_one()
            if time.monotonic() >= next_line_s:
                next_line_s += LINE_S
                print(f"{dict(load.counts)}; {len(load.defects)} defects", flush=True)
                print(usage(supervisor), flush=True)
    finally:
        load.stop()
    after = settled(client, load, supervisor)
    print(f"answered: {dict(load.counts)}")
    print(f"held before:\n{before}")
    print(f"held after:\n{after}")
    faults = ", ".join(f"{count} {name}" for name, count in sorted(load.faults.items()))
    print(f"faults injected: {sum(load.faults.values())} ({faults})")
    missing = [
        f"no {name} injected" for name in ("kills", "out of memory") if not load.faults[name]
    ]
    return [*warm_up.defects, *load.defects, *grown(before.total, after.total, slack), *missing]


def main() -> None:
    """Start a server, soak it, and print a verdict."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument(
        "--slack", type=float, default=1.0, help="how many times as much growth may pass"
    )
    parser.add_argument("--logs", type=Path, help="where to keep the server's logs if it fails")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nos-soak-") as state_dir:
        client = nos.start(state_dir=state_dir, owned=True, capacity_bytes=CAPACITY)
        try:
            record = read_backend(Path(state_dir))
            if record is None:
                sys.exit("the server left no record")
            wrong = soak(client, psutil.Process(record.pid), options.seconds, options.slack)
        except NosError as error:
            wrong = [f"it did not come to rest: {type(error).__name__}: {error}"]
        finally:
            client.close()
            nos.stop(state_dir=state_dir)
        if wrong and options.logs:
            shutil.copytree(Path(state_dir) / LOG_FOLDER_NAME, options.logs, dirs_exist_ok=True)
    for line in wrong[:20]:
        print(line)
    print(f"verdict: {'FAILED' if wrong else 'passed'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
