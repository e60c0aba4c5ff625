"""`nos apply`: have a server serve what a file says."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nos import _manifest
from nos.errors import ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos._manifest import ModelEntry
    from nos.client import Client


def add_to(
    app: typer.Typer, connect: Callable[[], Client], print_json: Callable[[Any], None]
) -> None:
    """Add the command, which finds its server and prints through the arguments."""

    @app.command("apply")
    def apply(
        file: Annotated[Path, typer.Argument(help="YAML: models, each with name, source, ...")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    ) -> None:
        """Register the models of a file; those that are as it says stay as they are."""
        entries = _manifest.read(file)
        done = []
        with connect() as client:
            for entry in entries:
                done.append(_apply(client, entry))
                if not as_json:
                    typer.echo(f"{done[-1]['model']}  {done[-1]['change']}")
        if as_json:
            print_json(done)


def _apply(client: Client, entry: ModelEntry) -> dict[str, str]:
    try:
        before = client.info(entry.name).version
    except ModelNotFoundError:
        before = 0
    info = client.register(
        entry.source,
        name=entry.name,
        class_name=entry.class_name,
        init=entry.init,
        device=entry.device,
        isolation=entry.isolation,
        env=entry.env,
        pin=entry.pin,
        idle_unload_s=entry.idle_unload_s,
        source_name=entry.source_name,
    )
    if entry.replicas is not None or entry.memory_bytes is not None or entry.placement:
        # What nobody says otherwise of has one replica, while somebody uses it.
        low, high = entry.replicas or (0, 1)
        client.scale(
            entry.name,
            min=low,
            max=high,
            memory_bytes=entry.memory_bytes,
            placement=entry.placement,
        )
    changed = "updated" if before else "registered"
    change = "unchanged" if info.version == before else changed
    return {"model": info.spec.key, "change": change}
