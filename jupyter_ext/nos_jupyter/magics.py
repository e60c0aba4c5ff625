"""The `%nos` magics: each is one call of a public function of the SDK, and shows what that gave."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import nos
from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics,
    line_cell_magic,
    magics_class,
    no_var_expand,
    output_can_be_silenced,
)
from nos.errors import InvalidRequestError, ModelError, NosError, UnauthenticatedError
from nos.types import ModelList

from nos_jupyter import arguments, views
from nos_jupyter.completion import NameCache, matcher
from nos_jupyter.progress import Progress
from nos_jupyter.sources import class_names, compile_source

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from IPython.core.interactiveshell import InteractiveShell
    from nos import Client

T = TypeVar("T")

_MAX_FPS = 120
_CELL_COMMANDS = ("model", "run")


@magics_class
class NosMagics(Magics):
    """`%nos` and `%%nos`."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._shell = shell
        self.command_line = arguments.build()
        self.cache = NameCache(self._fetch_names)
        self.matcher = matcher(self.command_line, self.cache)
        self._lock = threading.Lock()
        #: The kernel's connection; made on first use, replaced by connect and start.
        self._client: Client | None = None
        #: How to make it; what connect and start were told.
        self._find: Callable[[], Client] = nos.connect
        #: Whether `start` was the last that told.
        self._is_started = False
        #: What the last command that failed left behind; None after none.
        self._last_failure: NosError | None = None

    @no_var_expand
    @output_can_be_silenced
    @line_cell_magic
    def nos(self, line: str, cell: str | None = None) -> Any:
        """Use an inference server from the notebook; `%nos help` lists the commands.

        Values are text; `{expression}` and `$name` pass the object itself.
        """
        if cell is None:
            # IPython hides the output for it, and leaves it on the line.
            line = line.rstrip().removesuffix(";")
        try:
            options = self.command_line.parse(line)
        except arguments.HelpShown:
            return None
        if cell is not None and options.command not in _CELL_COMMANDS:
            raise UsageError(f"%%nos {options.command} takes no cell; write %nos {options.command}")
        with self._one_line_errors():
            if options.command == "model":
                return self._model(options, cell)
            if options.command == "run":
                return self._run(options, cell)
            run: Callable[[argparse.Namespace], Any] = getattr(self, f"_{options.command}")
            return run(options)

    def client(self) -> Client:
        """Return the kernel's connection, and make it if there is none. Any thread may call it.

        Raises:
            NosError: If no backend is found.
        """
        with self._lock:
            if self._client is None:
                self._client = self._find()
            return self._client

    def connect(self) -> Client:
        """Make a further connection to the backend that the kernel uses now.

        Raises:
            NosError: If it does not answer.
        """
        return self._find()

    def close(self) -> None:
        """Close the kernel's connection."""
        self._use(None)

    def _ask(self, question: Callable[[Client], T]) -> T:
        """Ask the backend; once more over a new connection where it was restarted with another token."""
        client = self.client()
        try:
            return question(client)
        except UnauthenticatedError:
            self._use(None)
            return question(self.client())

    def _use(self, client: Client | None) -> None:
        with self._lock:
            old, self._client = self._client, client
        if old is not None and old is not client:
            old.close()
        self.cache.forget()

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Let errors keep their class and show one line in place of a traceback through this package."""
        try:
            yield
        except NosError as error:
            self._last_failure = error
            text = str(error)
            if isinstance(error, ModelError) or "\n" in text:
                text = f"{views.without_traceback(text)}. %nos debug shows the traceback"
            show_in_one_line(error, text)
            raise
        except KeyboardInterrupt as error:
            show_in_one_line(error, "interrupted; the call is cancelled")
            raise

    def _fetch_names(self) -> list[str]:
        return [model.name for model in self._ask(lambda client: client.models())]

    def _status(self, _: argparse.Namespace) -> Any:
        return self._ask(lambda client: client.status())

    def _connect(self, options: argparse.Namespace) -> Any:
        namespace = self._shell.user_ns
        address, token_file = (
            word and str(arguments.value(word, namespace))
            for word in (options.address, options.token_file)
        )
        find = functools.partial(nos.connect, address, token_file=token_file)
        self._use(find())
        self._find, self._is_started = find, False
        return self._status(options)

    def _start(self, options: argparse.Namespace) -> Any:
        wanted = {name: getattr(options, name) for name in ("device", "port", "models", "owned")}
        with Progress(self._shell, "starting the backend"):
            client = nos.start(
                progress=False, **{name: value for name, value in wanted.items() if value}
            )
        self._use(client)
        self._find, self._is_started = functools.partial(nos.connect, client.address), True
        return self._status(options)

    def _stop(self, _: argparse.Namespace) -> Any:
        if self._is_started:
            self._use(None)
            self._find, self._is_started = nos.connect, False
        if nos.stop():
            return views.Message("the backend is stopped")
        return views.Message("no backend of this user runs on this machine")

    def _dask(self, options: argparse.Namespace) -> Any:
        url = self._status(options).dashboard_url
        return views.Link(url) if url else views.Message("this backend has no dashboard")

    def _models(self, options: argparse.Namespace) -> Any:
        models = self._ask(lambda client: client.models(options.pattern))
        return (
            ModelList(model for model in models if model.state == "device")
            if options.loaded
            else models
        )

    def _info(self, options: argparse.Namespace) -> Any:
        return self._ask(lambda client: client.info(options.model))

    def _load(self, options: argparse.Namespace) -> Any:
        with Progress(self._shell, f"loading {options.model}"):
            return self._ask(lambda client: client.load(options.model))

    def _unload(self, options: argparse.Namespace) -> Any:
        return self._ask(lambda client: client.unload(options.model))

    def _scale(self, options: argparse.Namespace) -> Any:
        return self._ask(
            lambda client: client.scale(
                options.model, options.replicas, min=options.min, max=options.max
            )
        )

    def _profile(self, options: argparse.Namespace) -> Any:
        with Progress(self._shell, f"measuring {options.model}"):
            return self._ask(lambda client: client.profile(options.model))

    def _stats(self, options: argparse.Namespace) -> Any:
        if options.model:
            return self._ask(lambda client: client.stats(options.model))
        return self._ask(lambda client: client.stats())

    def _logs(self, options: argparse.Namespace) -> Any:
        lines = self._ask(lambda client: client.logs(options.model, max_lines=options.lines))
        text = "\n".join(map(str, lines))
        return views.Preformatted(text or f"{options.model} has printed nothing")

    def _run(self, options: argparse.Namespace, cell: str | None) -> Any:
        namespace = self._shell.user_ns
        values = [arguments.value(word, namespace) for word in options.values]
        named = arguments.named_values(options.input, namespace)
        _check_name(options.out)
        if cell is not None:
            values.insert(0, cell.strip())
        handle = self._ask(lambda client: client.model(options.model))
        method = getattr(handle, options.method) if options.method else handle
        if options.timeout is not None:
            named["timeout_s"] = options.timeout
        begin_s = time.monotonic()
        value = method(*values, **named)
        if isinstance(value, Iterator):
            value = list(value)
        result = views.RunResult(options.model, value, time.monotonic() - begin_s)
        if options.out:
            namespace[options.out] = value
        return result

    def _map(self, options: argparse.Namespace) -> Any:
        items = arguments.value(options.items, self._shell.user_ns)
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise UsageError(f"ITEMS expects a list or an array, got {type(items).__name__}")
        _check_name(options.out)
        handle = self._ask(lambda client: client.model(options.model))
        results: list[Any] = []
        total = operator.length_hint(items)
        begin_s = time.monotonic()
        try:
            with Progress(self._shell, f"calling {options.model}") as progress:
                for value in handle.map(
                    items, method=options.method or None, timeout_s=options.timeout
                ):
                    results.append(value)
                    progress.count = f"{len(results)} of {total}" if total else f"{len(results)}"
        finally:
            if options.out:
                self._shell.user_ns[options.out] = results
        return views.MapResult(options.model, results, time.monotonic() - begin_s)

    def _bench(self, options: argparse.Namespace) -> Any:
        namespace = self._shell.user_ns
        values = [arguments.value(word, namespace) for word in options.values]
        named = arguments.named_values(options.input, namespace)
        _check_name(options.out)
        handle = self._ask(lambda client: client.model(options.model))
        with Progress(self._shell, f"calling {options.model}"):
            bench = handle.bench(
                *values,
                method=options.method or None,
                num_calls=options.calls,
                concurrency=options.concurrency,
                **named,
            )
        if options.out:
            namespace[options.out] = bench
        return bench

    def _panel(self, options: argparse.Namespace) -> Any:
        from nos_jupyter.widgets import InferencePanel

        info = self._ask(lambda client: client.info(options.model))
        return InferencePanel(info.name, self.connect)

    def _stream(self, options: argparse.Namespace) -> Any:
        from nos_jupyter.frames import image_parameter
        from nos_jupyter.widgets import StreamPlayer

        images = options.source and arguments.value(options.source, self._shell.user_ns)
        if isinstance(images, str) or not (images is None or isinstance(images, Iterable)):
            raise UsageError("--source expects images as $name or {expression}")
        if not 0 < options.fps <= _MAX_FPS:
            raise UsageError(f"--fps expects a number up to {_MAX_FPS}, got {options.fps:g}")
        handle = self._ask(lambda client: client.model(options.model))
        image_parameter(handle.spec, handle.method(options.method or None).info)
        return StreamPlayer(
            handle.name,
            images,
            method=options.method or "__call__",
            fps=options.fps,
            source=self.connect,
        )

    def _browse(self, _: argparse.Namespace) -> Any:
        from nos_jupyter.widgets import ModelBrowser

        self.client()
        return ModelBrowser(self.connect)

    def _cluster(self, _: argparse.Namespace) -> Any:
        from nos_jupyter.widgets import ClusterPanel

        self.client()
        return ClusterPanel(self.connect)

    def _register(self, options: argparse.Namespace) -> Any:
        if options.value is None:
            from nos_jupyter.widgets import RegisterModel

            return RegisterModel(source=self.connect)
        value = arguments.value(options.value, self._shell.user_ns)
        wanted = {name: getattr(options, name) for name in ("name", "device", "isolation")}
        fields = {name: value for name, value in wanted.items() if value}
        info = self._ask(lambda client: client.register(value, **fields))
        self.cache.forget()
        return info

    def _unregister(self, options: argparse.Namespace) -> Any:
        self._ask(lambda client: client.unregister(options.model))
        self.cache.forget()
        return views.Message(f"{options.model} is unregistered")

    def _mem(self, options: argparse.Namespace) -> Any:
        if options.watch:
            from nos_jupyter.widgets import MemoryProfile

            return MemoryProfile(self.connect)
        return views.Memory(self._status(options).workers)

    def _model(self, options: argparse.Namespace, cell: str | None) -> Any:
        if cell is None:
            raise UsageError("%%nos model NAME heads the cell that holds the class")
        source_name = f"<cell {self._shell.execution_count}>"
        # The first line is the magic's own, so that a traceback counts lines as the notebook does.
        source = "\n" + cell
        class_name = find_class(source, source_name, options.class_name)
        wanted = {name: getattr(options, name) for name in ("device", "isolation", "env")}
        fields = {name: value for name, value in wanted.items() if value}
        info = self._ask(
            lambda client: client.register(
                source,
                name=options.model,
                class_name=class_name,
                source_name=source_name,
                namespace=self._shell.user_ns,
                **fields,
            )
        )
        self.cache.forget()
        return info

    def _debug(self, _: argparse.Namespace) -> Any:
        failure = self._last_failure
        if failure is None:
            return views.Message("no command has failed yet")
        traceback = failure.remote_traceback if isinstance(failure, ModelError) else ""
        return views.Preformatted((traceback or str(failure)).strip("\n"))

    def _help(self, options: argparse.Namespace) -> None:
        topic = options.topic
        if topic is not None and topic not in self.command_line.commands:
            raise UsageError(f"no command {topic!r}; %nos help lists the commands")
        parser = self.command_line.commands[topic] if topic else self.command_line.parser
        parser.print_help()


def _check_name(out: str | None) -> None:
    if out and not out.isidentifier():
        raise UsageError(f"-o expects a variable's name, got {out!r}")


def find_class(source: str, source_name: str, wanted: str | None) -> str:
    """Compile a cell and say which of its classes is the model.

    Args:
        source: The cell's code.
        source_name: Where it stands, for messages.
        wanted: The class that the user named, if any.

    Raises:
        UsageError: If it does not compile, or leaves open which class is meant.
    """
    try:
        names = class_names(compile_source(source, source_name))
    except InvalidRequestError as error:
        raise UsageError(f"the cell {error}") from None
    if wanted is not None:
        if wanted not in names:
            raise UsageError(f"the cell defines no class {wanted!r} at its top level")
        return wanted
    if len(names) == 1:
        return names[0]
    if not names:
        raise UsageError("the cell defines no class; a model is a class with public methods")
    raise UsageError(
        f"the cell defines {', '.join(names)}; say which is the model with --class NAME"
    )


def show_in_one_line(error: BaseException, text: str) -> None:
    """Make IPython show an exception as its class and one sentence."""
    line = f"{type(error).__name__}: {text}"
    vars(error)["_render_traceback_"] = lambda: [line]


def load(shell: InteractiveShell) -> None:
    """Add the magics and their completion to a shell, once."""
    if shell.magics_manager.registry.get(NosMagics.__name__) is not None:
        return
    magics = NosMagics(shell)
    shell.register_magics(magics)
    shell.Completer.custom_matchers.append(magics.matcher)


def unload(shell: InteractiveShell) -> None:
    """Take them away."""
    magics = shell.magics_manager.registry.pop(NosMagics.__name__, None)
    if magics is None:
        return
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("nos", None)
    shell.Completer.custom_matchers.remove(magics.matcher)
    magics.close()
