"""Device memory by model over time, live."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anywidget
import nos
from nos.errors import NosError

from nos_jupyter import page
from nos_jupyter.following import Follower, start_thread
from nos_jupyter.memory import History, Sample
from nos_jupyter.rendering import describe
from nos_jupyter.stills import Still
from nos_jupyter.views import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos import Event

    from nos_jupyter.views import MimeBundle

_INTERVAL_S = 0.5
_FIRST_SAMPLE_S = 1.0
_STILL_PERIOD_S = 10.0


class MemoryProfile(anywidget.AnyWidget):
    """Device memory by model over time, live at 2 Hz.

    A thread of its own reads the backend's events and sends each to the pages that show the widget. Samples
    travel as messages and never as traits, so that a saved notebook holds nothing of them, nor of the
    connection.

    Args:
        source: The client to ask, which stays the caller's; or a function that connects, called again after
            each loss, so that a backend that came back elsewhere is found.
    """

    _esm = page.script("page", "breakdown", "memory_profile")
    _css = page.style("page", "calls", "memory_profile")

    def __init__(self, source: nos.Client | Callable[[], nos.Client] = nos.connect) -> None:
        super().__init__()
        self._lock = threading.Lock()
        #: What was seen; under the lock.
        self._history = History()
        self._has_sample = threading.Event()
        self._still = Still(self._picture, _STILL_PERIOD_S)
        self.on_msg(self._on_message)
        self._follower = Follower(
            source,
            lambda client: client.events(status_interval_s=_INTERVAL_S),
            self._on_event,
            self.send,
        )

    @property
    def peak_bytes(self) -> int:
        """The most that any one device had in use while this was watching."""
        with self._lock:
            return self._history.peak_bytes

    @property
    def samples(self) -> list[Sample]:
        """What was seen so far, at most ten minutes."""
        with self._lock:
            return list(self._history.samples)

    def close(self) -> None:
        """Stop watching and take the widget off the page."""
        self._follower.close()
        super().close()

    def _on_message(self, _: object, content: dict[str, Any], __: object) -> None:
        """Answer a page; on any thread, as ipykernel likes."""
        kind = content.get("type")
        if kind == "hello":
            with self._lock:
                samples = [sample.to_json() for sample in self._history.samples]
                marks = [mark.to_json() for mark in self._history.marks]
                self.send({"type": "history", "samples": samples, "marks": marks})
        elif kind == "profile":
            start_thread(self._break_down, str(content["model"]), name="nos-profile")
        self._follower.on_page(kind)

    def _break_down(self, model: str) -> None:
        """Tell pages what a model needs, measured by the backend if it is not known."""
        try:
            profile = self._follower.client().profile(model)
        except NosError as error:
            self.send({"type": "unprofiled", "model": model, **describe(error)})
        else:
            self.send({"type": "profile", "model": model, "profile": profile.to_dict()})

    def _on_event(self, event: Event) -> None:
        with self._lock:
            for new in self._history.take(event):
                kind = "sample" if isinstance(new, Sample) else "mark"
                self.send({"type": kind, kind: new.to_json()})
        if event.status is not None:
            self._has_sample.set()
            self._still.change()

    def _picture(self) -> MimeBundle:
        with self._lock:
            html = self._history.to_html()
            peak = format_bytes(self._history.peak_bytes)
        return {"text/html": html, "text/plain": f"MemoryProfile(peak {peak})"}

    def _repr_mimebundle_(self, **options: Any) -> Any:
        # So that a saved page shows more than an empty picture.
        self._has_sample.wait(_FIRST_SAMPLE_S)
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, **self._still.show()}, metadata
