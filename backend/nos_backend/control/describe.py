"""What a Python source serves: its models, their methods and options, from syntax alone.

The gateway describes sources that strangers sent, so nothing here runs or imports any of them.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from nos.errors import InvalidRequestError, LimitExceededError, NosError
from nos.wire.signature import CALL
from nos.wire.v1 import models_pb2

from nos_backend import pieces
from nos_backend.control import batchable
from nos_backend.control.annotations import Annotations, literal_value
from nos_backend.control.requirements import normalize
from nos_backend.definition import DEFAULT_CALL_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_Target: TypeAlias = ast.ClassDef | _Function

MAX_SOURCE_BYTES: Final = 1 << 20
DEVICES: Final = ("auto", "cpu", "cuda")
ISOLATIONS: Final = ("shared", "process")
PLACEMENTS: Final = ("spread", "pack")

_OPTIONS: Final = (
    "name",
    "device",
    "isolation",
    "call_timeout_s",
    *batchable.OPTIONS,
    "env",
    "pin",
    "idle_unload_s",
    "memory_bytes",
    "placement",
)
_NO_METHOD: Final = frozenset(
    {"property", "cached_property", "setter", "getter", "deleter", "overload"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One model of a source."""

    class_name: str
    """The top-level class or function."""
    spec: models_pb2.ModelSpec
    """Its interface and options; without version and owner. An empty name: the source gives none."""
    init: models_pb2.Method = field(default_factory=models_pb2.Method)
    """What it is made with; a function, and a class without `__init__`, is made with nothing."""


def describe(
    source: str,
    *,
    class_name: str = "",
    source_name: str = "<source>",
    max_bytes: int = MAX_SOURCE_BYTES,
) -> list[Description]:
    """Return the models of a source, in its order.

    They are those decorated with `@nos.model(...)`. Without any, it is the one public class that no
    other class of the source derives from, or else the one public function.

    Args:
        source: Python source.
        class_name: The one top-level class or function wanted, whatever its decorators.
        source_name: Names the source in errors.
        max_bytes: Of the source.

    Raises:
        InvalidRequestError: If it is not Python, holds no model or several candidates, an option is
            not a literal or unknown, or a shape is malformed; names the line.
        LimitExceededError: If it has more than `max_bytes`.
    """
    size = len(source.encode(errors="replace"))
    if size > max_bytes:
        raise LimitExceededError(
            f"{source_name} is too large", "source", f"at most {max_bytes} bytes", str(size)
        )
    digest = hashlib.sha256(source.encode(errors="replace")).hexdigest()
    try:
        module = _Module(_parse(source, source_name))
        targets = module.find(class_name, source_name)
        return [module.describe(target, digest) for target in targets]
    except RecursionError as error:
        raise InvalidRequestError(f"{source_name} is nested too deeply", "source") from error
    except NosError:  # some of them are ValueErrors too
        raise
    except ValueError as error:  # text that is no Unicode, numbers of thousands of digits
        raise InvalidRequestError(
            f"{source_name} has a value that cannot be told to clients",
            "source",
            got=str(error)[:200],
        ) from error


def _parse(source: str, source_name: str) -> ast.Module:
    whole = ast.Module(body=[], type_ignores=[])
    for piece in pieces.split(source, source_name):
        try:
            whole.body += pieces.parse(piece).body
        except SyntaxError as error:
            text = (error.text or "").strip()
            raise InvalidRequestError(
                f"{piece.name} is not Python: line {error.lineno or 1}: {error.msg}",
                "source",
                "",
                repr(text[:80]) if text else "",
            ) from error
        except (ValueError, MemoryError) as error:
            raise InvalidRequestError(
                f"{piece.name} is not Python: {type(error).__name__}: {error}", "source"
            ) from error
    return whole


class _Module:
    """The top level of one source."""

    def __init__(self, tree: ast.Module) -> None:
        self._targets: dict[str, _Target] = {}
        #: Of the classes looked at so far.
        self._functions_of: dict[str, dict[str, _Function]] = {}
        self._modules = {"nos"}
        self._decorators = {"model"}
        aliases: dict[str, ast.expr] = {}
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                self._targets[node.name] = node
            elif isinstance(node, ast.Import):
                self._modules.update(_aliases(node, "nos"))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nos":
                self._decorators.update(_aliases(node, "model"))
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if len(targets) == 1 and isinstance(targets[0], ast.Name):
                    aliases[targets[0].id] = node.value
        self._decorators -= set(self._targets)
        self._classes = {
            name: node for name, node in self._targets.items() if isinstance(node, ast.ClassDef)
        }
        self._annotations = Annotations(aliases, frozenset(self._classes))

    def find(self, class_name: str, source_name: str) -> list[_Target]:
        if class_name:
            found = self._targets.get(class_name)
            if found is None:
                names = ", ".join(name for name in self._targets if not name.startswith("_"))
                raise InvalidRequestError(
                    f"{source_name} has no top-level class or function {class_name[:100]!r}",
                    "class_name",
                    f"one of {names[:200]}" if names else "",
                )
            return [found]
        marked = [node for node in self._targets.values() if self._decorator(node) is not None]
        if marked:
            return marked
        bases = {_dotted(base) for node in self._classes.values() for base in node.bases}
        public = {name for name in self._targets if not name.startswith("_")}
        candidates: list[_Target] = [
            node for name, node in self._classes.items() if name in public and name not in bases
        ]
        if not self._classes:
            candidates = [node for name, node in self._targets.items() if name in public]
        if len(candidates) == 1:
            return candidates
        raise InvalidRequestError(
            f"{source_name} does not say which class is the model",
            "source",
            "one public class, or classes decorated with @nos.model(...)",
            ", ".join(node.name for node in candidates)[:200] or "no public class",
        )

    def describe(self, target: _Target, digest: str) -> Description:
        spec = models_pb2.ModelSpec(
            doc=ast.get_docstring(target) or "",
            device="auto",
            isolation="shared",
            source_sha256=digest,
            call_timeout_s=DEFAULT_CALL_TIMEOUT_S,
        )
        wish = batchable.Wish()
        self._read_options(target, spec, wish)
        init = models_pb2.Method(name="__init__")
        if isinstance(target, ast.ClassDef):
            functions = self._functions(target)
            if "__init__" in functions:
                init = self._method("__init__", functions["__init__"], is_bound=True)
            if CALL not in functions and "forward" in functions and self._is_network(target):
                functions = {
                    CALL if name == "forward" else name: node for name, node in functions.items()
                }
            spec.methods.extend(
                self._method(name, node, is_bound=not _is_static(node))
                for name, node in functions.items()
                if name == CALL or not name.startswith("_")
            )
            if not spec.methods:
                raise InvalidRequestError(
                    f"line {target.lineno}: class {target.name} has no public method",
                    "source",
                    "`__call__`, or any method without a leading underscore",
                )
        else:
            spec.methods.append(self._method(CALL, target, is_bound=False))
        batchable.declare(spec, wish, f"line {target.lineno}: {target.name}")
        return Description(class_name=target.name, spec=spec, init=init)

    def _decorator(self, target: _Target) -> ast.expr | None:
        """Return the decorator that marks a model."""
        for decorator in target.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if isinstance(called, ast.Name) and called.id in self._decorators:
                return decorator
            if (
                isinstance(called, ast.Attribute)
                and called.attr == "model"
                and isinstance(called.value, ast.Name)
                and called.value.id in self._modules
            ):
                return decorator
        return None

    def _read_options(
        self, target: _Target, spec: models_pb2.ModelSpec, wish: batchable.Wish
    ) -> None:
        decorator = self._decorator(target)
        if not isinstance(decorator, ast.Call):
            return
        given: list[tuple[str | None, ast.expr]] = [
            *zip(("name",), decorator.args, strict=False),
            *((keyword.arg, keyword.value) for keyword in decorator.keywords),
        ]
        where = f"line {decorator.lineno}: @nos.model"
        for name, node in given:
            if name not in _OPTIONS:
                raise InvalidRequestError(
                    f"{where} has an unknown option",
                    name or "**",
                    f"one of {', '.join(_OPTIONS)}",
                    name or "**",
                )
            _set_option(spec, wish, name, node, where)

    def _functions(self, target: ast.ClassDef) -> dict[str, _Function]:
        """Return the callables of a class by name, inherited ones of the same source included."""
        known = self._functions_of.get(target.name)
        if known is not None:
            return known
        found: dict[str, _Function] = {}
        # Set before looking at the bases: a class that derives from itself through others ends here.
        self._functions_of[target.name] = found
        for base in reversed(target.bases):
            parent = self._classes.get(_dotted(base))
            if parent is not None:
                found.update(self._functions(parent))
        for node in _statements(target.body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.pop(node.name, None)
                if not _decorators(node) & _NO_METHOD:
                    found[node.name] = node
            elif isinstance(node, ast.Assign):
                original = found.get(node.value.id) if isinstance(node.value, ast.Name) else None
                for name in (item.id for item in node.targets if isinstance(item, ast.Name)):
                    found.pop(name, None)
                    if original is not None:
                        found[name] = original
        return found

    def _is_network(self, target: ast.ClassDef) -> bool:
        waiting, seen = [target], {target.name}
        while waiting:
            for name in map(_dotted, waiting.pop().bases):
                if name.rpartition(".")[2] == "Module":
                    return True
                if name in self._classes and name not in seen:
                    seen.add(name)
                    waiting.append(self._classes[name])
        return False

    def _method(self, name: str, node: _Function, *, is_bound: bool) -> models_pb2.Method:
        if isinstance(node, ast.AsyncFunctionDef):
            raise InvalidRequestError(
                f"line {node.lineno}: {node.name} is an async function",
                "source",
                "a plain function",
                "async def",
                "Models run one call at a time in a process of their own; use def",
            )
        method = models_pb2.Method(name=name, doc=ast.get_docstring(node) or "")
        arguments = node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults: list[ast.expr | None] = [
            *([None] * (len(positional) - len(arguments.defaults))),
            *arguments.defaults,
        ]
        if is_bound and not positional and arguments.vararg is None:
            raise InvalidRequestError(
                f"line {node.lineno}: method {node.name} takes no self",
                "source",
                "self as its first parameter, or @staticmethod",
                "no parameter",
            )
        start = 1 if is_bound and positional else 0
        for argument, default in list(zip(positional, defaults, strict=True))[start:]:
            self._add_parameter(method, argument, default)
        if arguments.vararg is not None:
            self._add_parameter(method, arguments.vararg, None).is_variadic = True
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            self._add_parameter(method, argument, default)
        if arguments.kwarg is not None:
            self._add_parameter(method, arguments.kwarg, None).is_keywords = True

        item = self._annotations.read_item(node.returns)
        method.is_generator = item is not None or _yields(node)
        method.returns.CopyFrom(item if item is not None else self._annotations.read(node.returns))
        return method

    def _add_parameter(
        self, method: models_pb2.Method, argument: ast.arg, default: ast.expr | None
    ) -> models_pb2.Parameter:
        parameter = method.parameters.add(
            name=argument.arg, type=self._annotations.read(argument.annotation)
        )
        if default is not None:
            parameter.has_default = True
            parameter.default_text = ast.unparse(default)
        return parameter


def _set_option(
    spec: models_pb2.ModelSpec, wish: batchable.Wish, name: str, node: ast.expr, where: str
) -> None:
    if name == "env":
        spec.environment[:] = normalize(_texts(node, where))
        return
    value = literal_value(node)
    given = value.WhichOneof("kind") if value is not None else None
    if value is None or given is None:
        raise InvalidRequestError(
            f"{where}: option {name} is not a literal",
            name,
            "a text or number that stands there, since the source is described without being run",
            ast.unparse(node)[:80],
        )
    fits = False
    if name == "name" and given == "text":
        spec.name, fits = value.text, bool(value.text)
    elif name == "device" and value.text in DEVICES:
        spec.device, fits = value.text, True
    elif name == "isolation" and value.text in ISOLATIONS:
        spec.isolation, fits = value.text, True
    elif name == "call_timeout_s" and given in {"integer", "real"}:
        spec.call_timeout_s = value.integer if given == "integer" else value.real
        fits = 0 <= spec.call_timeout_s < float("inf")
    elif name == "pin" and given == "flag":
        spec.is_pinned, fits = value.flag, True
    elif name == "idle_unload_s" and given in {"integer", "real"}:
        spec.idle_unload_s = value.integer if given == "integer" else value.real
        fits = 0 <= spec.idle_unload_s < float("inf")
    elif name == "memory_bytes" and given == "integer":
        fits = 0 <= value.integer < 1 << 63
        spec.memory_bytes = value.integer if fits else 0
    elif name == "placement" and value.text in PLACEMENTS:
        spec.placement, fits = value.text, True
    elif name in batchable.OPTIONS:
        fits = wish.take(name, value)
    if not fits:
        wanted = {
            "name": "a text",
            "device": f"one of {', '.join(DEVICES)}",
            "isolation": f"one of {', '.join(ISOLATIONS)}",
            "call_timeout_s": "seconds, 0 for no limit",
            "batch": "True, False, or the most rows at once, at least 1",
            "queue_delay_s": "seconds, at least 0 and at most 60",
            "exact": "True or False",
            "check_batch": "True or False",
            "pad": "the name of a dimension",
            "pin": "True or False",
            "idle_unload_s": "seconds, 0 for never",
            "memory_bytes": "a number of bytes, 0 for any",
            "placement": f"one of {', '.join(PLACEMENTS)}",
        }[name]
        raise InvalidRequestError(
            f"{where}: option {name} is wrong", name, wanted, ast.unparse(node)[:80]
        )


def _texts(node: ast.expr, where: str) -> list[str]:
    """Return the texts of a list in the source; the packages of an environment."""
    items = node.elts if isinstance(node, ast.List | ast.Tuple) else []
    texts = [item.value for item in items if isinstance(item, ast.Constant)]
    if not items or len(texts) < len(items) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            f"{where}: option env is no list of packages",
            "env",
            'for instance ["opencv-python-headless==4.*"] or ["conda:gdal=3.9"]; a file of requirements'
            " or of conda can be given to client.register(env=...)",
            ast.unparse(node)[:80],
        )
    return [str(text) for text in texts]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, those under `if`, `try` and `with` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
            if not isinstance(node, ast.With):
                yield from _statements(node.orelse)
            if isinstance(node, ast.Try):
                for handler in node.handlers:
                    yield from _statements(handler.body)


def _yields(function: _Function) -> bool:
    """Tell whether a function's own body yields; functions inside it do not count."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def _decorators(node: _Function) -> set[str]:
    called = (item.func if isinstance(item, ast.Call) else item for item in node.decorator_list)
    return {_dotted(item).rpartition(".")[2] for item in called}


def _is_static(node: _Function) -> bool:
    return "staticmethod" in _decorators(node)


def _aliases(node: ast.Import | ast.ImportFrom, name: str) -> list[str]:
    return [item.asname for item in node.names if item.name == name and item.asname]


def _dotted(node: ast.expr) -> str:
    """Return `nn.Module` for that expression; a subscript counts as what it subscripts."""
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
