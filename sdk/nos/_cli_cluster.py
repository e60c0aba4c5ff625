"""`nos cluster`: how many workers the server has on its machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos.client import Client

Json = Annotated[bool, typer.Option("--json", help="Print JSON")]


def make_app(connect: Callable[[], Client], print_json: Callable[[Any], None]) -> typer.Typer:
    """Return the commands, which find their server and print through the arguments."""
    app = typer.Typer(name="cluster", help="Workers of the server.", no_args_is_help=True)

    def show(names: list[str], as_json: bool) -> None:
        if as_json:
            print_json({"workers": names})
        else:
            typer.echo(f"{len(names)} workers: {', '.join(names)}")

    @app.command("scale")
    def scale(
        count: Annotated[int, typer.Argument(help="So many workers", min=1)],
        as_json: Json = False,
    ) -> None:
        """Have so many workers on the server's machine; who leaves is drained first."""
        with connect() as client:
            show(client.scale_workers(count), as_json)

    @app.command("adapt")
    def adapt(
        low: Annotated[int, typer.Option("--min", help="At least so many", min=1)],
        high: Annotated[int, typer.Option("--max", help="At most so many", min=1)],
        as_json: Json = False,
    ) -> None:
        """Have as many workers as the models need, between two numbers."""
        with connect() as client:
            show(client.scale_workers(min=low, max=high), as_json)

    return app
