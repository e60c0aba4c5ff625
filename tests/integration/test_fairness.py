"""Whose turn it is on a real worker: by the weights that tickets carry."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plane import definitions, running_plane
from tests.servers import wait_for

SOURCE = '''
import time
from pathlib import Path

import nos


@nos.model(name="turns", isolation="process")
class Turns:
    """Remembers who came."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, who: str, gate: str) -> list:
        while not Path(gate).exists():
            time.sleep(0.01)
        time.sleep(0.01)
        self.seen.append(who)
        return self.seen
'''
NUM_FRAMES = 16
WEIGHTS = {"heavy": 4.0}


@pytest.mark.accept("C7")
def test_a_tenant_of_more_weight_has_more_turns(tmp_path: Path) -> None:
    (definition,) = definitions(SOURCE, "turns.py")
    gate = tmp_path / "open"
    with running_plane({"turns": definition}, weights=WEIGHTS) as plane:
        first, heavy, light = (
            plane.stream("turns@v1", tenant=tenant) for tenant in ("first", "heavy", "light")
        )
        first.send("first", str(gate))
        wait_for(lambda: plane.status()["num_running"], "the first one runs")
        for _ in range(NUM_FRAMES):
            light.send("light", str(gate))
            heavy.send("heavy", str(gate))
        wait_for(lambda: plane.status()["num_queued"] == 2 * NUM_FRAMES, "all others wait")
        gate.touch()
        assert first.result()[1] == ["first"]
        heavy_ends = [heavy.result()[1] for _ in range(NUM_FRAMES)]
        light_ends = [light.result()[1] for _ in range(NUM_FRAMES)]
    order = max(heavy_ends + light_ends, key=len)[1:]
    assert len(order) == 2 * NUM_FRAMES
    turns_of_light = order[:NUM_FRAMES].count("light")
    assert 1 <= turns_of_light <= NUM_FRAMES // 2 - 2, order
