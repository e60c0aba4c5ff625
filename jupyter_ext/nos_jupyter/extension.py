"""The Jupyter server extension: routes under `<base_url>nos/`, guarded by Jupyter's own access checks.

Security rules, each with a test: every method says `@authorized(action, resource=...)` with explicit
arguments (without them the decorator remembers the first call's), no decorated method is inherited, XSRF
and origin checks are Jupyter's, and no route accepts Python code.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from jupyter_server.extension.application import ExtensionApp
from tornado import web
from traitlets import Bool, Integer, Unicode

if TYPE_CHECKING:
    from nos_jupyter.link import Link


class NosApp(ExtensionApp):
    """Connects a Jupyter server to a NOS backend."""

    name = "nos_jupyter"
    load_other_extensions = True

    address = Unicode(
        "",
        help="The backend's address, host:port, for this server and its kernels; empty: each finds its own.",
    ).tag(config=True)
    token_file = Unicode("", help="File with the backend's token; empty: as the SDK finds it.").tag(
        config=True
    )
    max_streams = Integer(8, help="How many live streams pages may have open at once.").tag(
        config=True
    )
    allow_control = Bool(
        True, help="Whether pages may load and unload models, and start and stop a local backend."
    ).tag(config=True)
    dask_dashboard = Bool(
        False,
        help=(
            "Whether to show the backend's Dask dashboard under nos/dask/. Its scripts run as pages of this "
            "server: trust the backend as you trust a kernel."
        ),
    ).tag(config=True)

    #: The connection to the backend; made on first use.
    _link: Link | None = None
    #: Live streams that are open.
    num_streams = 0

    @property
    def link(self) -> Link:
        """The connection to the backend."""
        from nos_jupyter.link import Link

        if self._link is None:
            self._link = Link(self.address, self.token_file)
        return self._link

    def features(self) -> list[str]:
        """Return what pages can use here."""
        switched = {"control": self.allow_control, "dask": self.dask_dashboard}
        return ["events", "stream", *(name for name, is_on in switched.items() if is_on)]

    def check_control(self, *, is_local: bool = False) -> None:
        """Refuse where control is off; and starting or stopping where the backend is another's.

        Raises:
            HTTPError: 403 or 409, with a sentence.
        """
        if not self.allow_control:
            raise web.HTTPError(403, "c.NosApp.allow_control is off")
        if is_local and self.address:
            raise web.HTTPError(409, f"this server uses the backend at {self.address}")

    def initialize_settings(self) -> None:
        """Hand the configured backend to kernels; what the user's environment says goes first."""
        if not self.address or "NOS_ADDRESS" in os.environ:
            # Never this backend's token for another's address.
            return
        os.environ["NOS_ADDRESS"] = self.address
        if self.token_file:
            os.environ.setdefault("NOS_TOKEN_FILE", self.token_file)

    def initialize_handlers(self) -> None:
        """Add the routes."""
        from nos_jupyter.routes import ROUTES

        self.handlers.extend(ROUTES)

    async def stop_extension(self) -> None:
        """Close the connection to the backend."""
        if self._link is not None:
            await self._link.drop()
