"""What a live widget does in the kernel: follow the backend as long as a page shows it."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import nos
from nos.errors import NosError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_RETRY_S = 1.0
#: Without a sign of life from a page for so long, a widget leaves the backend alone, which could not end
#: when idle otherwise. Longer than most cells run: ipykernel 6 hears no page meanwhile.
_UNSEEN_S = 600.0


def start_thread(run: Callable[..., None], *args: Any, name: str) -> threading.Thread:
    """Run something in a thread of its own, in a copy of the caller's context.

    ipykernel takes from it which message a widget answers, and so where the page's next one goes.
    """
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run, *args), name=name, daemon=True)
    thread.start()
    return thread


class Follower(Generic[T]):
    """Follows news of the backend in a thread of its own, over any number of losses.

    Args:
        source: The client to ask, which stays the caller's; or a function that connects, called again after
            each loss, so that a backend that came back elsewhere is found.
        follow: What to iterate over; also asked anew after each loss.
        take: Called with each item, in the thread.
        tell: Sends a message to the pages.
    """

    def __init__(
        self,
        source: nos.Client | Callable[[], nos.Client],
        follow: Callable[[nos.Client], contextlib.AbstractContextManager[Iterable[T]]],
        take: Callable[[T], None],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._source = source
        self._follow = follow
        self._take = take
        self._tell = tell
        self._lock = threading.Lock()
        #: `connecting`, `live`, `lost` or `ended`, with a sentence; under the lock.
        self._state: tuple[str, str] = ("connecting", "connecting to the backend")
        #: The connection while there is one; under the lock.
        self._client: nos.Client | None = None
        #: When a page last said that it shows the widget, by the monotonic clock.
        self._seen_s = time.monotonic()
        self._stop = threading.Event()
        #: Ends what the thread reads; None before the first connection.
        self._end_feed: Callable[[], object] | None = None
        #: Ended when no page looks, and started again when one comes back.
        self._thread = start_thread(self._run, name="nos-follow")

    @property
    def state(self) -> tuple[str, str]:
        """`connecting`, `live` or `lost`, and a sentence for a person."""
        with self._lock:
            return self._state

    def client(self) -> nos.Client:
        """Return the connection that is followed.

        Raises:
            UnavailableError: If there is none now.
        """
        with self._lock:
            if self._client is None:
                raise UnavailableError(self._state[1])
            return self._client

    def on_page(self, kind: str | None) -> None:
        """A page said something: at `hello` and `alive` go on, or start again."""
        if kind not in ("hello", "alive"):
            return
        self._seen_s = time.monotonic()
        if kind == "hello":
            self._tell_state()
        with self._lock:
            if not self._thread.is_alive() and not self._stop.is_set():
                self._thread = start_thread(self._run, name="nos-follow")

    def close(self) -> None:
        """Stop following; the thread ends soon after."""
        self._stop.set()
        if self._end_feed is not None:
            self._end_feed()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; return whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._is_wanted():
            try:
                with self._connect() as client:
                    self._use(client)
                    self._read(client)
            except UnavailableError as error:
                self._set_state("lost", f"backend unreachable, retrying: {error}")
            except NosError as error:
                self._set_state("lost", f"retrying: {error}")
            finally:
                self._use(None)
            self._stop.wait(_RETRY_S)

    def _read(self, client: nos.Client) -> None:
        with self._follow(client) as feed:
            self._end_feed = getattr(feed, "close", None)
            for item in feed:
                if not self._is_wanted():
                    return
                self._set_state("live", "live")
                self._take(item)
        self._set_state("lost", "the backend ended the stream, retrying")

    def _connect(self) -> contextlib.AbstractContextManager[nos.Client]:
        if isinstance(self._source, nos.Client):
            return contextlib.nullcontext(self._source)
        return self._source()

    def _use(self, client: nos.Client | None) -> None:
        with self._lock:
            self._client = client

    def _is_wanted(self) -> bool:
        return not self._stop.is_set() and time.monotonic() - self._seen_s < _UNSEEN_S

    def _set_state(self, name: str, sentence: str) -> None:
        with self._lock:
            changed = self._state != (name, sentence)
            self._state = (name, sentence)
        if changed:
            self._tell_state()

    def _tell_state(self) -> None:
        name, sentence = self.state
        self._tell({"type": "state", "name": name, "sentence": sentence})
