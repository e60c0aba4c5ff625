"""What the tab key offers on `%nos` lines."""

from __future__ import annotations

import threading
import time

import pytest
from IPython.core.completer import CompletionContext
from nos.errors import UnavailableError
from nos_jupyter import arguments
from nos_jupyter.completion import BUDGET_S, NameCache, matcher

NAMES = ["nos/digits", "nos/echo", "me/net-2"]


def offers(text: str, *, line: int = 0) -> tuple[list[str], bool]:
    complete = matcher(arguments.build(), NameCache(lambda: NAMES))
    last = text.split("\n")[line]
    context = CompletionContext(
        token="", full_text=text, cursor_position=len(last), cursor_line=line, limit=None
    )
    result = complete(context)
    return [item.text for item in result["completions"]], bool(result.get("suppress"))


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("%nos con", ["connect"]),
        ("%nos load nos/", ["nos/digits", "nos/echo"]),
        ("%nos info me/net-", ["me/net-2"]),
        ("x = 1\n%nos run nos/d", ["nos/digits"]),
        ("%nos run nos/digits --out", ["--out"]),
        ("%%nos model me/x --cl", ["--class"]),
        ("%nos help sto", ["stop"]),
    ],
)
def test_commands_models_and_options_complete(text: str, offered: list[str]) -> None:
    assert offers(text, line=text.count("\n")) == (offered, True)


@pytest.mark.parametrize("text", ["x = pri", "%timeit nos", "%nos load nos/echo ", "%nosy "])
def test_other_lines_are_left_to_other_matchers(text: str) -> None:
    assert offers(text) == ([], False)


def test_the_body_of_a_cell_is_left_to_other_matchers() -> None:
    assert offers("%%nos model me/x\nclass A", line=1) == ([], False)


def test_a_slow_backend_costs_no_more_than_the_budget() -> None:
    release = threading.Event()
    cache = NameCache(lambda: [str(release.wait(10))])
    begin_s = time.monotonic()
    assert cache.names() == []
    took_s = time.monotonic() - begin_s
    release.set()
    assert took_s < 10 * BUDGET_S


def test_no_backend_offers_nothing_and_is_not_asked_again_at_once() -> None:
    asked = []

    def fetch() -> list[str]:
        asked.append(1)
        raise UnavailableError("nobody answers")

    cache = NameCache(fetch)
    assert cache.names() == []
    assert cache.names() == []
    assert len(asked) == 1


def test_a_changed_catalogue_is_fetched_again() -> None:
    names = ["a"]
    cache = NameCache(lambda: names)
    assert cache.names() == ["a"]
    names = ["a", "b"]
    assert cache.names() == ["a"]
    cache.forget()
    assert cache.names() == ["a", "b"]
