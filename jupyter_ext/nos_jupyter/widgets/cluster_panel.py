"""The cluster, live: workers, replicas and why there are so many, and the controls for both."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anywidget
import nos
from nos.errors import NosError

from nos_jupyter import page
from nos_jupyter.following import Follower, start_thread
from nos_jupyter.rendering import describe
from nos_jupyter.stills import Still
from nos_jupyter.views import Message, table_html, table_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos.types import Event, Status

    from nos_jupyter.views import MimeBundle

_INTERVAL_S = 0.5
_FIRST_STATUS_S = 1.0
_HEADER = ("model", "replicas", "why")


class ClusterPanel(anywidget.AnyWidget):
    """Workers and replicas as they come and go; scales both, for whoever may.

    Args:
        source: The client to use, which stays the caller's; or a function that connects.
    """

    _esm = page.script("page", "cluster_panel")
    _css = page.style("page", "cluster_panel")

    def __init__(self, source: nos.Client | Callable[[], nos.Client] = nos.connect) -> None:
        super().__init__()
        self._lock = threading.Lock()
        #: The last one; None before the first. Under the lock.
        self._status: Status | None = None
        self._has_status = threading.Event()
        self._still = Still(self._picture)
        self.on_msg(self._on_message)
        self._follower = Follower(
            source,
            lambda client: client.events(status_interval_s=_INTERVAL_S),
            self._on_event,
            self.send,
        )

    @property
    def status(self) -> Status | None:
        """What it shows; None before the backend answered."""
        with self._lock:
            return self._status

    def close(self) -> None:
        """Stop following and take the widget off the page."""
        self._follower.close()
        super().close()

    def _on_event(self, event: Event) -> None:
        if event.status is None:
            return
        with self._lock:
            self._status = event.status
        self.send({"type": "status", "status": _form(event.status)})
        self._has_status.set()
        self._still.change()

    def _on_message(
        self, _: object, content: dict[str, Any], buffers: Sequence[memoryview]
    ) -> None:
        kind = content.get("type")
        if kind in ("scale", "workers"):
            start_thread(self._scale, content, name="nos-scale")
        self._follower.on_page(kind)
        if kind == "hello" and (status := self.status) is not None:
            self.send({"type": "status", "status": _form(status)})

    def _scale(self, content: dict[str, Any]) -> None:
        low, high = int(content["min"]), int(content["max"])
        try:
            client = self._follower.client()
            if content["type"] == "scale":
                client.scale(str(content["model"]), min=low, max=high)
            else:
                client.scale_workers(min=low, max=high)
        except NosError as error:
            self.send({"type": "failed", **describe(error)})
        else:
            self.send({"type": "done"})

    def _picture(self) -> MimeBundle:
        status = self.status
        if status is None:
            return Message("the cluster is not known yet")._repr_mimebundle_()
        rows = [
            (
                it.model,
                f"{it.num_serving} of {it.scaling.target_replicas}",
                it.scaling.pending or it.scaling.reason,
            )
            for it in status.models
        ]
        return {"text/html": table_html(_HEADER, rows), "text/plain": table_text(_HEADER, rows)}

    def _repr_mimebundle_(self, **options: Any) -> Any:
        # So that a saved page shows what there was.
        self._has_status.wait(_FIRST_STATUS_S)
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, **self._still.show()}, metadata


def _form(status: Status) -> dict[str, Any]:
    """Return what the page shows of a status."""
    found = urlsplit(status.dashboard_url)
    is_link = found.scheme in ("http", "https")
    return {
        "dashboard": f"{found.scheme}://{found.netloc}/nos" if is_link else "",
        "workers": [
            {
                "name": worker.name,
                "device": worker.device.name,
                "product": worker.device.product,
                "used_bytes": worker.device.used_bytes,
                "capacity_bytes": worker.device.capacity_bytes,
                "num_running": worker.num_running,
                "num_queued": worker.num_queued,
                "num_streams": worker.num_streams,
                "is_retiring": worker.is_retiring,
            }
            for worker in status.workers
        ],
        "models": [
            {
                "name": it.model,
                "num_serving": it.num_serving,
                "min": it.scaling.min_replicas,
                "max": it.scaling.max_replicas,
                "target": it.scaling.target_replicas,
                "reason": it.scaling.reason,
                "pending": it.scaling.pending,
            }
            for it in status.models
        ],
        "events": [str(event) for event in reversed(status.events)],
    }
