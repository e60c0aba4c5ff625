"""`nos token`: make, list and revoke tokens of a server."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from nos.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos.client import Client

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")

Json = Annotated[bool, typer.Option("--json", help="Print JSON")]


def make_app(
    connect: Callable[[], Client],
    print_table: Callable[[Any], None],
    print_json: Callable[[Any], None],
) -> typer.Typer:
    """Return the commands, which find their server and print through the arguments."""
    app = typer.Typer(name="token", help="Make, list and revoke tokens.", no_args_is_help=True)

    @app.command("create")
    def create(
        tenant: Annotated[str, typer.Argument(help="Whom it acts for; owns what it registers")],
        role: Annotated[str, typer.Option(help="viewer, user, author or admin")] = "user",
        expires: Annotated[
            str, typer.Option(help="After how long it ends: 90s, 30m, 12h, 7d, or never")
        ] = "30d",
        label: Annotated[str, typer.Option(help="What it is for")] = "",
        as_json: Json = False,
    ) -> None:
        """Make a token and print its secret, which is shown this once."""
        with connect() as client:
            made = client.create_token(tenant, role=role, ttl_s=_duration_s(expires), label=label)
        if as_json:
            print_json({**made.info.to_dict(), "secret": made.secret})
        else:
            print_table(made.info)
            typer.echo(f"\n{made.secret}\n\nKeep it: it is not shown again.")

    @app.command("list")
    def list_tokens(as_json: Json = False) -> None:
        """List the tokens, without their secrets."""
        with connect() as client:
            tokens = client.list_tokens()
        if as_json:
            print_json([token.to_dict() for token in tokens])
        else:
            print_table(tokens)

    @app.command("revoke")
    def revoke(
        token_id: Annotated[str, typer.Argument(help="As `nos token list` shows it")],
        as_json: Json = False,
    ) -> None:
        """End a token, and all that it has under way."""
        with connect() as client:
            client.revoke_token(token_id)
        if as_json:
            print_json({"revoked": token_id})
        else:
            typer.echo(f"Token {token_id} is revoked.")

    return app


def _duration_s(text: str) -> float:
    """Return seconds; 0 for never.

    Raises:
        ConfigError: If it is no duration.
    """
    if text == "never":
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError(
            "this is no duration", "--expires", "90s, 30m, 12h, 7d or never", repr(text)
        )
    return float(match[1]) * _UNITS[match[2]]
