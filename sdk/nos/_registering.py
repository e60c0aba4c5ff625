"""A registration from beginning to end: the source with what it needs, its files, the request."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from nos import _blobs, _control
from nos._environment import packages
from nos.authoring import Source, source_of
from nos.wire import values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nos._engine import Engine
    from nos.types import ModelInfo

#: The server knows this path in a model's folder.
_INIT_FILE: Final = ".nos/init"
#: What a reference to the Hugging Face hub starts with.
_HUB: Final = "hf:"


def register(
    engine: Engine,
    source: Any,
    *,
    name: str,
    class_name: str,
    source_name: str,
    init: Mapping[str, Any] | None,
    example: Any,
    pickle: bool,
    namespace: Mapping[str, Any] | None,
    env: Any,
    timeout_s: float | None,
    **options: Any,
) -> ModelInfo:
    """Do what `Client.register` says; blocks.

    Args:
        engine: The client's.
        source: As there, and all that follows.
        name: The model's name, or empty.
        class_name: The model's class, or empty.
        source_name: Where the source came from, or empty.
        init: What `__init__` is called with.
        example: A call's arguments, or None.
        pickle: Whether the object itself travels, as a pickle.
        namespace: Where the names that a text needs are found.
        env: Packages.
        timeout_s: For the request itself; uploads have no limit.
        options: Fields of the request as they are.
    """
    from nos import _packing  # most clients never register

    repository = ""
    if isinstance(source, str) and source.startswith(_HUB):
        source, repository = "", source.removeprefix(_HUB)
    found = _pack(source, class_name, source_name, namespace, init or {}, example, pickle=pickle)
    nodes, payload = values.write_arguments(list((init or {}).items()))
    files = dict(found.files)
    if payload.size:
        files[_INIT_FILE] = b"".join(payload.buffers)
    call = None
    if example is not None:
        args, kwargs = _packing.arguments_of(example)
        call = [*(("", value) for value in args), *kwargs.items()]
    rpc = _control.register(
        found.text,
        found.class_name,
        init=nodes,
        name=name or found.name,
        source_name="" if repository else found.source_name,
        env=packages(env),
        files=_blobs.upload(engine, files),
        example=call,
        repository=repository,
        **options,
    )
    info = engine.wait(rpc, timeout_s)
    return dataclasses.replace(info, collected=found.collected)


def _pack(
    source: Any,
    class_name: str,
    source_name: str,
    namespace: Mapping[str, Any] | None,
    init: Mapping[str, Any],
    example: Any,
    *,
    pickle: bool,
) -> Source:
    from nos import _packing

    if pickle:
        return _packing.pickled(source)
    if _packing.is_network(source):
        return _packing.network(source, init, example)
    return source_of(source, class_name, source_name, namespace)
