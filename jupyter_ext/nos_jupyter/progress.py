"""A line that says what is under way and for how long, updated in place; it survives saving."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING, Self

from nos_jupyter.views import Message

if TYPE_CHECKING:
    from types import TracebackType

    from IPython.core.interactiveshell import InteractiveShell

#: What is done sooner needs no line.
_QUIET_S = 0.5
_PERIOD_S = 0.25


class Progress:
    """Shows a line while its body runs, from half a second on; nothing where lines cannot be updated.

    Args:
        shell: The shell whose cell runs.
        what: What is under way, for instance `loading nos/digits`.
    """

    def __init__(self, shell: InteractiveShell, what: str) -> None:
        self._what = what
        #: How far it is, for instance `3 of 10`; whoever runs sets it.
        self.count = ""
        self._publish = shell.display_pub.publish
        self._is_front_end = getattr(shell, "kernel", None) is not None
        self._done = threading.Event()
        self._begin_s = time.monotonic()
        #: Names the line on the page.
        self._display_id = uuid.uuid4().hex
        #: Whether the line is there; written by the thread only.
        self._is_shown = False
        self._thread = threading.Thread(target=self._tell, name="nos-progress", daemon=True)

    def __enter__(self) -> Self:
        if self._is_front_end:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if not self._is_front_end:
            return
        self._thread.join()
        if self._is_shown:
            self._say("failed" if error else "done")

    def _tell(self) -> None:
        self._done.wait(_QUIET_S)
        while not self._done.is_set():
            self._say("...")
            self._done.wait(_PERIOD_S)

    def _say(self, state: str) -> None:
        elapsed_s = f"{time.monotonic() - self._begin_s:.1f} s"
        line = Message(" ".join(filter(None, (self._what, self.count, state, elapsed_s))))
        self._publish(
            line._repr_mimebundle_(),
            transient={"display_id": self._display_id},
            update=self._is_shown,
        )
        self._is_shown = True
