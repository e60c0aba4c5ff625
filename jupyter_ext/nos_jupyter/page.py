"""The modules that run in the page: one file per widget, and what they share put in front of it."""

from __future__ import annotations

import re
from pathlib import Path

STATIC = Path(__file__).parent / "static"
#: What a widget's page needs that has a form for calls, in order.
FORM = ("page", "camera", "microphone", "parameters", "pictures", "inputs", "results", "calls")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./\w+\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?!default)", re.MULTILINE)


def script(*names: str) -> str:
    """Join modules of `static`, the last of which is the widget's: a page loads exactly one.

    Without the lines by which they import each other, and without exports but the default one.
    """
    texts = ((STATIC / f"{name}.js").read_text(encoding="utf-8") for name in names)
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", text)) for text in texts)


def style(*names: str) -> str:
    """Join style sheets of `static`."""
    return "\n".join((STATIC / f"{name}.css").read_text(encoding="utf-8") for name in names)
