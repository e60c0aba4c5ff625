"""`nos stats`: what became of requests: counts, latencies, batches, seconds of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos.client import Client


def add_to(
    app: typer.Typer,
    connect: Callable[[], Client],
    print_table: Callable[[Any], None],
    print_json: Callable[[Any], None],
) -> None:
    """Add the command, which finds its server and prints through the arguments."""

    @app.command()
    def stats(
        model: Annotated[str, typer.Argument(help="Name or name@v3; without it, all")] = "",
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    ) -> None:
        """Show what became of requests since their models were loaded."""
        with connect() as client:
            found = client.stats(model) if model else client.stats()
        if not as_json:
            print_table(found)
        elif isinstance(found, tuple):
            print_json([item.to_dict() for item in found])
        else:
            print_json(found.to_dict())
