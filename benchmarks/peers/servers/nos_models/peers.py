"""The three workloads as models of ours; what they compute is that of `workloads.py`."""

import itertools
from typing import Annotated

import nos
import numpy as np
import torch

Rows = Annotated[torch.Tensor, "float32[batch, 512]"]
WIDTHS = (512, 2048, 2048, 512)


@nos.model(name="peers/echo", batch=True)
class Echo:
    """Answers with what it got."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return `x`."""
        return x


@nos.model(name="peers/frame", batch=True)
class Frame:
    """The mean colour of an image."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the mean of each channel; sums of rows first, which stay in the cache."""
        height, width, channels = x.shape
        sums = x.reshape(height, width * channels).sum(0, dtype=np.uint32)
        mean: np.ndarray = (sums.reshape(width, channels).sum(0) / (height * width)).astype(
            np.float32
        )
        return mean


@nos.model(name="peers/mlp", batch=32)
class Mlp:
    """512-2048-2048-512."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        layers: list[torch.nn.Module] = []
        for a, b in itertools.pairwise(WIDTHS):
            matrix = rng.standard_normal((b, a), np.float32) / np.float32(a**0.5)
            layer = torch.nn.Linear(a, b, bias=False)
            layer.weight = torch.nn.Parameter(torch.from_numpy(matrix), requires_grad=False)
            layers += [layer, torch.nn.ReLU()]
        self.network = torch.nn.Sequential(*layers[:-1])

    def __call__(self, x: Rows) -> Rows:
        """Return the network's output."""
        y: torch.Tensor = self.network(x)
        return y
