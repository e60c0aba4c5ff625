"""Keeps a server under mixed load and watches for errors, wrong answers and growing memory.

`python benchmarks/soak.py --seconds 600`; exit code 1 if a call fails, an answer is wrong, or the memory of
all processes together grows by more than 5 % and 32 MB between the first and the last third.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import nos
import numpy as np
import psutil
from nos.wire.local import read_backend

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLE_S = 2.0
GROWTH = 0.05
GROWTH_BYTES = 32 << 20


class Load:
    """Threads that call until told to stop."""

    def __init__(self, client: nos.Client) -> None:
        self._client = client
        self._stop = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._repeat, args=(one,))
            for one in (
                self._stream_digests,
                self._stream_digests,
                self._digits,
                self._sentences,
                self._swap,
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

    def _repeat(self, one: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                one()
            except (nos.NosError, AssertionError) as error:
                self.errors.append(f"{one.__name__}: {type(error).__name__}: {error}")

    def _stream_digests(self) -> None:
        random = np.random.default_rng()
        frames = [random.bytes(int(size)) for size in random.integers(1, 2_000_000, 32)]
        with self._client.model("nos/echo").stream("digest") as stream:
            for frame in frames:
                stream.send(frame)
            answers = [result.value for result in stream]
        assert answers == [hashlib.sha256(frame).hexdigest() for frame in frames]
        self.counts["frames"] += len(frames)

    def _digits(self) -> None:
        images = np.zeros((8, 8, 8), np.float32)
        assert self._client.model("nos/digits")(images).shape == (8, 10)
        self.counts["digits"] += 1

    def _sentences(self) -> None:
        encode = self._client.model("sentence-transformers/all-MiniLM-L6-v2")
        assert encode(["one sentence", "and another"]).shape == (2, 384)
        self.counts["sentences"] += 1

    def _swap(self) -> None:
        self._client.unload("nos/edges")
        image = np.zeros((48, 64, 3), np.uint8)
        assert self._client.model("nos/edges")(image).shape == (48, 64)
        self.counts["swaps"] += 1
        self._stop.wait(1.0)


def memory_bytes(supervisor: psutil.Process) -> int:
    """Proportional set size of the server's processes; one that just ended counts as nothing."""
    total = 0
    for process in [supervisor, *supervisor.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Run the load, print a line per minute and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args().seconds
    samples: list[int] = []
    with tempfile.TemporaryDirectory(prefix="nos-soak-") as state_dir:
        client = nos.start(state_dir=state_dir, port=0, owned=True)
        record = read_backend(Path(state_dir))
        assert record is not None
        supervisor = psutil.Process(record.pid)
        load = Load(client)
        load.start()
        end_s, next_line_s = time.monotonic() + seconds, time.monotonic()
        try:
            while time.monotonic() < end_s:
                time.sleep(SAMPLE_S)
                samples.append(memory_bytes(supervisor))
                if time.monotonic() >= next_line_s:
                    next_line_s += 60
                    counts = ", ".join(
                        f"{value} {name}" for name, value in sorted(load.counts.items())
                    )
                    print(
                        f"{samples[-1] / 2**20:.0f} MB; {counts}; {len(load.errors)} errors",
                        flush=True,
                    )
        finally:
            load.stop()
            client.close()
            nos.stop(state_dir=state_dir)
    third = max(1, len(samples) // 3)
    early, late = statistics.median(samples[:third]), statistics.median(samples[-third:])
    print(f"memory: {early / 2**20:.0f} MB early, {late / 2**20:.0f} MB late; {dict(load.counts)}")
    for error in load.errors[:10]:
        print(error)
    has_grown = late > early * (1 + GROWTH) and late > early + GROWTH_BYTES
    sys.exit(1 if load.errors or has_grown or not load.counts else 0)


if __name__ == "__main__":
    main()
