"""Live widgets: plain ES modules, without a build and without a CDN."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import nos
from nos.errors import NosError, UnavailableError

from nos_jupyter.memory import History, Mark, Sample
from nos_jupyter.views import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos import Event

_STATIC = Path(__file__).parent / "static"
_INTERVAL_S = 0.5
_RETRY_S = 1.0
_FIRST_SAMPLE_S = 1.0
#: Without a sign of life from a page for so long, the widget leaves the backend alone, which could not end
#: when idle otherwise. Longer than most cells run: ipykernel 6 hears no page meanwhile.
_UNSEEN_S = 600.0
_MARKED = frozenset({"loading", "loaded", "unloaded", "failed", "worker-lost", "executor-lost"})


class MemoryProfile(anywidget.AnyWidget):
    """Device memory by model over time, live at 2 Hz.

    A thread of its own reads the backend's events and sends each to the pages that show the widget. Samples
    travel as messages and never as traits, so that a saved notebook holds nothing of them, nor of the
    connection.

    Args:
        source: The client to ask, which stays the caller's; or a function that connects, called again after
            each loss, so that a backend that came back elsewhere is found.
    """

    _esm = _STATIC / "memory_profile.js"
    _css = _STATIC / "memory_profile.css"

    def __init__(self, source: nos.Client | Callable[[], nos.Client] = nos.connect) -> None:
        super().__init__()
        self._source = source
        self._lock = threading.Lock()
        #: What was seen; under the lock.
        self._history = History()
        #: `connecting`, `live`, `lost` or `ended`, with a sentence; under the lock.
        self._state: tuple[str, str] = ("connecting", "connecting to the backend")
        #: When a page last said that it shows the widget, by the monotonic clock.
        self._seen_s = time.monotonic()
        self._stop = threading.Event()
        self._has_sample = threading.Event()
        #: Ends what the thread reads; None before the first connection.
        self._end_feed: Callable[[], None] | None = None
        self.on_msg(self._on_message)
        #: Reads the feed; ended, and started again when a page comes back.
        self._thread = self._start()

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
        self._stop.set()
        if self._end_feed is not None:
            self._end_feed()
        super().close()

    def _start(self) -> threading.Thread:
        # In a copy of the caller's context: ipykernel takes a message's parent from it.
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(self._watch,), name="nos-memory", daemon=True)
        thread.start()
        return thread

    def _on_message(self, _: object, content: dict[str, Any], __: object) -> None:
        """Answer a page; on any thread, as ipykernel likes."""
        kind = content.get("type")
        if kind not in ("hello", "alive"):
            return
        self._seen_s = time.monotonic()
        if kind == "hello":
            with self._lock:
                samples = [sample.to_json() for sample in self._history.samples]
                marks = [mark.to_json() for mark in self._history.marks]
                self.send({"type": "history", "samples": samples, "marks": marks})
            self._tell_state()
        with self._lock:
            if not self._thread.is_alive() and not self._stop.is_set():
                self._thread = self._start()

    def _watch(self) -> None:
        """Follow the backend's events until closed, over any number of losses."""
        while not self._stop.is_set() and self._is_seen():
            try:
                with self._client() as client, client.events(status_interval_s=_INTERVAL_S) as feed:
                    self._end_feed = feed.close
                    for event in feed:
                        self._on_event(event)
                        if self._stop.is_set() or not self._is_seen():
                            break
                    else:
                        self._set_state("lost", "the backend ended the stream, retrying")
            except UnavailableError as error:
                self._set_state("lost", f"backend unreachable, retrying: {error}")
            except NosError as error:
                self._set_state("lost", f"retrying: {error}")
            self._stop.wait(_RETRY_S)

    def _is_seen(self) -> bool:
        return time.monotonic() - self._seen_s < _UNSEEN_S

    def _client(self) -> contextlib.AbstractContextManager[nos.Client]:
        if isinstance(self._source, nos.Client):
            return contextlib.nullcontext(self._source)
        return self._source()

    def _on_event(self, event: Event) -> None:
        self._set_state("live", "live")
        if event.status is not None:
            sample = Sample(event.time_s, event.status.workers)
            with self._lock:
                self._history.samples.append(sample)
                self.send({"type": "sample", "sample": sample.to_json()})
            self._has_sample.set()
        elif event.kind in _MARKED:
            mark = Mark(event.time_s, event.kind, event.model)
            with self._lock:
                self._history.marks.append(mark)
                self.send({"type": "mark", "mark": mark.to_json()})

    def _set_state(self, name: str, sentence: str) -> None:
        with self._lock:
            changed = self._state != (name, sentence)
            self._state = (name, sentence)
        if changed:
            self._tell_state()

    def _tell_state(self) -> None:
        with self._lock:
            name, sentence = self._state
        self.send({"type": "state", "name": name, "sentence": sentence})

    def _repr_mimebundle_(self, **options: Any) -> Any:
        # So that a saved page shows more than an empty picture.
        self._has_sample.wait(_FIRST_SAMPLE_S)
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        with self._lock:
            html = self._history.to_html()
            peak = format_bytes(self._history.peak_bytes)
        still = {"text/html": html, "text/plain": f"MemoryProfile(peak {peak})"}
        return {**data, **still}, metadata
