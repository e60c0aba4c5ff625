"""NOS in Jupyter: the `%nos` magics, live widgets and the server extension.

Importing this package imports nothing else: the extension is switched on in every Jupyter server
beside which the SDK is installed, and must cost nothing there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["load_ipython_extension", "unload_ipython_extension"]


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from nos_jupyter.extension import NosApp

    return [{"module": "nos_jupyter", "app": NosApp}]


def load_ipython_extension(ipython: InteractiveShell) -> None:
    """Add `%nos` and its completion to a shell; doing it twice changes nothing."""
    from nos_jupyter.magics import load

    load(ipython)


def unload_ipython_extension(ipython: InteractiveShell) -> None:
    """Take `%nos` and its completion away again and close its connection."""
    from nos_jupyter.magics import unload

    unload(ipython)
