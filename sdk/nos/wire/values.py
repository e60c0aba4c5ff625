"""Python values to and from the wire: the only place that knows dtype names and byte order.

Arrays travel as row-major little-endian bytes. What does not travel (objects, strings in arrays,
structured dtypes) is refused by name, never pickled.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos.errors import InvalidRequestError, InvalidTensorError, LimitExceededError
from nos.types import Media
from nos.wire.limits import ALIGNMENT_BYTES, FRAME_BYTES, MAX_DEPTH, MAX_RANK
from nos.wire.v1 import values_pb2

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

    from nos.wire.frames import Buffer

OCTETS: Final = "application/octet-stream"

_ADDRESSES: Final = 1 << 63
#: Bytes up to this are copied sooner than they are made one's own.
_SMALL_BYTES: Final = 16 << 10
_IS_LITTLE: Final = sys.byteorder == "little"

#: Wire dtype, its name as in torch and numpy, and its element size in bytes.
_DTYPES: Final[tuple[tuple[values_pb2.Dtype.ValueType, str, int], ...]] = (
    (values_pb2.DTYPE_BOOL, "bool", 1),
    (values_pb2.DTYPE_UINT8, "uint8", 1),
    (values_pb2.DTYPE_UINT16, "uint16", 2),
    (values_pb2.DTYPE_UINT32, "uint32", 4),
    (values_pb2.DTYPE_UINT64, "uint64", 8),
    (values_pb2.DTYPE_INT8, "int8", 1),
    (values_pb2.DTYPE_INT16, "int16", 2),
    (values_pb2.DTYPE_INT32, "int32", 4),
    (values_pb2.DTYPE_INT64, "int64", 8),
    (values_pb2.DTYPE_FLOAT16, "float16", 2),
    (values_pb2.DTYPE_BFLOAT16, "bfloat16", 2),
    (values_pb2.DTYPE_FLOAT32, "float32", 4),
    (values_pb2.DTYPE_FLOAT64, "float64", 8),
    (values_pb2.DTYPE_COMPLEX64, "complex64", 8),
    (values_pb2.DTYPE_COMPLEX128, "complex128", 16),
)
DTYPE_NAMES: Final[dict[int, str]] = {number: name for number, name, _ in _DTYPES}
DTYPE_NUMBERS: Final[dict[str, values_pb2.Dtype.ValueType]] = {
    name: number for number, name, _ in _DTYPES
}
ITEM_BYTES: Final[dict[int, int]] = {number: size for number, _, size in _DTYPES}


class Payload:
    """Bytes of tensors and media in the making: what goes into `data`, in order."""

    __slots__ = ("buffers", "size")

    def __init__(self) -> None:
        #: Contiguous pieces; together `size` bytes, padding included.
        self.buffers: list[Buffer] = []
        self.size = 0

    def add(self, buffer: Buffer, size: int) -> int:
        """Append `size` bytes at the next aligned offset and return that offset."""
        padding = -self.size % ALIGNMENT_BYTES
        if padding:
            self.buffers.append(bytes(padding))
        offset = self.size + padding
        if size:
            self.buffers.append(buffer)
        self.size = offset + size
        if self.size > FRAME_BYTES:
            raise LimitExceededError(
                "the frame is too large",
                expected=f"at most {FRAME_BYTES} bytes",
                got=f"{self.size}",
            )
        return offset


def write(
    value: Any, target: values_pb2.Value, payload: Payload, where: str, depth: int = 0
) -> None:
    """Write `value` into `target`, its bulk into `payload`.

    Arrays are copied only if they are not contiguous, row-major and little-endian; otherwise
    `payload` refers to the caller's memory, which must not change until the message is joined.

    Args:
        value: None, bool, int, float, str, bytes, a numpy array or scalar, a torch tensor, a PIL
            image, `Media`, or lists, tuples and dicts of these.
        target: An empty node.
        payload: Where bytes go.
        where: Names the value in errors, for instance `x[3]`.
        depth: How deep `target` is nested.

    Raises:
        InvalidRequestError: If something in it has no wire form.
        LimitExceededError: If it is too large, or nested too deep.
    """
    if _write_scalar(value, target, where):
        return
    if isinstance(value, np.ndarray | np.generic):
        _write_array(np.asarray(value), target.tensor, payload, where)
    elif isinstance(value, bytes | bytearray | memoryview):
        _write_bytes(OCTETS, value, target.media, payload)
    elif isinstance(value, Media):
        _write_bytes(value.mime_type, value.data, target.media, payload)
    elif isinstance(value, list | tuple):
        _check_depth(depth, where)
        target.items.is_tuple = isinstance(value, tuple)
        for index, item in enumerate(value):
            write(item, target.items.items.add(), payload, f"{where}[{index}]", depth + 1)
    elif isinstance(value, Mapping):
        _check_depth(depth, where)
        target.fields.SetInParent()
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequestError("the key is no text", where, "str keys", repr(key)[:40])
            member = target.fields.fields.add(key=key)
            write(item, member.value, payload, f"{where}[{key!r}]", depth + 1)
    else:
        _write_foreign(value, target, payload, where)


def is_plain(array: np.ndarray[Any, Any]) -> bool:
    """Return whether an array's bytes travel as they lie: some, row-major and little-endian."""
    is_little = array.dtype.byteorder == "<" or (array.dtype.isnative and _IS_LITTLE)
    return bool(array.size and array.flags.c_contiguous and is_little)


def write_arrays(arrays: Iterable[np.ndarray[Any, Any]]) -> Payload:
    """Return the payload of plain arrays of which `write` accepted some of the same shapes and dtypes."""
    payload = Payload()
    for array in arrays:
        flat: Any = array.reshape(-1)
        payload.add(memoryview(flat.view(np.uint8)), array.nbytes)
    return payload


def read(node: values_pb2.Value, data: memoryview, *, copy: bool = True) -> Any:
    """Return the Python value that `node` stands for.

    Args:
        node: A node that `check` has accepted, or that a trusted peer wrote.
        data: The bytes of the carrying message.
        copy: Whether arrays own their memory; else they are views of `data`, but where they are not
            aligned in it, or so small a part of it that they should not keep the rest.

    Returns:
        Arrays as numpy arrays. bfloat16 comes as `ml_dtypes.bfloat16` where that package is
        installed, else widened to float32, which loses nothing.
    """
    kind = node.WhichOneof("kind")
    if kind == "tensor":
        return read_tensor(node.tensor, data, copy=copy)
    if kind == "items":
        members = [read(item, data, copy=copy) for item in node.items.items]
        return tuple(members) if node.items.is_tuple else members
    if kind == "fields":
        return {item.key: read(item.value, data, copy=copy) for item in node.fields.fields}
    if kind == "media":
        start = node.media.offset_bytes
        content = bytes(data[start : start + node.media.size_bytes])
        return content if node.media.mime_type == OCTETS else Media(node.media.mime_type, content)
    if kind in {None, "null"}:
        return None
    return getattr(node, kind)


def read_tensor(tensor: values_pb2.Tensor, data: memoryview, *, copy: bool) -> np.ndarray[Any, Any]:
    """Return the array that `tensor` stands for; see `read`."""
    shape = tuple(tensor.shape)
    name = DTYPE_NAMES[tensor.dtype]
    count = math.prod(shape)
    raw_dtype = np.dtype("<u2") if name == "bfloat16" else np.dtype(name)
    flat = (
        np.frombuffer(data, raw_dtype, count, tensor.offset_bytes)
        if count
        else np.empty(0, raw_dtype)
    )
    if name == "bfloat16":
        return _read_bfloat16(flat).reshape(shape)
    array = flat.reshape(shape)
    is_part = 2 * array.nbytes < data.nbytes
    return array.copy() if copy or is_part or not array.flags.aligned else array


class _Adopted:
    """Bytes as memory that may be written, by numpy's array interface."""

    def __init__(self, flat: np.ndarray[Any, Any]) -> None:
        address, _ = flat.__array_interface__["data"]
        self._flat = flat
        self.__array_interface__ = {
            "version": 3,
            "shape": flat.shape,
            "typestr": "|u1",
            "data": (address, False),
        }


def adopt(data: memoryview) -> memoryview:
    """Return bytes that a transport made for its caller alone as writable memory; small ones as they are.

    A result's arrays are then views of the message that brought them, which saves a copy into memory that is
    new to the process. Nobody else may ever look at the bytes object behind `data`.
    """
    if data.nbytes <= _SMALL_BYTES:
        return data
    return np.asarray(_Adopted(np.frombuffer(data, np.uint8))).data


def check(node: values_pb2.Value, data_bytes: int, where: str, depth: int = 0) -> None:
    """Accept a node from an untrusted peer, or say what is wrong with it.

    Raises:
        InvalidTensorError: If a tensor or media value is malformed or reaches beyond `data`.
        LimitExceededError: If it is nested too deep.
    """
    kind = node.WhichOneof("kind")
    if kind == "tensor":
        size = tensor_bytes(node.tensor, where)
        _check_range(node.tensor.offset_bytes, size, data_bytes, where)
    elif kind == "media":
        _check_range(node.media.offset_bytes, node.media.size_bytes, data_bytes, where)
    elif kind == "items":
        _check_depth(depth, where)
        for index, item in enumerate(node.items.items):
            check(item, data_bytes, f"{where}[{index}]", depth + 1)
    elif kind == "fields":
        _check_depth(depth, where)
        for member in node.fields.fields:
            check(member.value, data_bytes, f"{where}[{member.key!r}]", depth + 1)


def tensor_bytes(tensor: values_pb2.Tensor, where: str) -> int:
    """Return how many bytes a tensor from an untrusted peer occupies.

    Raises:
        InvalidTensorError: If its dtype is unknown, its rank too high, or a dimension negative or too large.
    """
    item_bytes = ITEM_BYTES.get(tensor.dtype)
    if item_bytes is None:
        raise InvalidTensorError("unknown dtype", where, "a nos.v1.Dtype", str(tensor.dtype))
    if len(tensor.shape) > MAX_RANK:
        raise InvalidTensorError(
            "too many dimensions", where, f"at most {MAX_RANK}", str(len(tensor.shape))
        )
    if any(size < 0 for size in tensor.shape):
        raise InvalidTensorError("negative dimension", where, "sizes >= 0", str(list(tensor.shape)))
    # No array has more, not even one without elements.
    if math.prod(size or 1 for size in tensor.shape) * item_bytes >= _ADDRESSES:
        raise InvalidTensorError(
            "the dimensions are too large", where, "fewer bytes than 2**63", str(list(tensor.shape))
        )
    return math.prod(tensor.shape) * item_bytes


def dtype_name(number: int) -> str:
    """Return a dtype's name, also of one that a newer peer knows."""
    return DTYPE_NAMES.get(number, f"dtype {number}")


def enum_name(kind: _EnumTypeWrapper[Any], number: int, prefix: str) -> str:
    """Return an enum's name without `prefix`, in small letters; `unknown` for a newer peer's."""
    if number not in kind.values():
        return "unknown"
    name: str = kind.Name(number)
    return name.removeprefix(prefix).lower()


def _write_scalar(value: Any, target: values_pb2.Value, where: str) -> bool:
    """Write None, a bool, int, float or str; return False for anything else.

    numpy's scalars are tensors, although some of them are subclasses of Python's numbers.
    """
    if isinstance(value, np.generic):
        return False
    if value is None:
        target.null.SetInParent()
    elif isinstance(value, bool):
        target.flag = value
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidRequestError(
                "the number does not fit 64 bits", where, "-2**63 .. 2**63 - 1", str(value)[:40]
            )
        target.integer = value
    elif isinstance(value, float):
        target.real = value
    elif isinstance(value, str):
        try:
            target.text = value
        except (UnicodeEncodeError, ValueError) as error:
            raise InvalidRequestError(
                "the text is not UTF-8", where, "no lone surrogates"
            ) from error
    else:
        return False
    return True


def _write_array(
    array: np.ndarray[Any, Any], tensor: values_pb2.Tensor, payload: Payload, where: str
) -> None:
    number = DTYPE_NUMBERS.get(array.dtype.name)
    if number is None:
        hint = "Convert it, for instance with .tolist()" if array.dtype.kind in "USO" else ""
        raise InvalidTensorError(
            "the array's dtype has no wire form",
            where,
            "a number or bool dtype",
            f"dtype {array.dtype}",
            hint,
        )
    if array.ndim > MAX_RANK:
        raise InvalidTensorError(
            "too many dimensions", where, f"at most {MAX_RANK}", str(array.ndim)
        )
    tensor.dtype = number
    tensor.shape.extend(array.shape)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    # ascontiguousarray makes 0-d arrays 1-d, which is why the shape is taken before.
    flat: Any = np.ascontiguousarray(array).reshape(-1)
    # numpy exports no buffer for dtypes it does not know itself (bfloat16); its bytes are the same.
    tensor.offset_bytes = payload.add(
        memoryview(flat.view(np.uint8)) if flat.size else b"", flat.nbytes
    )


def _write_bytes(
    mime_type: str, content: Buffer, media: values_pb2.Media, payload: Payload
) -> None:
    size = memoryview(content).nbytes
    media.mime_type = mime_type
    media.size_bytes = size
    media.offset_bytes = payload.add(content, size)


def _write_foreign(value: Any, target: values_pb2.Value, payload: Payload, where: str) -> None:
    """Write a torch tensor or PIL image, if the caller has those packages loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        if array.dtype is torch.bfloat16:
            raw = array.view(torch.uint16).numpy()
            _write_array(raw, target.tensor, payload, where)
            target.tensor.dtype = values_pb2.DTYPE_BFLOAT16
        else:
            _write_array(array.resolve_conj().resolve_neg().numpy(), target.tensor, payload, where)
        return
    image = sys.modules.get("PIL.Image")
    if image is not None and isinstance(value, image.Image):
        plain = value if value.mode in {"L", "RGB", "RGBA"} else value.convert("RGB")
        _write_array(np.asarray(plain), target.tensor, payload, where)
        return
    raise InvalidRequestError(
        "the value has no wire form",
        where,
        "numbers, text, bytes, arrays, images, or lists and dicts of these",
        type(value).__name__,
    )


def _read_bfloat16(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    try:
        import ml_dtypes  # optional: numpy alone has no bfloat16
    except ImportError:
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.copy().view(ml_dtypes.bfloat16)


def _check_depth(depth: int, where: str) -> None:
    if depth >= MAX_DEPTH:
        raise LimitExceededError("nested too deep", where[:60], f"at most {MAX_DEPTH} levels")


def _check_range(offset: int, size: int, data_bytes: int, where: str) -> None:
    if offset + size > data_bytes:
        raise InvalidTensorError(
            "the bytes are not all there",
            where,
            f"{size} bytes at {offset}",
            f"{data_bytes} in all",
        )


def write_arguments(
    arguments: Sequence[tuple[str, Any]],
) -> tuple[list[values_pb2.Argument], Payload]:
    """Write a call's arguments; an empty name means by position.

    Raises:
        InvalidRequestError: As `write`.
    """
    payload = Payload()
    nodes = []
    for index, (name, value) in enumerate(arguments):
        node = values_pb2.Argument(name=name)
        write(value, node.value, payload, name or f"argument {index}")
        nodes.append(node)
    return nodes, payload
