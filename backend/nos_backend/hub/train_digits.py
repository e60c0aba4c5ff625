"""Trains `nos/digits` and writes its weights: `python -m nos_backend.hub.train_digits`.

Needs scikit-learn. The same seed on the same machine gives the same file; its sha256 belongs into
`models/digits.py`.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from nos_backend.hub.models.digits import WEIGHTS, Network

SEED = 0
NUM_HELD_OUT = 500
NUM_EPOCHS = 60
BATCH_SIZE = 64


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images, held-out images, training labels and held-out labels."""
    digits = load_digits()
    parts = train_test_split(
        digits.images.astype(np.float32),
        digits.target,
        test_size=NUM_HELD_OUT,
        random_state=SEED,
    )
    train_BHW, held_BHW, train_B, held_B = (torch.from_numpy(np.asarray(part)) for part in parts)
    return train_BHW, held_BHW, train_B, held_B


def shifted(images_BHW: torch.Tensor) -> torch.Tensor:
    """Move each image by up to one pixel, so that the position of the ink counts less."""
    moved = images_BHW.clone()
    for image, (down, right) in zip(moved, torch.randint(-1, 2, (len(moved), 2)), strict=True):
        image.copy_(image.roll((int(down), int(right)), (0, 1)))
    return moved


def train() -> Network:
    """Return a trained network."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    images_BHW, _, labels_B, _ = split()
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    num_steps = NUM_EPOCHS * -(-len(images_BHW) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_steps)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(NUM_EPOCHS):
        for index in torch.split(torch.randperm(len(images_BHW)), BATCH_SIZE):
            optimizer.zero_grad()
            loss(network(shifted(images_BHW[index])), labels_B[index]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main() -> None:
    """Train, write the weights, say how good they are."""
    network = train()
    _, held_BHW, _, held_B = split()
    with torch.inference_mode():
        accuracy = (network(held_BHW).argmax(-1) == held_B).float().mean().item()
    data = safetensors.torch.save(network.state_dict())
    WEIGHTS.parent.mkdir(exist_ok=True)
    WEIGHTS.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    sys.stdout.write(f"accuracy {accuracy:.4f}, {len(data)} bytes, sha256 {sha256}\n")


if __name__ == "__main__":
    main()
