"""The Jupyter server extension: routes under `<base_url>nos/`, guarded by Jupyter's own access checks.

Security rules, each with a test: every method says `@authorized(action, resource=...)` with explicit
arguments (without them the decorator remembers the first call's), no decorated method is inherited, XSRF
and origin checks are Jupyter's, and no route accepts Python code.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.extension.handler import ExtensionHandlerMixin
from tornado import web
from traitlets import Unicode

if TYPE_CHECKING:
    import nos

HEALTH_TIMEOUT_S = 2.0


class HealthHandler(ExtensionHandlerMixin, APIHandler):
    """Says whether the backend answers."""

    _track_activity = False

    @web.authenticated
    @authorized("read", resource="nos")  # type: ignore[untyped-decorator]
    async def get(self) -> None:
        """Answer 200 with versions and latency, or 502 with a sentence."""
        from nos.errors import NosError

        try:
            health = await asyncio.to_thread(cast("NosApp", self.extensionapp).check_health)
        except NosError as error:
            self.set_status(502)
            self.finish({"message": f"backend: {error}"})
            return
        self.finish(health)


#: Every route of ours, under the server's base URL.
ROUTES = [(r"nos/api/v1/health", HealthHandler)]


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

    _lock: threading.Lock
    #: The connection to the backend; made on first use; under the lock.
    _client: nos.Client | None = None

    def initialize_settings(self) -> None:
        """Hand the configured backend to kernels; what the user's environment says goes first."""
        self._lock = threading.Lock()
        if not self.address or "NOS_ADDRESS" in os.environ:
            # Never this backend's token for another's address.
            return
        os.environ["NOS_ADDRESS"] = self.address
        if self.token_file:
            os.environ.setdefault("NOS_TOKEN_FILE", self.token_file)

    def initialize_handlers(self) -> None:
        """Add the routes."""
        self.handlers.extend(ROUTES)

    def check_health(self) -> dict[str, Any]:
        """Ask the backend how it is. Blocks for some seconds at most; called in a thread.

        Raises:
            NosError: If it does not answer.
        """
        from nos.errors import NosError

        with self._lock:
            is_new = self._client is None
            try:
                return self._ask_health()
            except NosError:
                self._close_client()
                if is_new:
                    raise
            # A backend that was restarted has another token, and maybe another port.
            return self._ask_health()

    def _ask_health(self) -> dict[str, Any]:
        import nos

        if self._client is None:
            self._client = nos.connect(
                self.address or None,
                token_file=self.token_file or None,
                timeout_s=HEALTH_TIMEOUT_S,
            )
        begin_s = time.monotonic()
        status = self._client.status()
        return {
            "version": nos.__version__,
            "backend": {
                "version": status.version,
                "state": status.state,
                "latency_s": round(time.monotonic() - begin_s, 6),
            },
            "features": [],
        }

    async def stop_extension(self) -> None:
        """Close the connection to the backend."""
        await asyncio.to_thread(self._close_client)

    def _close_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
