"""Models that run many calls as one, and some that get it wrong."""

import os
import time
from typing import Annotated, Any

import nos
import numpy as np
import torch

Rows = Annotated[torch.Tensor, "float32[batch, 4]"]


@nos.model(name="fake/batch", isolation="process")
class Batch:
    """Counts its calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Rows, scale: float = 1.0) -> Rows:
        """Return `x` times `scale`; takes 20 ms."""
        self.sizes.append(len(x))
        time.sleep(0.02)
        return x * scale

    def seen(self) -> list[int]:
        """Return how many rows each call had, and forget."""
        sizes, self.sizes = self.sizes, []
        return sizes

    def poisoned(self, x: Rows) -> Rows:
        """Return `x`; raise ValueError if a number in it is negative."""
        self.sizes.append(len(x))
        time.sleep(0.02)
        if bool((x < 0).any()):
            raise ValueError("a number is negative")
        return x

    def filtered(self, x: Rows) -> Rows:
        """Return the rows of `x` that are positive: fewer than went in where some are not."""
        self.sizes.append(len(x))
        time.sleep(0.02)
        return x[(x >= 0).all(-1)]

    def doubled(self, x: Rows) -> Rows:
        """Return each row twice: more than went in."""
        return x.repeat(2, 1)

    def pixels(
        self, images: Annotated[torch.Tensor, "uint8[batch, height, width, 3]"]
    ) -> Annotated[torch.Tensor, "int64[batch, 3]"]:
        """Return each image's sum by colour."""
        self.sizes.append(len(images))
        time.sleep(0.02)
        return images.long().sum((1, 2))


@nos.model(name="fake/batch-lists", isolation="process", batch=True)
class BatchLists(Batch):
    """Takes lists, and gives rows in lists, dicts and tuples."""

    def upper(self, texts: list[str]) -> list[str]:
        """Return each text in capitals."""
        self.sizes.append(len(texts))
        time.sleep(0.02)
        return [text.upper() for text in texts]

    def both(self, x: Rows) -> dict[str, Any]:
        """Return `x` and its sums, by name and in a tuple."""
        self.sizes.append(len(x))
        time.sleep(0.02)
        return {"x": x, "sums": (x.sum(-1), x.double().sum(-1))}

    def labelled(self, x: Rows) -> dict[str, Any]:
        """Return `x` beside something that has no rows, which cannot be split."""
        self.sizes.append(len(x))
        time.sleep(0.02)
        return {"x": x, "version": 3}


@nos.model(name="fake/batch-labelled", isolation="process", batch=32)
class BatchLabelled(BatchLists):
    """The same, with a limit."""


@nos.model(name="fake/batch-four", isolation="process", batch=4, queue_delay_s=0.1)
class BatchFour(Batch):
    """At most four rows at once; waits a tenth of a second for them."""


@nos.model(name="fake/batch-off", isolation="process", batch=False)
class BatchOff(Batch):
    """Says no, whatever its annotations say."""


@nos.model(name="fake/batch-deadly", isolation="process")
class BatchDeadly:
    """Ends its process for a negative number."""

    def __call__(self, x: Rows) -> Rows:
        """Return `x`; takes 20 ms."""
        time.sleep(0.02)
        if bool((x < 0).any()):
            os._exit(3)
        return x


@nos.model(name="fake/device", isolation="process")
class Device:
    """An emulated device: n rows take 5 ms + n x 0.2 ms."""

    t0_s = 5e-3
    row_s = 0.2e-3

    def __call__(
        self, x: Annotated[torch.Tensor, "float32[batch, 16]"]
    ) -> Annotated[torch.Tensor, "float32[batch, 16]"]:
        """Return `x` after that time."""
        end_s = time.perf_counter() + self.t0_s + self.row_s * len(x)
        # A sleep ends late by what the machine does meanwhile: a tenth of it is spun.
        time.sleep(0.9 * (end_s - time.perf_counter()))
        while time.perf_counter() < end_s:
            pass
        return x


@nos.model(name="fake/device-single", isolation="process", batch=False)
class DeviceSingle(Device):
    """The same, one call at a time."""


@nos.model(name="fake/slow-device", isolation="process", batch=16)
class SlowDevice(Device):
    """Slow enough to be overloaded by one client: n rows take 160 ms + n x 20 ms, at most 16 at once."""

    t0_s = 160e-3
    row_s = 20e-3


@nos.model(name="fake/batch-exact", isolation="process", batch=8, exact=True)
class BatchExact(Batch):
    """Always runs eight rows."""

    def upper(self, texts: list[str]) -> list[str]:
        """Return each text in capitals; needs eight."""
        self.sizes.append(len(texts))
        return [text.upper() for text in texts]

    def short(self, x: Rows) -> Rows:
        """Return a row less than it got."""
        return x[1:]


@nos.model(name="fake/batch-mixed", isolation="process", check_batch=True)
class BatchMixed(Batch):
    """Subtracts the mean of the batch: rows depend on what runs beside them."""

    def __call__(self, x: Rows) -> Rows:
        """Return `x` without its mean; takes 20 ms."""
        self.sizes.append(len(x))
        time.sleep(0.02)
        return x - x.mean(0)


@nos.model(name="fake/batch-checked", isolation="process", check_batch=True)
class BatchChecked(Batch):
    """As it should be, and asks to be checked."""


Waves = Annotated[torch.Tensor, "float32[batch, length]"]


@nos.model(name="fake/batch-padded", isolation="process", pad="length")
class BatchPadded:
    """Takes rows of different lengths at once."""

    def __call__(
        self, x: Waves, mask: Annotated[torch.Tensor, "bool[batch, length]"] | None = None
    ) -> Waves:
        """Return each row without its mean; takes 20 ms. What is filled up makes no difference."""
        time.sleep(0.02)
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        mean = (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        return torch.where(mask, x - mean, torch.nan)


Pixels = Annotated[
    torch.Tensor, "uint8[*batch, height, 3]", "normalize(mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.5])"
]


@nos.model(name="fake/batch-pixels", isolation="process")
class BatchPixels:
    """Takes pixels as numbers that networks were trained on."""

    def __call__(self, x: Pixels) -> Annotated[torch.Tensor, "float32[*batch, height, 3]"]:
        """Return what came; takes 20 ms."""
        time.sleep(0.02)
        return x


@nos.model(name="fake/batch-items", isolation="process", batch=True)
class BatchItems:
    """Takes one image at a time."""

    def __call__(
        self, image: Annotated[np.ndarray, "uint8[height, width]"], plus: int = 0
    ) -> dict[str, Any]:
        """Return its sum and itself; takes 20 ms. Raise ValueError for one that begins with 13."""
        time.sleep(0.02)
        if image[0, 0] == 13:
            raise ValueError("thirteen")
        return {"sum": int(image.sum()) + plus, "image": image}
