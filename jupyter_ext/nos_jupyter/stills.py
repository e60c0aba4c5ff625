"""What a saved notebook shows of a live widget: its last state, in an output of its own beside it."""

from __future__ import annotations

import contextvars
import threading
import uuid
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_jupyter.views import MimeBundle

#: Changes that follow each other sooner are one.
_PERIOD_S = 1.0


class Still:
    """A picture of a widget, for when the widget cannot be: its kernel is gone, or the page has no scripts.

    JupyterLab shows no other form of a widget that it cannot show live. So this one has an output of its own,
    which the widget's style hides for as long as the widget is there.

    Args:
        render: Returns the picture of now, as HTML and text; called on any thread.
        period_s: The least time between two pictures.
    """

    def __init__(self, render: Callable[[], MimeBundle], period_s: float = _PERIOD_S) -> None:
        self._render = render
        self._period_s = period_s
        self._display_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        #: Publishes into the notebook; None before the widget was shown in one. Under the lock.
        self._publish: Callable[..., None] | None = None
        #: Whether a picture is due already; under the lock.
        self._is_due = False

    def show(self) -> MimeBundle:
        """Put it into the cell that runs; return what stands in for the widget in the widget's own output."""
        bundle = self._render()
        shell = get_ipython()
        if shell is None or getattr(shell, "kernel", None) is None:
            return bundle
        with self._lock:
            self._publish = shell.display_pub.publish
        self._say(is_update=False)
        return {"text/plain": bundle["text/plain"], "text/html": ""}

    def change(self) -> None:
        """Take a new picture soon; any thread may ask for it."""
        with self._lock:
            if self._publish is None or self._is_due:
                return
            self._is_due = True
        # The context says to which cell it belongs.
        run = contextvars.copy_context().run
        timer = threading.Timer(self._period_s, run, (self._take,))
        timer.daemon = True
        timer.start()

    def _take(self) -> None:
        with self._lock:
            self._is_due = False
        self._say(is_update=True)

    def _say(self, *, is_update: bool) -> None:
        bundle: dict[str, Any] = dict(self._render())
        bundle["text/html"] = f'<div class="nos-still">{bundle["text/html"]}</div>'
        with self._lock:
            publish = self._publish
        if publish is not None:
            publish(bundle, transient={"display_id": self._display_id}, update=is_update)
