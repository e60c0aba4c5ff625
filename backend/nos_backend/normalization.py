"""What an annotation says about how uint8 values become the numbers that a network was trained on.

`Annotated[torch.Tensor, "uint8[*batch, 224, 224, 3]", "normalize(mean=0.5, std=[0.2, 0.2, 0.3])"]`: the
values travel as they are, and the method gets float32, `(value / 255 - mean) / std`, made on its device.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any, Final

GRAMMAR: Final = (
    '"normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])", each one number, or one for each'
    " element of the last dimension; without a mean 0, without a std 1, which must not be 0"
)

_NAME: Final = "normalize"
_MAX_CHANNELS: Final = 4096


@dataclass(frozen=True, slots=True)
class Normalization:
    """Makes `(value / 255 - mean) / std` of uint8 values."""

    mean: tuple[float, ...] = (0.0,)
    """One, or one for each element of the last dimension."""
    std: tuple[float, ...] = (1.0,)
    """Likewise; none is 0."""

    @property
    def num_channels(self) -> int:
        """The elements that the last dimension must have; 1 for any number."""
        return max(len(self.mean), len(self.std))


def is_meant(text: str) -> bool:
    """Tell whether a text of an annotation is about normalization."""
    return text.strip().startswith(_NAME)


def parse(text: str) -> Normalization:
    """Read `normalize(mean=..., std=...)`.

    Raises:
        ValueError: If it is not written as `GRAMMAR` says.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args):
            raise ValueError(text)
        given = {str(it.arg): _numbers(ast.literal_eval(it.value)) for it in node.keywords}
        found = Normalization(**given)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(text) from error
    lengths = {len(found.mean), len(found.std)} - {1}
    if node.func.id != _NAME or len(lengths) > 1 or 0.0 in found.std:
        raise ValueError(text)
    return found


def _numbers(value: Any) -> tuple[float, ...]:
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not 0 < len(values) <= _MAX_CHANNELS or not all(_is_number(it) for it in values):
        raise ValueError(value)
    return tuple(float(it) for it in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
