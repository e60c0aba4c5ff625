"""Which methods of a model run many calls as one, by what their author declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nos.errors import InvalidRequestError
from nos.wire.v1 import models_pb2, values_pb2

BATCH: Final = "batch"
#: Any number of leading dimensions, which the model sees as one.
ANY_BATCH: Final = "*batch"
MAX_ROWS: Final = 1 << 16
MAX_QUEUE_DELAY_S: Final = 60.0
#: Options of the decorator that are about batching.
OPTIONS: Final = ("batch", "queue_delay_s", "exact", "check_batch", "pad")
#: Rows of every run of an exact model that does not say how many.
EXACT_ROWS: Final = 16

#: The parameter through which the server tells what is real in padded rows.
MASK: Final = "mask"

_TENSOR = models_pb2.TYPE_KIND_TENSOR
_LIST = models_pb2.TYPE_KIND_LIST
#: Kinds that carry bytes, of which we know no way to join them.
_UNJOINED = {models_pb2.TYPE_KIND_IMAGE, models_pb2.TYPE_KIND_BYTES}
#: Results that may hold tensors; whether they do is seen when they come.
_UNKNOWN = {models_pb2.TYPE_KIND_UNSPECIFIED, models_pb2.TYPE_KIND_DICT, _LIST}


@dataclass(slots=True)
class Wish:
    """What the decorator says about batching."""

    is_on: bool | None = None
    """None: wherever the annotations name a dimension `batch`."""
    max_rows: int = 0
    queue_delay_s: float | None = None
    is_exact: bool = False
    is_checked: bool = False
    padded: str = ""
    """Name of the dimension that is padded; empty for none."""

    def take(self, option: str, value: values_pb2.Value) -> bool:
        """Take one of `OPTIONS`; return False if the value does not do."""
        kind = value.WhichOneof("kind")
        if kind == "null":  # as `nos.model` has it by default
            return True
        if option in {"exact", "check_batch"}:
            if option == "exact":
                self.is_exact = value.flag
            else:
                self.is_checked = value.flag
            return kind == "flag"
        if option == "pad":
            self.padded = value.text
            return kind == "text" and (not value.text or value.text.isidentifier())
        if option == "batch":
            if kind == "flag":
                self.is_on = value.flag
                return True
            self.is_on, self.max_rows = True, value.integer
            return kind == "integer" and 1 <= value.integer <= MAX_ROWS
        delay_s = float(value.integer) if kind == "integer" else value.real
        self.queue_delay_s = delay_s
        return kind in {"integer", "real"} and 0 <= delay_s <= MAX_QUEUE_DELAY_S


def declare(spec: models_pb2.ModelSpec, wish: Wish, where: str) -> None:
    """Write into each method of `spec` whether and how it batches.

    Raises:
        InvalidRequestError: If batching is asked for and no method can.
    """
    if wish.is_on is False:
        return
    for method in spec.methods:
        parameters = _joined(method, is_asked=wish.is_on is True)
        method.batching.is_each = not parameters and wish.is_on is True and _takes_item(method)
        if not parameters and not method.batching.is_each:
            method.ClearField("batching")
            continue
        if wish.padded and parameters:
            method.batching.padded = _padded(method, parameters, wish.padded)
        method.batching.parameters.extend(parameters)
        method.batching.max_rows = wish.max_rows
        if wish.queue_delay_s is not None:
            method.batching.queue_delay_s = wish.queue_delay_s
        if wish.is_exact and not method.batching.is_each:
            method.batching.exact_rows = wish.max_rows or EXACT_ROWS
            method.batching.max_rows = method.batching.exact_rows
        method.batching.is_checked = wish.is_checked
    is_asked = wish.is_on or wish.queue_delay_s is not None or wish.is_exact or wish.is_checked
    if is_asked and not any(method.HasField("batching") for method in spec.methods):
        raise InvalidRequestError(
            f"{where}: no method can batch",
            "batch",
            "a method whose tensors, parameters and result alike, have a first dimension `batch`, for"
            ' instance Annotated[torch.Tensor, "float32[batch, 8]"], or that takes a list, or single'
            " arrays or images",
        )
    if wish.padded:
        _check_padding(spec, wish, where)


def _check_padding(spec: models_pb2.ModelSpec, wish: Wish, where: str) -> None:
    """Accept that a dimension is padded.

    Raises:
        InvalidRequestError: If no method can, or every run is to have the same rows to the last bit.
    """
    if wish.is_exact:
        raise InvalidRequestError(
            f"{where}: a model that is exact pads nothing", "pad", "either `exact` or `pad`"
        )
    if not any(method.batching.padded for method in spec.methods):
        raise InvalidRequestError(
            f"{where}: no method can pad {wish.padded!r}",
            "pad",
            f"the name of a dimension right behind `batch`, and a parameter `{MASK}` of"
            f' Annotated[torch.Tensor, "bool[batch, {wish.padded}]"] | None that is None by default',
        )


def _padded(method: models_pb2.Method, parameters: list[str], name: str) -> str:
    """Return the dimension that a method pads; empty if it does not."""
    has_it = any(
        len(parameter.type.shape) > 1 and parameter.type.shape[1].name == name
        for parameter in method.parameters
        if parameter.name in parameters
    )
    return name if has_it and any(_is_mask(it) for it in method.parameters) else ""


def _is_mask(parameter: models_pb2.Parameter) -> bool:
    """Whether the server may tell through a parameter what is real."""
    kind = parameter.type
    return (
        parameter.name == MASK
        and parameter.has_default
        and kind.kind == _TENSOR
        and kind.is_optional
        and kind.dtype in {values_pb2.DTYPE_BOOL, values_pb2.DTYPE_UNSPECIFIED}
    )


def _takes_item(method: models_pb2.Method) -> bool:
    """Whether a method takes an array, an image or bytes, of which its calls can run one after the other."""
    if method.is_generator or any(it.is_variadic or it.is_keywords for it in method.parameters):
        return False
    if any(_leading(it.type) in {BATCH, ANY_BATCH} for it in method.parameters):
        return False
    return any(it.type.kind in {_TENSOR, *_UNJOINED} for it in method.parameters)


def _joined(method: models_pb2.Method, *, is_asked: bool) -> list[str]:
    """Return the parameters along which calls are joined; empty if they cannot be."""
    if method.is_generator:
        return []
    tensors, lists = [], []
    for parameter in method.parameters:
        kind = parameter.type.kind
        if _is_mask(parameter):
            continue
        if parameter.is_variadic or parameter.is_keywords or kind in _UNJOINED:
            return []
        if kind == _TENSOR:
            tensors.append(parameter)
        elif kind == _LIST:
            lists.append(parameter)
    result = method.returns
    leading = {_leading(parameter.type) for parameter in tensors}
    if not tensors:
        # Lists give a row for each item.
        leading = {BATCH}
    if len(leading) != 1 or not leading <= {BATCH, ANY_BATCH}:
        return []
    if result.kind == _TENSOR:
        if _leading(result) not in leading or result.is_optional:
            return []
    elif not is_asked or result.kind not in _UNKNOWN:
        return []
    if any(parameter.type.is_optional for parameter in tensors or lists):
        return []
    return [parameter.name for parameter in tensors or lists]


def _leading(kind: models_pb2.Type) -> str:
    """Return the name of a tensor's first dimension; empty if it has none."""
    return kind.shape[0].name if kind.has_shape and kind.shape else ""
