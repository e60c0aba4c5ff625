"""Batches of ragged frames under cancellations and kills: every frame has its own answer or a typed end."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
from nos.errors import CancelledError, ExecutorLostError
from nos.wire.v1 import inference_pb2

from tests.accept import Accept
from tests.plane import Wire, definitions, running_plane

SOURCE = '''
from typing import Annotated

import nos
import torch

Rows = Annotated[torch.Tensor, "float32[batch, width]"]


@nos.model(name="mark")
class Mark:
    """Its answer tells every number of its input."""

    def __call__(self, x: Rows) -> Rows:
        return 2 * x + x.sum(-1, keepdim=True)
'''
NUM_STREAMS, WINDOW = 32, 16


@pytest.mark.timeout(900)
@pytest.mark.accept("A6", "A7")
def test_no_frame_of_a_batch_gets_the_answer_of_another(accept: Accept) -> None:
    num_rounds = 200 if accept.strict else 4
    (definition,) = definitions(SOURCE, "mark.py")
    chance, sent = random.Random(1), 0
    num_right = num_lost = num_cancelled = num_wrong = num_kills = num_batched = 0
    streams: list[Wire] = []
    with running_plane({"mark": definition}) as plane:
        for round_number in range(num_rounds):
            if round_number % 2 == 0:  # the wire of these tests gives a stream a minute
                for stream in streams:
                    stream.half_close()
                streams = [plane.stream("mark@v1") for _ in range(NUM_STREAMS)]
            expected: list[dict[int, np.ndarray]] = []
            for stream in streams:
                frames: dict[int, np.ndarray] = {}
                for _ in range(WINDOW):
                    sent += 1
                    rows, width = chance.randint(1, 3), chance.choice([2, 5])
                    x = np.full((rows, width), sent % 100_000, np.float32)
                    x += np.arange(rows, dtype=np.float32)[:, None] / 8
                    frames[stream.send(x)] = 2 * x + x.sum(-1, keepdims=True)
                expected.append(frames)
                seq = chance.choice(list(frames))
                stream.say(seq=seq, cancel=inference_pb2.Cancel())
            if round_number in {1, num_rounds - 1}:  # a third one would quarantine the model
                os.kill(plane.executor_pids()["local"], signal.SIGKILL)
                num_kills += 1
            for stream, frames in zip(streams, expected, strict=True):
                for _ in range(WINDOW):
                    seq, value = stream.result()
                    answer = frames.pop(seq)
                    if isinstance(value, np.ndarray):
                        num_right += np.array_equal(value, answer)
                        num_wrong += not np.array_equal(value, answer)
                    else:
                        num_lost += isinstance(value, ExecutorLostError)
                        num_cancelled += isinstance(value, CancelledError)
                assert not frames
        batches = plane.model("mark@v1")["statistics"]["batches"]
        num_batched = sum(size * count for size, count in batches.items() if size > 1)
    assert (num_kills, num_wrong) == (2, 0)
    assert num_right + num_lost + num_cancelled == sent
    assert num_batched > sent // 4
    assert num_right > sent // 2
    accept.figure(num_wrong, 0, f"wrong answers of {sent} frames")
