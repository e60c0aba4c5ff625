"""Nodes to what a method's annotations ask for, and results back to nodes."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
import torch

from nos_backend import normalization
from nos_backend.executor import images
from nos_backend.executor.arena import ALIGNMENT_BYTES
from nos_backend.executor.failures import NoWireFormError, RefusedError
from nos_backend.executor.messages import (
    ITEM_BYTES,
    MAX_DEPTH,
    MAX_RANK,
    MAX_TREE_BYTES,
    NODE_BYTES,
    OCTETS,
)
from nos_backend.executor.process import MAX_IMAGE_PIXELS

if typing.TYPE_CHECKING:
    from nos_backend.normalization import Normalization

Node: typing.TypeAlias = Any
Array: typing.TypeAlias = np.ndarray[Any, Any]

#: Kinds of `Want` that take an array or media, and how errors call them.
_BULK: Final = {"torch": "a tensor", "numpy": "an array", "image": "an image"}
_TORCH_NAMES: Final = {getattr(torch, name): name for name in ITEM_BYTES}
_NUMPY_NAMES: Final = {np.dtype(name): name for name in ITEM_BYTES if name != "bfloat16"}
#: Bytes of both are the same, and numpy knows only the second.
_RAW_BFLOAT16: Final = torch.int16
_INT64: Final = 2**63
_UINT8_MAX: Final = 255
_IMAGE_CHANNELS: Final = 3
_WIRE_FORMS: Final = "return arrays, text, numbers, lists or dicts"


@dataclass(frozen=True, slots=True)
class Want:
    """What a parameter asks for."""

    kind: str = "any"
    """`any`, `torch`, `numpy`, `image`, `bytes`, `float`, `int`, `bool`, `each` or `members`."""
    items: tuple[Want, ...] = ()
    """Of `each`: one for all items, or one per item; of `members`: one for all values."""
    normalization: Normalization | None = None
    """Of `torch`: what becomes of uint8 values."""


ANY: Final = Want()


def want(annotation: Any) -> Want:
    """Return what a parameter with this annotation asks for."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        found = want(arguments[0])
        meant = [it for it in arguments[1:] if isinstance(it, str) and normalization.is_meant(it)]
        if found.kind == "torch" and meant:
            return dataclasses.replace(found, normalization=normalization.parse(meant[0]))
        return found
    if origin in {typing.Union, types.UnionType}:
        wants = [want(member) for member in arguments if member is not types.NoneType]
        return next((member for member in wants if member.kind in _BULK), wants[0])
    cls = origin or annotation
    if not isinstance(cls, type):
        return ANY
    if issubclass(cls, torch.Tensor):
        return Want("torch")
    if issubclass(cls, np.ndarray):
        return Want("numpy")
    if cls.__module__ == "PIL.Image" and cls.__name__ == "Image":
        return Want("image")
    if cls in {bytes, float, int, bool}:
        return Want(cls.__name__)
    if issubclass(cls, collections.abc.Mapping):
        return Want("members", (want(arguments[1]),)) if len(arguments) == 2 else ANY  # noqa: PLR2004
    if issubclass(cls, collections.abc.Iterable) and arguments and cls is not str:
        return Want("each", tuple(want(member) for member in arguments if member is not ...))
    return ANY


class Inputs:
    """Makes arguments of one call; arrays on the CPU are views of its block."""

    def __init__(
        self, block: memoryview, device: torch.device, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self._device = device
        self._max_image_pixels = max_image_pixels
        #: The base of every view that a model gets: its reference count tells whether one is left.
        self._owner: Array = np.frombuffer(block, np.uint8)

    @property
    def kept(self) -> bool:
        """Whether a view of the block is still referred to, by the model for instance."""
        # One by this object, one by getrefcount itself.
        return sys.getrefcount(self._owner) > 2  # noqa: PLR2004

    def find(self, piece: Array) -> int | None:
        """Return where in the block the bytes of a contiguous array lie; None if they are not all there."""
        offset = _address(piece) - _address(self._owner)
        return offset if 0 <= offset <= self._owner.size - piece.size else None

    def read(self, node: Node, wanted: Want, where: str) -> Any:
        """Return the Python value of `node`.

        Raises:
            RefusedError: INVALID_TENSOR or LIMIT_EXCEEDED if it is not what the parameter asks for.
        """
        if isinstance(node, dict):
            ((kind, content),) = node.items()
            if kind == "t":
                return self._read_tensor(content, wanted, where)
            if kind == "m":
                return self._read_media(content, wanted, where)
            return self._read_members(kind, content, wanted, where)
        if node is None:
            return None
        if wanted.kind in _BULK:
            raise RefusedError(
                "INVALID_TENSOR", "wrong argument", where, _BULK[wanted.kind], _name(node)
            )
        if wanted.kind == "float" and type(node) is int:
            return float(node)
        return node

    def _read_members(self, kind: str, content: list[Any], wanted: Want, where: str) -> Any:
        if wanted.kind in _BULK:
            got = "a dict" if kind == "d" else "a list"
            raise RefusedError("INVALID_TENSOR", "wrong argument", where, _BULK[wanted.kind], got)
        if kind == "d":
            member = wanted.items[0] if wanted.kind == "members" else ANY
            return {key: self.read(node, member, f"{where}[{key!r}]") for key, node in content}
        wants = wanted.items if wanted.kind == "each" else (ANY,)
        last = len(wants) - 1
        values = [
            self.read(node, wants[min(index, last)], f"{where}[{index}]")
            for index, node in enumerate(content)
        ]
        return tuple(values) if kind == "u" else values

    def _read_tensor(self, content: list[Any], wanted: Want, where: str) -> Any:
        name, shape, offset = content
        array = self._array("int16" if name == "bfloat16" else name, shape, offset)
        if name == "bool" and array.size and int(array.view(np.uint8).max()) > 1:
            raise RefusedError("INVALID_TENSOR", "not all bools are 0 or 1", where)
        if wanted.kind == "torch" or name == "bfloat16":
            tensor = torch.from_numpy(array)
            if name == "bfloat16":
                tensor = tensor.view(torch.bfloat16)
            tensor = tensor.to(self._device)
            if wanted.normalization is not None and name == "uint8":
                return _normalize(tensor, wanted.normalization, where)
            return tensor
        if wanted.kind == "image":
            return _to_image(array, where)
        if wanted.kind in {"float", "int", "bool"} and not shape:
            return array.item()
        return array

    def _array(self, name: str, shape: list[int], offset: int) -> Array:
        dtype = np.dtype(name)
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return np.empty(shape, dtype)
        raw = self._owner[offset : offset + size]
        if offset % dtype.itemsize:
            raw = raw.copy()
        return raw.view(dtype).reshape(shape)

    def _read_media(self, content: list[Any], wanted: Want, where: str) -> Any:
        mime_type, offset, size = content
        data = self._owner[offset : offset + size].tobytes()
        if wanted.kind == "bytes" or (wanted.kind not in _BULK and mime_type == OCTETS):
            return data
        image = images.decode(data, where, self._max_image_pixels)
        if wanted.kind == "image":
            return image
        array = images.pixels(image)
        if wanted.kind != "torch":
            return array
        tensor = torch.from_numpy(array).to(self._device)
        normal = wanted.normalization
        return tensor if normal is None else _normalize(tensor, normal, where)


def _normalize(tensor: torch.Tensor, wanted: Normalization, where: str) -> torch.Tensor:
    """Return `(tensor / 255 - mean) / std` in float32, where `tensor` is."""
    if wanted.num_channels > 1 and tensor.shape[-1:] != (wanted.num_channels,):
        raise RefusedError(
            "INVALID_TENSOR",
            "wrong shape",
            where,
            f"a last dimension of {wanted.num_channels}",
            str(tuple(tensor.shape)),
        )
    std = torch.tensor(wanted.std, dtype=torch.float64)
    scale, shift = 1 / (_UINT8_MAX * std), -torch.tensor(wanted.mean, dtype=torch.float64) / std
    values = tensor.to(torch.float32)
    values *= scale.to(values)
    values += shift.to(values)
    return values


def _to_image(array: Array, where: str) -> Any:
    from PIL import Image  # only models that take images pay for it

    is_grey = array.ndim == _IMAGE_CHANNELS - 1
    is_colour = array.ndim == _IMAGE_CHANNELS and array.shape[2] == _IMAGE_CHANNELS
    if array.dtype != np.uint8 or not array.size or not (is_grey or is_colour):
        raise RefusedError(
            "INVALID_TENSOR",
            "not an image",
            where,
            "uint8 (height, width, 3) or (height, width)",
            f"{array.dtype} {array.shape}",
        )
    return Image.fromarray(array)


def _name(node: Node) -> str:
    return "text" if isinstance(node, str) else f"the {type(node).__name__} {node}"


class Outputs:
    """A result in the making: its node, and the bytes that go into its block."""

    def __init__(self, value: Any, max_bytes: int = sys.maxsize) -> None:
        """Take `value` apart; nothing is copied yet, but what is on a device or strided.

        Args:
            value: The result.
            max_bytes: Of its arrays.

        Raises:
            NoWireFormError: If something in it cannot be sent.
            RefusedError: LIMIT_EXCEEDED if there is too much in it, in arrays or outside of them.
        """
        self._max_bytes = max_bytes
        #: Where each piece goes in the block.
        self._pieces: list[tuple[int, Array]] = []
        self.size = 0
        #: What the tree itself takes, roughly.
        self._tree_bytes = 0
        self.node = self._write(value, 0)

    def find_in(self, inputs: Inputs) -> int | None:
        """Return where in its input a call's result lies as it is; None if it has to be copied."""
        return inputs.find(self._pieces[0][1]) if len(self._pieces) == 1 else None

    def copy_to(self, block: memoryview) -> None:
        """Copy the bytes; `block` is `size` bytes long."""
        target: Array = np.frombuffer(block, np.uint8)
        for offset, piece in self._pieces:
            target[offset : offset + piece.size] = piece

    def _write(self, value: Any, depth: int) -> Node:
        self._count(NODE_BYTES)
        if isinstance(value, torch.Tensor):
            return self._write_tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._write_array(np.asarray(value))
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float | str):
            if isinstance(value, str):
                self._count(len(value))
            return _plain(value)
        if isinstance(value, bytes | bytearray | memoryview):
            raw = np.frombuffer(value, np.uint8)
            return {"m": [OCTETS, self._add(raw), raw.size]}
        if isinstance(value, collections.abc.Mapping | list | tuple):
            if depth >= MAX_DEPTH:
                raise NoWireFormError(f"returned lists or dicts nested over {MAX_DEPTH} deep")
            return self._write_members(value, depth)
        image = sys.modules.get("PIL.Image")
        if image is not None and isinstance(value, image.Image):
            plain = value if value.mode in {"L", "RGB", "RGBA"} else value.convert("RGB")
            return self._write_array(np.asarray(plain))
        raise _unsendable(value)

    def _count(self, size: int) -> None:
        self._tree_bytes += size
        if self._tree_bytes > MAX_TREE_BYTES:
            raise RefusedError(
                "LIMIT_EXCEEDED",
                "the result holds too much text or too many numbers outside arrays",
                hint="Return numbers as one array",
            )

    def _write_members(self, value: Any, depth: int) -> Node:
        if isinstance(value, collections.abc.Mapping):
            members = []
            for key, item in value.items():
                if not isinstance(key, str):
                    raise NoWireFormError(
                        f"returned a dict with the key {key!r:.60}: keys are text on the wire"
                    )
                self._count(len(key))
                members.append([_plain(key), self._write(item, depth + 1)])
            return {"d": members}
        if hasattr(value, "_fields") or dataclasses.is_dataclass(value):
            raise _unsendable(value)
        items = [self._write(item, depth + 1) for item in value]
        return {"u" if isinstance(value, tuple) else "l": items}

    def _write_tensor(self, tensor: torch.Tensor) -> Node:
        name = _TORCH_NAMES.get(tensor.dtype)
        if name is None or tensor.layout is not torch.strided or tensor.is_meta:
            raise NoWireFormError(
                f"returned a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which has"
                " no wire form: return a dense tensor of a plain dtype"
            )
        self._check_room(tensor.numel() * tensor.element_size())
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = dense.view(_RAW_BFLOAT16) if name == "bfloat16" else dense
        return self._add_array(raw.numpy(), name)

    def _write_array(self, array: Array) -> Node:
        name = _NUMPY_NAMES.get(array.dtype)
        if name is None and array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
            name = _NUMPY_NAMES.get(array.dtype)
        if name is None and array.dtype.name == "bfloat16":
            name = "bfloat16"
        if name is None:
            raise NoWireFormError(
                f"returned an array of dtype {array.dtype}, which has no wire form: {_WIRE_FORMS}"
            )
        return self._add_array(array, name)

    def _add_array(self, array: Array, name: str) -> Node:
        if array.ndim > MAX_RANK:
            raise NoWireFormError(f"returned {array.ndim} dimensions: at most {MAX_RANK} travel")
        self._check_room(array.size * array.itemsize)
        shape = list(array.shape)
        flat = np.ascontiguousarray(array).reshape(-1)
        return {"t": [name, shape, self._add(flat.view(np.uint8))]}

    def _check_room(self, size: int) -> None:
        """See that an array fits before it is copied: a repeated number takes no memory until then."""
        if self.size + size > self._max_bytes:
            raise RefusedError(
                "LIMIT_EXCEEDED",
                "the result is too large",
                expected=f"at most {self._max_bytes} bytes",
                got=str(self.size + size),
            )

    def _add(self, raw: Array) -> int:
        offset = -(-self.size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if raw.size:
            self._pieces.append((offset, raw))
        self.size = offset + raw.size
        return offset


def _address(array: Array) -> int:
    address, _ = array.__array_interface__["data"]
    return int(address)


def _plain(value: int | float | str) -> int | float | str:
    """Return the value as one of the three plain types, or refuse it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise NoWireFormError("returned text that is not UTF-8 (lone surrogates)") from error
        return str(value) if type(value) is not str else value
    if isinstance(value, float):
        return float(value)
    if not -_INT64 <= value < _INT64:
        raise NoWireFormError(f"returned {value!s:.40}, which does not fit 64 bits")
    return int(value)


def _unsendable(value: Any) -> NoWireFormError:
    return NoWireFormError(
        f"returned {type(value).__name__}, which has no wire form: {_WIRE_FORMS}"
    )
