"""The Dask dashboard, made when somebody first asks for one of its pages.

Importing bokeh takes a second of processor time and 60 MB, for which every start of a server would wait.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any, Final

from tornado.web import RequestHandler

if TYPE_CHECKING:
    from distributed import Scheduler
    from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest

#: What Dask answers without bokeh, and machines ask for.
_PLAIN: Final = ("/health", "/metrics", "/json/")


class LazyDashboard:
    """Stands before a scheduler's pages until they are there. Belongs to the scheduler's loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Take the requests of `scheduler`, which has no dashboard yet."""
        self._scheduler = scheduler
        self._application = scheduler.http_application
        self._find = self._application.find_handler
        self._lock = asyncio.Lock()
        self._is_made = False
        self._application.find_handler = self._find_handler  # type: ignore[method-assign]

    def _find_handler(self, request: HTTPServerRequest, **options: Any) -> HTTPMessageDelegate:
        if request.path.startswith(_PLAIN):
            found: HTTPMessageDelegate = self._find(request, **options)
            return found
        delegate: HTTPMessageDelegate = self._application.get_handler_delegate(
            request, _FirstPage, {"pages": self}
        )
        return delegate

    async def make(self) -> None:
        """Make the pages, once; the import runs beside the loop."""
        async with self._lock:
            if self._is_made:
                return
            dashboard = await asyncio.to_thread(
                importlib.import_module, "nos_backend.cluster.dashboard"
            )
            dashboard.open_pages(self._scheduler)
            self._application.find_handler = self._find  # type: ignore[method-assign]
            self._is_made = True


class _FirstPage(RequestHandler):
    """Makes the pages and sends the browser to the one that it asked for."""

    def initialize(self, pages: LazyDashboard) -> None:
        self._pages = pages

    async def prepare(self) -> None:
        try:
            await self._pages.make()
        except ImportError:
            self.set_status(501)
            self.finish("The dashboard needs bokeh: pip install bokeh, and start the server again")
        else:
            self.redirect(self.request.uri or "/")
