"""Source to a model that can be called."""

from __future__ import annotations
import __future__

import inspect
import itertools
import linecache
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from nos_backend import pieces
from nos_backend.definition import INIT_FILE, WEIGHTS_FILE
from nos_backend.executor import meta
from nos_backend.executor.failures import RefusedError
from nos_backend.executor.values import ANY, Inputs, Want, want

if typing.TYPE_CHECKING:
    from collections.abc import Callable

_CALL: Final = "__call__"
#: What a piece may switch on for those after it.
_FUTURE_FLAGS: Final = __future__.annotations.compiler_flag
#: Size, time, lines and name; an entry that is not read yet has one member.
_WHOLE_ENTRY: Final = 4


class _StandIn(types.ModuleType):
    """The module `nos` of an executor: what a model's source needs of it, and nothing else."""

    @staticmethod
    def model(target: Any = None, /, **_options: Any) -> Any:
        """Return the class or function itself: its options were read from the source before."""
        return target if target is not None else lambda decorated: decorated

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"module 'nos' has no attribute {name!r} where a model runs: only nos.model is there"
        )


def install_stand_in() -> None:
    """Let sources `import nos` without the SDK."""
    sys.modules["nos"] = _StandIn("nos", "Stand-in for the SDK where models run.")


@dataclass(frozen=True, slots=True)
class Method:
    """One callable of a model."""

    target: Callable[..., Any]
    signature: inspect.Signature
    wants: dict[str, Want]
    """By parameter."""

    def bind(self, arguments: list[tuple[str, Any]], inputs: Inputs) -> inspect.BoundArguments:
        """Return the Python arguments of a call; an empty name means by position.

        Raises:
            RefusedError: INVALID_REQUEST if they do not fit the signature; as `Inputs.read`.
        """
        by_position = [node for name, node in arguments if not name]
        by_name = {name: node for name, node in arguments if name}
        try:
            bound = self.signature.bind(*by_position, **by_name)
        except TypeError as error:
            raise RefusedError(
                "INVALID_REQUEST", str(error), expected=str(self.signature)
            ) from error
        for name, node in bound.arguments.items():
            wanted, kind = self.wants[name], self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                value: Any = tuple(
                    inputs.read(item, wanted, f"{name}[{index}]") for index, item in enumerate(node)
                )
            elif kind is inspect.Parameter.VAR_KEYWORD:
                value = {key: inputs.read(item, wanted, key) for key, item in node.items()}
            else:
                value = inputs.read(node, wanted, name)
            bound.arguments[name] = value
        return bound


class Model:
    """One loaded model version."""

    def __init__(
        self, target: Any, device: torch.device, source_name: str, module: types.ModuleType
    ) -> None:
        self.device = device
        self.source_name = source_name
        #: What its source made.
        self.module = module
        #: The object itself.
        self.target = target
        self._is_function = inspect.isroutine(target)
        #: Methods that were called before.
        self._methods: dict[str, Method] = {}
        self.weight_bytes = 0 if self._is_function else _weight_bytes(_modules(target))

    def method(self, name: str) -> Method:
        """Return a public method.

        Raises:
            RefusedError: METHOD_NOT_FOUND.
        """
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = self._find(name)
        return method

    def _find(self, name: str) -> Method:
        target = self.target if name == _CALL else None
        if name != _CALL and not self._is_function and not name.startswith("_"):
            of_class = getattr(type(self.target), name, None)
            # What every torch module has (`to`, `train`, ...) is not the model's interface.
            if of_class is not None and of_class is not getattr(torch.nn.Module, name, None):
                target = getattr(self.target, name)
        if not callable(target):
            raise RefusedError("METHOD_NOT_FOUND", "no such method", name)
        described: Any = target
        if name == _CALL and not self._is_function:
            described = type(target).__call__.__get__(target)
            if isinstance(target, torch.nn.Module):
                described = target.forward
        try:
            signature = inspect.signature(described)
        except (TypeError, ValueError):
            signature = inspect.signature(_anything)
            described = _anything
        return Method(target, signature, _wants(described, signature))


def unload(model: Model) -> None:
    """Forget a model's module; the rest goes with the last reference."""
    if sys.modules.get(model.module.__name__) is model.module:
        del sys.modules[model.module.__name__]


def load(definition: dict[str, Any], device: str) -> Model:
    """Run a model's source and make the model.

    Args:
        definition: Fields of a `ModelDefinition`.
        device: Where its weights go, as torch writes it.

    Raises:
        RefusedError: LOAD_FAILED if the source has no such class.
        BaseException: Whatever the source raises.
    """
    device = device_of(definition, device)
    module = run_source(definition)
    try:
        target, _ = construct(module, definition, device)
        move(target, torch.device(device))
        freeze(target)
        return Model(target, torch.device(device), definition["source_name"], module)
    except BaseException:
        sys.modules.pop(module.__name__, None)
        raise


def device_of(definition: dict[str, Any], device: str) -> str:
    """Return where a model goes in an executor of that device."""
    return "cpu" if definition["device"] == "cpu" else device


def run_source(definition: dict[str, Any]) -> types.ModuleType:
    """Run a model's source as a module.

    Its name is the same in every executor, and so are the names of its classes.

    Raises:
        BaseException: Whatever the source raises.
    """
    source, source_name = definition["source"], definition["source_name"]
    key = f"{definition['name']}@v{definition['version']}"
    module = types.ModuleType("nos_model_" + re.sub(r"\W", "_", key))
    folder = definition["folder"]
    if folder:
        # Not where it lay on its author's machine.
        module.__file__ = str(Path(folder, Path(source_name).name))
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    # Dataclasses, torch and pickle look a class's module up by its name.
    sys.modules[module.__name__] = module
    try:
        flags = 0
        for piece in pieces.split(source, source_name):
            _show_lines(piece)
            code = compile(pieces.parse(piece), piece.name, "exec", flags, dont_inherit=True)
            flags |= code.co_flags & _FUTURE_FLAGS
            exec(code, module.__dict__)  # noqa: S102 - running the model's source is what this process is for
    except BaseException:
        sys.modules.pop(module.__name__, None)
        raise
    return module


def _show_lines(piece: pieces.Piece) -> None:
    """Let tracebacks quote a piece's lines, beside those that other pieces of its name have."""
    known = linecache.cache.get(piece.name)
    lines = list(known[2]) if known is not None and len(known) == _WHOLE_ENTRY else []
    new = piece.text.splitlines(keepends=True)
    begin = piece.first_line - 1
    lines += ["\n"] * (begin - len(lines))
    lines[begin : begin + len(new)] = new
    linecache.cache[piece.name] = (sum(map(len, lines)), None, lines, piece.name)


def construct(module: types.ModuleType, definition: dict[str, Any], device: str) -> tuple[Any, str]:
    """Make the model's object, and give it its state if that came along; or return its function.

    A network whose state came along takes its tensors from the file where that can be: its constructor then
    makes none that are not needed.

    Returns:
        The object, and why its weights were made before they were read; empty if they were not.

    Raises:
        RefusedError: LOAD_FAILED if the source has no such class, or the state is not its.
        BaseException: Whatever its constructor raises.
    """
    found = _find_class(module, definition["class_name"])
    folder = Path(definition["folder"]) if definition["folder"] else None

    def make() -> Any:
        return _make(found, _read_init(found, definition["init"], folder), device)

    if folder is None or not (folder / WEIGHTS_FILE).exists():
        return make(), ""
    weights = _read_weights(folder / WEIGHTS_FILE)
    reason = ""
    if inspect.isclass(found) and issubclass(found, torch.nn.Module):
        try:
            return meta.construct(make, weights), ""
        except meta.UnfitError as error:
            reason = str(error)
    target = make()
    _restore(target, weights)
    return target, reason


def _read_init(found: Any, nodes: list[Any], folder: Path | None) -> dict[str, Any]:
    """Return the arguments of `__init__` as its annotations ask for them; arrays are its own."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        signature = inspect.signature(_anything)
    wants = _wants(getattr(found, "__init__", found), signature)
    file = folder / INIT_FILE if folder is not None else None
    block = bytearray(file.read_bytes() if file is not None and file.exists() else b"\0")
    inputs = Inputs(memoryview(block), torch.device("cpu"))
    return {name: inputs.read(node, wants.get(name, ANY), name) for name, node in nodes}


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name, as views of its pages."""
    from safetensors.torch import load_file  # most models have no such file

    try:
        return load_file(file)
    except Exception as error:
        raise RefusedError(
            "LOAD_FAILED", f"the weights cannot be read: {error}", WEIGHTS_FILE
        ) from error


def _restore(target: Any, weights: dict[str, torch.Tensor]) -> None:
    try:
        target.load_state_dict(weights)
    except (AttributeError, RuntimeError) as error:
        raise RefusedError(
            "LOAD_FAILED",
            f"the weights are not those of this class: {error}",
            "init",
            hint="Give the init arguments that the network was made with",
        ) from error


def move(target: Any, device: torch.device) -> None:
    """Move the model's modules to a device, tensor by tensor."""
    for module in [] if inspect.isroutine(target) else _modules(target):
        module.to(device)


def freeze(target: Any) -> None:
    """Switch the model's modules to inference."""
    for module in [] if inspect.isroutine(target) else _modules(target):
        module.eval()


def _find_class(module: types.ModuleType, name: str) -> Any:
    found = module.__dict__.get(name)
    if not callable(found):
        raise RefusedError(
            "LOAD_FAILED", f"the source defines no class or function {name!r}", "class_name"
        )
    return found


def _make(found: Any, init: dict[str, Any], device: str) -> Any:
    if not inspect.isclass(found):
        if init:
            raise RefusedError("LOAD_FAILED", "a function takes no init arguments", "init")
        return found
    if "device" not in init:
        try:
            takes_device = "device" in inspect.signature(found).parameters
        except (TypeError, ValueError):
            takes_device = False
        if takes_device:
            init = {**init, "device": device}
    return found(**init)


def _modules(target: Any) -> list[torch.nn.Module]:
    candidates = [target, *getattr(target, "__dict__", {}).values()]
    return [value for value in candidates if isinstance(value, torch.nn.Module)]


def _weight_bytes(modules: list[torch.nn.Module]) -> int:
    storages = {}
    for module in modules:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.layout is not torch.strided:
                continue  # it has no storage
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _wants(described: Any, signature: inspect.Signature) -> dict[str, Want]:
    function = inspect.unwrap(getattr(described, "__func__", described))
    namespace = getattr(function, "__globals__", {})
    return {
        name: _want(name, parameter.annotation, namespace)
        for name, parameter in signature.parameters.items()
    }


def _want(name: str, annotation: Any, namespace: dict[str, Any]) -> Want:
    if annotation is inspect.Parameter.empty:
        return ANY
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        hints = typing.get_type_hints(holder, namespace, include_extras=True)
    except Exception:  # noqa: BLE001 - an annotation may be any expression; one that fails says nothing
        return ANY
    return want(hints[name])


def _anything(*arguments: Any, **named: Any) -> None:
    """Stand for a callable whose signature cannot be had."""
