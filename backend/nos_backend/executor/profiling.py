"""What one method of a model needs at one batch size: predicted on the meta device, or measured.

Both start from one sample call. Its joined arguments are cut to their first row, which is repeated to make
up the batch, so that values that a model is particular about (token numbers, text) are as in a real call.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from nos_backend.executor import footprint
from nos_backend.executor.devices import wait_for
from nos_backend.executor.failures import RefusedError
from nos_backend.executor.messages import FIRST_DIMENSION, IN_LIST
from nos_backend.executor.values import Inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.executor.devices import Device
    from nos_backend.executor.loading import Model

#: Whoever serves goes first where cores are short.
_NICENESS: Final = 5
_MAX_PASSES: Final = 7
#: The clock's own grain.
_LEAST_S: Final = 1e-6
#: Nanoseconds on a core, waiting for one, and turns.
_SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")
#: Modules of one answer; the first to end, which are the innermost.
_MAX_MODULES: Final = 400

Point = dict[str, Any]


class Sample:
    """One call that can be made with any number of rows.

    Args:
        model: Whose method it is.
        method: `__call__` or a public method.
        arguments: (name or nothing, node) each.
        data: What the nodes' offsets count from; only read here.
        joined: By parameter that holds rows, how: see `executor/messages.py`.
        max_image_pixels: Of one encoded image.

    Raises:
        RefusedError: If there is no such method, or the arguments do not fit it.
    """

    def __init__(
        self,
        model: Model,
        method: str,
        arguments: list[list[Any]],
        data: bytes,
        joined: dict[str, int],
        max_image_pixels: int,
    ) -> None:
        self._model = model
        self._method = model.method(method)
        inputs = Inputs(memoryview(bytearray(data)), model.device, max_image_pixels)
        bound = self._method.bind([(name, node) for name, node in arguments], inputs)
        self._bound = bound
        self._rows = {
            name: _first_row(bound.arguments[name], kind) for name, kind in joined.items()
        }

    def measure(self, rows: int, limit_s: float, device: Device | None) -> Point:
        """Run it.

        Args:
            rows: How many.
            limit_s: Passes are repeated for so long, a few times at most; two are made anyhow. Time for which
                others had the core counts neither here nor in what is returned.
            device: Counts the bytes where it can; else the passes' operators are watched.

        Raises:
            BaseException: Whatever the model raises.
        """
        begun_s = _working_s()
        bound = self._with(lambda row: _repeated(row, rows))
        run = self._method.target
        with torch.inference_mode():
            if device is not None:
                device.start_measuring()
            best_s = self._timed(run, bound.args, bound.kwargs)
            device_bytes = device.peak_bytes() if device is not None else 0
        seen = footprint.measure(self._model.target, run, bound.args, rows, bound.kwargs)
        started_s = _working_s()
        with torch.inference_mode():
            for _ in range(_MAX_PASSES):
                if _working_s() - started_s + best_s > limit_s:
                    break
                best_s = min(best_s, self._timed(run, bound.args, bound.kwargs))
        return {
            **_point(seen),
            "took_s": best_s,
            "peak_bytes": device_bytes or seen.peak_bytes,
            "spent_s": _working_s() - begun_s,
        }

    def predict(self, sizes: list[int]) -> list[Point]:
        """Say what it would need at these sizes.

        Raises:
            BaseException: Whatever the model raises on meta tensors.
        """
        points = []
        for rows in sizes:
            bound = self._with(lambda row, rows=rows: _meta(row, rows))  # type: ignore[misc]
            run = self._method.target
            seen = footprint.predict(self._model.target, run, bound.args, rows, bound.kwargs)
            points.append(_point(seen))
        return points

    def _with(self, make: Callable[[Any], Any]) -> Any:
        """Return the arguments with batches in place of their rows."""
        self._bound.arguments.update({name: make(row) for name, row in self._rows.items()})
        return self._bound

    def _timed(self, run: Callable[..., Any], args: Any, named: Any) -> float:
        wait_for(self._model.device)
        started_s = _working_s()
        result = run(*args, **named)
        if isinstance(result, Iterator):
            raise RefusedError("INVALID_REQUEST", "a method that yields items has no batch")
        wait_for(self._model.device)
        return max(_working_s() - started_s, _LEAST_S)


def read_sample(
    model: Model, message: dict[str, Any], fds: list[int], max_image_pixels: int
) -> Sample:
    """Return the call that a message describes, whose bytes are in the descriptor that came with it."""
    data = os.pread(fds[0], message["size_bytes"], 0)
    method, arguments, joined = message["method"], message["args"], message["joined"]
    return Sample(model, method, arguments, data, joined, max_image_pixels)


def give_way() -> None:
    """Let other processes have the cores first, for good."""
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def _working_s() -> float:
    """Return a time in seconds that stands still while this thread waits for a core."""
    while True:
        waited_ns = _waited_ns()
        now_s = time.perf_counter()
        if _waited_ns() == waited_ns:  # else it waited between the two clocks
            return now_s - waited_ns * 1e-9


def _waited_ns() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_SCHEDSTAT.read_text().split()[1])
    return 0


def _first_row(value: Any, kind: int) -> Any:
    """Return the first row, in a container of one.

    Raises:
        RefusedError: If there is none.
    """
    if kind == IN_LIST and isinstance(value, list | tuple) and value:
        return list(value[:1])
    if isinstance(value, torch.Tensor | np.ndarray) and kind != IN_LIST:
        trailing = value.shape[1:] if kind == FIRST_DIMENSION else value.shape[value.ndim - kind :]
        flat = value.reshape(-1, *trailing)
        if len(flat):
            return flat[:1]
    raise RefusedError("INVALID_REQUEST", "the sample has no rows", got=type(value).__name__)


def _repeated(row: Any, rows: int) -> Any:
    if isinstance(row, torch.Tensor):
        return row.repeat(rows, *(1 for _ in row.shape[1:]))
    if isinstance(row, np.ndarray):
        return np.repeat(row, rows, axis=0)
    return row * rows


def _meta(row: Any, rows: int) -> Any:
    if isinstance(row, torch.Tensor):
        return torch.empty((rows, *row.shape[1:]), dtype=row.dtype, device="meta")
    raise RefusedError("INVALID_REQUEST", "only tensors can be predicted", got=type(row).__name__)


def _point(seen: footprint.Measurement) -> Point:
    return {
        "rows": seen.batch_size,
        "peak_bytes": seen.peak_bytes,
        "flops": seen.flops,
        "modules": [
            [use.path, use.kind, use.weight_bytes, use.activation_bytes, use.workspace_bytes]
            for use in seen.modules[:_MAX_MODULES]
        ],
    }
