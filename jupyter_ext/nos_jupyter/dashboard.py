"""The backend's Dask dashboard under the Jupyter server's address.

Only what is named here goes through: no cookie, no credential, no token of Jupyter's reaches the dashboard,
and nothing but reading is possible. Its scripts run as pages of the Jupyter server: off unless configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from jupyter_server.auth.decorator import authorized, ws_authenticated
from nos.errors import NosError
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from nos_jupyter.handlers import NosHandler
from nos_jupyter.link import http_status
from nos_jupyter.sockets import GOING_AWAY, NosSocket

if TYPE_CHECKING:
    from nos_jupyter.extension import NosApp

TIMEOUT_S = 20.0
_SENT_ON = ("Accept", "If-None-Match", "If-Modified-Since", "User-Agent")
_SENT_BACK = ("Content-Type", "Cache-Control", "Etag", "Last-Modified")
_OURS = frozenset({"token", "_xsrf"})


async def _target(app: NosApp, path: str, query: str) -> str:
    """Return where a path of the dashboard is; the host comes from the backend, never from the page.

    Raises:
        HTTPError: 404 where the dashboard is off or there is none; 502 where the backend does not answer.
    """
    if not app.dask_dashboard:
        raise web.HTTPError(404, "the dashboard is off; c.NosApp.dask_dashboard = True shows it")
    try:
        status = await app.link.ask(lambda client: client.status())
    except NosError as error:
        raise web.HTTPError(http_status(error), f"backend: {error}") from None
    found = urlsplit(status.dashboard_url)
    if found.scheme not in ("http", "https"):
        raise web.HTTPError(404, "the backend has no dashboard")
    kept = [(name, value) for name, value in parse_qsl(query) if name not in _OURS]
    return f"{found.scheme}://{found.netloc}/{path}" + (f"?{urlencode(kept)}" if kept else "")


class DashboardHandler(NosHandler):
    """Pages and files of the dashboard."""

    @property
    def content_security_policy(self) -> str:
        """Jupyter's own for pages, not that for APIs: the dashboard has scripts."""
        return f"frame-ancestors 'self'; report-uri {self.base_url}api/security/csp-report"

    @web.authenticated
    @authorized("read", resource="nos.dask")  # type: ignore[untyped-decorator]
    async def get(self, path: str) -> None:
        """Fetch a page or file."""
        url = await _target(self.app, path, self.request.query)
        headers = {name: value for name in _SENT_ON if (value := self.request.headers.get(name))}
        request = HTTPRequest(
            url, headers=headers, follow_redirects=False, request_timeout=TIMEOUT_S
        )
        try:
            answer = await AsyncHTTPClient().fetch(request, raise_error=False)
        except (OSError, HTTPClientError) as error:
            raise web.HTTPError(502, f"dashboard: {error}") from None
        self.set_status(502 if answer.code >= 500 else answer.code)  # noqa: PLR2004 - server errors
        for name in _SENT_BACK:
            if name in answer.headers:
                self.set_header(name, answer.headers[name])
        location = answer.headers.get("Location", "")
        if location:
            inside = urlsplit(location).path.lstrip("/")
            self.set_header("Location", f"{self.base_url}nos/dask/{inside}")
        self.finish(answer.body or b"")

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the content type, which `APIHandler` would set to JSON."""
        return super(NosHandler, self).finish(*args, **kwargs, set_content_type=self._kind())

    def _kind(self) -> str:
        return str(self._headers.get("Content-Type", "text/plain"))


class DashboardSocket(NosSocket):
    """The websocket of one of the dashboard's pages."""

    #: To the dashboard; None before it is open.
    upstream: WebSocketClientConnection | None = None

    @ws_authenticated
    @authorized("read", resource="nos.dask")  # type: ignore[untyped-decorator]
    async def get(self, path: str) -> None:  # type: ignore[override]
        """Open it, once the dashboard's is open."""
        if not self.check_origin():
            # Before anything is opened for a page of another origin.
            raise web.HTTPError(403)
        url = await _target(self.app, path, self.request.query)
        offered = self.request.headers.get("Sec-WebSocket-Protocol", "")
        protocols = [name.strip() for name in offered.split(",") if name.strip()]
        try:
            self.upstream = await websocket_connect(
                HTTPRequest(url.replace("http", "ws", 1), connect_timeout=TIMEOUT_S),
                on_message_callback=self._on_upstream,
                subprotocols=protocols or None,
            )
        except (OSError, HTTPClientError) as error:
            raise web.HTTPError(502, f"dashboard: {error}") from None
        await super().get(path)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """Take what the dashboard took."""
        return cast("WebSocketClientConnection", self.upstream).selected_subprotocol

    async def open(self, path: str) -> None:
        """Open; messages go both ways from here."""
        super().open(path)

    async def on_message(self, message: str | bytes) -> None:
        """Pass a message of the page on."""
        if self.upstream is not None:
            await self.upstream.write_message(message, binary=isinstance(message, bytes))

    def _on_upstream(self, message: str | bytes | None) -> None:
        if message is None:
            self.end(GOING_AWAY, "dashboard: closed")
        elif self.ws_connection is not None:
            self.write_message(message, binary=isinstance(message, bytes))

    def on_close(self) -> None:
        """Close the dashboard's end."""
        if self.upstream is not None:
            self.upstream.close()
        super().on_close()
