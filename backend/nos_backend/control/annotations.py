"""What an annotation of a model's source says about a value: from syntax alone, nothing is imported."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Final

from nos.errors import InvalidRequestError
from nos.wire.limits import MAX_RANK
from nos.wire.signature import ANY_LEADING
from nos.wire.v1 import models_pb2, values_pb2
from nos.wire.values import DTYPE_NUMBERS

from nos_backend import normalization

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_DEPTH = 16
_MAX_INTEGER = 1 << 63
_SHAPE: Final = re.compile(r"\s*(?P<dtype>\w*)\s*(?:\[(?P<shape>[^\[\]]*)\])?\s*")
_GRAMMAR: Final = (
    'for instance "float32[batch, 3, 224, 224]", "uint8[height, width, 3]", "[..., 2]" or'
    ' "[*batch, 2]"'
)

#: Names that stand for one kind, wherever they were imported from.
_PLAIN: Final[dict[str, models_pb2.TypeKind.ValueType]] = {
    "ndarray": models_pb2.TYPE_KIND_TENSOR,
    "NDArray": models_pb2.TYPE_KIND_TENSOR,
    "Tensor": models_pb2.TYPE_KIND_TENSOR,
    "Image": models_pb2.TYPE_KIND_IMAGE,
    "str": models_pb2.TYPE_KIND_TEXT,
    "bytes": models_pb2.TYPE_KIND_BYTES,
    "int": models_pb2.TYPE_KIND_INTEGER,
    "float": models_pb2.TYPE_KIND_REAL,
    "bool": models_pb2.TYPE_KIND_FLAG,
    "list": models_pb2.TYPE_KIND_LIST,
    "List": models_pb2.TYPE_KIND_LIST,
    "Sequence": models_pb2.TYPE_KIND_LIST,
    "Iterable": models_pb2.TYPE_KIND_LIST,
    "tuple": models_pb2.TYPE_KIND_LIST,
    "Tuple": models_pb2.TYPE_KIND_LIST,
    "dict": models_pb2.TYPE_KIND_DICT,
    "Dict": models_pb2.TYPE_KIND_DICT,
    "Mapping": models_pb2.TYPE_KIND_DICT,
}

_TUPLES: Final = frozenset({"tuple", "Tuple"})
_UNIONS: Final = frozenset({"Union", "Optional"})
_GENERATORS: Final = frozenset(
    {"Iterator", "Generator", "Iterable", "AsyncIterator", "AsyncGenerator"}
)


class Annotations:
    """Reads the annotations of one source.

    Args:
        aliases: Module-level assignments, by name: `Pixels = Annotated[torch.Tensor, "uint8[...]"]`.
        local_classes: Classes that the source defines itself; their names mean nothing to us.
    """

    def __init__(self, aliases: Mapping[str, ast.expr], local_classes: frozenset[str]) -> None:
        self._aliases = aliases
        self._local_classes = local_classes

    def read(self, annotation: ast.expr | None) -> models_pb2.Type:
        """Return what `annotation` says; one that we do not know is of unspecified kind.

        Raises:
            InvalidRequestError: If the dtype or shape in an `Annotated` tensor is malformed.
        """
        if annotation is None:
            return models_pb2.Type()
        found = self._read(annotation, _MAX_DEPTH)
        found.annotation = _text(annotation)
        return found

    def read_item(self, annotation: ast.expr | None) -> models_pb2.Type | None:
        """Return what each item of an iterator is; None if `annotation` is no iterator's."""
        node = _parsed(annotation) if annotation is not None else None
        base, members = _subscripted(node)
        if base is None or _last_name(base) not in _GENERATORS:
            return None
        return self.read(members[0] if members else None)

    def _read(self, node: ast.expr, depth: int) -> models_pb2.Type:
        node = _parsed(node)
        if depth == 0:
            return models_pb2.Type()
        if isinstance(node, ast.Constant) and node.value is None:
            return models_pb2.Type(kind=models_pb2.TYPE_KIND_NONE)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._union([node.left, node.right], depth)
        base, members = _subscripted(node)
        name = _last_name(base)
        if isinstance(base, ast.Name) and not members:
            if name in self._aliases:
                return self._read(self._aliases[name], depth - 1)
            if name in self._local_classes:
                return models_pb2.Type()
        if name in _UNIONS:
            return self._union(
                [*members, ast.Constant(None)] if name == "Optional" else members, depth
            )
        if name == "Literal":
            return _literal(members)
        if name == "Annotated" and members:
            return self._annotated(members, depth)
        return self._plain(name, members, depth)

    def _plain(self, name: str, members: list[ast.expr], depth: int) -> models_pb2.Type:
        found = models_pb2.Type(kind=_PLAIN.get(name, models_pb2.TYPE_KIND_UNSPECIFIED))
        if name == "NDArray" and members:
            dtype = _last_name(_parsed(members[0])).rstrip("_")
            found.dtype = DTYPE_NUMBERS.get(dtype, values_pb2.DTYPE_UNSPECIFIED)
        elif name in _TUPLES:
            items = [item for item in members if not _is_ellipsis(item)]
            read = [self._read(item, depth - 1) for item in items]
            if read and all(item == read[0] for item in read):
                found.item.CopyFrom(read[0])
        elif found.kind == models_pb2.TYPE_KIND_LIST and members:
            found.item.CopyFrom(self._read(members[0], depth - 1))
        elif found.kind == models_pb2.TYPE_KIND_DICT and len(members) > 1:
            found.item.CopyFrom(self._read(members[1], depth - 1))
        return found

    def _union(self, members: list[ast.expr], depth: int) -> models_pb2.Type:
        read = [self._read(member, depth - 1) for member in members]
        some = [item for item in read if item.kind != models_pb2.TYPE_KIND_NONE]
        is_optional = len(some) < len(read) or any(item.is_optional for item in some)
        found = models_pb2.Type()
        kinds = {item.kind for item in some}
        if len(some) == 1:
            found.CopyFrom(some[0])
        elif kinds == {models_pb2.TYPE_KIND_INTEGER, models_pb2.TYPE_KIND_REAL}:
            found.kind = models_pb2.TYPE_KIND_REAL
        elif kinds == {models_pb2.TYPE_KIND_TENSOR}:
            # `np.ndarray | torch.Tensor`: one kind of value, of any dtype and shape.
            found.kind = models_pb2.TYPE_KIND_TENSOR
        found.is_optional = is_optional
        return found

    def _annotated(self, members: list[ast.expr], depth: int) -> models_pb2.Type:
        found = self._read(members[0], depth - 1)
        if found.kind != models_pb2.TYPE_KIND_TENSOR:
            return found
        texts = [
            (extra.value, extra.lineno)
            for extra in members[1:]
            if isinstance(extra, ast.Constant) and isinstance(extra.value, str)
        ]
        shapes = [it for it in texts if not normalization.is_meant(it[0])]
        if shapes:
            _read_shape(found, *shapes[0])
        for text, line in texts:
            if normalization.is_meant(text):
                _check_normalization(found, text, line, _last_name(_parsed(members[0])))
        return found


def _check_normalization(found: models_pb2.Type, text: str, line: int, name: str) -> None:
    """Accept that uint8 values are normalized on the device."""
    try:
        num_channels = normalization.parse(text).num_channels
    except ValueError:
        raise InvalidRequestError(
            f"line {line}: a normalization is not understood",
            "source",
            normalization.GRAMMAR,
            repr(text[:80]),
        ) from None
    last = found.shape[-1].size if found.has_shape and found.shape else 0
    wanted, got = "", ""
    if name != "Tensor":
        wanted, got = "a torch.Tensor", name
    elif found.dtype != values_pb2.DTYPE_UINT8:
        wanted, got = 'uint8, as in "uint8[*batch, 224, 224, 3]"', "another or no element type"
    elif num_channels > 1 and last and last != num_channels:
        wanted, got = f"a last dimension of {num_channels}", str(last)
    if wanted:
        raise InvalidRequestError(
            f"line {line}: this tensor cannot be normalized", "source", wanted, got
        )


def _read_shape(found: models_pb2.Type, text: str, line: int) -> None:
    """Read `float32[batch, 3, 224, 224]` into `found`."""
    match = _SHAPE.fullmatch(text)
    dtype = match["dtype"] if match else ""
    if match is None or (dtype and dtype not in DTYPE_NUMBERS):
        raise InvalidRequestError(
            f"line {line}: a tensor's annotation is not understood",
            "source",
            _GRAMMAR,
            repr(text[:80]),
            f"The dtypes are {', '.join(DTYPE_NUMBERS)}" if match else "",
        )
    if dtype:
        found.dtype = DTYPE_NUMBERS[dtype]
    if match["shape"] is None:
        return
    found.has_shape = True
    parts = [part.strip() for part in match["shape"].split(",")] if match["shape"].strip() else []
    for index, part in enumerate(parts):
        if part.isdecimal() and int(part) < _MAX_INTEGER:
            found.shape.add(size=int(part))
        elif part.isidentifier() or (index == 0 and _is_any_leading(part)):
            found.shape.add(name=part)
        else:
            raise InvalidRequestError(
                f"line {line}: dimension {index} of a tensor's annotation is not understood",
                "source",
                "a number, a name, or as the first `...` or `*name`",
                repr(part[:80]),
            )
    if len(parts) > MAX_RANK:
        raise InvalidRequestError(
            f"line {line}: a tensor's annotation has too many dimensions",
            "source",
            f"at most {MAX_RANK}",
            str(len(parts)),
        )


def _is_any_leading(part: str) -> bool:
    return part == ANY_LEADING or (part.startswith("*") and part[1:].isidentifier())


def literal_value(node: ast.expr) -> values_pb2.Value | None:
    """Return a text, number, truth value or None that stands in the source; None for all else."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if value is None:
        return values_pb2.Value(null=values_pb2.Null())
    if isinstance(value, bool):
        return values_pb2.Value(flag=value)
    if isinstance(value, int) and -_MAX_INTEGER <= value < _MAX_INTEGER:
        return values_pb2.Value(integer=value)
    if isinstance(value, float):
        return values_pb2.Value(real=value)
    if isinstance(value, str):
        return values_pb2.Value(text=value)
    return None


def _literal(members: list[ast.expr]) -> models_pb2.Type:
    choices = [literal_value(member) for member in members]
    found = models_pb2.Type()
    known = [choice for choice in choices if choice is not None]
    if len(known) < len(choices):
        return found
    kinds = {choice.WhichOneof("kind") for choice in known}
    found.is_optional = "null" in kinds
    by_kind = {
        "text": models_pb2.TYPE_KIND_TEXT,
        "integer": models_pb2.TYPE_KIND_INTEGER,
        "flag": models_pb2.TYPE_KIND_FLAG,
        "real": models_pb2.TYPE_KIND_REAL,
    }
    rest = kinds - {"null"}
    if len(rest) == 1:
        found.kind = by_kind[str(rest.pop())]
    found.choices.extend(choice for choice in known if choice.WhichOneof("kind") != "null")
    return found


def _parsed(node: ast.expr) -> ast.expr:
    """Return what a string annotation says; any other node as it is, as is one that does not parse."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            inner = ast.parse(node.value.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return node
        for child in ast.walk(inner):
            if isinstance(child, ast.expr):
                child.lineno = node.lineno
        return inner
    return node


def _subscripted(node: ast.expr | None) -> tuple[ast.expr | None, list[ast.expr]]:
    if not isinstance(node, ast.Subscript):
        return node, []
    members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return node.value, list(members)


def _last_name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node)
