"""Models that give what they should not, and calls that cannot be sent: their own end, and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from nos.errors import InternalError, LimitExceededError, ModelError
from nos_backend.worker.dispatch import Request
from nos_backend.worker.memory import MemoryOptions
from nos_backend.worker.replies import Reply

from tests.plane import Plane, definitions, running_plane

SOURCE = """
from typing import Annotated
import os, time
import nos, numpy as np, torch

Rows = Annotated[torch.Tensor, "float32[batch, 2]"]

@nos.model(name="odd")
class Odd:
    def same(self, x: Rows) -> Rows:
        return x

    def not_numbers(self, x: Rows) -> Rows:
        return x / 0 * 0

    def endless(self, kind: str):
        return {
            "tensor": lambda: torch.zeros(1).expand(1 << 40),
            "array": lambda: np.broadcast_to(np.zeros(1, np.float32), (1 << 40,)),
        }[kind]()

    def thing(self, kind: str):
        return {"object": object(), "class": Odd, "set": {1}, "function": len, "module": os}[kind]

    def pid(self):
        return os.getpid()

@nos.model(name="words", batch=True)
class Words:
    def __call__(self, words: list[str], scale: object = None) -> list[int]:
        time.sleep(0.2 if words == ["wait"] else 0)
        return [len(word) for word in words]

@nos.model(name="beside")
class Beside(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1024))
    def forward(self):
        return float(self.weight.sum())
"""


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    models = {item.name: item for item in definitions(SOURCE, "odd.py")}
    memory = MemoryOptions(min_residency_s=0.0)
    with running_plane(models, memory=memory, max_concurrent_batches=1) as plane:
        yield plane


def test_what_is_no_number_passes_as_it_is(plane: Plane) -> None:
    bits = np.array([[0x7FC00001, 0xFFC12345], [0x7F800000, 0x3F800000]], np.uint32)
    found = plane.run("odd@v1", "same", bits.view(np.float32))
    assert found.view(np.uint32).tolist() == bits.tolist()
    assert np.isnan(plane.run("odd@v1", "not_numbers", np.ones((1, 2), np.float32))).all()


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_result_that_no_memory_holds_is_refused_with_both_figures(
    plane: Plane, kind: str
) -> None:
    pid = plane.run("odd@v1", "pid")
    with pytest.raises(LimitExceededError, match=r"the result is too large.*at most \d+ bytes"):
        plane.run("odd@v1", "endless", kind)
    assert plane.run("odd@v1", "pid") == pid
    assert plane.model("beside@v1")["state"] == "device", "nobody had to leave for it"
    assert plane.run("beside@v1", "") == 1024.0


@pytest.mark.parametrize("kind", ["object", "class", "set", "function", "module"])
def test_a_result_that_is_no_value_is_the_models_error(plane: Plane, kind: str) -> None:
    pid = plane.run("odd@v1", "pid")
    with pytest.raises(ModelError, match="has no wire form"):
        plane.run("odd@v1", "thing", kind)
    assert plane.run("odd@v1", "pid") == pid


def submit(plane: Plane, *calls: list[list[Any]]) -> list[Reply]:
    """Queue calls of `words` at once, past all checks of what they hold; return their replies."""

    async def go() -> list[Reply]:
        loop = asyncio.get_running_loop()
        replies: list[asyncio.Future[Reply]] = []
        for arguments in calls:
            replies.append(loop.create_future())
            request = Request(
                model="words@v1",
                method="__call__",
                tenant="t",
                arguments=arguments,
                sink=replies[-1].set_result,
            )
            plane.manager.submit(request)
        return [await reply for reply in replies]

    return plane.data_plane.submit_coroutine(go).result(30)


def words(*given: str, scale: Any = None) -> list[list[Any]]:
    return [["", {"l": list(given)}], ["scale", scale]]


def test_a_call_that_cannot_be_sent_holds_up_nobody(plane: Plane) -> None:
    thing = object()
    alone, *_ = submit(plane, words("one", scale=thing))
    assert isinstance(alone.error, InternalError)
    first, second, third, last = submit(
        plane, words("wait"), words("two", scale=thing), words("three", scale=thing), words("four")
    )
    assert [first.node, last.node] == [{"l": [4]}, {"l": [4]}]
    assert isinstance(second.error, InternalError)
    assert isinstance(third.error, InternalError)
    assert plane.status()["num_running"] == plane.status()["num_queued"] == 0
    assert plane.model("words@v1")["num_pending"] == 0
    assert plane.run("words@v1", "", ["again"]) == [5]
