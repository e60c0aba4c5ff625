"""How a list of packages says what is conda's: by what a text starts with. All others are of PyPI."""

from __future__ import annotations

from typing import Final

#: The text of a file follows. The server takes it apart into texts as below.
CONDA_FILE: Final = "environment.yml:"
#: The name of a channel follows.
CONDA_CHANNEL: Final = "channel:"
#: A package follows, as conda writes it.
CONDA_PACKAGE: Final = "conda:"
