"""Evicting and reloading a model, as ratios to one memcpy of its bytes and to `load_state_dict`.

Usage: `python benchmarks/swap.py [--device cpu|cuda:0] [--rounds N] [--json FILE]`.

Two models: a transformer of about 400 MB, and 4,000 tensors of 2 KB. In every round, in turn:

- `memcpy`: one copy of the same bytes into a warm buffer (on CUDA: from pinned memory). The limit.
- `evict`, `reload`: what the executor does.
- `first answer`: reload and the forward pass right after it, beside a forward pass of a loaded model.
- `load_state_dict`: construct the model and load its weights from a file, the naive way back.
"""

from __future__ import annotations

import argparse
import fcntl
import mmap
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nos_backend.executor import devices, flat
from report import write_json
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable


class Transformer(nn.Module):
    """About 400 MB of float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, 1024) to the same shape."""
        return self.encoder(x)


class Many(nn.Module):
    """4,000 tensors of 2 KB."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(512)) for _ in range(4000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add all of them to `x`, (512,)."""
        for part in self.parts:
            x = x + part
        return x


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer 400 MB": (Transformer, (1, 16, 1024)),
    "4,000 small tensors": (Many, (512,)),
}


def clock(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, kernels included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def host_copy(plan: flat.Plan, model: nn.Module) -> int:
    """Pack the model into a sealed memfd and return its descriptor."""
    fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, plan.size_bytes)
    with mmap.mmap(fd, plan.size_bytes) as mapping:
        run = torch.frombuffer(mapping, dtype=torch.uint8)
        flat.pack(plan, model, run)
        del run
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


@torch.inference_mode()
def measure(name: str, device_name: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of every step for one case."""
    make, shape = CASES[name]
    device = torch.device(device_name)
    model = make().eval()
    plan = flat.make_plan(model)
    fd = host_copy(plan, model)
    run = devices.open_device(device_name).reside(fd, plan.size_bytes)
    run.load()
    if device.type == "cuda":
        model.to(device)
    flat.bind(plan, model, run.flat)
    x = torch.randn(shape, device=device)
    expected = model(x).clone()
    source = torch.ones(plan.size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(plan.size_bytes, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(make().state_dict(), path)

        def naive() -> None:
            fresh = make()
            fresh.load_state_dict(torch.load(path, weights_only=True))
            fresh.to(device)

        def answer() -> None:
            run.load()
            assert torch.equal(model(x), expected)

        for index in tqdm(range(rounds), desc=name, file=sys.stderr):
            steps: dict[str, Callable[[], Any]] = {
                "memcpy": lambda: target.copy_(source, non_blocking=True),
                "forward": lambda: model(x),
                "evict": run.evict,
                "reload": run.load,
                "evict again": run.evict,
                "first answer": answer,
            }
            if index < max(2, rounds // 5):
                steps["load_state_dict"] = naive
            for step, function in steps.items():
                times.setdefault(step, []).append(clock(function, device))
    os.close(fd)
    medians = {step: statistics.median(values) for step, values in times.items()}
    medians["bytes"] = plan.size_bytes
    return medians


def main() -> None:
    """Measure, print the ratios, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument(
        "--rounds", type=int, default=15, help="how often all steps are run in turn"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for name in CASES:
        seconds = measure(name, options.device, options.rounds)
        print(f"{name} on {options.device}, {seconds['bytes'] / 1e6:.1f} MB")
        for step in ("memcpy", "evict", "reload", "load_state_dict"):
            took = seconds[step]
            print(
                f"  {step:<16}{took * 1e3:>10.3f} ms   memcpy / it {seconds['memcpy'] / took:>9.2f}"
                f"   load_state_dict / it {seconds['load_state_dict'] / took:>9.1f}"
            )
        answer_s, forward_s = seconds["first answer"], seconds["forward"]
        extra = (answer_s - forward_s) / seconds["memcpy"]
        print(
            f"  {'first answer':<16}{answer_s * 1e3:>10.3f} ms   forward {forward_s * 1e3:.3f} ms"
            f"   difference {extra:.2f} x memcpy"
        )
        figures[name] = seconds
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
