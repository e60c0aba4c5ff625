"""The Dask dashboard, made when somebody first asks for one of its pages.

Importing bokeh takes a second of processor time and 60 MB, for which every start of a server would wait.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any, Final

from tornado.httputil import HTTPMessageDelegate
from tornado.web import ErrorHandler

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from distributed import Scheduler
    from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine, ResponseStartLine

#: What Dask answers without bokeh, and machines ask for.
_PLAIN: Final = ("/health", "/metrics", "/json/")
_NOT_IMPLEMENTED: Final = 501


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
            return self.found(request, **options)
        return _FirstRequest(self, request)

    def found(self, request: HTTPServerRequest, **options: Any) -> HTTPMessageDelegate:
        """Return what Dask has for a request."""
        handler: HTTPMessageDelegate = self._find(request, **options)
        return handler

    def refusal(self, request: HTTPServerRequest) -> HTTPMessageDelegate:
        """Return what answers where bokeh is not installed."""
        handler: HTTPMessageDelegate = self._application.get_handler_delegate(
            request, ErrorHandler, {"status_code": _NOT_IMPLEMENTED}
        )
        return handler

    async def make(self) -> None:
        """Make the pages, once; the import runs beside the loop.

        Raises:
            ImportError: If bokeh is not installed.
        """
        async with self._lock:
            if self._is_made:
                return
            dashboard = await asyncio.to_thread(
                importlib.import_module, "nos_backend.cluster.dashboard"
            )
            dashboard.open_pages(self._scheduler)
            self._application.find_handler = self._find  # type: ignore[method-assign]
            self._is_made = True


class _FirstRequest(HTTPMessageDelegate):
    """A request that waits until there are pages, and is then handled like any other."""

    def __init__(self, pages: LazyDashboard, request: HTTPServerRequest) -> None:
        self._pages = pages
        self._request = request
        self._head: tuple[RequestStartLine | ResponseStartLine, HTTPHeaders] | None = None
        self._chunks: list[bytes] = []
        self._answering: asyncio.Task[None] | None = None

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        self._head = (start_line, headers)
        return None

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self._chunks.append(chunk)
        return None

    def finish(self) -> None:
        self._answering = asyncio.get_running_loop().create_task(self._answer())

    async def _answer(self) -> None:
        try:
            await self._pages.make()
            handler = self._pages.found(self._request)
        except ImportError:
            handler = self._pages.refusal(self._request)
        if self._head is not None:
            handler.headers_received(*self._head)
        for chunk in self._chunks:
            handler.data_received(chunk)
        handler.finish()
