"""What the clients' handles have in common: a model's interface as Python sees it, and calls made ready."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos import _control
from nos._link import Call
from nos._session import Outgoing
from nos.errors import InvalidRequestError
from nos.wire import signature, values
from nos.wire.v1 import inference_pb2

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from nos._engine import Engine
    from nos.types import MethodInfo, ModelSpec
    from nos.wire.v1 import models_pb2

CALL: Final = "__call__"
#: Of one method; calls of more kinds are encoded again.
_MAX_HEADERS: Final = 64


class _Text:
    """Stands for an annotation or a default that only the server has; shows its source text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def to_signature(method: MethodInfo) -> inspect.Signature:
    """Return a method's signature, for shift-tab and `inspect.signature`."""
    empty = inspect.Parameter.empty
    is_after_variadic = False
    parameters = []
    for it in method.parameters:
        own: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        if it.is_variadic:
            own, is_after_variadic = inspect.Parameter.VAR_POSITIONAL, True
        elif it.is_keywords:
            own = inspect.Parameter.VAR_KEYWORD
        elif is_after_variadic:
            own = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(
                it.name,
                own,
                annotation=_Text(it.annotation) if it.annotation else empty,
                default=_Text(it.default_text or "...") if it.has_default else empty,
            )
        )
    returns: Any = _Text(method.returns) if method.returns else inspect.Signature.empty
    if method.is_generator:
        returns = _Text(f"Iterator[{method.returns or 'Any'}]")
    # Not validated: what a newer server describes need not be what this Python would accept.
    return inspect.Signature(parameters, return_annotation=returns, __validate_parameters__=False)


def _says_more(wants: str) -> bool:
    """Return whether a parameter's type in words says more than its annotation."""
    return any(word in wants for word in ("tensor", "image", "one of"))


def _form(
    args: Sequence[Any], kwargs: Mapping[str, Any], timeout_s: float | None, is_bulk: bool
) -> tuple[Hashable, ...] | None:
    """Return what a call's header depends on, if its arguments are nothing but plain arrays; else None."""
    form: list[Hashable] = [timeout_s, is_bulk, *kwargs]
    for value in (*args, *kwargs.values()):
        if type(value) is not np.ndarray or not values.is_plain(value):
            return None
        form += (value.dtype, value.shape)
    return tuple(form)


class MethodCore:
    """A method of a remote model: what it is, and its calls made ready."""

    def __init__(self, engine: Engine, spec: ModelSpec, method: models_pb2.Method) -> None:
        self._engine = engine
        self._spec = spec
        self._message = method
        #: Its interface.
        self.info = info = _control.to_method(method)
        #: Headers of calls that fitted, by what `_form` says of them.
        self._headers: dict[tuple[Hashable, ...], bytes] = {}
        self.__name__ = info.name
        self.__qualname__ = f"{spec.name}.{info.name}"
        self.__doc__ = info.doc or None
        self.__signature__ = to_signature(info)

    def __repr__(self) -> str:
        return f"<{self._spec.key} {self.info}>"

    def _prepare(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        *,
        is_bulk: bool = False,
    ) -> Call:
        """Check a call and make it ready; nothing has been sent yet.

        Raises:
            InvalidRequestError: If the arguments do not fit the method.
        """
        if timeout_s is not None and not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise InvalidRequestError(
                "the time limit is wrong", "timeout_s", "seconds above 0, or None", repr(timeout_s)
            )
        form = _form(args, kwargs, timeout_s, is_bulk)
        header = self._headers.get(form) if form else None
        if header is not None:
            payload = values.write_arrays((*args, *kwargs.values()))
            return Call(Outgoing(header, payload), is_generator=self._message.is_generator)
        bound = signature.bind(self._message, args, kwargs)
        nodes, payload = values.write_arguments(bound)
        signature.check_call(self._message, nodes)
        header = inference_pb2.Frame(
            method=self._message.name,
            arguments=nodes,
            timeout_s=timeout_s or 0.0,
            data_bytes=payload.size,
            is_bulk=is_bulk,
        ).SerializeToString()
        if form:
            if len(self._headers) >= _MAX_HEADERS:
                self._headers.clear()
            self._headers[form] = header
        return Call(Outgoing(header, payload), is_generator=self._message.is_generator)

    def _pop_timeout(self, kwargs: dict[str, Any]) -> float | None:
        """Take our own keyword `timeout_s` out, unless the method has a parameter of that name."""
        if any(it.name == "timeout_s" for it in self.info.parameters):
            return None
        timeout: float | None = kwargs.pop("timeout_s", None)
        return timeout


class HandleCore:
    """A remote model: its interface, as attributes.

    Public methods of the model are attributes, unless the handle itself has one of that name; all are in
    `methods`. Names that start with an underscore are never the model's.
    """

    #: Names the handle, for `repr`.
    spec: ModelSpec
    _methods: Mapping[str, Any]

    def __init__(self, engine: Engine, message: models_pb2.ModelSpec) -> None:
        self._engine = engine
        self.spec = spec = _control.to_spec(message)
        self._message = message
        self._methods = {
            method.name: self._make_method(engine, spec, method) for method in message.methods
        }
        self.__doc__ = spec.doc or None
        self.__name__ = spec.name
        if (call := self._methods.get(CALL)) is not None:
            self.__signature__ = call.__signature__

    def _make_method(self, engine: Engine, spec: ModelSpec, method: models_pb2.Method) -> Any:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def version(self) -> int:
        """The version that this handle calls; a newer one needs a new handle."""
        return self.spec.version

    def method(self, name: str | None = None) -> Any:
        """Return a method, by default the one that calling the model runs.

        Raises:
            MethodNotFoundError: If there is none of that name; lists those there are.
        """
        found = self._methods.get(name or CALL)
        if found is None:
            signature.find_method(self._message, name or CALL)  # raises, and says which there are
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(
                f"{name!r} is no attribute of the handle, and names with an underscore are never the model's"
            )
        return self.method(name)

    def __dir__(self) -> Iterator[str]:
        yield from super().__dir__()
        yield from (name for name in self._methods if not name.startswith("_"))

    def __repr__(self) -> str:
        lines = [f"{self.spec.key}: {self.spec.doc.partition(chr(10))[0]}".rstrip(": ")]
        for method in self.spec.methods:
            doc = method.doc.partition("\n")[0]
            wants = [f"{it.name}: {it.wants}" for it in method.parameters if _says_more(it.wants)]
            lines.append(f"  {method}" + (f"  # {doc}" if doc else ""))
            lines += [f"      {line}" for line in wants]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.spec._repr_html_()
