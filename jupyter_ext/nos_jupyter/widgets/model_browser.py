"""The catalogue, live: what there is, where it is, and a form for each."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anywidget
import nos
from nos.errors import NosError

from nos_jupyter import page
from nos_jupyter.desk import Desk
from nos_jupyter.following import Follower, start_thread
from nos_jupyter.forms import model_form
from nos_jupyter.rendering import describe
from nos_jupyter.stills import Still
from nos_jupyter.views import Message, format_bytes, table_html, table_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos.types import ModelChange

    from nos_jupyter.views import MimeBundle

_FIRST_MODEL_S = 1.0
_HEADER = ("model", "state", "device memory", "about")


class ModelBrowser(anywidget.AnyWidget):
    """All models with their state, tier and bytes; loads, unloads and runs them.

    Args:
        source: The client to use, which stays the caller's; or a function that connects.
    """

    _esm = page.script(*page.FORM, "model_browser")
    _css = page.style("page", "calls", "model_browser")

    def __init__(self, source: nos.Client | Callable[[], nos.Client] = nos.connect) -> None:
        super().__init__()
        self._lock = threading.Lock()
        #: What pages show of each model, by name; under the lock.
        self._forms: dict[str, dict[str, Any]] = {}
        self._has_model = threading.Event()
        self._still = Still(self._picture)
        self.on_msg(self._on_message)
        self._follower = Follower(
            source, lambda client: client.watch(), self._on_change, self._tell
        )
        self._desk = Desk(self._follower.client, self.send)

    @property
    def names(self) -> list[str]:
        """The models that it shows, in order."""
        with self._lock:
            return sorted(self._forms)

    def close(self) -> None:
        """End all calls and take the widget off the page."""
        self._follower.close()
        self._desk.close()
        super().close()

    def _tell(self, message: dict[str, Any]) -> None:
        if message.get("name") == "lost":
            # What went away meanwhile is not told after a loss: start from nothing.
            with self._lock:
                self._forms.clear()
        self.send(message)

    def _on_change(self, change: ModelChange) -> None:
        name = change.model.name
        with self._lock:
            if change.is_deleted:
                self._forms.pop(name, None)
                self.send({"type": "gone", "name": name})
            else:
                self._forms[name] = model_form(change.model)
                self.send({"type": "model", "model": self._forms[name]})
        self._has_model.set()
        self._still.change()

    def _on_message(
        self, _: object, content: dict[str, Any], buffers: Sequence[memoryview]
    ) -> None:
        if self._desk.take(content, buffers):
            return
        kind = content.get("type")
        if kind in ("load", "unload"):
            start_thread(self._move, kind, str(content["name"]), name="nos-move")
        if kind == "hello":
            with self._lock:
                self.send({"type": "models", "models": list(self._forms.values())})
        self._follower.on_page(kind)

    def _move(self, kind: str, name: str) -> None:
        try:
            client = self._follower.client()
            (client.load if kind == "load" else client.unload)(name)
        except NosError as error:
            self.send({"type": "unmoved", "model": name, "act": kind, **describe(error)})
        else:
            self.send({"type": "moved", "model": name, "act": kind})

    def _picture(self) -> MimeBundle:
        with self._lock:
            rows = [
                (
                    form["name"],
                    form["state"],
                    format_bytes(form["device_bytes"]) if form["device_bytes"] else "",
                    form["doc"],
                )
                for _, form in sorted(self._forms.items())
            ]
        if not rows:
            return Message("no model is known yet")._repr_mimebundle_()
        return {"text/html": table_html(_HEADER, rows), "text/plain": table_text(_HEADER, rows)}

    def _repr_mimebundle_(self, **options: Any) -> Any:
        # So that a saved page shows what there was.
        self._has_model.wait(_FIRST_MODEL_S)
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, **self._still.show()}, metadata
