"""A network whose weights are in a file, made without memory of its own: its tensors are the file's pages.

Its constructor runs with parameters on torch's meta device; all else of it is real. Then the file's tensors
take their places. Whatever could turn out otherwise than by the constructor and `load_state_dict` is refused,
and the caller makes it that way.
"""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from nos_backend.executor import flat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_META: Final = "meta"
_REASON_CHARS: Final = 300
#: Functions of torch that give a tensor other numbers and nothing else, as far as constructors use them.
_FILLING: Final = frozenset(
    {
        *(name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")),
        *("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"),
    }
)


class UnfitError(Exception):
    """A network that cannot be made this way; the text says why."""


class _Parameters:
    """Puts every parameter that a module gets on the meta device, and remembers what it was."""

    def __init__(self) -> None:
        #: The memory of those that were real.
        self.storages: list[StorageWeakRef] = []
        #: What took the place of each, by its identity while it lives.
        self._twins: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def take(self, _module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        """Return what takes the place of a parameter; None if it stays."""
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        known = self._twins.get(id(parameter))
        if known is not None and known[0]() is parameter:
            return known[1]
        self.storages.append(_weak(parameter))
        sizes, strides = parameter.shape, parameter.stride()
        twin = torch.empty_strided(sizes, strides, dtype=parameter.dtype, device=_META)
        made = nn.Parameter(twin, parameter.requires_grad)
        self._twins[id(parameter)] = weakref.ref(parameter), made
        return made


class _NoFilling(TorchFunctionMode):
    """Leaves out what would fill a parameter: on the meta device that imports much of torch first."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        is_filling = getattr(func, "__name__", "") in _FILLING
        if is_filling and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


class _Seeker(pickle.Pickler):
    """Goes through an object and finds what is on the meta device, or says that something was."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=5)
        self.has_meta = False

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, torch.Tensor):
            self.has_meta |= obj.is_meta
            return id(obj)
        if isinstance(obj, torch.device):
            self.has_meta |= obj.type == _META
        elif isinstance(obj, str):
            self.has_meta |= obj == _META
        return None


def construct(make: Callable[[], Any], weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Make a network whose tensors are those of `weights`, as far as it has names for them.

    Args:
        make: Runs its constructor.
        weights: By the names of its state dict. They become the network's, unchanged and uncopied.

    Raises:
        UnfitError: If that would not be the network that its constructor and `load_state_dict` make.
    """
    parameters = _Parameters()
    handle = register_module_parameter_registration_hook(
        parameters.take  # type: ignore[arg-type]  # it may return a parameter, says its documentation
    )
    try:
        with _NoFilling():
            target = make()
    except Exception as error:
        raise UnfitError(f"its constructor reads its parameters: {type(error).__name__}") from error
    finally:
        handle.remove()
    if not isinstance(target, nn.Module) or not all(it.is_meta for it in target.parameters()):
        raise UnfitError("it has parameters of its own kind")
    try:
        replaced = _fill(target, weights)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UnfitError(
            f"its weights do not take their places: {error}"[:_REASON_CHARS]
        ) from error
    gc.collect()
    if not all(storage.expired() for storage in (*parameters.storages, *replaced)):
        raise UnfitError("it has its weights in a second place")
    _look_through(target)
    return target


def _fill(target: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[StorageWeakRef]:
    """Put the file's tensors into a network; returns the memory of the real ones that they replace."""
    state = target.state_dict()
    if _forms(state) != _forms(weights):
        raise UnfitError("its weight file has other tensors")
    replaced = [_weak(tensor) for tensor in state.values() if not tensor.is_meta]
    ties = _ties(target)
    for first, *others in ties:
        if not all(torch.equal(weights[first], weights[other]) for other in others):
            raise UnfitError(f"its weight file has other values for {first}, which is shared")
    target.load_state_dict(weights, assign=True)
    for first, *others in ties:
        for other in others:
            path, _, name = other.rpartition(".")
            setattr(target.get_submodule(path), name, target.get_parameter(first))
    return replaced


def _look_through(target: nn.Module) -> None:
    seeker = _Seeker()
    try:
        seeker.dump(target)
    except Exception as error:
        raise UnfitError(f"its object cannot be looked through: {type(error).__name__}") from error
    if seeker.has_meta:
        raise UnfitError("its constructor derives something from its parameters")


def _forms(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be equal of tensors and of those that take their places."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.stride())
        if isinstance(tensor, torch.Tensor) and not flat.why_loose(tensor)
        else None
        for name, tensor in state.items()
    }


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _ties(target: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in target.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
