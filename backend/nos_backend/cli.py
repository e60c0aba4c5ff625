"""The server's commands: `nos serve`, which is `python -m nos_backend serve`.

`nos` replaces its own process by the latter, so that a supervisor has neither gRPC nor its threads in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

from nos.errors import ConfigError, InternalError, NosError

if TYPE_CHECKING:
    import typer
    from nos.wire.local import BackendRecord

    from nos_backend.config import Settings

_OK: Final = 0
_FAILED: Final = 1
_USAGE: Final = 2

_HELP: Final = "`nos serve --help` lists the flags"


def register(app: typer.Typer) -> None:
    """Add the server's commands to the client's command line."""
    import typer

    passed_on = {"ignore_unknown_options": True, "allow_extra_args": True}

    @app.command("serve", context_settings=passed_on, add_help_option=False)
    def serve(context: typer.Context) -> None:
        """Start a server on this machine; --help lists its settings."""
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "nos_backend", "serve", *context.args])  # noqa: S606 - no shell is wanted

    groups = [group.typer_instance for group in app.registered_groups]
    cluster = next(group for group in groups if group and group.info.name == "cluster")

    @cluster.command("certs")
    def certs(folder: Path) -> None:
        """Make, or renew, the certificates of a cluster of several machines."""
        _make_certificates(folder)

    # typer resolves annotations by name, in the module's namespace, where typer is not imported.
    serve.__annotations__["context"] = typer.Context
    certs.__annotations__["folder"] = Annotated[Path, typer.Argument(help="Made if missing")]


def _make_certificates(folder: Path) -> None:
    from nos_backend.cluster.certificates import TlsFiles

    try:
        made = TlsFiles.create_for_cluster(folder)
    except OSError as error:
        raise ConfigError(
            "the certificates cannot be written", "folder", got=f"{folder}: {error.strerror}"
        ) from error
    for role, files in made.items():
        _say(f"{role:<10} {files.folder}")
    _say(
        f"Keep {folder / 'ca-key.pem'} to yourself: who has it makes certificates that are accepted"
    )


def main(arguments: list[str]) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _say("usage: python -m nos_backend serve [--help | settings]")
        return _OK if arguments else _USAGE
    if arguments[0] != "serve":
        _complain(f"unknown command {arguments[0]!r}: expected serve")
        return _USAGE
    if not sys.platform.startswith("linux"):
        _complain(
            f"the backend needs Linux, got {sys.platform}; connect to one with nos.connect(address)"
        )
        return _FAILED
    return _serve(arguments[1:])


def _serve(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    started_s = time.monotonic()
    try:
        options, settings = _parse(arguments)
        if options.detach:
            return _serve_detached(options, settings, started_s)
        logging.basicConfig(level=logging.WARNING, format="nos serve: %(message)s")
        _supervise(options, settings, started_s)
    except NosError as error:
        _complain(str(error), error, as_json=as_json)
        return _USAGE if isinstance(error, _UsageError) else _FAILED
    return _OK


def _supervise(options: argparse.Namespace, settings: Settings, started_s: float) -> None:
    from nos_backend.supervisor import Supervisor

    def announce(record: BackendRecord) -> None:
        _say(_screen(record, settings, time.monotonic() - started_s, as_json=options.json))

    Supervisor(settings, owner_pid=options.owner_pid, on_ready=announce).run()


def _screen(record: BackendRecord, settings: Settings, start_s: float, *, as_json: bool) -> str:
    from nos.wire.local import LOG_FOLDER_NAME

    from nos_backend.supervisor import describe

    if as_json:
        return json.dumps({**dataclasses.asdict(record), "start_s": round(start_s, 3)})
    return describe(record, record.read_token(), start_s, settings.state_dir / LOG_FOLDER_NAME)


# In the background: the grandchild serves, and says through a pipe when it is ready or why it is not.


def _serve_detached(options: argparse.Namespace, settings: Settings, started_s: float) -> int:
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        _serve_in_background(options, settings, started_s, writer)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    if not said:
        raise InternalError(
            "the backend ended while it started",
            hint=f"Its logs are in {settings.state_dir / 'logs'}",
        )
    answer = json.loads(said)
    if "error" in answer:
        _complain(answer["message"], as_json=options.json, fields=answer["error"])
        return _FAILED
    _say(answer["screen"])
    return _OK


def _serve_in_background(
    options: argparse.Namespace, settings: Settings, started_s: float, writer: int
) -> NoReturn:
    from nos_backend.supervisor import Supervisor

    def report(answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), os.fdopen(writer, "w", encoding="utf-8") as pipe:
            json.dump(answer, pipe)

    def announce(record: BackendRecord) -> None:
        screen = _screen(record, settings, time.monotonic() - started_s, as_json=options.json)
        report({"screen": screen})

    code = _FAILED
    try:
        _let_go(settings.state_dir / "logs")
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        Supervisor(settings, owner_pid=options.owner_pid, on_ready=announce).run()
        code = _OK
    except NosError as error:
        logging.getLogger(__name__).error("%s", error)  # noqa: TRY400 - a sentence, not a traceback
        report({"message": str(error), "error": _fields(error)})
    except Exception:
        logging.getLogger(__name__).exception("the supervisor failed")
    os._exit(code)


def _let_go(log_folder: Path) -> None:
    """Leave the terminal and its folder: output goes to the supervisor's log."""
    log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chdir("/")
    with open(os.devnull, "rb") as nothing, (log_folder / "supervisor.log").open("ab") as log:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


# Flags: one per setting, described by its docstring.


class _UsageError(ConfigError):
    """A flag is unknown or lacks its value."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message, hint=_HELP)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Settings]:
    """Return the flags that are no settings, and the settings.

    Raises:
        ConfigError: If one is unknown or wrong.
    """
    from nos_backend.config import Settings, flag_of, load_settings, suggest, unknown_variables

    parser = _Parser(
        prog="nos serve", description="Start a server on this machine.", allow_abbrev=False
    )
    for name, field in Settings.model_fields.items():
        action = "append" if name == "models" else "store"
        parser.add_argument(
            flag_of(name),
            dest=name,
            action=action,
            default=argparse.SUPPRESS,
            metavar="DIR" if name == "models" else name.rpartition("_")[2].upper(),
            help=(field.description or "").replace("%", "%%"),
        )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file of settings: port = 50051"
    )
    parser.add_argument(
        "--owner-pid", type=int, default=0, metavar="PID", help="end when this process is gone"
    )
    parser.add_argument(
        "--detach", action="store_true", help="serve in the background; return when it is ready"
    )
    parser.add_argument(
        "--json", action="store_true", help="say where it listens as one line of JSON"
    )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]  # noqa: SLF001
        flag = unknown[0].partition("=")[0]
        raise _UsageError(f"unknown argument {flag}", hint=suggest(flag, known) or _HELP)
    for sentence in unknown_variables(os.environ):
        _complain(sentence)
    flags = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    return options, load_settings(flags, options.config)


def _fields(error: NosError) -> dict[str, str]:
    return {
        name: getattr(error, name)
        for name in ("message", "field", "expected", "got", "hint")
        if getattr(error, name)
    }


def _complain(
    sentence: str,
    error: NosError | None = None,
    *,
    as_json: bool = False,
    fields: dict[str, str] | None = None,
) -> None:
    if as_json:
        _say(json.dumps({"error": fields or (_fields(error) if error else {"message": sentence})}))
    sys.stderr.write(f"nos serve: {sentence}\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
