"""Large jobs: Dask collections through a model, behind everybody's calls. Imports Dask where it is used.

    >>> import dask.array as da
    >>> images = da.from_zarr("images.zarr")
    >>> labels = client.model("nos/digits").labels.map_blocks(images, progress=True)
    >>> labels.compute()

The graph runs wherever the user has Dask run it; its blocks go to the serving workers in calls of some
milliseconds each, over streams of their own, and share the device with what else there is.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from nos._blocks import MAX_ROWS, RESULT, Bar, Lane, Split, Work, run_items, run_partition
from nos.errors import InvalidRequestError
from nos.wire import values
from nos.wire.v1 import models_pb2

if TYPE_CHECKING:
    from nos._engine import Engine
    from nos.types import MethodInfo, ParameterInfo


class BulkMethod:
    """A method's ways to run over Dask collections."""

    info: MethodInfo
    _engine: Engine
    _message: models_pb2.Method

    def map_blocks(
        self, array: Any, *, batch: bool | None = None, rows: int = 0, progress: bool = False
    ) -> Any:
        """Return a Dask array of the results for each row of one; nothing runs before it is computed.

        A row is what stands at one index of the first axis. Rows that got no answer because a worker was
        lost are sent again; each row of the result is one answer.

        Args:
            array: A Dask array; chunks of its first axis are what is in memory at once.
            batch: Whether a call takes many rows as one tensor; None: as the signature says.
            rows: Of a call at most; 0: as many as take about 20 ms.
            progress: Whether to show a bar, where the graph is computed in this process.

        Returns:
            Its first axis has the chunks of the array's. Type and shape of a row are those that the
            signature declares; where it does not, one call with a row of zeros tells.

        Raises:
            InvalidRequestError: If the array does not fit the method.
            ImportError: If Dask is missing.
        """
        da = _import("dask.array")
        if not isinstance(array, da.Array):
            _refuse("the input is no Dask array", "array", "a dask.array.Array", array)
        if array.ndim == 0:
            raise InvalidRequestError("the array has no rows", "array", "at least one axis", "none")
        array = array.rechunk(dict.fromkeys(range(1, array.ndim), -1))
        first = _first(self.info)
        work = self._work(first, _split_array(first, array, batch, self.info), rows)
        if first.dtype and array.dtype != first.dtype:
            expected = f"{first.dtype}; array.astype({first.dtype!r}) makes it so"
            raise InvalidRequestError(
                "the array has another dtype", first.name, expected, str(array.dtype)
            )
        declared = _declared(self._message.returns, first, array, work.split)
        if declared is None:
            found = work.run(np.zeros((1, *array.shape[1:]), array.dtype))
            declared = found.dtype, found.shape[1:]
        work.dtype, work.row_shape = str(declared[0]), tuple(declared[1])
        work.bar = _bar(progress, self, array.shape[0])
        return array.map_blocks(
            work,
            dtype=work.dtype,
            chunks=(array.chunks[0], *((size,) for size in work.row_shape)),
            drop_axis=list(range(1, array.ndim)),
            new_axis=list(range(1, 1 + len(work.row_shape))),
            meta=np.empty((0,) * (1 + len(work.row_shape)), work.dtype),
        )

    def map_partitions(
        self,
        frame: Any,
        *,
        column: str | list[str],
        batch: bool | None = None,
        rows: int = 0,
        progress: bool = False,
    ) -> Any:
        """Return a Dask series of the results for each row of a Dask dataframe, with its index.

        Args:
            frame: A Dask dataframe.
            column: Its column that the method takes; of several, a row's numbers are one tensor.
            batch: See `map_blocks`.
            rows: See `map_blocks`.
            progress: See `map_blocks`.

        Returns:
            Numbers where each result is one, else objects: arrays, text, dicts.

        Raises:
            InvalidRequestError: If the frame does not fit the method.
            ImportError: If Dask or pandas is missing.
        """
        dd = _import("dask.dataframe")
        if not isinstance(frame, dd.DataFrame):
            _refuse("the input is no Dask dataframe", "frame", "a dask.dataframe.DataFrame", frame)
        names = [column] if isinstance(column, str) else list(column)
        for name in names:
            if name not in frame.columns:
                known = f"one of {', '.join(map(str, frame.columns))}"
                raise InvalidRequestError("there is no such column", "column", known, repr(name))
        first = _first(self.info)
        work = self._work(first, _split_rows(first, batch, self.info), rows)
        work.dtype = _series_dtype(self._message.returns, work.split)
        work.bar = _bar(progress, self, None)
        on_part = functools.partial(run_partition, work, column)
        return frame.map_partitions(on_part, meta=(RESULT, work.dtype))

    def map_bag(self, bag: Any, *, progress: bool = False) -> Any:
        """Return a Dask bag of the results for each item of one, which is passed as the only argument.

        Args:
            bag: A Dask bag.
            progress: See `map_blocks`.

        Raises:
            InvalidRequestError: If it is no Dask bag.
            ImportError: If Dask is missing.
        """
        db = _import("dask.bag")
        if not isinstance(bag, db.Bag):
            _refuse("the input is no Dask bag", "bag", "a dask.bag.Bag", bag)
        work = self._work(None, "alone", 0)
        work.bar = _bar(progress, self, None)
        return bag.map_partitions(functools.partial(run_items, work))

    def _work(self, first: ParameterInfo | None, split: Split, rows: int) -> Work:
        if self.info.is_generator:
            raise InvalidRequestError("a generator gives no row", "method", "a plain method")
        if rows < 0:
            raise InvalidRequestError("the rows are wrong", "rows", "0 or more", str(rows))
        batching = self._message.batching
        limit = batching.exact_rows or batching.max_rows or MAX_ROWS
        engine = self._engine
        return Work(
            url=engine.target.url,
            via=engine.via,
            key=self._spec.key,  # type: ignore[attr-defined]
            method=self.info.name,
            split=split,
            max_rows=min(rows or limit, limit),
            is_adaptive=not rows,
            wants=first.dtype if first is not None else "",
            lane=Lane(engine.aside(), self),  # type: ignore[arg-type]
        )


class BulkHandle:
    """A model's ways to run over Dask collections."""

    def map_blocks(self, array: Any, *, method: str | None = None, **options: Any) -> Any:
        """Run the model, or one of its methods, on a Dask array; see `BulkMethod.map_blocks`."""
        return self.method(method).map_blocks(array, **options)  # type: ignore[attr-defined]

    def map_partitions(self, frame: Any, *, method: str | None = None, **options: Any) -> Any:
        """Run the model, or one of its methods, on a Dask dataframe; see `BulkMethod.map_partitions`."""
        return self.method(method).map_partitions(frame, **options)  # type: ignore[attr-defined]

    def map_bag(self, bag: Any, *, method: str | None = None, **options: Any) -> Any:
        """Run the model, or one of its methods, on a Dask bag; see `BulkMethod.map_bag`."""
        return self.method(method).map_bag(bag, **options)  # type: ignore[attr-defined]


def _bar(is_wanted: bool, method: Any, total: Any) -> Bar | None:
    is_known = isinstance(total, int)  # the size of a Dask array may be unknown: not a number
    return Bar(method.__qualname__, total if is_known else None) if is_wanted else None


def _first(info: MethodInfo) -> ParameterInfo:
    """Return the parameter that takes the rows; all others must have defaults."""
    for position, parameter in enumerate(info.parameters):
        if position and not (
            parameter.has_default or parameter.is_variadic or parameter.is_keywords
        ):
            raise InvalidRequestError(
                f"{info.name} takes more than rows", parameter.name, "a default", "none"
            )
    if not info.parameters:
        raise InvalidRequestError(
            f"{info.name} takes nothing", "method", "a parameter for the rows"
        )
    return info.parameters[0]


def _split_rows(first: ParameterInfo, batch: bool | None, info: MethodInfo) -> Split:
    """Return whether a call takes many rows, as said or as the signature says."""
    if batch is not None:
        return "together" if batch else "alone"
    return "together" if first.kind == "list" or first.name in info.batches else "alone"


def _split_array(first: ParameterInfo, array: Any, batch: bool | None, info: MethodInfo) -> Split:
    if batch is not None or first.kind in {"list", "image", "integer", "real", "flag"}:
        return _split_rows(first, batch, info)
    if first.shape is not None:
        is_open = any(str(size).startswith("*") for size in first.shape)
        if first.name in info.batches and (is_open or len(first.shape) == array.ndim):
            return "together"
        if first.name not in info.batches and len(first.shape) == array.ndim - 1:
            return "alone"
    raise InvalidRequestError(
        f"{info.name} does not say what a row is",
        first.name,
        f"a tensor of {array.ndim} dimensions of which the first is named batch, or of {array.ndim - 1};"
        " or batch=True, or batch=False",
        first.annotation or first.kind,
    )


def _declared(
    returns: models_pb2.Type, first: ParameterInfo, array: Any, split: Split
) -> tuple[str, tuple[int, ...]] | None:
    """Return dtype and shape of a result's row as the signature declares them; None if it does not."""
    if not (returns.has_shape and returns.dtype):
        return None
    dtype = values.DTYPE_NAMES[returns.dtype]
    shape = [dimension.name or dimension.size for dimension in returns.shape]
    inner = array.shape[1:]
    known: dict[int | str, int] = {}
    if first.shape is not None:
        ours = (
            first.shape[len(first.shape) - len(inner) :] if len(first.shape) >= len(inner) else ()
        )
        known = dict(zip(ours, inner, strict=False))
    row = shape[1:] if split == "together" else shape
    sizes = [size if isinstance(size, int) else known.get(size) for size in row]
    if split == "together" and str(shape[:1]) not in {"['batch']", "['*batch']"}:
        return None
    found = tuple(size for size in sizes if isinstance(size, int))
    return (dtype, found) if len(found) == len(sizes) else None


def _series_dtype(returns: models_pb2.Type, split: Split) -> str:
    """Return the dtype of a series of results."""
    scalars = {"integer": "int64", "real": "float64", "flag": "bool"}
    kind = values.enum_name(models_pb2.TypeKind, returns.kind, "TYPE_KIND_")
    num_own = 1 if split == "together" else 0
    if kind == "list" and split == "together":
        kind = values.enum_name(models_pb2.TypeKind, returns.item.kind, "TYPE_KIND_")
    if kind == "tensor" and returns.has_shape and returns.dtype and len(returns.shape) == num_own:
        return values.DTYPE_NAMES[returns.dtype]
    return scalars.get(kind, "object")


def _refuse(message: str, name: str, expected: str, got: Any) -> None:
    hint = "map_bag takes any items and gives any results"
    raise InvalidRequestError(message, name, expected, type(got).__name__, hint)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is missing: pip install 'nos-inference[bulk]'") from error
