"""Code that is to become a model: whether it compiles, and which classes it defines."""

from __future__ import annotations

import ast

from nos.errors import InvalidRequestError


def compile_source(source: str, source_name: str) -> ast.Module:
    """Return the syntax tree of code that compiles; runs none of it.

    Raises:
        InvalidRequestError: If it does not compile; says the line.
    """
    try:
        tree = ast.parse(source, source_name)
        compile(tree, source_name, "exec", dont_inherit=True)
    except SyntaxError as error:
        code = (error.text or "").strip()
        raise InvalidRequestError(
            f"does not compile: line {error.lineno}: {error.msg}: {code}"
        ) from None
    except ValueError as error:
        raise InvalidRequestError(f"does not compile: {error}") from None
    return tree


def class_names(tree: ast.Module) -> list[str]:
    """Return the classes at the top level, in order."""
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
