"""Completion of `%nos` lines: commands, options, model names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from IPython.core.completer import SimpleCompletion, SimpleMatcherResult, context_matcher
from nos.errors import NosError

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext

    from nos_jupyter.arguments import CommandLine

FRESH_S = 30.0
BUDGET_S = 0.15

#: Commands whose first word is a model of the catalogue.
MODEL_COMMANDS = frozenset(
    (
        "info",
        "load",
        "unload",
        "run",
        "map",
        "models",
        "panel",
        "stream",
        "scale",
        "profile",
        "stats",
        "logs",
        "unregister",
    )
)


class NameCache:
    """Model names that are at most 30 s old, asked for in the background.

    Any thread may call `names`; it returns within 150 ms whatever the backend does.
    """

    def __init__(self, fetch: Callable[[], Sequence[str]]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        #: The names that were last fetched; empty before the first answer and after a failure.
        self._names: list[str] = []
        #: When they came, by the monotonic clock.
        self._fetched_s = float("-inf")
        #: Set while no fetch is under way.
        self._is_idle = threading.Event()
        self._is_idle.set()

    def names(self) -> list[str]:
        """Return the names, or those known so far if the backend takes too long."""
        with self._lock:
            is_stale = time.monotonic() - self._fetched_s > FRESH_S
            if is_stale and self._is_idle.is_set():
                self._is_idle.clear()
                threading.Thread(target=self._refresh, name="nos-complete", daemon=True).start()
        if is_stale:
            self._is_idle.wait(BUDGET_S)
        return self._names

    def forget(self) -> None:
        """Fetch again at the next use: the catalogue changed."""
        self._fetched_s = float("-inf")

    def _refresh(self) -> None:
        try:
            self._names = list(self._fetch())
        except NosError:
            self._names = []
        finally:
            self._fetched_s = time.monotonic()
            self._is_idle.set()


Matcher = Callable[["CompletionContext"], SimpleMatcherResult]


def matcher(command_line: CommandLine, cache: NameCache) -> Matcher:
    """Return the matcher to add to a shell's completer.

    It speaks only on `%nos` lines, and silences the others only where it has something to offer.
    """

    @context_matcher(identifier="nos", priority=200)  # type: ignore[untyped-decorator]
    def complete(context: CompletionContext) -> SimpleMatcherResult:
        head = context.line_with_cursor[: context.cursor_position].lstrip()
        is_cell_magic = context.full_text.lstrip().startswith("%%nos ") and context.cursor_line == 0
        if not (head.startswith("%nos ") or is_cell_magic):
            return SimpleMatcherResult(completions=[])
        words = head.split()
        fragment = "" if head[-1].isspace() else words.pop()
        offers = _offers(command_line, cache, words[1:], fragment)
        return SimpleMatcherResult(
            completions=[SimpleCompletion(text=offer, type="param") for offer in offers],
            suppress=bool(offers),
            matched_fragment=fragment,
        )

    return cast("Matcher", complete)


def _offers(
    command_line: CommandLine, cache: NameCache, words: list[str], fragment: str
) -> list[str]:
    """Return what may stand at the cursor after these words."""
    if not words:
        offers = list(command_line.commands)
    elif words[0] not in command_line.commands:
        return []
    elif fragment.startswith("-"):
        offers = command_line.commands[words[0]].long_options
    elif words[0] in MODEL_COMMANDS and len(words) == 1:
        offers = cache.names()
    elif words[0] == "help" and len(words) == 1:
        offers = list(command_line.commands)
    else:
        return []
    return [offer for offer in offers if offer.startswith(fragment)]
