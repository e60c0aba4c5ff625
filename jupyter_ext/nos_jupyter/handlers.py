"""REST routes: what there is, how it stands, load and unload, start and stop."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.extension.handler import ExtensionHandlerMixin
from nos.errors import NosError
from tornado import web

from nos_jupyter.link import http_status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import nos

    from nos_jupyter.extension import NosApp
    from nos_jupyter.link import Link

#: Loading may fetch weights first.
MOVE_TIMEOUT_S = 600.0


class NosHandler(ExtensionHandlerMixin, APIHandler):
    """What the routes share; none of its methods answers a request."""

    _track_activity = False

    @property
    def app(self) -> NosApp:
        """The extension."""
        return cast("NosApp", self.extensionapp)

    @property
    def link(self) -> Link:
        """The connection to the backend."""
        return self.app.link

    async def answer(
        self, question: Callable[[nos.AsyncClient], Awaitable[dict[str, Any]]]
    ) -> None:
        """Answer with what the backend says, or with a status and a sentence."""
        try:
            self.finish(await self.link.ask(question))
        except NosError as error:
            self.set_status(http_status(error))
            self.finish({"message": f"backend: {error}"})


class HealthHandler(NosHandler):
    """Says whether the backend answers."""

    @web.authenticated
    @authorized("read", resource="nos")  # type: ignore[untyped-decorator]
    async def get(self) -> None:
        """Answer 200 with versions and latency, or 502 with a sentence."""
        await self.answer(self._health)

    async def _health(self, client: nos.AsyncClient) -> dict[str, Any]:
        import nos

        begin_s = time.monotonic()
        status = await client.status()
        return {
            "version": nos.__version__,
            "backend": {
                "address": client.address,
                "version": status.version,
                "state": status.state,
                "latency_s": round(time.monotonic() - begin_s, 6),
            },
            "features": self.app.features(),
        }


class ModelsHandler(NosHandler):
    """The catalogue."""

    @web.authenticated
    @authorized("read", resource="nos")  # type: ignore[untyped-decorator]
    async def get(self) -> None:
        """Answer the models whose names contain `q`."""
        pattern = self.get_query_argument("q", "")

        async def models(client: nos.AsyncClient) -> dict[str, Any]:
            return {"models": [model.to_dict() for model in await client.models(pattern)]}

        await self.answer(models)


class ModelHandler(NosHandler):
    """One model."""

    @web.authenticated
    @authorized("read", resource="nos")  # type: ignore[untyped-decorator]
    async def get(self, name: str) -> None:
        """Answer how a model stands; 404 if there is none of that name."""

        async def model(client: nos.AsyncClient) -> dict[str, Any]:
            return (await client.info(name)).to_dict()

        await self.answer(model)


class DevicesHandler(NosHandler):
    """The devices."""

    @web.authenticated
    @authorized("read", resource="nos")  # type: ignore[untyped-decorator]
    async def get(self) -> None:
        """Answer the status: workers, their devices, and who holds how much of them."""

        async def devices(client: nos.AsyncClient) -> dict[str, Any]:
            return (await client.status()).to_dict()

        await self.answer(devices)


class LoadHandler(NosHandler):
    """Places a model on a device."""

    @web.authenticated
    @authorized("write", resource="nos.control")  # type: ignore[untyped-decorator]
    async def post(self, name: str) -> None:
        """Answer how the model stands when it can answer."""

        async def load(client: nos.AsyncClient) -> dict[str, Any]:
            return (await client.load(name, timeout_s=MOVE_TIMEOUT_S)).to_dict()

        self.app.check_control()
        await self.answer(load)


class UnloadHandler(NosHandler):
    """Takes a model off its devices."""

    @web.authenticated
    @authorized("write", resource="nos.control")  # type: ignore[untyped-decorator]
    async def post(self, name: str) -> None:
        """Answer how the model stands."""

        async def unload(client: nos.AsyncClient) -> dict[str, Any]:
            return (await client.unload(name, timeout_s=MOVE_TIMEOUT_S)).to_dict()

        self.app.check_control()
        await self.answer(unload)


class StartHandler(NosHandler):
    """Starts a backend on the Jupyter server's machine."""

    @web.authenticated
    @authorized("execute", resource="nos.control")  # type: ignore[untyped-decorator]
    async def post(self) -> None:
        """Join the user's backend, or start one; answer its address."""
        self.app.check_control(is_local=True)
        import nos

        try:
            client = await asyncio.to_thread(nos.start, progress=False)
        except NosError as error:
            self.set_status(http_status(error))
            self.finish({"message": f"backend: {error}"})
            return
        address = client.address
        client.close()
        await self.link.drop()
        self.finish({"address": address})


class StopHandler(NosHandler):
    """Stops the user's backend on the Jupyter server's machine."""

    @web.authenticated
    @authorized("execute", resource="nos.control")  # type: ignore[untyped-decorator]
    async def post(self) -> None:
        """Stop it; answer whether there was one."""
        self.app.check_control(is_local=True)
        import nos

        await self.link.drop()
        try:
            self.finish({"was_running": await asyncio.to_thread(nos.stop)})
        except NosError as error:
            self.set_status(http_status(error))
            self.finish({"message": f"backend: {error}"})
