"""What batching gives, and how far it is from the limit: ratios within one run.

Usage: `python benchmarks/batching.py [--models NAME ...] [--seconds S] [--rounds N] [--json FILE]`.

1 to 64 clients, each on a stream of its own, send one row and wait for its answer, to the same model with
batching and without. Beside them, in this process and with one thread as in an executor: the model called
one by one, and with as many rows at once as give most rows per second. The emulated device has its limit by
definition, n / (5 ms + n x 0.2 ms), without any round trip. All is interleaved in every round; figures are
medians.

The clients share the machine with the server: where a call costs more than the model, they are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nos
import numpy as np
import torch
from report import write_json
from tqdm import tqdm

MODELS = Path(__file__).resolve().parent / "models"
CLIENTS = (1, 4, 16, 32, 64)
#: Of which the loop in one process does the best.
BATCHES = (1, 8, 32)
SETTLE_S = 0.4
ROWS = {
    "mlp": np.zeros((1, 512), np.float32),
    "device": np.zeros((1, 512), np.float32),
    "minilm": [
        "Many notebooks share one server, and no kernel holds memory while its user thinks."
    ],
}
CLASSES = {"mlp": "Mlp", "minilm": "Sentences"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One model under so many clients, medians over rounds."""

    model: str
    num_clients: int
    rate_hz: float
    """Answers per second with batching."""
    mean_batch: float
    p50_s: float
    off_hz: float
    """Answers per second of the same server with batching off."""
    single_hz: float
    """Rows per second of a loop in one process, one by one."""
    limit_hz: float
    """Rows per second of such a loop with the best of its batches."""


async def crowd(
    client: nos.AsyncClient, model: str, num_clients: int, seconds: float
) -> tuple[float, float, float]:
    """Return answers per second, mean batch and median latency of clients in closed loop."""
    handle = await client.model(model)
    row = ROWS[model.removeprefix("bench/").removesuffix("-single")]
    await handle(row)
    begin_s = time.perf_counter() + SETTLE_S
    end_s = begin_s + seconds
    times_s: list[float] = []
    sizes: list[int] = []

    async def one() -> None:
        async with handle.stream() as stream:
            while (sent_s := time.perf_counter()) < end_s:
                await stream.send(row)
                result = await anext(stream)
                if sent_s >= begin_s:
                    times_s.append(time.perf_counter() - sent_s)
                    sizes.append(result.timings.batch_size)

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return len(times_s) / seconds, statistics.fmean(sizes), statistics.median(times_s)


def loop_hz(model: Any, row: Any, num_rows: int, seconds: float) -> float:
    """Return rows per second of the bare model in this process."""
    rows = row * num_rows if isinstance(row, list) else torch.zeros(num_rows, row.shape[1])
    count, end_s = 0, time.perf_counter() + seconds
    with torch.inference_mode():
        model(rows)
        while time.perf_counter() < end_s:
            model(rows)
            count += num_rows
    return count / seconds


def bare_model(name: str) -> Any:
    """Return a model as an executor makes it."""
    path = MODELS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return getattr(module, CLASSES[name])()


async def measure(
    address: str, token_file: Path, models: list[str], seconds: float, rounds: int
) -> list[Figure]:
    """Run everything interleaved and return the figures."""
    bare = {name: bare_model(name) for name in models if name in CLASSES}
    samples: dict[tuple[str, int], list[tuple[float, ...]]] = defaultdict(list)
    async with await nos.AsyncClient.connect(address, token_file=token_file) as client:
        for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr):
            for model in models:
                for num in CLIENTS:
                    on = await crowd(client, f"bench/{model}", num, seconds)
                    off = await crowd(client, f"bench/{model}-single", num, seconds)
                    limits = (1 / 5.2e-3, num / (5e-3 + 0.2e-3 * num))
                    if model in bare:
                        rates = [
                            loop_hz(bare[model], ROWS[model], rows, seconds / 4) for rows in BATCHES
                        ]
                        limits = (rates[0], max(rates))
                    samples[model, num].append((*on, off[0], *limits))
    return [
        Figure(
            model=model,
            num_clients=num,
            rate_hz=middle[0],
            mean_batch=middle[1],
            p50_s=middle[2],
            off_hz=middle[3],
            single_hz=middle[4],
            limit_hz=middle[5],
        )
        for (model, num), found in samples.items()
        for middle in [[statistics.median(column) for column in zip(*found, strict=True)]]
    ]


def main() -> None:
    """Measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often all is run in turn")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with ExitStack() as stack:
        state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = stack.enter_context(
            nos.start(state_dir=state_dir, owned=True, models=[str(MODELS)])
        )
        stack.callback(nos.stop, state_dir=state_dir)
        figures = asyncio.run(
            measure(
                client.address,
                state_dir / "token",
                options.models,
                options.seconds,
                options.rounds,
            )
        )
    print(
        f"{'model':<8}{'clients':>8}{'answers/s':>11}{'batch':>7}{'p50 ms':>8}"
        f"{'x off':>7}{'x one by one':>14}{'of the limit':>14}"
    )
    for it in figures:
        print(
            f"{it.model:<8}{it.num_clients:>8}{it.rate_hz:>11.0f}{it.mean_batch:>7.1f}"
            f"{it.p50_s * 1e3:>8.1f}{it.rate_hz / it.off_hz:>7.2f}"
            f"{it.rate_hz / it.single_hz:>14.2f}{it.rate_hz / it.limit_hz:>14.2f}"
        )
    if options.json:
        write_json(options.json, [asdict(figure) for figure in figures])


if __name__ == "__main__":
    main()
