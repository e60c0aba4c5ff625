"""Weights of a model as one flat run of bytes: plan where each tensor lies, pack them, bind views.

A model's parameters and buffers become views into one buffer, so that moving a model is moving one block,
whatever the number of its tensors. The plan is independent of the device and plain data: it travels
as JSON beside the bytes it describes.

Tensors that share a storage (tied weights, views of one another) are packed once and share it again
after binding. What cannot be a strided view of plain bytes (sparse, quantised, subclasses) is not
flattened: `make_plan` names it, and such a model takes the slow path.
"""

from __future__ import annotations

import bisect
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: What CUDA kernels want of an address; more than any CPU kernel does.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of the model lies."""

    owner: str
    """Path of the module that holds it, from the model object; empty for the object itself."""
    name: str
    """Its name in that module."""
    kind: str
    """`parameter`, `buffer`, `attribute` for a plain tensor on the model object, or `other` for one deeper
    inside of it, which `bind` does not find."""
    offset_bytes: int
    """Of its first element, from the start of the flat run."""
    dtype: str
    """As torch writes it, without `torch.`."""
    shape: tuple[int, ...]
    """Its sizes."""
    stride: tuple[int, ...]
    """In elements."""


@dataclass(frozen=True, slots=True)
class Block:
    """One storage's used bytes."""

    offset_bytes: int
    """In the flat run; a multiple of `ALIGNMENT_BYTES`."""
    size_bytes: int
    """How many."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every tensor of a model lies in its flat run."""

    size_bytes: int
    """Of the whole run, padding between blocks included."""
    slots: tuple[Slot, ...]
    """In the order in which the modules hold them."""
    blocks: tuple[Block, ...]
    """In order of offset; they do not overlap."""
    loose: tuple[str, ...]
    """Tensors that cannot be flattened, with the reason; such a model takes the slow path."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can carry it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return what `to_dict` gave."""
        slots = tuple(
            Slot(**{**slot, "shape": tuple(slot["shape"]), "stride": tuple(slot["stride"])})
            for slot in fields["slots"]
        )
        blocks = tuple(Block(**block) for block in fields["blocks"])
        return cls(fields["size_bytes"], slots, blocks, tuple(fields["loose"]))


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor where it was found."""

    owner: str
    name: str
    kind: str
    tensor: torch.Tensor

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


def find_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model itself if it is a module, else the modules among its attributes, by name."""
    if isinstance(model, nn.Module):
        yield "", model
        return
    for name, value in vars(model).items() if hasattr(model, "__dict__") else ():
        if isinstance(value, nn.Module):
            yield name, value


def make_plan(model: Any, others: Sequence[torch.Tensor] = ()) -> Plan:
    """Plan the flat run of a model's weights; reads no values and moves nothing.

    Args:
        model: A module, or any object with modules or tensors as attributes.
        others: Further tensors that its object graph holds, and that are not found this way.
    """
    found, loose = [], []
    for item in _find_tensors(model, others):
        reason = why_loose(item.tensor)
        if reason:
            loose.append(f"{item.path}: {reason}")
        else:
            found.append(item)
    spans: dict[int, tuple[int, int]] = {}
    for item in found:
        key = _storage_of(item.tensor)
        start, end = _span(item.tensor)
        known = spans.get(key, (start, end))
        spans[key] = (min(known[0], start), max(known[1], end))
    offsets: dict[int, int] = {}
    blocks, size = [], 0
    for key, (start, end) in spans.items():
        # Keep the start's remainder, so that elements stay aligned whatever part of a storage is used.
        offset = size + start % ALIGNMENT_BYTES
        offsets[key] = offset - start
        blocks.append(Block(offset, end - start))
        size = -(-(offset + end - start) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    slots = tuple(
        Slot(
            item.owner,
            item.name,
            item.kind,
            offsets[_storage_of(item.tensor)] + _span(item.tensor)[0],
            str(item.tensor.dtype).removeprefix("torch."),
            tuple(item.tensor.shape),
            tuple(item.tensor.stride()),
        )
        for item in found
    )
    return Plan(size, slots, tuple(blocks), tuple(loose))


def slot_numbers(plan: Plan, model: Any, others: Sequence[torch.Tensor] = ()) -> dict[int, int]:
    """Return the first slot of each tensor, by the tensor's `id`."""
    numbers: dict[int, int] = {}
    for number, item in enumerate(_flattened(plan, model, others)):
        numbers.setdefault(id(item.tensor), number)
    return numbers


def pack(plan: Plan, model: Any, flat: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> None:
    """Copy a model's weights to where the plan wants them.

    Args:
        plan: What `make_plan(model, others)` gave.
        model: The model; unchanged.
        flat: uint8, (plan.size_bytes,), on any device; bytes between blocks are left as they are.
        others: As for the plan.
    """
    packed: set[int] = set()
    starts = [block.offset_bytes for block in plan.blocks]
    for slot, item in zip(plan.slots, _flattened(plan, model, others), strict=True):
        if not item.tensor.numel() or _storage_of(item.tensor) in packed:
            continue
        packed.add(_storage_of(item.tensor))
        block = plan.blocks[bisect.bisect_right(starts, slot.offset_bytes) - 1]
        start = _span(item.tensor)[0] - (slot.offset_bytes - block.offset_bytes)
        source = torch.empty(0, dtype=torch.uint8, device=item.tensor.device).set_(
            item.tensor.untyped_storage(), start, (block.size_bytes,), (1,)
        )
        flat[block.offset_bytes : block.offset_bytes + block.size_bytes].copy_(source)


def bind(plan: Plan, model: Any, flat: torch.Tensor) -> None:
    """Make the model's parameters, buffers and tensors views of `flat`; copies nothing.

    Args:
        plan: The model's plan; the model may be a twin of the one that was planned, on the meta device too.
        model: Its tensors are replaced; parameters keep their identity.
        flat: uint8, (plan.size_bytes,); must stay alive as long as the model runs.

    Raises:
        KeyError: If the model lacks a module that the plan names.
    """
    modules: dict[str, Any] = {"": model}
    for root, module in find_modules(model):
        modules.update(module.named_modules(prefix=root))
    for slot in plan.slots:
        view = view_of(slot, flat)
        if slot.kind == "other":
            continue
        owner = modules[slot.owner]
        if slot.kind == "parameter":
            parameter = owner._parameters[slot.name]  # noqa: SLF001 - the only way past registration
            if parameter.device == view.device:
                parameter.data = view
            else:
                requires_grad = parameter.requires_grad
                owner._parameters[slot.name] = nn.Parameter(view, requires_grad)  # noqa: SLF001
        elif slot.kind == "buffer":
            owner._buffers[slot.name] = view  # noqa: SLF001
        elif getattr(owner, slot.name).device.type in {view.device.type, "meta"}:
            setattr(owner, slot.name, view)


def view_of(slot: Slot, flat: torch.Tensor) -> torch.Tensor:
    """Return the tensor that a slot stands for, as a view of the flat run."""
    dtype: torch.dtype = getattr(torch, slot.dtype)
    return torch.empty(0, dtype=dtype, device=flat.device).set_(
        flat.untyped_storage(),
        (flat.storage_offset() + slot.offset_bytes) // dtype.itemsize,
        slot.shape,
        slot.stride,
    )


def _find_tensors(model: Any, others: Sequence[torch.Tensor]) -> Iterator[_Found]:
    for root, module in find_modules(model):
        for path, child in module.named_modules(prefix=root):
            for name, parameter in child._parameters.items():  # noqa: SLF001 - None entries, no copies
                if parameter is not None:
                    yield _Found(path, name, "parameter", parameter)
            for name, buffer in child._buffers.items():  # noqa: SLF001
                if buffer is not None:
                    yield _Found(path, name, "buffer", buffer)
    for name, value in vars(model).items() if hasattr(model, "__dict__") else ():
        if isinstance(value, torch.Tensor):
            yield _Found("", name, "attribute", value)
    for number, tensor in enumerate(others):
        yield _Found("", f"#{number}", "other", tensor)


def _flattened(plan: Plan, model: Any, others: Sequence[torch.Tensor]) -> Iterator[_Found]:
    wanted = {(slot.owner, slot.name) for slot in plan.slots}
    return (item for item in _find_tensors(model, others) if (item.owner, item.name) in wanted)


def why_loose(tensor: torch.Tensor) -> str:
    """Return why a tensor cannot be a view of plain bytes; empty if it can."""
    if type(tensor) not in {torch.Tensor, nn.Parameter}:
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_conj() or tensor.is_neg():
        return "lazily conjugated or negated"
    return ""


def _storage_of(tensor: torch.Tensor) -> int:
    """Identify a tensor's storage; by the object, since all storages on the meta device lie at 0."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - what torch itself compares


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first and the end byte that a tensor uses of its storage."""
    item = tensor.element_size()
    start = int(tensor.storage_offset()) * item
    if not tensor.numel():
        return start, start
    last = sum(
        (int(size) - 1) * int(step)
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (last + 1) * item
