"""`nos profile`: what a model needs, by batch size, and which batch was chosen and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nos import _tables

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
    def profile(
        model: Annotated[str, typer.Argument(help="The model, as name or name@v3")],
        modules: Annotated[bool, typer.Option(help="Also what each module needs")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    ) -> None:
        """Show what a model needs by batch size; loads and measures it if that is not known."""
        with connect() as client:
            found = client.profile(model)
        if as_json:
            print_json(found.to_dict())
            return
        print_table(found)
        for reason in found.reasons():
            typer.echo(reason)
        for method in found.methods if modules else ():
            rows = [
                (
                    use.path or "(all)",
                    use.kind,
                    *map(
                        _tables.format_bytes,
                        (use.weight_bytes, use.activation_bytes, use.workspace_bytes),
                    ),
                )
                for use in method.modules
            ]
            header = ("module", "class", "weights", "activations", "workspace")
            caption = f"\n{method.method}, a batch of {method.module_rows}:"
            typer.echo(_tables.to_text(header, rows, caption))
