"""A form that makes a model of code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anywidget
import nos
from nos.errors import InvalidRequestError, NosError

from nos_jupyter import page
from nos_jupyter.desk import Desk
from nos_jupyter.following import Follower, start_thread
from nos_jupyter.forms import model_form
from nos_jupyter.rendering import describe
from nos_jupyter.sources import class_names, compile_source
from nos_jupyter.stills import Still
from nos_jupyter.views import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos.types import Event, ModelInfo

    from nos_jupyter.views import MimeBundle

DEVICES = ("auto", "cpu", "cuda")
EXAMPLE = '''class Scale:
    """Multiplies a number."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def __call__(self, x: float) -> float:
        """Return x times the factor."""
        return x * self.factor
'''


class RegisterModel(anywidget.AnyWidget):
    """A form for `client.register`: code, name and device; shows the `%%nos model` cell that it stands for.

    Args:
        name: The name that it starts with.
        source_text: The code that it starts with.
        source: The client to use, which stays the caller's; or a function that connects.
    """

    _esm = page.script(*page.FORM, "register_model")
    _css = page.style("page", "calls", "register_model")

    def __init__(
        self,
        name: str = "me/scale",
        source_text: str = EXAMPLE,
        source: nos.Client | Callable[[], nos.Client] = nos.connect,
    ) -> None:
        super().__init__()
        self._start = {"type": "start", "name": name, "source": source_text, "devices": DEVICES}
        #: What it registered last; None before.
        self._registered: ModelInfo | None = None
        self._still = Still(self._picture)
        self.on_msg(self._on_message)
        self._follower: Follower[Event] = Follower(
            source, lambda client: client.events(status_interval_s=2.0), lambda _: None, self.send
        )
        self._desk = Desk(self._follower.client, self.send)

    def close(self) -> None:
        """End all calls and take the widget off the page."""
        self._follower.close()
        self._desk.close()
        super().close()

    def _on_message(
        self, _: object, content: dict[str, Any], buffers: Sequence[memoryview]
    ) -> None:
        if self._desk.take(content, buffers):
            return
        kind = content.get("type")
        if kind == "check":
            self._check(content)
        elif kind == "register":
            start_thread(self._register, content, name="nos-register")
        elif kind == "hello":
            self.send(self._start)
        self._follower.on_page(kind)

    def _check(self, content: dict[str, Any]) -> None:
        """Tell which classes the code defines, or what is wrong with it; runs none of it."""
        answer: dict[str, Any] = {
            "type": "checked",
            "id": content["id"],
            "classes": [],
            "wrong": "",
        }
        try:
            answer["classes"] = class_names(compile_source(str(content["source"]), "<form>"))
        except InvalidRequestError as error:
            answer["wrong"] = str(error)
        self.send(answer)

    def _register(self, content: dict[str, Any]) -> None:
        call_id = str(content["id"])
        try:
            info = self._follower.client().register(
                str(content["source"]),
                name=str(content["name"]),
                class_name=str(content["class_name"]),
                device=str(content["device"]),
                source_name="<form>",
            )
        except NosError as error:
            self.send({"type": "unregistered", "id": call_id, **describe(error)})
        else:
            self.send({"type": "registered", "id": call_id, "model": model_form(info)})
            self._registered = info
            self._still.change()

    def _picture(self) -> MimeBundle:
        if self._registered is None:
            text = "a form that registers a model, live while the notebook runs"
            return Message(text)._repr_mimebundle_()
        return {"text/html": self._registered._repr_html_(), "text/plain": str(self._registered)}

    def _repr_mimebundle_(self, **options: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, **self._still.show()}, metadata
