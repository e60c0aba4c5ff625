"""What a forward pass needs beside the weights: bytes of activations and FLOPs, predicted or measured.

Every operator's outputs pass through a dispatch mode that counts the storages which are alive. The same mode
runs on real tensors (measured) and on a twin whose tensors are on the meta device (predicted: shapes are
computed, no byte is touched). What an operator allocates inside itself (convolution reordering, cuDNN and
cuBLAS workspaces) is seen by neither.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from nos_backend.executor.flat import find_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

#: CUDA's caching allocator rounds every request up to this.
_ROUNDING_BYTES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleUse:
    """One module's part of a forward pass."""

    path: str
    """As in `named_modules`; empty for the model itself."""
    kind: str
    """Its class."""
    weight_bytes: int
    """Of its own parameters and buffers, children's excluded."""
    activation_bytes: int
    """What is alive after it ran that was not before: its outputs and what it keeps."""
    workspace_bytes: int
    """What it needed beyond that while it ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One forward pass."""

    batch_size: int
    """Items in it."""
    peak_bytes: int
    """The most that was alive at once, inputs and weights excluded."""
    flops: int
    """Multiply-adds counted twice, by the formulas of torch's flop counter."""
    modules: tuple[ModuleUse, ...]
    """In the order in which they first ended."""


def measure(
    model: Any,
    call: Callable[..., Any],
    arguments: Sequence[Any],
    batch_size: int,
    named: Mapping[str, Any] | None = None,
) -> Measurement:
    """Run `call(*arguments, **named)` once and count what it needs.

    Args:
        model: The object whose modules run, for the breakdown.
        call: The model itself or one of its methods.
        arguments: Real tensors measure; meta tensors together with `on_meta` predict.
        batch_size: What the arguments hold; only noted.
        named: Arguments by name.

    Raises:
        Exception: Whatever the model raises.
    """
    given = dict(named or {})
    leaves = tree_leaves([list(arguments), given])
    known = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for _, module in find_modules(model):
        known += [*module.parameters(), *module.buffers()]
    with torch.no_grad(), _watched(model, known) as (tracker, uses), tracker:
        result = call(*arguments, **given)
        del result
    return Measurement(
        batch_size=batch_size,
        peak_bytes=tracker.peak_bytes,
        flops=tracker.flops,
        modules=tuple(uses.values()),
    )


def predict(
    model: Any,
    call: Callable[..., Any],
    arguments: Sequence[Any],
    batch_size: int,
    named: Mapping[str, Any] | None = None,
) -> Measurement:
    """Say what `measure` would, without running the pass and with as good as no memory.

    Raises:
        Exception: Whatever the model raises on meta tensors, for instance where its code looks at values;
            such a model must be measured instead.
    """
    with on_meta(model):
        args, given = tree_map_only(torch.Tensor, _twin, (list(arguments), dict(named or {})))
        return measure(model, call, args, batch_size, given)


@contextmanager
def on_meta(model: Any) -> Iterator[None]:
    """Give the model's modules meta tensors in place of their weights, and their weights back after."""
    with ExitStack() as stack:
        twins: dict[int, Any] = {}
        for _, root in find_modules(model):
            for module in root.modules():
                for held in (module._parameters, module._buffers):  # noqa: SLF001 - swapped, not copied
                    kept: dict[str, Any] = dict(held)
                    stack.callback(held.update, kept)
                    for name, tensor in kept.items():
                        if tensor is not None:
                            held[name] = twins.setdefault(id(tensor), _twin(tensor))
        yield


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


class _Tracker(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are alive."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch._python_dispatch is untyped
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        #: The most since it was set to the live bytes last, for the module that runs.
        self.local_peak_bytes = 0
        #: Storages that are counted, or that were there before and are not.
        self._seen: set[int] = {tensor.untyped_storage()._cdata for tensor in known}  # noqa: SLF001

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler for this class: that takes over a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        count_flops = flop_registry.get(func._overloadpacket)  # noqa: SLF001 - the key of torch's own table
        if count_flops is None:
            # In inference mode operators that stand for several arrive whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if count_flops is not None:
            self.flops += count_flops(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.local_peak_bytes = max(self.local_peak_bytes, self.live_bytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001 - the identity that torch itself uses
        if key in self._seen:
            return
        size = -(-storage.nbytes() // _ROUNDING_BYTES) * _ROUNDING_BYTES
        self._seen.add(key)
        self.live_bytes += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= size


@contextmanager
def _watched(
    model: Any, known: Sequence[torch.Tensor]
) -> Iterator[tuple[_Tracker, dict[str, ModuleUse]]]:
    """Hook every module so that it notes its use; a module that runs twice keeps its largest."""
    tracker = _Tracker(known)
    uses: dict[str, ModuleUse] = {}
    #: Of every module that runs now: live bytes at its start, and the peak seen outside of it so far.
    running: list[tuple[int, int]] = []

    def start(_module: nn.Module, _inputs: Any) -> None:
        running.append((tracker.live_bytes, tracker.local_peak_bytes))
        tracker.local_peak_bytes = tracker.live_bytes

    def end(path: str, module: nn.Module) -> None:
        before, outer_peak = running.pop()
        grown = max(0, tracker.live_bytes - before)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        use = ModuleUse(
            path=path,
            kind=type(module).__name__,
            weight_bytes=sum(tensor.nbytes for tensor in own),
            activation_bytes=grown,
            workspace_bytes=max(0, tracker.local_peak_bytes - before - grown),
        )
        tracker.local_peak_bytes = max(tracker.local_peak_bytes, outer_peak)
        known_use = uses.get(path)
        if known_use is None or known_use.activation_bytes < grown:
            uses[path] = use

    with ExitStack() as stack:
        for root, top in find_modules(model):
            for path, module in top.named_modules(prefix=root):
                stack.callback(module.register_forward_pre_hook(start).remove)

                def finish(ended: nn.Module, _inputs: Any, _outputs: Any, path: str = path) -> None:
                    end(path, ended)

                stack.callback(module.register_forward_hook(finish, always_call=True).remove)
        yield tracker, uses
