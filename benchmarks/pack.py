"""Many models on a device that holds few of them: hit rate and latency by eviction policy.

Usage: `python benchmarks/pack.py [--models N] [--requests N] [--seed N] [--json FILE]`.

Models of 1 to 16 MB, 12 of 40 of their bytes fit at once; requests come one after the other, the models'
popularity by Zipf's law. Every row sees the same requests:

- `lru`, `fifo`, `lfu`, `gdsf`: what leaves the device waits in host memory.
- `nothing kept`: what leaves is unloaded (by lru) and constructed again when it is wanted.

A hit is a request whose model is on the device. Latency is that of whole requests, misses included.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nos_backend.control.describe import describe
from nos_backend.definition import ModelDefinition
from nos_backend.worker.manager import ModelManager, Request
from nos_backend.worker.memory import MemoryOptions
from report import write_json
from tqdm import tqdm

if TYPE_CHECKING:
    from nos_backend.worker.executors import Reply

SOURCE = """
import torch
from torch import nn
import nos

@nos.model(name="NAME")
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(LAYERS))

    def forward(self, x: float):
        row = torch.full((1, 256), x)
        for layer in self.layers:
            row = layer(row)
        return float(row.sum())
"""
LAYER_BYTES = (256 * 256 + 256) * 4
SHARE = 12 / 40


def make_models(number: int, chance: random.Random) -> list[ModelDefinition]:
    """Return models of mixed sizes, the most popular first."""
    found = []
    for index in range(number):
        layers = str(round(4 * 16 ** chance.random()))
        source = SOURCE.replace("NAME", f"m{index}").replace("LAYERS", layers)
        (item,) = describe(source, source_name=f"m{index}.py")
        item.spec.version, item.spec.owner = 1, "bench"
        found.append(
            ModelDefinition(
                name=item.spec.name,
                version=1,
                owner="bench",
                source=source,
                source_name=f"m{index}.py",
                class_name=item.class_name,
                spec=item.spec.SerializeToString(),
            )
        )
    return found


async def call(manager: ModelManager, key: str) -> None:
    """Run one request to its end."""
    answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    manager.submit(
        Request(
            model=key,
            method="__call__",
            tenant="bench",
            arguments=[["", 0.5]],
            sink=answered.set_result,
        )
    )
    reply = await answered
    reply.release()
    if reply.error is not None:
        raise reply.error


def is_on_device(manager: ModelManager, key: str) -> bool:
    """Return whether a request for the model would hit."""
    return any(
        item["key"] == key and item["state"] == "device" for item in manager.status()["models"]
    )


async def keep_all(
    models: list[ModelDefinition], trace: list[ModelDefinition], capacity_bytes: int, policy: str
) -> tuple[int, list[float]]:
    """Serve the trace with host copies; return hits and seconds."""
    options = MemoryOptions(capacity_bytes=capacity_bytes, eviction=policy, min_residency_s=0.0)
    manager = ModelManager(device="cpu", memory=options)
    await manager.start()
    hits, seconds = 0, []
    try:
        await asyncio.gather(*(manager.load(model) for model in models))
        for model in tqdm(trace, desc=policy, file=sys.stderr):
            hits += is_on_device(manager, model.key)
            started = time.perf_counter()
            await call(manager, model.key)
            seconds.append(time.perf_counter() - started)
            # The executor's answer to an eviction may come behind the reply.
            await asyncio.sleep(0)
    finally:
        await manager.close()
    return hits, seconds


async def keep_nothing(
    sizes: dict[str, int], trace: list[ModelDefinition], capacity_bytes: int
) -> tuple[int, list[float]]:
    """Serve the trace by loading and unloading whole models; return hits and seconds."""
    manager = ModelManager(device="cpu")
    await manager.start()
    hits, seconds = 0, []
    loaded: OrderedDict[str, int] = OrderedDict()
    try:
        for model in tqdm(trace, desc="nothing kept", file=sys.stderr):
            started = time.perf_counter()
            if model.key in loaded:
                hits += 1
                loaded.move_to_end(model.key)
            else:
                while sum(loaded.values()) + sizes[model.key] > capacity_bytes:
                    oldest, _ = loaded.popitem(last=False)
                    await manager.unload(oldest)
                await manager.load(model)
                loaded[model.key] = sizes[model.key]
            await call(manager, model.key)
            seconds.append(time.perf_counter() - started)
    finally:
        await manager.close()
    return hits, seconds


async def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run every row and return its figures."""
    chance = random.Random(options.seed)
    models = make_models(options.models, chance)
    sizes = {
        model.key: int(model.source.partition("range(")[2].partition(")")[0]) * LAYER_BYTES
        for model in models
    }
    capacity_bytes = max(int(sum(sizes.values()) * SHARE), *sizes.values())
    shuffled = chance.sample(models, len(models))
    weights = [1 / rank for rank in range(1, len(models) + 1)]
    trace = chance.choices(shuffled, weights, k=options.requests)
    print(
        f"{len(models)} models, {sum(sizes.values()) / 1e6:.0f} MB; "
        f"device {capacity_bytes / 1e6:.0f} MB; {len(trace)} requests",
        flush=True,
    )
    figures = {}
    for name in ("lru", "fifo", "lfu", "gdsf", "nothing kept"):
        if name == "nothing kept":
            hits, seconds = await keep_nothing(sizes, trace, capacity_bytes)
        else:
            hits, seconds = await keep_all(models, trace, capacity_bytes, name)
        ordered = sorted(seconds)
        row = figures[name] = {
            "hit_rate": hits / len(trace),
            "mean_ms": statistics.fmean(seconds) * 1e3,
            "p50_ms": ordered[len(ordered) // 2] * 1e3,
            "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        }
        print(
            f"  {name:<14} hits {row['hit_rate']:6.1%}   mean {row['mean_ms']:8.3f} ms"
            f"   p50 {row['p50_ms']:8.3f} ms   p99 {row['p99_ms']:8.3f} ms",
            flush=True,
        )
    return figures


def main() -> None:
    """Measure, print the rows, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", type=int, default=40, help="how many models")
    parser.add_argument("--requests", type=int, default=500, help="how many requests per row")
    parser.add_argument("--seed", type=int, default=1, help="of sizes, popularity and requests")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = asyncio.run(measure(options))
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
