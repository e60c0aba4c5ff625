"""Every route of ours, under the server's base URL."""

from __future__ import annotations

from nos_jupyter.dashboard import DashboardHandler, DashboardSocket
from nos_jupyter.handlers import (
    DevicesHandler,
    HealthHandler,
    LoadHandler,
    ModelHandler,
    ModelsHandler,
    StartHandler,
    StopHandler,
    UnloadHandler,
)
from nos_jupyter.sockets import EventsSocket, StreamSocket

_API = "nos/api/v1"

#: Names of models hold slashes: what ends in a verb stands before what does not.
ROUTES = [
    (rf"{_API}/health", HealthHandler),
    (rf"{_API}/models", ModelsHandler),
    (rf"{_API}/models/(.+)/load", LoadHandler),
    (rf"{_API}/models/(.+)/unload", UnloadHandler),
    (rf"{_API}/models/(.+)", ModelHandler),
    (rf"{_API}/devices", DevicesHandler),
    (rf"{_API}/backend/start", StartHandler),
    (rf"{_API}/backend/stop", StopHandler),
    (rf"{_API}/ws/events", EventsSocket),
    (rf"{_API}/ws/stream/(.+)", StreamSocket),
    (r"nos/dask/(.*/ws)", DashboardSocket),
    (r"nos/dask/(.*)", DashboardHandler),
]
