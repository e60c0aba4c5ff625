"""`nos/digits`: handwritten digits of 8 x 8 pixels."""

import hashlib
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
from torch import nn

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "digits.safetensors"
WEIGHTS_SHA256 = "89ddf751a6929bb16c767c543ae63b8bc99377240fb9dae1e99839e7f1d708e3"
#: Grey levels of the data set that it was trained on.
WHITE = 16.0


class Network(nn.Module):
    """Two convolutions and two linear layers; shapes: B images, C channels, H x W pixels, N classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classes = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, images_BHW: torch.Tensor) -> torch.Tensor:
        """Return logits (B, N) for images of 0 .. 16."""
        features = self.features((images_BHW / WHITE).unsqueeze(1))
        logits_BN: torch.Tensor = self.classes(features)
        return logits_BN


class Digits:
    """Recognises handwritten digits.

    It takes images as `sklearn.datasets.load_digits` has them: 8 x 8 pixels, 0.0 for paper to 16.0 for ink,
    float32. One image (8, 8), a batch (n, 8, 8) or any further leading dimensions: the answer keeps them.

    Held-out accuracy is above 0.99 (`nos_backend/hub/train_digits.py` says how it was trained).

    Example:
        >>> from sklearn.datasets import load_digits
        >>> images = load_digits().images.astype("float32")
        >>> client.model("nos/digits").labels(images[:3])
        array([0, 1, 2])
    """

    def __init__(self) -> None:
        data = WEIGHTS.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != WEIGHTS_SHA256:
            raise ValueError(f"{WEIGHTS.name}: expected sha256 {WEIGHTS_SHA256}, got {digest}")
        self.network = Network()
        self.network.load_state_dict(safetensors.torch.load(data))

    def __call__(
        self, images: Annotated[torch.Tensor, "float32[*batch, 8, 8]"]
    ) -> Annotated[torch.Tensor, "float32[*batch, 10]"]:
        """Return the probability of each digit.

        Args:
            images: Grey levels from 0.0 (paper) to 16.0 (ink), shape (..., 8, 8).

        Returns:
            Probabilities of 0 .. 9, shape (..., 10); each row sums to 1.
        """
        logits = self.network(images.reshape(-1, 8, 8))
        probabilities: torch.Tensor = logits.softmax(-1).reshape(*images.shape[:-2], 10)
        return probabilities

    def labels(
        self, images: Annotated[torch.Tensor, "float32[*batch, 8, 8]"]
    ) -> Annotated[torch.Tensor, "int64[*batch]"]:
        """Return the most likely digit.

        Args:
            images: As for calling the model.

        Returns:
            Digits 0 .. 9, shape (...); a scalar for one image.
        """
        return self(images).argmax(-1)
