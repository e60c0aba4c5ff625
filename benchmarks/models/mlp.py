"""An MLP and an emulated device, each with batching and without."""

import time
from typing import Annotated

import nos
import torch
from torch import nn

Rows = Annotated[torch.Tensor, "float32[batch, 512]"]


@nos.model(name="bench/mlp", isolation="process", batch=32)
class Mlp:
    """512-2048-2048-512, float32, random weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 512)
        )

    def __call__(self, x: Rows) -> Rows:
        """Return the network's output."""
        y: torch.Tensor = self.network(x)
        return y


@nos.model(name="bench/mlp-single", isolation="process", batch=False)
class MlpSingle(Mlp):
    """The same, one call at a time."""


@nos.model(name="bench/device", isolation="process")
class Device:
    """n rows take 5 ms + n x 0.2 ms."""

    def __call__(self, x: Rows) -> Rows:
        """Return `x` after that time."""
        end_s = time.perf_counter() + 5e-3 + 0.2e-3 * len(x)
        time.sleep(0.9 * (end_s - time.perf_counter()))
        while time.perf_counter() < end_s:
            pass
        return x


@nos.model(name="bench/device-single", isolation="process", batch=False)
class DeviceSingle(Device):
    """The same, one call at a time."""
