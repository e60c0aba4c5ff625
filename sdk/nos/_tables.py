"""Tables in text and HTML; what came from a server or a user is escaped: a model's name is not markup."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_KIB: Final = 1024
_CELL: Final = "padding:2px 12px 2px 0;text-align:left;border:0;vertical-align:top"


def format_bytes(count: float) -> str:
    """Return a number of bytes for a person, in powers of 1024."""
    if count < _KIB:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= _KIB
        if count < _KIB:
            return f"{count:.1f} {unit}"
    return f"{count / _KIB:.1f} TiB"


def to_text(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return aligned columns."""
    lines = [header, *rows] if header else list(rows)
    if not lines:
        return caption
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return f"{caption}\n{text}" if caption else text


def to_html(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table element, with the caption above it."""
    head = "".join(f'<th style="{_CELL};opacity:.7">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    top = f'<div style="margin-bottom:4px">{escape(caption)}</div>' if caption else ""
    thead = f"<thead><tr>{head}</tr></thead>" if header else ""
    return (
        f'{top}<table style="border-collapse:collapse;margin:0">{thead}'
        f"<tbody>{body}</tbody></table>"
    )
