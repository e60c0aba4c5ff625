"""One method at growing sizes, in an executor for that alone: seconds, bytes, and which batch is best."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Final

from nos.errors import InternalError, NosError, OutOfDeviceMemoryError
from nos.wire.v1 import models_pb2

from nos_backend.scheduling import knee
from nos_backend.scheduling.batching import MAX_BATCH_BYTES, MAX_BATCH_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.worker.entries import Entry
    from nos_backend.worker.executors import Executor
    from nos_backend.worker.samples import Sample

#: One size, or a prediction, which imports much of torch first.
_PASS_S: Final = 60.0
#: Passes of one size are repeated for so long.
_SIZE_S: Final = 0.06
#: What measuring one size costs, in passes of twice the rows of the size before.
_COST: Final = 3.0
_NONSENSE: Final = "an executor told nonsense about a model"


class Sweep:
    """Measures methods at growing sizes until the time is up."""

    def __init__(
        self,
        executor: Executor,
        entry: Entry,
        quiet: Callable[[], Any],
        room_bytes: Callable[[], int],
        budget_s: float,
    ) -> None:
        self._executor = executor
        self._key = entry.key
        self._quiet = quiet
        self._room_bytes = room_bytes
        self._left_s = self._budget_s = budget_s
        #: Of the method that is measured, by rows.
        self._modules: dict[int, list[models_pb2.ModuleUse]] = {}
        #: What ended the last one early, if not the time.
        self.error: NosError | None = None

    async def run(self, sample: Sample, method: models_pb2.Method) -> models_pb2.MethodProfile:
        """Measure one method; what goes wrong is in its note."""
        found = models_pb2.MethodProfile(method=method.name, sample=sample.origin)
        ladder = ladder_of(sample, method)
        self._modules.clear()
        found.note = await self._measure(sample, ladder, found)
        if method.HasField("batching") and not method.batching.is_each:
            _choose(found, method.batching.max_rows, ladder if self.error is None else [])
        if isinstance(self.error, OutOfDeviceMemoryError):
            await self._predict(sample, ladder[len(found.points) :], found)
        if self._modules:
            found.module_rows = found.chosen_rows or max(self._modules)
            if found.module_rows not in self._modules:
                found.module_rows = max(self._modules)
            found.modules.extend(self._modules[found.module_rows])
        return found

    async def _measure(
        self, sample: Sample, ladder: list[int], found: models_pb2.MethodProfile
    ) -> str:
        """Add a point for each size; returns why it stopped before the last one."""
        self.error = None
        for rows in ladder:
            predicted_bytes = 0
            if found.points:
                last = found.points[-1]
                if _COST * rows / last.rows * last.took_s > self._left_s:
                    return f"was not tried with {rows} rows: {self._budget_s:g} s were up"
                seen = [(point.rows, point.measured_bytes) for point in found.points]
                predicted_bytes = knee.fit_activations(seen).at(rows) if len(seen) > 1 else 0
            if not await self._quiet():
                return f"was not tried with {rows} rows: there was no quiet moment"
            try:
                if predicted_bytes > self._room_bytes():
                    raise OutOfDeviceMemoryError("the budget has no room")
                (raw,) = await ask(
                    self._executor, self._key, sample, op="measure", rows=rows, limit_s=_SIZE_S
                )
                self._left_s -= _seconds(raw.get("spent_s"))
                point = _point(raw, rows)
                point.predicted_bytes = predicted_bytes
                found.points.append(point)
                self._modules[rows] = _modules(raw)
            except NosError as error:
                self.error = error
                return f"failed with {rows} rows: {error}"
        return ""

    async def _predict(
        self, sample: Sample, sizes: list[int], found: models_pb2.MethodProfile
    ) -> None:
        """Say what sizes need for which there was no room, without running them."""
        try:
            for raw in await ask(self._executor, self._key, sample, op="predict", sizes=sizes):
                found.points.add(
                    rows=whole(raw.get("rows")),
                    predicted_bytes=whole(raw.get("peak_bytes")),
                    flops=whole(raw.get("flops")),
                )
        except NosError as error:
            found.note += f"; cannot be predicted: {error}"


async def ask(executor: Executor, key: str, sample: Sample, **fields: Any) -> list[dict[str, Any]]:
    """Have an executor do something; its answer is a list of dicts, and no more is known of it.

    Raises:
        NosError: What the model raised, or that it took too long.
    """
    message = {
        **fields,
        "key": key,
        "method": sample.method,
        "args": sample.arguments,
        "joined": sample.joined,
    }
    try:
        async with asyncio.timeout(_PASS_S):
            points = await executor.profile(message, sample.data)
    except TimeoutError:
        executor.kill("its profile takes too long")
        raise InternalError(f"it took over {_PASS_S:g} s") from None
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise InternalError(_NONSENSE)
    return points


def ladder_of(sample: Sample, method: models_pb2.Method) -> list[int]:
    """Return the sizes to try: powers of two up to the author's limit or the usual one."""
    if not sample.joined:
        return [1]
    most = method.batching.max_rows or MAX_BATCH_ROWS
    most = max(1, min(most, MAX_BATCH_BYTES // max(1, len(sample.data))))
    sizes = [1 << power for power in range(int(math.log2(most)) + 1)]
    return sizes if sizes[-1] == most else [*sizes, most]


def _choose(found: models_pb2.MethodProfile, limit: int, ladder: list[int]) -> None:
    """Choose a batch among the sizes measured, and those of `ladder` on the line through them."""
    times_of = [(point.rows, point.took_s) for point in found.points if point.took_s]
    if not times_of:
        return
    choice = knee.choose(times_of)
    found.t0_s, found.row_s = choice.t0_s, choice.row_s
    if len(times_of) == 1 and len(ladder) > 1:
        found.why = "nothing is chosen: one size was measured"
        return
    beyond = [(rows, choice.t0_s + choice.row_s * rows) for rows in ladder[len(times_of) :]]
    if beyond:
        choice = knee.choose([*times_of, *beyond])
    found.chosen_rows, found.why = choice.rows, choice.why
    if beyond:
        found.why += f", by the line beyond {times_of[-1][0]} rows"
    if limit:
        found.chosen_rows = limit
        found.why = f"its author's limit; by these figures {choice.rows}: {choice.why}"


def _point(raw: dict[str, Any], rows: int) -> models_pb2.ProfilePoint:
    return models_pb2.ProfilePoint(
        rows=rows,
        took_s=_seconds(raw.get("took_s")),
        measured_bytes=whole(raw.get("peak_bytes")),
        flops=whole(raw.get("flops")),
    )


def _modules(raw: dict[str, Any]) -> list[models_pb2.ModuleUse]:
    try:
        return [
            models_pb2.ModuleUse(
                path=str(path),
                kind=str(kind),
                weight_bytes=whole(weight),
                activation_bytes=whole(activation),
                workspace_bytes=whole(workspace),
            )
            for path, kind, weight, activation, workspace in raw["modules"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InternalError(_NONSENSE, got=repr(error)[:100]) from None


def _seconds(value: Any) -> float:
    if type(value) is not float or not 0 < value < math.inf:
        raise InternalError(_NONSENSE, got=repr(value)[:100])
    return value


def whole(value: Any) -> int:
    """Return a count that an executor told.

    Raises:
        InternalError: If it is none.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise InternalError(_NONSENSE, got=repr(value)[:100])
    return value
