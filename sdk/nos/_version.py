"""The version of this distribution, without reading its metadata."""

from typing import Final

__version__: Final = "0.1.0"
