"""Does a call fit the method? One check for both sides: the SDK before transport, the worker after it.

Only the headers of tensors are read, never their elements, and no message repeats a value that could
be large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from nos.errors import InvalidRequestError, InvalidTensorError, MethodNotFoundError, NosError
from nos.wire.v1 import models_pb2, values_pb2
from nos.wire.values import OCTETS, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CALL: Final = "__call__"

#: The name of a first dimension that stands for any number of dimensions.
ANY_LEADING: Final = "..."

#: Of each free dimension of a call: its size, and the argument that settled it.
_Sizes: TypeAlias = dict[str, tuple[int, str]]

_MAX_TEXT = 120
_MAX_NAMES = 200
_IMAGE_RANKS = (2, 3)
_IMAGE_CHANNELS = 3

_KIND_NAMES: Final[dict[int, str]] = {
    models_pb2.TYPE_KIND_UNSPECIFIED: "anything",
    models_pb2.TYPE_KIND_TENSOR: "tensor",
    models_pb2.TYPE_KIND_IMAGE: "image: JPEG, PNG or a uint8 tensor (height, width, 3)",
    models_pb2.TYPE_KIND_TEXT: "text",
    models_pb2.TYPE_KIND_BYTES: "bytes",
    models_pb2.TYPE_KIND_INTEGER: "whole number",
    models_pb2.TYPE_KIND_REAL: "number",
    models_pb2.TYPE_KIND_FLAG: "truth value",
    models_pb2.TYPE_KIND_LIST: "list",
    models_pb2.TYPE_KIND_DICT: "dict",
    models_pb2.TYPE_KIND_NONE: "None",
}

#: Which nodes stand for the kinds that need no look inside.
_PLAIN: Final[dict[int, frozenset[str]]] = {
    models_pb2.TYPE_KIND_TEXT: frozenset({"text"}),
    models_pb2.TYPE_KIND_BYTES: frozenset({"media"}),
    models_pb2.TYPE_KIND_INTEGER: frozenset({"integer"}),
    models_pb2.TYPE_KIND_REAL: frozenset({"real", "integer"}),
    models_pb2.TYPE_KIND_FLAG: frozenset({"flag"}),
    models_pb2.TYPE_KIND_NONE: frozenset({"null"}),
}

#: Where numpy's scalars, which travel as tensors, stand for Python's numbers.
_SCALARS: Final[dict[int, tuple[type[np.generic], ...]]] = {
    models_pb2.TYPE_KIND_INTEGER: (np.integer,),
    models_pb2.TYPE_KIND_REAL: (np.integer, np.floating),
    models_pb2.TYPE_KIND_FLAG: (np.bool_,),
}


def is_any_leading(name: str) -> bool:
    """Tell whether a first dimension of this name stands for any number of dimensions: `...`, `*batch`."""
    return name == ANY_LEADING or name.startswith("*")


def find_method(spec: models_pb2.ModelSpec, name: str) -> models_pb2.Method:
    """Return the public method of that name; empty means `__call__`.

    Raises:
        MethodNotFoundError: If there is none; lists those there are.
    """
    wanted = name or CALL
    for method in spec.methods:
        if method.name == wanted:
            return method
    public = ", ".join(method.name for method in spec.methods)
    raise MethodNotFoundError(
        f"{_clip(spec.name)} has no public method {_clip(wanted)!r}",
        _clip(wanted),
        f"one of {_clip(public, _MAX_NAMES)}" if public else "",
    )


def bind(
    method: models_pb2.Method, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Give each argument of a Python call its parameter's name.

    numpy scalars for numbers become Python numbers; every other value is handed on as it is.

    Returns:
        (name, value) in the order in which they travel. Where `*args` takes some, all positional
        ones keep the empty name.

    Raises:
        InvalidRequestError: If an argument is missing, unknown, given twice or one too many.
    """
    names = [*("" for _ in args), *kwargs]
    parameters = _assign(method, names)
    values = [
        value.item() if isinstance(value, _SCALARS.get(parameter.type.kind, ())) else value
        for value, parameter in zip((*args, *kwargs.values()), parameters, strict=True)
    ]
    if not any(parameter.is_variadic for parameter in parameters):
        names = [name or parameter.name for name, parameter in zip(names, parameters, strict=True)]
    return list(zip(names, values, strict=True))


def check_call(method: models_pb2.Method, arguments: Sequence[values_pb2.Argument]) -> None:
    """Accept the arguments of a call, or say what is wrong with the first that does not fit.

    Nothing is converted: where a float32 tensor is wanted, a float64 one is an error. A whole number
    passes for a real one. An encoded image passes for a uint8 tensor of rank 3: the executor decodes it.

    Raises:
        InvalidRequestError: If one is missing, unknown, given twice, one too many, or of another kind.
        InvalidTensorError: If a tensor's dtype or shape does not fit, or two parameters that share a
            named dimension disagree.
    """
    parameters = _assign(method, [argument.name for argument in arguments])
    sizes: _Sizes = {}
    for index, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
        where = argument.name or parameter.name
        if parameter.is_variadic:
            where = f"{where}[{index}]"
        if parameter.default_text == "None" and argument.value.WhichOneof("kind") in {None, "null"}:
            continue
        _check(argument.value, parameter.type, _clip(where), sizes)


def describe(kind: models_pb2.Type) -> str:
    """Return a type in words, for instance `float32 tensor of shape (batch, 3, 224, 224)`."""
    text = _KIND_NAMES.get(kind.kind, "anything")
    if kind.kind == models_pb2.TYPE_KIND_TENSOR:
        if kind.dtype:
            text = f"{dtype_name(kind.dtype)} {text}"
        if kind.has_shape:
            text += f" of shape {_declared_shape(kind)}"
    elif kind.kind in {models_pb2.TYPE_KIND_LIST, models_pb2.TYPE_KIND_DICT} and (
        kind.item.kind != models_pb2.TYPE_KIND_UNSPECIFIED
    ):
        text += f" of {describe(kind.item)}"
    if kind.choices:
        text = "one of " + ", ".join(_describe_choice(choice) for choice in kind.choices)
    return _clip(f"{text} or None" if kind.is_optional else text)


def _assign(method: models_pb2.Method, names: Iterable[str]) -> list[models_pb2.Parameter]:
    """Return the parameter of each argument, given the arguments' names in order."""
    by_name = {
        parameter.name: parameter
        for parameter in method.parameters
        if not (parameter.is_variadic or parameter.is_keywords)
    }
    by_position: list[models_pb2.Parameter] = []
    variadic: models_pb2.Parameter | None = None
    for parameter in method.parameters:
        if parameter.is_variadic:
            variadic = parameter
        if parameter.is_variadic or parameter.is_keywords:
            break
        by_position.append(parameter)
    keywords = next((item for item in method.parameters if item.is_keywords), None)

    assigned: list[models_pb2.Parameter] = []
    seen: set[str] = set()
    num_positional = 0
    for name in names:
        if name:
            found = by_name.get(name, keywords)
            if found is None:
                raise _refuse(method, f"has no parameter {_clip(name)!r}", name)
        else:
            if num_positional < len(assigned):
                raise _refuse(method, "got an argument by position after one by name", "")
            found = by_position[num_positional] if num_positional < len(by_position) else variadic
            if found is None:
                raise _refuse(
                    method,
                    f"takes {len(by_position)} arguments by position, but more were given",
                    "",
                )
            num_positional += 1
            name = "" if found.is_variadic else found.name  # noqa: PLW2901 - what it amounts to
        if name in seen:
            raise _refuse(method, f"got {_clip(name)!r} twice", name)
        if name:
            seen.add(name)
        assigned.append(found)

    missing = [
        name
        for name, parameter in by_name.items()
        if name not in seen and not parameter.has_default
    ]
    if missing:
        listed = _clip(", ".join(repr(name) for name in missing))
        raise _refuse(method, f"misses {listed}", missing[0])
    return assigned


def _check(node: values_pb2.Value, kind: models_pb2.Type, where: str, sizes: _Sizes) -> None:
    given = node.WhichOneof("kind") or "null"
    if kind.choices:
        if (given == "null" and kind.is_optional) or node in kind.choices:
            return
        raise _mismatch(node, kind, where)
    wanted = kind.kind
    if wanted == models_pb2.TYPE_KIND_UNSPECIFIED or (given == "null" and kind.is_optional):
        return
    if wanted == models_pb2.TYPE_KIND_TENSOR:
        _check_tensor(node, kind, where, sizes)
    elif wanted == models_pb2.TYPE_KIND_IMAGE:
        _check_image(node, kind, where)
    elif wanted == models_pb2.TYPE_KIND_LIST:
        if given != "items":
            raise _mismatch(node, kind, where)
        for index, item in enumerate(node.items.items):
            _check(item, kind.item, f"{where}[{index}]", sizes)
    elif wanted == models_pb2.TYPE_KIND_DICT:
        if given != "fields":
            raise _mismatch(node, kind, where)
        for member in node.fields.fields:
            _check(member.value, kind.item, _clip(f"{where}[{member.key!r}]"), sizes)
    elif given not in _PLAIN.get(wanted, frozenset({given})):
        raise _mismatch(node, kind, where)


def _check_tensor(node: values_pb2.Value, kind: models_pb2.Type, where: str, sizes: _Sizes) -> None:
    if _is_encoded_image(node):
        if kind.dtype in {values_pb2.DTYPE_UNSPECIFIED, values_pb2.DTYPE_UINT8}:
            return
        raise _mismatch(node, kind, where)
    if not node.HasField("tensor"):
        raise _mismatch(node, kind, where)
    tensor = node.tensor
    if kind.dtype and tensor.dtype != kind.dtype:
        wanted = dtype_name(kind.dtype)
        raise InvalidTensorError(
            f"argument {where!r} has the wrong dtype",
            where,
            wanted,
            dtype_name(tensor.dtype),
            f"Convert it, for instance with .astype({wanted!r}) or torch's .to(torch.{wanted})",
        )
    if kind.has_shape:
        _check_shape(tensor, kind, where, sizes)


def _check_shape(
    tensor: values_pb2.Tensor, kind: models_pb2.Type, where: str, sizes: _Sizes
) -> None:
    dimensions = list(kind.shape)
    shape = list(tensor.shape)
    if dimensions and is_any_leading(dimensions[0].name):
        del dimensions[0]
        shape = shape[max(0, len(shape) - len(dimensions)) :]
    fits = len(shape) == len(dimensions) and all(
        dimension.name or size == dimension.size
        for size, dimension in zip(shape, dimensions, strict=False)
    )
    if not fits:
        raise InvalidTensorError(
            f"argument {where!r} has the wrong shape",
            where,
            _declared_shape(kind),
            _shape_text(tensor.shape),
        )
    for size, dimension in zip(shape, dimensions, strict=True):
        if not dimension.name:
            continue
        settled, by = sizes.setdefault(dimension.name, (size, where))
        if size != settled:
            raise InvalidTensorError(
                f"argument {where!r} disagrees with {by!r} about {_clip(dimension.name)!r}",
                where,
                str(settled),
                str(size),
            )


def _check_image(node: values_pb2.Value, kind: models_pb2.Type, where: str) -> None:
    if _is_encoded_image(node):
        return
    if not node.HasField("tensor"):
        raise _mismatch(node, kind, where)
    shape = node.tensor.shape
    fits = (
        node.tensor.dtype == values_pb2.DTYPE_UINT8
        and len(shape) in _IMAGE_RANKS
        and all(size > 0 for size in shape)
        and (len(shape) == _IMAGE_RANKS[0] or shape[-1] == _IMAGE_CHANNELS)
    )
    if not fits:
        raise InvalidTensorError(
            f"argument {where!r} is no image",
            where,
            "uint8 of shape (height, width, 3) or (height, width)",
            f"{dtype_name(node.tensor.dtype)} of shape {_shape_text(shape)}",
        )


def _is_encoded_image(node: values_pb2.Value) -> bool:
    return node.HasField("media") and node.media.mime_type != OCTETS


def _refuse(method: models_pb2.Method, what: str, name: str) -> InvalidRequestError:
    parameters = ", ".join(_describe_parameter(parameter) for parameter in method.parameters)
    return InvalidRequestError(
        f"{_clip(method.name, 40)}() {what}",
        _clip(name),
        "",
        "",
        f"Its signature is {_clip(method.name, 40)}({_clip(parameters, _MAX_NAMES)})",
    )


def _mismatch(node: values_pb2.Value, kind: models_pb2.Type, where: str) -> NosError:
    is_tensor = kind.kind in {models_pb2.TYPE_KIND_TENSOR, models_pb2.TYPE_KIND_IMAGE}
    hint = ""
    if kind.kind == models_pb2.TYPE_KIND_TENSOR and node.WhichOneof("kind") in {
        "items",
        "real",
        "integer",
    }:
        hint = "Make it an array first, for instance with numpy.asarray"
    cls = InvalidTensorError if is_tensor else InvalidRequestError
    return cls(
        f"argument {where!r} does not fit", where, describe(kind), _describe_node(node), hint
    )


def _describe_parameter(parameter: models_pb2.Parameter) -> str:
    if parameter.is_variadic:
        return f"*{parameter.name}"
    if parameter.is_keywords:
        return f"**{parameter.name}"
    text = parameter.name
    if parameter.type.annotation:
        text += f": {parameter.type.annotation}"
    return f"{text} = {parameter.default_text or '...'}" if parameter.has_default else text


def _describe_node(node: values_pb2.Value) -> str:
    match node.WhichOneof("kind"):
        case "tensor":
            name = dtype_name(node.tensor.dtype)
            return f"{name} tensor of shape {_shape_text(node.tensor.shape)}"
        case "media":
            name = "bytes" if node.media.mime_type == OCTETS else _clip(node.media.mime_type)
            return f"{name} ({node.media.size_bytes} bytes)"
        case "items":
            name = "tuple" if node.items.is_tuple else "list"
            return f"a {name} of {len(node.items.items)}"
        case "fields":
            return f"a dict of {len(node.fields.fields)}"
        case "text":
            return f"text {_clip(node.text, 40)!r}"
        case "integer" | "real" | "flag" as name:
            value: object = getattr(node, name)
            return f"{type(value).__name__} {value}"
        case _:
            return "None"


def _describe_choice(choice: values_pb2.Value) -> str:
    name = choice.WhichOneof("kind")
    return repr(getattr(choice, name)) if name in {"text", "integer", "real", "flag"} else "None"


def _declared_shape(kind: models_pb2.Type) -> str:
    return _shape_text(
        [
            _clip(dimension.name, 30) if dimension.name else dimension.size
            for dimension in kind.shape
        ]
    )


def _shape_text(shape: Iterable[int | str]) -> str:
    sizes = [str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else _clip(f"({', '.join(sizes)})")


def _clip(text: str, limit: int = _MAX_TEXT) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
