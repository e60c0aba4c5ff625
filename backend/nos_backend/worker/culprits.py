"""Calls that ended an executor, known by a digest of their input and refused from then on."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from nos.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Kept for all models together; the oldest go first.
_MAX_DIGESTS: Final = 1024


def digest(method: str, arguments: Sequence[Sequence[Any]], data: memoryview) -> str:
    """Return what tells one call of a model from all others."""
    found = hashlib.blake2b(json.dumps([method, arguments]).encode(), digest_size=16)
    found.update(data)
    return found.hexdigest()


class Culprits:
    """Digests of such calls, by model."""

    def __init__(self) -> None:
        self._digests: OrderedDict[tuple[str, str], None] = OrderedDict()
        #: How many there are of each model.
        self._counts: dict[str, int] = {}

    def has(self, model: str) -> bool:
        """Whether calls of a model have to be checked."""
        return model in self._counts

    def add(self, model: str, found: str) -> None:
        """Refuse this call from now on."""
        if (model, found) in self._digests:
            return
        self._digests[model, found] = None
        self._counts[model] = self._counts.get(model, 0) + 1
        while len(self._digests) > _MAX_DIGESTS:
            self._drop(next(iter(self._digests)))

    def forget(self, model: str) -> None:
        """Let a model's calls try again."""
        for key in [key for key in self._digests if key[0] == model]:
            self._drop(key)

    def check(self, model: str, method: str, found: str) -> None:
        """Let a call pass.

        Raises:
            InvalidRequestError: If it ended an executor before.
        """
        if (model, found) in self._digests:
            raise InvalidRequestError(
                f"this call of {model} ended its executor before and is not run again",
                method,
                got=f"an input with digest {found}",
                hint="Repair the model and register it again, or unload it to try once more",
            )

    def _drop(self, key: tuple[str, str]) -> None:
        del self._digests[key]
        self._counts[key[0]] -= 1
        if not self._counts[key[0]]:
            del self._counts[key[0]]
