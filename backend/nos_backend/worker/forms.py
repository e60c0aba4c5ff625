"""What calls and results have in common with earlier ones, so that it need not be said or checked again."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final

from nos_backend.executor.messages import check_node, decode_json

_MAX_FORMS: Final = 256
_MAX_NODES: Final = 256
_MAX_NODE_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class _Form:
    number: int
    #: Held, so that no other list has its identity.
    arguments: list[list[Any]]


class Forms:
    """The forms of calls that an executor knows: model, method and the very list of arguments."""

    def __init__(self) -> None:
        self._forms: dict[tuple[str, str, int], _Form] = {}
        self._numbers = itertools.count()

    @property
    def is_full(self) -> bool:
        """Whether the executor is to forget them before it is told of another."""
        return len(self._forms) >= _MAX_FORMS

    def find(self, key: str, method: str, arguments: list[list[Any]]) -> int | None:
        """Return the number of a form; None if the executor does not know it."""
        form = self._forms.get((key, method, id(arguments)))
        return form.number if form is not None else None

    def add(self, key: str, method: str, arguments: list[list[Any]]) -> int:
        """Give a form a number that none had before."""
        form = self._forms[key, method, id(arguments)] = _Form(next(self._numbers), arguments)
        return form.number

    def clear(self) -> None:
        """Note that the executor forgets them."""
        self._forms.clear()


class Nodes:
    """Nodes of results, each checked once."""

    def __init__(self) -> None:
        #: By their JSON and the bytes of their block.
        self._nodes: dict[tuple[bytes, int], Any] = {}

    def read(self, raw: bytes, block_bytes: int) -> tuple[Any, bytes]:
        """Return the node that is `raw`, and `raw` where such a node is remembered, else nothing.

        Raises:
            MalformedError: If it is none, or reaches outside its block.
        """
        if (found := self._nodes.get((raw, block_bytes))) is not None:
            return found, raw
        node = decode_json(raw)
        check_node(node, block_bytes)
        if node is None or len(raw) > _MAX_NODE_BYTES:
            return node, b""
        if len(self._nodes) >= _MAX_NODES:
            self._nodes.clear()
        self._nodes[raw, block_bytes] = node
        return node, raw
