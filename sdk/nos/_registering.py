"""A registration from beginning to end: the source with what it needs, its files, the request."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nos import _blobs, _control
from nos._environment import packages
from nos.authoring import source_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nos._engine import Engine
    from nos.types import ModelInfo


def register(
    engine: Engine,
    source: Any,
    *,
    name: str,
    class_name: str,
    source_name: str,
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
        namespace: Where the names that a text needs are found.
        env: Packages.
        timeout_s: For the request itself; uploads have no limit.
        options: Fields of the request as they are.
    """
    found = source_of(source, class_name, source_name, namespace)
    rpc = _control.register(
        found.text,
        found.class_name,
        name=name or found.name,
        source_name=found.source_name,
        env=packages(env),
        files=_blobs.upload(engine, found.files),
        **options,
    )
    info = engine.wait(rpc, timeout_s)
    return dataclasses.replace(info, collected=found.collected)
