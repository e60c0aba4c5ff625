"""A source made of pieces: lines `#!nos LINE NAME` say where the text below each stood when it was written.

A source without such lines is one piece. Code of a piece is compiled under its own name and lines.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from typing import Final

_HEAD: Final = re.compile(r"^#!nos ([1-9][0-9]{0,6}) ([^\n]{1,1024})\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of a cell or file."""

    text: str
    name: str
    first_line: int


def split(source: str, source_name: str) -> list[Piece]:
    """Return the pieces of a source in order; what stands before the first head is the source's own."""
    heads = list(_HEAD.finditer(source))
    if not heads:
        return [Piece(source, source_name, 1)]
    first = source[: heads[0].start()]
    pieces = [Piece(first, "<imports>", 1)] if first else []
    ends = [head.start() for head in heads[1:]] + [len(source)]
    for head, end in zip(heads, ends, strict=True):
        pieces.append(Piece(source[head.end() : end], head[2], int(head[1])))
    return pieces


def parse(piece: Piece) -> ast.Module:
    """Return the syntax tree of a piece, with the line numbers that it had.

    Raises:
        SyntaxError: If it is not Python.
        ValueError: If it has null bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(piece.text, filename=piece.name)
        except SyntaxError as error:
            error.lineno = (error.lineno or 1) + piece.first_line - 1
            raise
    ast.increment_lineno(tree, piece.first_line - 1)
    return tree
