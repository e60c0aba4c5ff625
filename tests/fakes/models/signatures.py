"""A model with every sort of parameter, for argument checks."""

from typing import Annotated, Literal

import nos
import numpy as np
import torch
from PIL import Image


@nos.model(name="fake/signature")
class Signature:
    """Takes many things."""

    def __call__(
        self,
        images: Annotated[torch.Tensor, "float32[batch, 3, 8, 8]"],
        weights: Annotated[torch.Tensor, "float32[batch]"] | None = None,
        scale: float = 1.0,
    ) -> Annotated[torch.Tensor, "float32[batch]"]:
        """Return the mean of each image, weighted and scaled."""
        means = images.mean((1, 2, 3)) * scale
        return means if weights is None else means * weights

    def mode(self, name: Literal["fast", "exact"], repeat: int = 1) -> str:
        """Return `name`, `repeat` times."""
        return name * repeat

    def sizes(self, images: list[Image.Image]) -> list[list[int]]:
        """Return width and height of each image."""
        return [list(image.size) for image in images]

    def total(self, table: dict[str, np.ndarray]) -> float:
        """Return the sum over all arrays."""
        return float(sum(array.sum() for array in table.values()))

    def many(self, *values: int, **named: str) -> list[str]:
        """Return all of them as text."""
        return [*map(str, values), *(f"{name}={value}" for name, value in named.items())]

    def _private(self) -> str:
        return "never"
