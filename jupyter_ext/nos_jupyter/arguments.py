"""The command line of `%nos`: how a line splits into words, what the commands take, and what a value means.

Not IPython's `magic_arguments`: its splitter breaks `text='two words'` and its parser has no `--help`.
Not IPython's variable expansion either: it turns objects into text, and one failing brace leaves the
whole line unexpanded.
"""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.error import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_QUOTES = "'\""
_OPEN, _CLOSE = "([{", ")]}"


class HelpShown(Exception):  # noqa: N818 - control flow, as SystemExit is
    """`--help` was asked for and printed."""


class CommandParser(argparse.ArgumentParser):
    """Raises where argparse would end the process, and says one line where it would say several."""

    def __init__(self, **options: Any) -> None:
        #: The long options it takes.
        self.long_options: list[str] = []
        super().__init__(**options, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse does, and keep the option's name for completion."""
        self.long_options += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and how the command is used.

        Raises:
            UsageError: Always.
        """
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise UsageError(f"{message}. Usage: {usage}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the command, not the kernel.

        Raises:
            HelpShown: Always.
        """
        raise HelpShown


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The parser of `%nos` and those of its commands."""

    parser: CommandParser
    commands: dict[str, CommandParser]

    def parse(self, line: str) -> argparse.Namespace:
        """Parse what follows `%nos`; nothing means `status`.

        Raises:
            UsageError: One line, for a person.
            HelpShown: After `--help` printed.
        """
        words = split(line) or ["status"]
        if not words[0].startswith("-") and words[0] not in self.commands:
            near = difflib.get_close_matches(words[0], self.commands, n=1)
            advice = f"did you mean %nos {near[0]}?" if near else "%nos help lists the commands"
            raise UsageError(f"no command {words[0]!r}; {advice}")
        options, unknown = self.parser.parse_known_args(words)
        if unknown:
            self.commands[options.command].error(f"no such option: {' '.join(unknown)}")
        return options


def counts(text: str) -> tuple[int, ...]:
    """Read whole numbers between commas.

    Raises:
        ArgumentTypeError: If they are not; argparse says so.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as 1,4,16, got {text!r}") from None


def split(line: str) -> list[str]:
    """Split a line into words as a shell does, but keep `{...}` whole, with the spaces and quotes in it.

    Raises:
        UsageError: For a quote or brace that is never closed.
    """
    words: list[str] = []
    word: str | None = None
    at = 0
    while at < len(line):
        char = line[at]
        if char.isspace():
            if word is not None:
                words.append(word)
                word = None
            at += 1
            continue
        end = at + 1
        piece = char
        if char == "{":
            end = _end_of_braces(line, at)
            piece = line[at:end]
        elif char in _QUOTES:
            end = _end_of_quote(line, at)
            piece = line[at + 1 : end - 1]
        elif char == "\\" and end < len(line):
            piece = line[end]
            end += 1
        word = (word or "") + piece
        at = end
    if word is not None:
        words.append(word)
    return words


def _end_of_quote(line: str, begin: int) -> int:
    end = line.find(line[begin], begin + 1)
    if end < 0:
        raise UsageError(f"the quote in {line[begin:]!r} is never closed")
    return end + 1


def _end_of_braces(line: str, begin: int) -> int:
    depth = 0
    at = begin
    while at < len(line):
        if line[at] in _QUOTES:
            at = _end_of_quote(line, at)
            continue
        depth += (line[at] in _OPEN) - (line[at] in _CLOSE)
        at += 1
        if depth == 0:
            return at
    raise UsageError(f"the brace in {line[begin:]!r} is never closed")


def value(word: str, namespace: dict[str, Any]) -> Any:
    """Return what a word stands for: `{expr}` and `$name` the object itself, anything else its text.

    JSON objects such as `{"a": 1}` are text, as everything is that Python would not read as an expression.

    Raises:
        UsageError: If the name is not defined or the expression raises.
    """
    if word.startswith("$") and word[1:].isidentifier():
        expression = word[1:]
    elif word.startswith("{") and word.endswith("}") and not _is_json(word):
        expression = word[1:-1].strip()
    else:
        return word
    try:
        return eval(expression, namespace)  # noqa: S307 - the user's own notebook, as IPython's own {..}
    except Exception as error:  # noqa: BLE001 - whatever the user's expression raises
        raise UsageError(f"{word}: {type(error).__name__}: {error}") from None


def _is_json(word: str) -> bool:
    try:
        json.loads(word)
    except ValueError:
        return False
    return True


def named_values(pairs: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that `-i NAME=VALUE` gave.

    Raises:
        UsageError: For a pair without a name, or a name given twice.
    """
    named: dict[str, Any] = {}
    for pair in pairs:
        name, equals, word = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"-i expects NAME=VALUE, got {pair!r}")
        if name in named:
            raise UsageError(f"-i {name} is given twice")
        named[name] = value(word, namespace)
    return named


def build() -> CommandLine:
    """Return the command line with every command."""
    parser = CommandParser(prog="%nos", description="Use an inference server from the notebook.")
    group = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, summary: str) -> CommandParser:
        return group.add_parser(name, help=summary.replace("%", "%%"), description=summary)

    _add_backend(command)
    _add_calls(command)
    _add_figures(command)
    _add_widgets(command)
    _add_own_models(command)
    command("debug", "all that is known of the last failure, the model's traceback included")
    sub = command("help", "the commands, or one of them")
    sub.add_argument("topic", nargs="?", metavar="COMMAND")
    return CommandLine(parser, dict(group.choices))


def _add_backend(command: Callable[[str, str], CommandParser]) -> None:
    command("status", "backend, devices, loaded models; the same as %nos alone")
    sub = command("connect", "use the backend at an address, or find one")
    sub.add_argument("address", nargs="?", metavar="HOST:PORT")
    sub.add_argument("--token-file", metavar="FILE", help="file that holds the token")
    sub = command("start", "join this user's backend, or start one on this machine")
    sub.add_argument("--device", help="auto, cpu or cuda:N")
    sub.add_argument("--port", type=int)
    sub.add_argument("--models", metavar="DIR", help="folder of model files to serve")
    sub.add_argument("--owned", action="store_true", help="end it with this kernel")
    command("stop", "stop this user's backend on this machine")
    command("dask", "the link to the Dask dashboard")


def _add_calls(command: Callable[[str, str], CommandParser]) -> None:
    sub = command("models", "the catalogue")
    sub.add_argument("pattern", nargs="?", default="", help="only names that contain this")
    sub.add_argument("--loaded", action="store_true", help="only those on a device")
    _model(command("info", "what a model takes and gives, and where it is"))
    _model(command("load", "place a model on a device and wait until it can answer"))
    _model(command("unload", "take a model off its devices"))
    sub = _model(command("run", "run a model; a cell's body is its first argument"))
    sub.add_argument("values", nargs="*", metavar="VALUE", help="text, {expression} or $name")
    sub.add_argument("-i", "--input", action="append", default=[], metavar="NAME=VALUE")
    _method(sub)
    sub.add_argument("-o", "--out", metavar="NAME", help="also put the value into this variable")
    sub.add_argument("--timeout", type=float, metavar="SECONDS")
    sub = _model(command("map", "run a model on each item of a list or array"))
    sub.add_argument("items", metavar="ITEMS", help="{expression} or $name")
    _method(sub)
    sub.add_argument("-o", "--out", metavar="NAME", help="put the results here, also on interrupt")
    sub.add_argument("--timeout", type=float, metavar="SECONDS", help="of each call")
    sub = _model(command("bench", "latency and calls per second of one call, from this notebook"))
    sub.add_argument("values", nargs="*", metavar="VALUE", help="text, {expression} or $name")
    sub.add_argument("-i", "--input", action="append", default=[], metavar="NAME=VALUE")
    _method(sub)
    sub.add_argument("-n", "--calls", type=int, default=50, metavar="N", help="default 50")
    sub.add_argument("--concurrency", type=counts, default=(1, 4, 16), metavar="1,4,16")
    sub.add_argument("-o", "--out", metavar="NAME", help="also put the figures into this variable")


def _add_figures(command: Callable[[str, str], CommandParser]) -> None:
    sub = _model(command("scale", "say how many replicas a model may have"))
    sub.add_argument("replicas", type=int, nargs="?", metavar="N", help="exactly so many")
    sub.add_argument("--min", type=int, metavar="N", help="at least so many")
    sub.add_argument("--max", type=int, metavar="N", help="at most so many: the load decides")
    _model(command("profile", "time and memory of a model by batch size"))
    sub = command("stats", "what became of a model's requests, or of every model's")
    sub.add_argument("model", nargs="?", default="", metavar="MODEL")
    sub = _model(command("logs", "the last lines that a model printed"))
    sub.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="default 50")


def _add_widgets(command: Callable[[str, str], CommandParser]) -> None:
    sub = command("mem", "device memory by model")
    sub.add_argument("--watch", action="store_true", help="a live chart")
    _model(command("panel", "a form for calls of a model"))
    summary = "live frames through a model: of the camera, a file or the notebook"
    sub = _model(command("stream", summary))
    sub.add_argument("--source", metavar="FRAMES", help="$name or {expression}: images to play")
    sub.add_argument("--fps", type=float, default=30.0, metavar="N", help="at most; default 30")
    _method(sub)
    command("browse", "the catalogue, live")
    command("cluster", "workers and replicas, live, and how many of them")


def _add_own_models(command: Callable[[str, str], CommandParser]) -> None:
    sub = _model(command("model", "%%nos model NAME: make a model of the class in this cell"))
    sub.add_argument("--class", dest="class_name", metavar="NAME", help="which class of the cell")
    pip = "a package that it needs besides the server's; again for more"
    sub.add_argument("--pip", dest="env", action="append", metavar="PACKAGE", help=pip)
    _where(sub)
    sub = command("register", "make a model of a class or object of this notebook")
    sub.add_argument("value", metavar="VALUE", nargs="?", help="$name, {expression}; none: a form")
    sub.add_argument("--name", default="", metavar="NAME", help="by default what @nos.model says")
    _where(sub)
    _model(command("unregister", "forget a model and all its versions"))


def _where(parser: CommandParser) -> None:
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--isolation", choices=("shared", "process"))


def _method(parser: CommandParser) -> None:
    parser.add_argument("-m", "--method", default="", help="a method other than __call__")


def _model(parser: CommandParser) -> CommandParser:
    parser.add_argument("model", metavar="MODEL")
    return parser
