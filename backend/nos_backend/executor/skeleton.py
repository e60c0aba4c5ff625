"""A model's object graph without its tensors, as bytes: so a model moves without its constructor.

It is a pickle whose tensors are references into the model's flat run. It is written and read inside
executors of one owner only, beside code of that owner which may do anything there anyway; worker,
gateway and client pass it on unread. Classes of the model's source are found by reference in its module.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from nos_backend.executor import flat

_LENGTH: Final = struct.Struct("<Q")
_REASON_CHARS: Final = 300


class ImmovableError(Exception):
    """The object graph cannot be written; the text says why."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model taken apart."""

    plan: flat.Plan
    """Where each of its tensors goes."""
    others: tuple[torch.Tensor, ...]
    """Tensors that only the object graph leads to; in the plan after the model's own."""
    data: bytes
    """What `read` takes."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, target: Any, device: torch.device) -> None:
        super().__init__(file, protocol=5)
        self._device = device
        self._of_modules = {
            id(tensor)
            for _, module in flat.find_modules(target)
            for tensor in itertools.chain(module.parameters(), module.buffers())
        }
        #: Tensors met, by identity; kept alive so that no identity is used twice.
        self.met: dict[int, tuple[int, torch.Tensor]] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor) or flat.why_loose(obj):
            return None
        if obj.device.type != self._device.type and id(obj) not in self._of_modules:
            return None  # its author keeps it in host memory
        return self.met.setdefault(id(obj), (len(self.met), obj))[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._tensors[pid]
        return tensor


def write(target: Any, device: torch.device) -> Skeleton:
    """Take a model apart; it stays as it is.

    Args:
        target: The model. Tensors of its modules move to the device, others only if they are there already.
        device: Where it will run.

    Raises:
        ImmovableError: If something in it cannot be written: a lambda, an open file, a lock.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, target, device)
    try:
        pickler.dump(target)
    except Exception as error:
        raise ImmovableError(f"{type(error).__name__}: {error}"[:_REASON_CHARS]) from error
    own = flat.slot_numbers(flat.make_plan(target), target)
    others = tuple(tensor for _, tensor in pickler.met.values() if id(tensor) not in own)
    plan = flat.make_plan(target, others)
    numbers = flat.slot_numbers(plan, target, others)
    header = {
        "plan": plan.to_dict(),
        "tensors": [
            [numbers[id(tensor)], isinstance(tensor, nn.Parameter), tensor.requires_grad]
            for _, tensor in pickler.met.values()
        ],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return Skeleton(plan, others, _LENGTH.pack(len(text)) + text + file.getvalue())


def read_plan(data: bytes) -> flat.Plan:
    """Return the plan of a skeleton without making anything of it."""
    return flat.Plan.from_dict(_header(data)["plan"])


def read(data: bytes, run: torch.Tensor) -> Any:
    """Put a model together, its tensors as views of `run`; no constructor is called.

    Args:
        data: Of `write`; the modules of its classes are imported by now.
        run: uint8, (plan.size_bytes,), filled; must stay alive as long as the model.

    Raises:
        Exception: Whatever the classes' own `__setstate__` and `__reduce__` raise.
    """
    header = _header(data)
    slots = flat.Plan.from_dict(header["plan"]).slots
    tensors = []
    for number, is_parameter, requires_grad in header["tensors"]:
        view = flat.view_of(slots[number], run)
        if is_parameter:
            view = nn.Parameter(view, requires_grad)
        tensors.append(view)
    body = io.BytesIO(memoryview(data)[_body_at(data) :])
    return _Unpickler(body, tensors).load()


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[_LENGTH.size : _body_at(data)])
    return header


def _body_at(data: bytes) -> int:
    (length,) = _LENGTH.unpack_from(data)
    return _LENGTH.size + int(length)
