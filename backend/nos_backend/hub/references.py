"""References to repositories of the Hugging Face hub, `org/name@revision`, as sources of models."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).resolve().parent / "models" / "transformer.py"
_REFERENCE: Final = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,128}))?", re.ASCII)
#: Task, as the hub calls it, and the class of the source.
TASKS: Final = {
    "image-classification": "ImageClassifier",
    "feature-extraction": "FeatureExtractor",
    "text-generation": "TextGenerator",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model of the hub."""

    name: str
    """For instance `openai-community/gpt2`."""
    revision: str
    source: str
    """What serves it."""
    source_name: str
    class_name: str
    folder: str
    """Where its files are at hand; empty if they are not."""


def find(reference: str, task: str, weights_dir: str | None = None) -> Repository | None:
    """Return what a reference means; None if it is malformed or the task is unknown.

    Args:
        reference: `org/name` or `org/name@revision`.
        task: One of `TASKS`.
        weights_dir: Has a folder per repository with files that are at hand; None means the one that
            `NOS_WEIGHTS_DIR` names.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or task not in TASKS or not all(it.strip(".") for it in match[1].split("/")):
        return None
    if weights_dir is None:
        weights_dir = os.environ.get("NOS_WEIGHTS_DIR", "")
    folder = Path(weights_dir, match[1]).absolute()
    return Repository(
        name=match[1],
        revision=match[2] or "main",
        source=_SOURCE.read_text(encoding="utf-8"),
        source_name=str(_SOURCE),
        class_name=TASKS[task],
        folder=str(folder) if weights_dir and folder.is_dir() else "",
    )
