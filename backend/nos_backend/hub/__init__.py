"""The built-in models, as definitions; nothing of them is imported here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from nos_backend.definition import ModelDefinition

MODELS = Path(__file__).resolve().parent / "models"
OWNER = "nos"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
#: Model name -> (file of its source, its class).
BUILT_IN = {
    "nos/digits": ("digits.py", "Digits"),
    "nos/echo": ("echo.py", "Echo"),
    "nos/edges": ("edges.py", "Edges"),
    MINILM: ("minilm.py", "MiniLM"),
}


def definitions(weights_dir: Path | str | None = None) -> list[ModelDefinition]:
    """Return the built-in models, in order of names.

    Args:
        weights_dir: Has a folder per model name with weights that are at hand, so that nothing is
            fetched; a model that is not in it takes them from its own hub. Empty if there is none; None
            means the one that `NOS_WEIGHTS_DIR` names.
    """
    if weights_dir is None:
        weights_dir = os.environ.get("NOS_WEIGHTS_DIR", "")
    return [_definition(name, Path(weights_dir) if weights_dir else None) for name in BUILT_IN]


def find_here(definition: ModelDefinition) -> ModelDefinition:
    """Return a built-in model with the folders of this machine's installation, where it has others.

    Any other model is returned as it is.
    """
    if definition.owner == OWNER and not Path(definition.folder).is_dir():
        for own in definitions():
            if own.key == definition.key:
                return replace(definition, folder=own.folder, init=own.init)
    return definition


def _definition(name: str, weights_dir: Path | None) -> ModelDefinition:
    file, class_name = BUILT_IN[name]
    path = MODELS / file
    local = (weights_dir / name).absolute() if weights_dir and name == MINILM else None
    return ModelDefinition(
        name=name,
        version=1,
        owner=OWNER,
        source=path.read_text(encoding="utf-8"),
        source_name=str(path),
        class_name=class_name,
        folder=str(MODELS),
        init=[("folder", str(local))] if local and local.is_dir() else [],
    )
