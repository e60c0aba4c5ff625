"""Large sources are described the same, and hold nobody up."""

import asyncio
import time

import pytest
from nos.errors import InvalidRequestError
from nos_backend.control.describe import MAX_SOURCE_BYTES, describe
from nos_backend.control.describe_apart import describe_apart

METHOD = "class A:\n    def __init__(self, n: int): ...\n    def f(self, x: str) -> str: ...\n"
LARGE = METHOD + "".join(f"x{i} = [{i}, {i} + 1, f({i})]\n" for i in range(5000))

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("source", [METHOD, LARGE])
async def test_description_is_that_of_describe(source):
    found = await describe_apart(source, "", "<x>", MAX_SOURCE_BYTES)
    assert found == describe(source, source_name="<x>")


async def test_error_is_that_of_describe():
    with pytest.raises(InvalidRequestError, match="<x> is not Python: line 5004"):
        await describe_apart(LARGE + "class\n", "", "<x>", MAX_SOURCE_BYTES)


async def test_loop_goes_on_meanwhile():
    gaps = []

    async def tick():
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - start)

    ticking = asyncio.create_task(tick())
    await describe_apart(LARGE, "", "<x>", MAX_SOURCE_BYTES)
    ticking.cancel()
    assert len(gaps) > 20
