"""Live objects as models: networks with their weights, and anything else as a pickle where its author asks.

torch and cloudpickle are used where the caller's process has them; nothing here needs them otherwise.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import itertools
import json
import sys
import textwrap
import types
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from nos import _collect, _local_modules
from nos.authoring import Source
from nos.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: The server knows these paths in a model's folder.
_WEIGHTS_FILE: Final = ".nos/weights.safetensors"
_PROGRAM_FILE: Final = ".nos/program.pt2"
_PICKLE_FILE: Final = ".nos/object.pickle"

_STARS: Final[dict[Any, str]] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_HEAD: Final = """from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Annotated

import torch

"""
_PROGRAM_INIT: Final = """    def __init__(self):
        super().__init__()
        program = torch.export.load(str(Path(__file__).with_name(".nos") / "program.pt2"))
        self.program = program.module()
        # An exported program refuses to be switched to inference, where it is already.
        for name in ("train", "eval"):
            vars(self.program).pop(name, None)
"""
_PICKLE_NEW: Final = """    def __new__(cls, **init):
        if sys.version_info[:2] != {version}:
            raise RuntimeError(
                "this model was pickled by Python {shown}, and pickles are opened by that version only;"
                f" here runs {{sys.version_info[0]}}.{{sys.version_info[1]}}"
            )
        target = pickle.loads((Path(__file__).with_name(".nos") / "object.pickle").read_bytes())
        return target(**init) if isinstance(target, type) else target
"""


def is_network(source: Any) -> bool:
    """Tell whether this is an instance of `torch.nn.Module`."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def network(source: Any, init: Mapping[str, Any], example: Any) -> Source:
    """Return a network with its weights: as an exported program, else as its class and its state.

    Args:
        source: The instance; unchanged.
        init: What it was made with.
        example: Arguments of a call; without them it cannot be exported. None if there are none.

    Raises:
        InvalidRequestError: If neither is possible; says why.
    """
    why = "it was given no example="
    if example is not None and not init:
        try:
            return _exported(source, arguments_of(example))
        except Exception as error:  # noqa: BLE001 - torch.export fails in as many ways as there are networks
            why = f"torch.export: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    cls = type(source)
    try:
        inspect.signature(cls).bind(**init)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{cls.__name__} cannot be made anew ({error}), nor exported ({why})",
            "init",
            f"the arguments that {cls.__name__} was made with",
            ", ".join(init) or "none",
            "Give init={...}, or example= so that it can be exported, or pickle=True",
        ) from None
    found = _class_of(source, cls)
    weights = {_WEIGHTS_FILE: _safetensors(source.state_dict())}
    return Source(
        found.text,
        found.class_name,
        found.source_name,
        found.name,
        (*found.collected, f"weights of {sum(1 for _ in source.parameters())} parameters"),
        {**found.files, **weights},
    )


def pickled(source: Any) -> Source:
    """Return any object, class or function as a pickle, with the interface that can be seen of it.

    Raises:
        InvalidRequestError: If there is no cloudpickle here, or it cannot pickle this.
    """
    try:
        cloudpickle: Any = importlib.import_module("cloudpickle")
    except ImportError as error:
        raise InvalidRequestError(
            "there is no cloudpickle here", "pickle", hint="pip install cloudpickle"
        ) from error
    local = _local_modules.imported()
    for module in local:
        cloudpickle.register_pickle_by_value(module)
    try:
        data = cloudpickle.dumps(source)
    except Exception as error:
        raise InvalidRequestError(
            f"this cannot be pickled: {type(error).__name__}: {str(error)[:300]}",
            "source",
            got=type(source).__name__,
        ) from error
    finally:
        for module in local:
            cloudpickle.unregister_pickle_by_value(module)
    cls = source if inspect.isclass(source) else type(source)
    name = source.__name__ if inspect.isroutine(source) or inspect.isclass(source) else cls.__name__
    name = name if name.isidentifier() else "Pickled"
    version = sys.version_info[:2]
    body = _PICKLE_NEW.format(version=version, shown=".".join(map(str, version)))
    if inspect.isclass(source) and isinstance(vars(source).get("__init__"), types.FunctionType):
        body += _method("__init__", source.__init__, is_bound=True)
    for method, function in _methods(source):
        body += _method(method, function, is_bound=not inspect.isfunction(source))
    text = f"{_HEAD}class {name}:\n{_doc(source)}{body}"
    return Source(text, name, f"<pickle of {name}>", "", ("a pickle",), {_PICKLE_FILE: data})


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return an example call: of a tuple by position, of a dict by name, of anything else as the one."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    return (example,), {}


def _exported(source: Any, example: tuple[tuple[Any, ...], dict[str, Any]]) -> Source:
    """Return a network as an exported program, for batches of any size where that can be."""
    torch: Any = sys.modules["torch"]
    export: Any = importlib.import_module("torch.export")
    args, kwargs = example
    names = list(inspect.signature(source.forward).bind(*args, **kwargs).arguments)
    args = tuple(torch.as_tensor(value) for value in (*args, *kwargs.values()))
    was_training = source.training
    source.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # Of size 1 a dimension would be taken for fixed.
            pair = tuple(torch.cat([it, it]) if it.ndim and len(it) == 1 else it for it in args)
            try:
                batch = export.Dim("batch")
                shapes = tuple({0: batch} if it.ndim else None for it in pair)
                program, args = export.export(source, pair, dynamic_shapes=shapes), pair
                is_dynamic = True
            except Exception:  # noqa: BLE001 - as above: then for this size alone
                program, is_dynamic = export.export(source, args), False
            result = source(*args)
    finally:
        source.train(was_training)
    file = io.BytesIO()
    export.save(program, file)
    cls = type(source)
    name = cls.__name__ if cls.__name__ != "Module" else "Program"
    parameters = ", ".join(
        f"{parameter}: {_annotation(value, is_dynamic)}"
        for parameter, value in zip(names, args, strict=True)
    )
    keeps_rows = isinstance(result, torch.Tensor) and result.shape[:1] == args[0].shape[:1]
    returns = f" -> {_annotation(result, is_dynamic)}" if keeps_rows else ""
    text = (
        f"{_HEAD}class {name}(torch.nn.Module):\n{_doc(source)}{_PROGRAM_INIT}\n"
        f"    def forward(self, {parameters}){returns}:\n"
        f"        return self.program({', '.join(names)})\n"
    )
    files = {_PROGRAM_FILE: file.getvalue()}
    return Source(text, name, f"<program of {name}>", "", ("an exported program",), files)


def _annotation(tensor: Any, is_dynamic: bool) -> str:
    sizes = [str(size) for size in tensor.shape]
    if is_dynamic and sizes:
        sizes[0] = "batch"
    dtype = str(tensor.dtype).rpartition(".")[2]
    return f'Annotated[torch.Tensor, "{dtype}[{", ".join(sizes)}]"]'


def _class_of(source: Any, cls: type) -> Source:
    """Return the source of a network's class, which may be an installed library's."""
    module = sys.modules.get(cls.__module__)
    is_installed = (
        module is not None
        and cls.__module__ != "__main__"
        and getattr(module, cls.__qualname__, None) is cls
        and _local_modules.root_of(module) is None
        and getattr(cls, "__nos_model__", None) is None
    )
    if not is_installed:
        found = _collect.collect(cls)
        options = getattr(cls, "__nos_model__", None)
        name = getattr(options, "name", "")
        return Source(
            found.text, cls.__name__, found.source_name, name, found.names, dict(found.files)
        )
    line = f"from {cls.__module__} import {cls.__qualname__}"
    make: Any = vars(cls).get("__init__", cls)
    init = _method("__init__", make, is_bound=make is not cls, body="super().__init__({})")
    forward = _method("forward", source.forward, is_bound=False, body="return super().forward({})")
    head = f"{_HEAD}{line}\n\nclass Served({cls.__qualname__}, torch.nn.Module):\n"
    text = f"{head}{_doc(source)}{init}{forward}"
    return Source(text, "Served", f"<{cls.__name__}>", "", (line,))


def _methods(source: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield what can be called of an object: its name on the server and the function."""
    if inspect.isroutine(source):
        yield "__call__", source
        return
    cls = source if inspect.isclass(source) else type(source)
    torch = sys.modules.get("torch")
    known = vars(torch.nn.Module) if torch is not None and issubclass(cls, torch.nn.Module) else {}
    for name in dict.fromkeys(itertools.chain.from_iterable(map(vars, reversed(cls.__mro__)))):
        function = inspect.getattr_static(cls, name)
        if name == "forward" and known:
            yield "__call__", function
        elif isinstance(function, types.FunctionType) and (
            name not in known and (name == "__call__" or not name.startswith("_"))
        ):
            yield name, function


def _method(name: str, function: Callable[..., Any], *, is_bound: bool, body: str = "") -> str:
    """Return a method's text with the signature of a function, as far as it can be written."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    if is_bound:
        parameters = parameters[1:]
    written = ", ".join(["self", *map(str, _plain_parameters(parameters))])
    returns = inspect.signature(function).return_annotation if parameters or is_bound else None
    arrow = f" -> {_annotation_text(returns)}" if _annotation_text(returns) else ""
    if body:
        passed = (f"{it.name}={it.name}" for it in parameters if it.kind not in _STARS)
        line = body.format(", ".join(passed))
    else:
        line = "yield" if inspect.isgeneratorfunction(function) else "..."
    text = f"    def {name}({written}){arrow}:\n        {_doc(function).strip() or 'pass'}\n        {line}\n"
    try:
        ast.parse(textwrap.dedent(text))
    except SyntaxError:
        line = body.format("*args, **kwargs") if body else line
        return f"    def {name}(self, *args, **kwargs):\n        {line}\n"
    return text


def _plain_parameters(parameters: list[inspect.Parameter]) -> Iterator[str]:
    for parameter in parameters:
        stars = _STARS.get(parameter.kind, "")
        text = _annotation_text(parameter.annotation)
        written = f"{stars}{parameter.name}" + (f": {text}" if text else "")
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            written += f" = {default if _is_literal(default) else '...'}"
        yield written


def _annotation_text(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty or annotation is None:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return ""
    return text


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def _doc(source: Any) -> str:
    text = (
        source.__doc__
        if inspect.isroutine(source) or inspect.isclass(source)
        else type(source).__doc__
    )
    return f"    {inspect.cleandoc(text)!r}\n" if text else ""


def _safetensors(state: Mapping[str, Any]) -> bytes:
    """Return tensors in the safetensors format, which is a length, a JSON header and the bytes."""
    torch: Any = sys.modules["torch"]
    header: dict[str, Any] = {}
    pieces, offset = [], 0
    for name, tensor in state.items():
        data = tensor.detach().cpu().contiguous()
        kind = _SAFETENSORS.get(str(data.dtype))
        if kind is None:
            raise InvalidRequestError(
                f"{name} has a dtype that weights cannot have",
                "source",
                "a plain dtype",
                str(data.dtype),
            )
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        ends = [offset, offset + len(raw)]
        header[name] = {"dtype": kind, "shape": list(data.shape), "data_offsets": ends}
        pieces.append(raw)
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


_SAFETENSORS: Final = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
