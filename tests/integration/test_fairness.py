"""Whose turn it is on a real worker: by the weights that tickets carry."""

from __future__ import annotations

import pytest

from tests.plane import definitions, running_plane

SOURCE = '''
import time

import nos


@nos.model(name="turns", isolation="process")
class Turns:
    """Remembers who came."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, who: str, s: float) -> list:
        time.sleep(s)
        self.seen.append(who)
        return self.seen
'''
NUM_FRAMES = 16
WEIGHTS = {"heavy": 4.0}


@pytest.mark.accept("C7")
def test_a_tenant_of_more_weight_has_more_turns() -> None:
    (definition,) = definitions(SOURCE, "turns.py")
    with running_plane({"turns": definition}, weights=WEIGHTS) as plane:
        first, heavy, light = (
            plane.stream("turns@v1", tenant=tenant) for tenant in ("first", "heavy", "light")
        )
        first.send("first", 1.0)  # all others are there when it ends
        for _ in range(NUM_FRAMES):
            light.send("light", 0.01)
            heavy.send("heavy", 0.01)
        assert first.result()[1] == ["first"]
        heavy_ends = [heavy.result()[1] for _ in range(NUM_FRAMES)]
        light_ends = [light.result()[1] for _ in range(NUM_FRAMES)]
    order = max(heavy_ends + light_ends, key=len)[1:]
    assert len(order) == 2 * NUM_FRAMES
    turns_of_light = order[:NUM_FRAMES].count("light")
    assert 1 <= turns_of_light <= NUM_FRAMES // 2 - 2, order
