"""`nos`: the server's state and its models from a terminal.

Exit codes: 0 done, 1 failed, 2 wrong usage. Errors are one line on standard error; with `--json` also one
object on standard output. Server commands join through the entry point group `nos.commands`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from nos import local as backend
from nos._cli_apply import add_to as add_apply_to
from nos._cli_cluster import make_app as make_cluster_app
from nos._cli_profile import add_to as add_profile_to
from nos._cli_stats import add_to as add_stats_to
from nos._cli_tokens import make_app as make_token_app
from nos._cli_values import parse_argument, parse_input, to_json, to_line
from nos._version import __version__
from nos.client import Client, connect
from nos.errors import ConfigError, InvalidRequestError, NosError
from nos.wire import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nos.types import Result, _Table

_FAILED: Final = 1
_USAGE: Final = 2
_INTERRUPTED: Final = 130
_COMPLETION_TIMEOUT_S: Final = 1.0
_POLL_S: Final = 0.2
_TAIL_BYTES: Final = 1 << 20

app = typer.Typer(
    name="nos",
    help="Run models on a NOS server, and look after them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Place:
    """Which server this run of the command line talks to."""

    address: str | None = None
    token_file: str | None = None

    @classmethod
    def connect(cls, **options: Any) -> Client:
        return connect(cls.address, token_file=cls.token_file, **options)


@app.callback()
def _options(
    address: Annotated[
        str | None,
        typer.Option(help="host:port of the server; default: NOS_ADDRESS, nos.toml, this machine"),
    ] = None,
    token_file: Annotated[str | None, typer.Option(help="File that holds the token")] = None,
) -> None:
    _Place.address, _Place.token_file = address, token_file


def _complete_model(incomplete: str) -> list[str]:
    try:
        with _Place.connect(timeout_s=_COMPLETION_TIMEOUT_S) as client:
            return [info.name for info in client.models() if info.name.startswith(incomplete)]
    except NosError:
        return []


Json = Annotated[bool, typer.Option("--json", help="Print JSON")]
Model = Annotated[
    str, typer.Argument(help="The model, as name or name@v3", autocompletion=_complete_model)
]
Method = Annotated[
    str | None, typer.Option("--method", "-m", help="Which method; default: its call")
]
StateDir = Annotated[Path | None, typer.Option(help="The backend's state folder")]


@app.command()
def status(as_json: Json = False) -> None:
    """Show the server, its workers and devices."""
    with _Place.connect() as client:
        _show(client.status(), as_json)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Only names that contain this")] = "",
    as_json: Json = False,
) -> None:
    """List the models."""
    with _Place.connect() as client:
        found = client.models(pattern)
    if as_json:
        _print_json([info.to_dict() for info in found])
    else:
        _print_table(found)


@app.command()
def info(model: Model, as_json: Json = False) -> None:
    """Show what a model takes and gives, and where it is."""
    with _Place.connect() as client:
        _show(client.info(model), as_json)


@app.command()
def load(
    model: Model,
    pin: Annotated[
        bool | None,
        typer.Option(help="Keep it on its device whatever else wants the room, or no longer"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Place a model on a device, and wait until it can answer."""
    with _Place.connect() as client:
        _show(client.load(model, pin=pin), as_json)


@app.command()
def unload(model: Model, as_json: Json = False) -> None:
    """Take a model off its devices, after its work in flight."""
    with _Place.connect() as client:
        _show(client.unload(model), as_json)


@app.command()
def scale(
    model: Model,
    replicas: Annotated[int | None, typer.Argument(help="Exactly so many", min=1)] = None,
    low: Annotated[int | None, typer.Option("--min", help="At least so many", min=0)] = None,
    high: Annotated[int | None, typer.Option("--max", help="At most so many", min=1)] = None,
    device: Annotated[str, typer.Option(help="Only there: cpu, cuda, or auto for any")] = "",
    memory_bytes: Annotated[
        int | None, typer.Option(help="Only on devices with so much memory for models", min=0)
    ] = None,
    placement: Annotated[
        str, typer.Option(help="spread over as many devices as can be, or pack on few")
    ] = "",
    as_json: Json = False,
) -> None:
    """Say how many replicas a model may have; between --min and --max the load decides."""
    with _Place.connect() as client:
        info = client.scale(
            model,
            replicas,
            min=low,
            max=high,
            device=device,
            memory_bytes=memory_bytes,
            placement=placement,
        )
        _show(info, as_json)


@app.command()
def run(
    model: Model,
    value: Annotated[
        str | None,
        typer.Argument(
            metavar="[INPUT]", help="Image file, .npy file, text file, text, or - for stdin"
        ),
    ] = None,
    method: Method = None,
    arguments: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", help="Named argument name=value; value is JSON, text or @FILE"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result to a .npy or text file")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after so many seconds")] = None,
    as_json: Json = False,
) -> None:
    """Run a model once."""
    with _Place.connect() as client:
        found = client.model(model)
        chosen = found.method(method)
        args = [] if value is None else [parse_input(value, chosen.info)]
        kwargs = dict(parse_argument(text, chosen.info) for text in arguments or ())
        future = chosen.submit(*args, **kwargs, **({"timeout_s": timeout_s} if timeout_s else {}))
        result = future.wait(timeout_s)
        if output is not None:
            _write(result, output)
        if as_json:
            _print_json({"value": to_json(result), "timings": to_json(future.timings)})
        elif output is None:
            _print(to_line(result))


@app.command()
def stream(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images, .npy or text files, one frame each; or one video; or camera, camera:1",
        ),
    ],
    method: Method = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Make a video of the results, which are pictures"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Send files or a video as frames of a stream; print a line for each result, or make a video of them."""
    from nos import _cli_stream

    def say(seq: int, result: Result) -> None:
        name = source.name(seq)
        if not as_json:
            _print(f"{name}: {result.error or to_line(result.value)}")
            return
        outcome = {"error": _fields(result.error)} if result.error else {}
        outcome = outcome or {"value": to_json(result.value)}
        _print_json({"file": name, **outcome, "timings": to_json(result.timings)}, indent=None)

    with _Place.connect() as client:
        chosen = client.model(model).method(method)
        with closing(_cli_stream.Source(sources, chosen.info)) as source:
            num_failed = _cli_stream.run(chosen, source, out, say)
    if num_failed:
        raise typer.Exit(_FAILED)


@app.command()
def stop(state_dir: StateDir = None, as_json: Json = False) -> None:
    """End this user's backend on this machine, in order."""
    was_running = backend.stop(state_dir=state_dir)
    if as_json:
        _print_json({"stopped": was_running})
    else:
        _print("The backend has stopped." if was_running else "No backend runs.")


@app.command()
def logs(
    model: Annotated[
        str, typer.Argument(help="What this model printed; without it, the backend's logs")
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Last lines of each file")] = 20,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Show what a model printed, or the logs of this user's backend on this machine."""
    if model:
        _show_model_log(model, lines, follow=follow, as_json=as_json)
        return
    folder = state_dir or local.state_dir()
    offsets: dict[Path, int] = {}
    for path in local.log_files(folder):
        size = offsets[path] = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            _print_log(path, file.read(size).splitlines()[-lines:] if lines else [])
    if not offsets and not follow:
        raise ConfigError(
            "there are no logs", "state_dir", got=str(folder), hint="Has `nos serve` run here?"
        )
    while follow:
        time.sleep(_POLL_S)
        for path in local.log_files(folder):
            _follow(path, offsets)


def _show_model_log(model: str, max_lines: int, *, follow: bool, as_json: bool) -> None:
    with _Place.connect() as client:
        found = client.logs(model, max_lines=max_lines)
        if as_json:
            _print_json([dataclasses.asdict(line) for line in found])
            return
        last_s = 0.0
        while True:
            for line in found:
                _print(str(line))
                last_s = line.time_s
            if not follow:
                return
            time.sleep(_POLL_S)
            found = [line for line in client.logs(model) if line.time_s > last_s]


@app.command()
def version(as_json: Json = False) -> None:
    """Show the version of this program."""
    if as_json:
        _print_json({"version": __version__})
    else:
        _print(__version__)


def main() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    _add_server_commands()
    try:
        code = typer.main.get_command(app).main(
            args=list(arguments), prog_name="nos", standalone_mode=False
        )
        return code if isinstance(code, int) else 0
    except NosError as error:
        return _complain(error, as_json="--json" in arguments)
    except OSError as error:
        wrong = InvalidRequestError(
            f"{error.filename}: {error.strerror}" if error.filename else str(error)
        )
        return _complain(wrong, as_json="--json" in arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except typer.Exit as end:
        return end.exit_code
    except Exception as error:
        # click's own; typer carries a copy of it under a name of its own in newer versions.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        return int(error.exit_code)


def _add_server_commands() -> None:
    known = {command.name for command in app.registered_commands}
    if "serve" in known:
        return
    try:
        backend.check_installed()
    except ConfigError:
        _add_serve_stub()
        return
    for entry in importlib.metadata.entry_points(group="nos.commands"):
        entry.load()(app)


def _add_serve_stub() -> None:
    @app.command(
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )
    def serve() -> None:
        """Start a server on this machine (not installed)."""
        backend.check_installed()


def _complain(error: NosError, *, as_json: bool) -> int:
    if as_json:
        _print_json({"error": _fields(error)})
    sentence = " ".join(str(error).split())
    sys.stderr.write(f"nos: {sentence}\n")
    return _USAGE if isinstance(error, ConfigError) and error.field.startswith("--") else _FAILED


def _fields(error: NosError) -> dict[str, Any]:
    names = ("message", "field", "expected", "got", "hint", "error_id")
    facts = {name: getattr(error, name) for name in names if getattr(error, name)}
    return {"type": type(error).__name__, **facts}


def _show(value: _Table, as_json: bool) -> None:
    if as_json:
        _print_json(value.to_dict())
    else:
        _print_table(value)


def _print_table(value: Any) -> None:
    if not sys.stdout.isatty():
        _print(str(value))
        return
    from rich.console import Console
    from rich.table import Table

    header, rows, caption = value.columns()
    table = Table(box=None, show_header=bool(header), pad_edge=False, header_style="dim")
    for index in range(len(header) or (len(rows[0]) if rows else 0)):
        table.add_column(header[index] if header else "", style="" if index else "bold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if caption:
        console.print(caption)
    console.print(table)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _print_json(value: Any, indent: int | None = 2) -> None:
    _print(json.dumps(value, indent=indent))


def _write(result: Any, path: Path) -> None:
    import numpy as np

    if path.suffix == ".npy":
        np.save(path, np.asarray(result), allow_pickle=False)
    elif isinstance(result, bytes):
        path.write_bytes(result)
    elif hasattr(result, "mime_type"):
        path.write_bytes(result.data)
    else:
        text = result if isinstance(result, str) else json.dumps(to_json(result))
        path.write_text(text, encoding="utf-8")


def _follow(path: Path, offsets: dict[Path, int]) -> None:
    size = path.stat().st_size
    start = offsets.get(path, 0)
    if size < start:  # a new file under the old name
        start = 0
    if size > start:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size - start)
        end = data.rfind(b"\n") + 1
        offsets[path] = start + end
        _print_log(path, data[:end].splitlines())


def _print_log(path: Path, lines: Sequence[bytes]) -> None:
    for line in lines:
        _print(f"{path.stem:<12} {line.decode('utf-8', 'replace')}")


add_apply_to(app, _Place.connect, _print_json)
add_profile_to(app, _Place.connect, _print_table, _print_json)
add_stats_to(app, _Place.connect, _print_table, _print_json)
app.add_typer(make_cluster_app(_Place.connect, _print_json))
app.add_typer(make_token_app(_Place.connect, _print_table, _print_json))


if __name__ == "__main__":
    main()
