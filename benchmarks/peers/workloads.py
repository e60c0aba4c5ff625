"""What every peer serves, what is sent to it, and what a right answer is.

Needs numpy alone, and torch for `mlp`, so that it can be imported in every peer's environment.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

MAX_BATCH: Final = 32
_WIDTHS: Final = (512, 2048, 2048, 512)


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request; what goes in and what comes out."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    answer_shape: tuple[int, ...]
    #: Requests that a peer may run as one; 1 where that gains nothing.
    max_batch: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a request's tensor."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def num_answer_bytes(self) -> int:
        """Bytes of an answer, which is float32."""
        return int(np.prod(self.answer_shape)) * 4

    def tensor(self, data: Any) -> Array:
        """Return what a request's bytes are."""
        return np.frombuffer(data, self.dtype).reshape(self.shape)

    def answer(self, data: Any, offset: int = 0) -> Array:
        """Return what an answer's bytes are."""
        return np.frombuffer(data, np.float32, offset=offset).reshape(self.answer_shape)

    def inputs(self) -> list[Array]:
        """Return different requests."""
        rng = np.random.default_rng(1)
        if self.name == "frame":
            return [rng.integers(0, 256, self.shape, np.uint8) for _ in range(8)]
        return [rng.standard_normal(self.shape, np.float32) for _ in range(64)]

    def expected(self, inputs: list[Array]) -> list[Array]:
        """Return the right answers, computed without torch."""
        if self.name == "echo":
            return inputs
        if self.name == "frame":
            return [mean_colour(x) for x in inputs]
        y = np.concatenate(inputs)
        layers = weights()
        for number, weight in enumerate(layers, start=1):
            y = y @ weight.T
            if number < len(layers):
                y = np.maximum(y, 0)
        return [y[i : i + 1] for i in range(len(inputs))]


WORKLOADS: Final = {
    "echo": Workload("echo", (1, 16), "float32", (1, 16), 1),
    "frame": Workload("frame", (480, 640, 3), "uint8", (3,), 1),
    "mlp": Workload("mlp", (1, _WIDTHS[0]), "float32", (1, _WIDTHS[-1]), MAX_BATCH),
}


def served() -> Workload:
    """Return which workload this server is started for."""
    return WORKLOADS[os.environ["PEER_WORKLOAD"]]


def wait_s() -> float:
    """Return how long a peer's batcher, where it has a timer, waits for a full batch."""
    return float(os.environ.get("PEER_WAIT_MS", "3")) / 1e3


def mean_colour(frame: Array) -> Array:
    """Return the mean of each channel; sums of rows first, which stay in the cache."""
    height, width, channels = frame.shape
    sums = frame.reshape(height, width * channels).sum(0, dtype=np.uint32)
    mean: Array = (sums.reshape(width, channels).sum(0) / (height * width)).astype(np.float32)
    return mean


def weights() -> list[Array]:
    """Return the matrices of the MLP, the same everywhere."""
    rng = np.random.default_rng(7)
    return [
        rng.standard_normal((b, a), np.float32) / np.float32(a**0.5)
        for a, b in itertools.pairwise(_WIDTHS)
    ]


class Model:
    """The one model that all peers serve."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        if workload.name == "mlp":
            import torch

            torch.set_num_threads(1)
            layers: list[torch.nn.Module] = []
            for matrix in weights():
                layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
                layer.weight = torch.nn.Parameter(torch.from_numpy(matrix), requires_grad=False)
                layers += [layer, torch.nn.ReLU()]
            self._network = torch.nn.Sequential(*layers[:-1])
            self._torch = torch

    def one(self, x: Array) -> Array:
        """Return the answer to one request."""
        return mean_colour(x) if self._workload.name == "frame" else self.rows(x)

    def rows(self, x: Array) -> Array:
        """Return the answers to requests that are the rows of one array; not for frames."""
        if self._workload.name == "echo":
            return x
        with self._torch.inference_mode():
            y: Array = self._network(self._torch.from_numpy(np.ascontiguousarray(x))).numpy()
        return y

    def many(self, inputs: list[Array]) -> list[Array]:
        """Return the answers to several requests, computed as one where that gains something."""
        if self._workload.max_batch == 1:
            return [self.one(x) for x in inputs]
        y = self.rows(np.concatenate(inputs))
        return [y[i : i + 1] for i in range(len(inputs))]
