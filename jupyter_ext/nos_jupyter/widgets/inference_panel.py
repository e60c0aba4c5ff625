"""One model, run from a form that is made from its interface."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anywidget
import nos
from nos.types import ModelChange

from nos_jupyter import page
from nos_jupyter.desk import Desk
from nos_jupyter.following import Follower
from nos_jupyter.forms import model_form
from nos_jupyter.stills import Still
from nos_jupyter.views import Message, RunResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nos_jupyter.views import MimeBundle


class InferencePanel(anywidget.AnyWidget):
    """A form for calls of one model: images, drawings, text and numbers in, results by type out.

    The form changes when the model is registered again, and says when the backend goes away and comes back.

    Args:
        model: Its name.
        source: The client to use, which stays the caller's; or a function that connects.
    """

    _esm = page.script(*page.FORM, "inference_panel")
    _css = page.style("page", "calls")

    def __init__(
        self, model: str, source: nos.Client | Callable[[], nos.Client] = nos.connect
    ) -> None:
        super().__init__()
        self._model = model
        #: What the pages were last told of the model; None before it is known.
        self._form: dict[str, Any] | None = None
        #: How long the last call that succeeded took; None before.
        self._total_s: float | None = None
        self._still = Still(self._picture)
        self.on_msg(self._on_message)
        self._follower = Follower(source, self._follow, self._on_change, self.send)
        self._desk = Desk(self._follower.client, self._answer)

    @property
    def value(self) -> Any:
        """What the last call that succeeded gave; None before."""
        return self._desk.value

    def close(self) -> None:
        """End all calls and take the widget off the page."""
        self._follower.close()
        self._desk.close()
        super().close()

    @contextlib.contextmanager
    def _follow(self, client: nos.Client) -> Iterator[Iterator[ModelChange]]:
        """Follow the models; raises where ours is not known."""
        now = client.info(self._model)
        with client.watch() as feed:

            def changes() -> Iterator[ModelChange]:
                yield ModelChange(model=now)
                yield from feed

            yield changes()

    def _on_change(self, change: ModelChange) -> None:
        if change.model.name != self._model:
            return
        self._form = {
            "type": "model",
            "model": model_form(change.model),
            "is_deleted": change.is_deleted,
        }
        self.send(self._form)

    def _on_message(
        self, _: object, content: dict[str, Any], buffers: Sequence[memoryview]
    ) -> None:
        if self._desk.take(content, buffers):
            return
        kind = content.get("type")
        if kind == "hello" and self._form is not None:
            self.send(self._form)
        self._follower.on_page(kind)

    def _answer(self, message: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        """Pass on what became of a call."""
        self.send(message, buffers)
        if message["type"] == "done":
            self._total_s = float(message["total_s"])
            self._still.change()

    def _picture(self) -> MimeBundle:
        if self._total_s is None:
            text = f"%nos panel {self._model}: a form, live while the notebook runs"
            return Message(text)._repr_mimebundle_()
        return RunResult(self._model, self.value, self._total_s)._repr_mimebundle_()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, **self._still.show()}, metadata
