"""What runs on each block of a large job: calls of some milliseconds, made again where nobody answers."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from nos.errors import (
    ExecutorLostError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nos._engine import Engine
    from nos._link import Call
    from nos.client import Method

#: What a call may take of a device: whoever comes meanwhile waits for it.
_CALL_S: Final = 0.02
#: Rows and bytes of a call at most.
MAX_ROWS: Final = 4096
_MAX_CALL_BYTES: Final = 4 << 20
_FIRST_ROWS: Final = 8
#: Calls of one block without an answer.
_MAX_IN_FLIGHT: Final = 16
#: How long a row is tried again while there is nobody to answer, and after what pauses.
_PATIENCE_S: Final = 60.0
_FIRST_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 5.0
#: How often a row may be what was running when an executor died.
_MAX_LOSSES: Final = 3

Rows: TypeAlias = "np.ndarray[Any, Any] | Sequence[Any]"

#: Name of a series of results.
RESULT: Final = "result"

#: Whether a call takes many rows at once, or each its own.
Split = Literal["together", "alone"]


@dataclass(slots=True, frozen=True)
class Lane:
    """A way to the server: streams that only large jobs use, and the method."""

    engine: Engine
    method: Method

    def submit(self, argument: Any) -> Call:
        call = self.method._prepare((argument,), {}, None, is_bulk=True)  # noqa: SLF001 - of ours
        self.engine.submit(self.method._spec.key, call)  # noqa: SLF001
        return call


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """What runs on each block: a picklable function of an array that gives an array.

    It takes neither connection nor credentials to other processes: there the token is found as by
    `nos.connect(url)`.
    """

    url: str
    via: str
    key: str
    method: str
    split: Split
    max_rows: int
    #: Whether calls have as many rows as take about `_CALL_S`.
    is_adaptive: bool
    #: Of the tensor that the method takes; empty where it takes what comes.
    wants: str = ""
    #: Of the result; empty while it is not known.
    dtype: str = ""
    row_shape: tuple[int, ...] = ()
    #: None where it came from another process, until it is used.
    lane: Lane | None = None
    bar: Bar | None = None
    #: Rows of the next call; threads may overwrite each other's.
    rows: float = field(default=_FIRST_ROWS)

    @property
    def __name__(self) -> str:
        """What Dask shows and names keys by."""
        return f"nos-{self.key.partition('@')[0]}"

    def __call__(self, block: Rows) -> Any:
        """Return the results of a block's rows."""
        if not len(block):
            return np.empty((0, *self.row_shape), self.dtype or None)
        found = self.run(block)
        if found.shape[1:] != self.row_shape:
            raise InvalidRequestError(
                f"{self.key} gave rows of another shape than it declares",
                "returns",
                str(self.row_shape),
                str(found.shape[1:]),
            )
        return found.astype(self.dtype, casting="same_kind", copy=False)

    def run(self, block: Rows) -> np.ndarray[Any, Any]:
        """Return the results of a block's rows as one array, the first axis being the rows."""
        if self.split == "together":
            parts = list(self.answers(block))
            if all(isinstance(part, np.ndarray) for part in parts):
                return np.concatenate(parts)
            return _to_array([row for part in parts for row in part])
        return _to_array(list(self.answers(block)))

    def answers(self, block: Rows) -> Iterator[Any]:
        """Yield the answers to the calls that a block makes, in order.

        Raises:
            NosError: At the first call that has none after all.
        """
        lane = self._open()
        calls: deque[tuple[Any, int, Call]] = deque()
        try:
            for argument, count in self._arguments(block):
                calls.append((argument, count, lane.submit(argument)))
                if len(calls) >= _MAX_IN_FLIGHT:
                    yield self._answer(lane, *calls.popleft())
            while calls:
                yield self._answer(lane, *calls.popleft())
        finally:
            for _, _, call in calls:
                call.cancel()

    def _arguments(self, block: Rows) -> Iterator[tuple[Any, int]]:
        if self.split == "alone":
            for row in block:
                yield row, 1
            return
        row_bytes = block[:1].nbytes if isinstance(block, np.ndarray) else 1
        most = max(1, min(self.max_rows, _MAX_CALL_BYTES // max(1, row_bytes)))
        start = 0
        while start < len(block):
            count = most if not self.is_adaptive else max(1, min(most, int(self.rows)))
            count = min(count, len(block) - start)
            yield block[start : start + count], count
            start += count

    def _answer(self, lane: Lane, argument: Any, count: int, call: Call) -> Any:
        """Wait for an answer; where there is nobody to give it, ask again."""
        give_up_s, pause_s, num_lost = 0.0, _FIRST_PAUSE_S, 0
        while True:
            try:
                answer = call.wait(None)
                break
            except (UnavailableError, OverloadedError) as error:
                now_s = time.monotonic()
                give_up_s = give_up_s or now_s + _PATIENCE_S
                num_lost += isinstance(error, ExecutorLostError)
                if now_s >= give_up_s or num_lost >= _MAX_LOSSES:
                    raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            call = lane.submit(argument)
        if self.split == "together" and (not hasattr(answer, "__len__") or len(answer) != count):
            raise InvalidRequestError(
                f"{self.key} gave another number of rows than it got",
                "batch",
                f"{count} rows; batch=False where a call takes one",
                str(len(answer)) if hasattr(answer, "__len__") else type(answer).__name__,
            )
        self._learn(count, call.timings.compute_s / max(1, call.timings.batch_size))
        if self.bar is not None:
            self.bar.add(count)
        return answer

    def _learn(self, count: int, took_s: float) -> None:
        """Choose the rows of the next call by what this one took."""
        wanted = count * _CALL_S / max(took_s, 1e-6)
        self.rows = min(max(wanted, count / 2, 1), max(2 * count, _FIRST_ROWS), self.max_rows)

    def _open(self) -> Lane:
        if self.lane is None:
            self.lane = _connect(self.url, self.via, self.key, self.method)
        return self.lane

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self.__slots__}
        return {**state, "lane": None, "bar": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("nos", self.url, self.key, self.method, self.split, self.max_rows)


@functools.lru_cache(maxsize=32)
def _connect(url: str, via: str, key: str, method: str) -> Lane:
    """Return this process's lane; processes of Dask end with their connections."""
    from nos.client import connect

    found: Method = connect(url, via=via).model(key).method(method)  # type: ignore[arg-type]
    return Lane(found._engine.aside(), found)  # noqa: SLF001 - of ours


class Bar:
    """A bar in notebook or terminal; a new one when the last is full. Usable from many threads."""

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        self._lock = threading.Lock()
        self._shown: Any = None

    def add(self, count: int) -> None:
        """Count rows that are done."""
        from tqdm.auto import tqdm  # picks the notebook's bar; not needed otherwise

        with self._lock:
            if self._shown is None:
                self._shown = tqdm(total=self._total, desc=self._name, unit="row")
            self._shown.update(count)
            if self._total is not None and self._shown.n >= self._total:
                self._shown.close()
                self._shown = None


def run_partition(work: Work, column: str | list[str], part: Any) -> Any:
    """Return a series of the results for a pandas dataframe's rows."""
    import pandas as pd

    block: Any
    if isinstance(column, str):
        block = (
            list(part[column]) if part[column].dtype.kind not in "biuf" else part[column].to_numpy()
        )
        if work.wants and isinstance(block, list) and block and work.split == "together":
            block = np.stack(block)
    else:
        block = part[column].to_numpy()
    if work.wants and isinstance(block, np.ndarray):
        block = block.astype(work.wants, copy=False)
    if not len(block):
        return pd.Series([], index=part.index, dtype=work.dtype, name=RESULT)
    found = list(work.answers(block))
    rows = [row for answer in found for row in answer] if work.split == "together" else found
    if work.dtype == "object":
        filled = np.empty(len(rows), dtype=object)
        for number, row in enumerate(rows):
            filled[number] = row
        return pd.Series(filled, index=part.index, dtype="object", name=RESULT)
    return pd.Series(np.asarray(rows).astype(work.dtype), index=part.index, name=RESULT)


def run_items(work: Work, items: Iterable[Any]) -> list[Any]:
    return list(work.answers(list(items)))


def _to_array(rows: list[Any]) -> np.ndarray[Any, Any]:
    if rows and isinstance(rows[0], dict | str | bytes):
        raise InvalidRequestError(
            "the results make no array",
            "returns",
            "numbers or tensors",
            type(rows[0]).__name__,
            "map_bag gives any results",
        )
    return np.asarray(rows)
