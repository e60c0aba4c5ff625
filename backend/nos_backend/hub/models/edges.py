"""`nos/edges`: edge maps of photographs."""

from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

#: Weights of red, green and blue in brightness (ITU-R BT.601).
BRIGHTNESS = (0.299, 0.587, 0.114)
#: The largest answer of a Sobel filter to one unit of brightness.
LARGEST = 4.0


class Edges:
    """Finds edges in an image of any size, by Sobel's filter. It has no weights.

    Example:
        >>> from skimage import data
        >>> client.model("nos/edges")(data.astronaut(), gain=2.0).shape
        (512, 512)
    """

    def __init__(self, device: str = "cpu") -> None:
        self.brightness = torch.tensor(BRIGHTNESS, device=device)

    def __call__(
        self, image: Image.Image, gain: float = 1.0
    ) -> Annotated[torch.Tensor, "uint8[height, width]"]:
        """Return how strong the edge at each pixel is.

        Args:
            image: JPEG or PNG, or a uint8 array (height, width, 3) or (height, width).
            gain: Multiplies the answer; at 1.0 a step from black to white gives 255.

        Returns:
            Strengths from 0 (flat) to 255, shape (height, width), the size of the image.
        """
        pixels_HWC = torch.from_numpy(np.array(image.convert("RGB"))).to(self.brightness.device)
        brightness_HW = pixels_HWC.float() @ self.brightness
        padded = functional.pad(brightness_HW[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        # The filter is one of differences and one of sums, in turn: half the time of a convolution.
        steps = padded[:, 2:] - padded[:, :-2]
        across_HW = (steps[:-2] + steps[2:]).add_(steps[1:-1], alpha=2)
        sums = (padded[:, :-2] + padded[:, 2:]).add_(padded[:, 1:-1], alpha=2)
        down_HW = sums[2:] - sums[:-2]
        strength_HW = across_HW.square_().add_(down_HW.square_()).sqrt_().mul_(gain / LARGEST)
        return strength_HW.clamp_(0, 255).round_().to(torch.uint8)
