"""The client for threads: scripts, notebooks, anything that waits."""

from __future__ import annotations

import contextlib
import operator
import os
import queue
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, overload

from nos import _address, _bench, _control, _profile, _registering, _stats, _timeline, _tokens
from nos._channel import check_listening
from nos._engine import Engine, Feed, Via
from nos._stream import Policy, StreamCore, flow_of
from nos.bulk import BulkHandle, BulkMethod
from nos.errors import StreamClosedError
from nos.handles import HandleCore, MethodCore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import numpy as np
    import numpy.typing as npt

    from nos._bench import Bench
    from nos._link import Call, Flow
    from nos._profile import Profile
    from nos._stats import ModelStats, StatsList
    from nos._timeline import MemoryHistory
    from nos._tokens import NewToken, TokenList
    from nos.types import Event, LogLine, Memory, ModelChange, ModelInfo, ModelList, Result, Status
    from nos.wire.v1 import models_pb2

DEFAULT_TIMEOUT_S: Final = 30.0

#: Twice the server's usual window: as the next result is taken, the next frame is already there.
MAX_IN_FLIGHT: Final = 32


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    token_file: str | Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    via: Via = "auto",
) -> Client:
    """Connect to a running server.

    Args:
        address: `host:port`. By default `NOS_ADDRESS`, the nearest `nos.toml`, or this user's backend on
            this machine; `client.status()` says which it was.
        token: What opens the server; rather name a file.
        token_file: A file that holds the token. By default `NOS_TOKEN_FILE`, or what belongs to the address.
        timeout_s: How long a question to the server may take. Calls of models have no limit of their own.
        via: `auto` sends frames straight to the workers where they can be reached, else through the
            gateway; `direct` and `relay` allow the one only.

    Raises:
        UnavailableError: If no server listens there.
        UnauthenticatedError: If the token is missing or wrong.
        ConfigError: If the address, a settings file or the token file is wrong.
    """
    target = _address.find(address, token, token_file)
    check_listening(target.address)
    client = Client(target, timeout_s=timeout_s, via=via)
    try:
        client.status()
    except BaseException:
        client.close()
        raise
    return client


class Client:
    """A connection to a server; made by `nos.connect` or `nos.start`.

    Usable from many threads, inside a running event loop, and in forked children, where it connects anew.
    """

    def __init__(
        self, target: _address.Target, *, timeout_s: float = DEFAULT_TIMEOUT_S, via: Via = "auto"
    ) -> None:
        self._target = target
        self._engine = Engine(target, timeout_s, via)

    @property
    def address(self) -> str:
        """The gateway's address."""
        return self._target.url

    def status(self, *, timeout_s: float | None = None) -> Status:
        """Return how the server stands, and which way this client's streams go."""
        target = self._target
        rpc = _control.get_status(target.address, target.source, self._engine.routes())
        return self._engine.wait(rpc, timeout_s)

    def memory(self, *, timeout_s: float | None = None) -> Memory:
        """Return who holds how much memory, by device, tier, model and owner."""
        return self.status(timeout_s=timeout_s).memory

    def memory_history(self, *, timeout_s: float | None = None) -> MemoryHistory:
        """Return what the devices held over the last time, from change to change."""
        return self._engine.wait(_timeline.get(), timeout_s)

    def models(self, pattern: str = "", *, timeout_s: float | None = None) -> ModelList:
        """List the models whose names contain `pattern`."""
        return self._engine.wait(_control.list_models(pattern), timeout_s)

    def info(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """Return how a model stands; `name`, or `name@v3`.

        Raises:
            ModelNotFoundError: If there is none of that name.
        """
        return self._engine.wait(_control.get_info(name), timeout_s)

    def model(self, name: str, *, timeout_s: float | None = None) -> ModelHandle:
        """Return a handle to a model, which need not be loaded.

        Raises:
            ModelNotFoundError: If there is none of that name.
        """
        return ModelHandle(self._engine, self._engine.wait(_control.get_spec(name), timeout_s))

    def load(
        self, name: str, *, pin: bool | None = None, timeout_s: float | None = None
    ) -> ModelInfo:
        """Place a model on a device; returns when it can answer.

        Args:
            name: `name` or `name@v3`.
            pin: Keep it there whatever else wants the room, until the server ends or it is loaded with
                False; for its owner. None leaves it as it is.
            timeout_s: Replaces the client's limit.

        Raises:
            LoadError: If it cannot be loaded.
            OutOfDeviceMemoryError: If no device has room for it.
        """
        return self._engine.wait(_control.load(name, pin=pin), timeout_s)

    def unload(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """Take a model off its devices, after its work in flight."""
        return self._engine.wait(_control.unload(name), timeout_s)

    def profile(self, name: str, *, timeout_s: float | None = None) -> Profile:
        """Return what a model needs by batch size; it is loaded and measured if that is not known.

        Raises:
            InvalidRequestError: If nothing can be measured; a model whose signature leaves sizes open is
                measured with its first call.
            UnavailableError: If the device is busy for too long.
        """
        return self._engine.wait(_profile.get(name), timeout_s)

    @overload
    def stats(self, name: str, *, timeout_s: float | None = None) -> ModelStats: ...

    @overload
    def stats(self, *, timeout_s: float | None = None) -> StatsList: ...

    def stats(self, name: str = "", *, timeout_s: float | None = None) -> ModelStats | StatsList:
        """Return what became of a model's requests since it was loaded, or of every model's.

        Args:
            name: `name` (its newest version) or `name@v3`; nothing for all versions on workers.
            timeout_s: Replaces the client's limit.
        """
        if name:
            return self._engine.wait(_stats.get(name), timeout_s)
        return self._engine.wait(_stats.get_all(), timeout_s)

    def scale(
        self,
        name: str,
        replicas: int | None = None,
        *,
        min: int | None = None,
        max: int | None = None,
        device: str = "",
        memory_bytes: int | None = None,
        placement: str = "",
        timeout_s: float | None = None,
    ) -> ModelInfo:
        """Say how many replicas a model may have; the server sees to it from then on.

        Each replica has a worker of its own; several may share a device. What is missing, and why, stands in
        `info(name).scaling`. It holds over restarts of the server, until the model is unloaded.

        Args:
            name: `name` or `name@v3`.
            replicas: Exactly so many.
            min: At least so many; 0 lets it leave while nobody calls.
            max: At most so many; between the two the load decides.
            device: Only there: `cpu`, `cuda`, or `auto` for any; empty leaves it as it is.
            memory_bytes: Only on devices of whose memory models may use as much; 0 for any, None leaves it.
            placement: `spread` over as many devices as can be, or `pack` on as few; empty leaves it.
            timeout_s: How long the server may take to answer.

        Raises:
            InvalidRequestError: If the numbers are missing or contradict each other.
            ModelNotFoundError: If there is no such model.
            PermissionDeniedError: If it is another owner's.
        """
        rpc = _control.scale(
            name, replicas, min, max, device=device, memory_bytes=memory_bytes, placement=placement
        )
        return self._engine.wait(rpc, timeout_s)

    def scale_workers(
        self,
        count: int | None = None,
        *,
        min: int = 1,
        max: int = 1,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Say how many workers the server has on its machine; for admins.

        A worker leaves once what it serves is served elsewhere.

        Args:
            count: Exactly so many.
            min: Without `count`: at least so many.
            max: Without `count`: at most so many; between the two there are as many as the models need.
            timeout_s: How long the server may take to answer.

        Returns:
            The names of the workers that there are to be.

        Raises:
            InvalidRequestError: If the numbers make no sense there, or a model needs more.
            UnavailableError: If the server has no say over its workers.
        """
        return self._engine.wait(_control.scale_workers(count, min, max), timeout_s)

    def logs(
        self, name: str, *, max_lines: int = 0, timeout_s: float | None = None
    ) -> list[LogLine]:
        """Return the last lines that a model printed, the oldest first; loaded or not, for its owner.

        A line counts as printed by the model whose call ran. At most 1,000 lines and 256 KiB of each
        model are kept, and lines beyond what the server allows, 100 a second, are counted and dropped.

        Args:
            name: `name` or `name@v3`.
            max_lines: At most so many of the last ones; 0 means all.
            timeout_s: Replaces the client's limit.
        """
        return self._engine.wait(_control.get_logs(name, max_lines), timeout_s)

    def register(
        self,
        source: str | type | Any,
        *,
        name: str = "",
        class_name: str = "",
        init: Mapping[str, Any] | None = None,
        example: Any = None,
        pickle: bool = False,
        check: bool = True,
        task: str = "",
        remote_code: bool = False,
        device: str = "",
        isolation: str = "",
        env: Sequence[str] | str | Path = (),
        source_name: str = "",
        namespace: Mapping[str, Any] | None = None,
        pin: bool | None = None,
        idle_unload_s: float | None = None,
        timeout_s: float | None = None,
    ) -> ModelInfo:
        """Make a model of a class, by its source; it runs beside the server's other models, never here.

        What the class needs of its notebook or module goes with it: imports, constants, functions and
        classes, as source, and modules of the notebook's folder, as files.

        Args:
            source: A class or function, Python text, or the path of a file or folder: of a folder, its
                `model.py` or its only Python file is the source, and everything in it goes along. Or a
                network with its weights: it is exported where `example` is given and torch can, and goes
                as its class, `init` and its state otherwise. Or `hf:org/name@revision`, a repository of
                the Hugging Face hub, for a `task`.
            name: The model's name; by default what its `@nos.model` says.
            class_name: Which top-level name of the text is the model; known where a class is given.
            init: What `__init__` is called with: plain values, arrays and tensors, in lists and dicts.
            example: Arguments of one call, which is made before the model is accepted: a tuple by
                position, a dict by name, or the one argument. A network is exported with them.
            pickle: Send the object itself by cloudpickle, not its source. Whoever serves it trusts you,
                and runs the same minor version of Python.
            check: Make the model, in a process of its own, before it is accepted; one that needs `env` is
                made when it is loaded.
            task: Of a repository of the hub: `image-classification`, `feature-extraction` or
                `text-generation`. The server needs transformers for it, or `env=["transformers"]`.
            remote_code: Let Python code of that repository run.
            device: `auto`, `cpu` or `cuda`.
            isolation: `shared` (with the owner's other models) or `process` (one of its own).
            env: Packages that it needs besides the server's, as in `["einops"]`, or the path of a
                requirements file or of an `environment.yml` of conda; by default what its `@nos.model` says.
            source_name: Where the source came from, for tracebacks.
            namespace: Where the names are found that a text needs and does not define, for instance
                `globals()` of a notebook.
            pin: Whether it stays on its device whatever else wants the room; None: as its source says.
            idle_unload_s: After how long without use it leaves the device; None: as its source says.
            timeout_s: Replaces the client's limit.

        Returns:
            The new version; the old one where nothing changed. Its `collected` says what came along.

        Raises:
            InvalidRequestError: If it needs something that cannot travel as source, for instance an open
                connection; names that. Also if there is no source to be found, or no model in it.
            AlreadyExistsError: If another owner has the name.
            LoadError: If its constructor or the example fails; with the lines of its source.
        """
        return _registering.register(
            self._engine,
            source,
            name=name,
            class_name=class_name,
            init=init,
            example=example,
            pickle=pickle,
            check=check,
            task=task,
            remote_code=remote_code,
            device=device,
            isolation=isolation,
            env=env,
            source_name=source_name,
            namespace=namespace,
            pin=pin,
            idle_unload_s=idle_unload_s,
            timeout_s=timeout_s,
        )

    def unregister(self, name: str, *, timeout_s: float | None = None) -> None:
        """Forget a model and all its versions."""
        self._engine.wait(_control.delete(name), timeout_s)

    def create_token(
        self,
        tenant: str,
        *,
        role: str = "user",
        ttl_s: float = 0.0,
        label: str = "",
        timeout_s: float | None = None,
    ) -> NewToken:
        """Make a token for somebody; takes an admin.

        Args:
            tenant: Whom it acts for; owns what it registers.
            role: `viewer`, `user`, `author` or `admin`.
            ttl_s: Seconds until it ends; 0 for never.
            label: What it is for.
            timeout_s: Replaces the client's limit.

        Returns:
            What is known of it, and its secret, which is told only here.
        """
        return self._engine.wait(_tokens.create(tenant, role, ttl_s, label), timeout_s)

    def list_tokens(self, *, timeout_s: float | None = None) -> TokenList:
        """List the tokens, without secrets; takes an admin."""
        return self._engine.wait(_tokens.list_all(), timeout_s)

    def revoke_token(self, token_id: str, *, timeout_s: float | None = None) -> None:
        """End a token, and within seconds all that it has under way; takes an admin."""
        self._engine.wait(_tokens.revoke(token_id), timeout_s)

    def watch(self) -> Feed[ModelChange]:
        """Follow the models: each as it is now, then each that changes."""
        return self._engine.feed(_control.watch_models())

    def events(self, *, status_interval_s: float = 0.0) -> Feed[Event]:
        """Follow what happens on the server.

        Args:
            status_interval_s: Seconds between snapshots of the status; 0 for none.
        """
        return self._engine.feed(_control.watch_events(status_interval_s, self.address))

    def close(self) -> None:
        """End all calls and streams; idempotent. The server and its models stay."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<nos.Client of {self.address}>"


class Items:
    """The items of a generator method, as the model yields them."""

    def __init__(self, engine: Engine, key: str, call: Call) -> None:
        self._call = call
        self._arrived: queue.SimpleQueue[tuple[Any] | None] = queue.SimpleQueue()
        call.stream_items(lambda value: self._arrived.put((value,)))
        call.add_done_callback(lambda _: self._arrived.put(None))
        engine.submit(key, call)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        got = self._arrived.get()
        if got is not None:
            return got[0]
        self._arrived.put(None)
        if not self._call.cancelled():
            self._call.result()
        raise StopIteration

    def close(self) -> None:
        """End the generator on the server."""
        self._call.cancel()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class Method(MethodCore, BulkMethod):
    """A method of a remote model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it and return its result; of a generator, an iterator over its items.

        Args:
            *args: As its signature says.
            **kwargs: As its signature says, and `timeout_s`: how long the answer is worth waiting for.

        Raises:
            InvalidRequestError: If the arguments do not fit.
            ModelError: If the model raised.
            NosError: If it did not come to that.
        """
        timeout_s = self._pop_timeout(kwargs)
        call = self._prepare(args, kwargs, timeout_s)
        if self.info.is_generator:
            return Items(self._engine, self._spec.key, call)
        self._engine.submit(self._spec.key, call)
        return call.wait(timeout_s)

    def submit(self, *args: Any, **kwargs: Any) -> Call:
        """Start it and return a `concurrent.futures.Future`; a generator's items come as one list.

        The arguments may be changed as soon as this returns.
        """
        call = self._prepare(args, kwargs, self._pop_timeout(kwargs))
        self._engine.submit(self._spec.key, call)
        return call

    def map(
        self,
        items: Iterable[Any],
        *,
        progress: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout_s: float | None = None,
    ) -> Iterator[Any]:
        """Run it on each item and yield the results in order.

        Args:
            items: Each is passed as the only argument. Taken as needed: it may be endless.
            progress: Whether to show a bar.
            max_in_flight: How many calls may be without an answer at once.
            timeout_s: How long each answer is worth waiting for.

        Raises:
            NosError: While iterating, at the item whose call failed; those behind it are withdrawn.
        """
        return self._map(items, progress, max(1, max_in_flight), timeout_s)

    def _map(
        self, items: Iterable[Any], progress: bool, max_in_flight: int, timeout_s: float | None
    ) -> Iterator[Any]:
        bar: Any = contextlib.nullcontext()
        if progress:
            from tqdm.auto import tqdm  # picks the notebook's bar; not needed otherwise

            bar = tqdm(total=operator.length_hint(items) or None, desc=self._spec.name, unit="call")
        calls: deque[Call] = deque()
        try:
            with bar:
                for item in items:
                    call = self._prepare((item,), {}, timeout_s)
                    self._engine.submit(self._spec.key, call)
                    calls.append(call)
                    if len(calls) >= max_in_flight:
                        yield calls.popleft().wait(timeout_s)
                        if progress:
                            bar.update()
                while calls:
                    yield calls.popleft().wait(timeout_s)
                    if progress:
                        bar.update()
        finally:
            for call in calls:
                call.cancel()

    def stream(
        self,
        *,
        max_pending: int | None = None,
        policy: Policy = "block",
        ordered: bool = True,
    ) -> Stream:
        """Open a stream for frames of this method; see `Stream`."""
        flow = flow_of(policy, ordered=ordered)
        return Stream(self, self._engine, self._spec.key, max_pending, flow)

    def _prepare_frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return self._prepare(args, kwargs, self._pop_timeout(kwargs))


class Stream:
    """Frames in, results out, over a connection of its own.

    One thread may send and receive in turn: then iterating ends when everything that it sent has its
    end. Or one thread sends while another receives: then iterating ends after `finish()`. Memory is
    bounded by the server's window for frames and by `max_pending` for results that nobody takes.

    It outlives a worker, a gateway or a connection that is lost: frames that were sent end in an
    `UnavailableError`, and those that follow go to whoever serves the model next. It breaks, and says so to
    sender and receiver, when nobody does for 30 s.

    Args:
        method: What runs on each frame.
        engine: Carries it.
        key: The model version.
        max_pending: How many frames may be without an end or with a result that was not taken, before
            `send` waits; None for no limit.
        flow: From `policy`: under `block` `send` waits for room; under `drop_oldest` up to 16 frames wait
            instead, under `latest` one, and at most two are at the server. A frame that is dropped ends at
            once in an `OverloadedError`. From `ordered`: False gives results as they are there.
    """

    def __init__(
        self, method: Method, engine: Engine, key: str, max_pending: int | None, flow: Flow
    ) -> None:
        self._method = method
        self._max_pending = max_pending
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._core = StreamCore(engine, key, flow, self._change)

    @property
    def route(self) -> str:
        """Which way the frames go; empty until that is known."""
        return self._core.route

    def send(self, *args: Any, **kwargs: Any) -> int:
        """Send a frame; waits while the server's window is full.

        The arguments may be changed as soon as this returns.

        Args:
            *args: As the method's signature says.
            **kwargs: As the method's signature says, and `timeout_s`.

        Returns:
            The frame's number: 1, 2, 3, ...

        Raises:
            InvalidRequestError: If the arguments do not fit; nothing was sent.
            StreamClosedError: If the stream was closed or finished.
        """
        self._check_pid()
        call = self._method._prepare_frame(args, kwargs)  # noqa: SLF001 - of this module
        results = self._core.results
        with self._changed:
            if self._max_pending is not None:
                self._changed.wait_for(
                    lambda: results.num_pending < (self._max_pending or 1) or results.is_finished
                )
            if results.is_finished:
                raise StreamClosedError("the stream is finished: it takes no more frames")
            seq = results.on_send(threading.get_ident())
        admitted: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._core.submit(call, seq, partial(admitted.put, None))
        if not self._core.is_blocking:
            return seq
        try:
            admitted.get()
        except BaseException:
            call.cancel()
            raise
        return seq

    def buffer(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = "uint8"
    ) -> np.ndarray[Any, Any]:
        """Return an array to fill and `send` once, without a copy on the server's host.

        Its content is arbitrary. Once it was sent it is the server's: ask for another for the next frame.

        Args:
            shape: Of the frame, for instance `(480, 640, 3)`.
            dtype: Of its items.
        """
        self._check_pid()
        return self._core.buffer(shape, dtype)

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        """Return the next result.

        Raises:
            StopIteration: If none will come.
            NosError: If the stream broke while nothing was in flight.
        """
        self._check_pid()
        me = threading.get_ident()
        with self._changed:
            while (result := self._core.results.take(me)) is None:
                self._changed.wait()
            self._changed.notify_all()
            return result

    def finish(self) -> None:
        """Say that no frame will follow; results still come."""
        self._check_pid()
        with self._changed:
            self._core.results.is_finished = True
            self._changed.notify_all()
        self._core.finish()

    def close(self) -> None:
        """End at once: frames without an end are withdrawn; idempotent."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._core.results.is_finished = True
            self._changed.notify_all()
        self._core.close()

    def _change(self, apply: Any) -> None:
        with self._changed:
            apply()
            self._changed.notify_all()

    def _check_pid(self) -> None:
        if os.getpid() != self._pid:
            raise StreamClosedError(
                "the stream was opened before this process was forked", hint="Open another here"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


class ModelHandle(HandleCore, BulkHandle):
    """A remote model that is called like a local one.

    `model(x)` runs it; its public methods are attributes (`model.encode(x)`), each with `submit`, `map` and
    `stream` of its own.
    """

    def _make_method(self, engine: Engine, spec: Any, method: models_pb2.Method) -> Method:
        return Method(engine, spec, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see `Method.__call__`."""
        return self.method(None)(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Call:
        """Start the model and return a `concurrent.futures.Future`; see `Method.submit`."""
        future: Call = self.method(None).submit(*args, **kwargs)
        return future

    def map(
        self,
        items: Iterable[Any],
        *,
        method: str | None = None,
        progress: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout_s: float | None = None,
    ) -> Iterator[Any]:
        """Run the model, or one of its methods, on each item; see `Method.map`."""
        found: Method = self.method(method)
        return found.map(items, progress=progress, max_in_flight=max_in_flight, timeout_s=timeout_s)

    def stream(
        self,
        method: str | None = None,
        *,
        max_pending: int | None = None,
        policy: Policy = "block",
        ordered: bool = True,
    ) -> Stream:
        """Open a stream for frames of one method, by default of the model's call; see `Stream`."""
        found: Method = self.method(method)
        return found.stream(max_pending=max_pending, policy=policy, ordered=ordered)

    def bench(
        self,
        *args: Any,
        method: str | None = None,
        num_calls: int = 50,
        concurrency: Sequence[int] = (1, 4, 16),
        **kwargs: Any,
    ) -> Bench:
        """Measure latency and rate of one call, made again and again from here.

        Args:
            *args: Of the call.
            method: Which method, by default the model's call.
            num_calls: How many calls for each number of `concurrency`.
            concurrency: How many calls are under way at once, one number after the other.
            **kwargs: Of the call.

        Raises:
            InvalidRequestError: If the arguments do not fit.
            NosError: What ended a call; the others are withdrawn.
        """
        found: Method = self.method(method)
        points = _bench.measure(
            lambda: found.submit(*args, **kwargs), num_calls, tuple(concurrency)
        )
        return _bench.Bench(model=self.spec.key, method=found.info.name, points=points)

    @property
    def methods(self) -> dict[str, Method]:
        """All methods by name, whatever the handle itself has of that name."""
        return dict(self._methods)

    def info(self) -> ModelInfo:
        """Return how the model stands now."""
        return self._engine.wait(_control.get_info(self.spec.key))

    def load(self, *, pin: bool | None = None) -> ModelInfo:
        """Place it on a device; see `Client.load`."""
        return self._engine.wait(_control.load(self.spec.key, pin=pin))

    def unload(self) -> ModelInfo:
        """Take it off its devices; see `Client.unload`."""
        return self._engine.wait(_control.unload(self.spec.key))

    def scale(
        self,
        replicas: int | None = None,
        *,
        min: int | None = None,
        max: int | None = None,
        device: str = "",
        memory_bytes: int | None = None,
        placement: str = "",
    ) -> ModelInfo:
        """Say how many replicas it may have; see `Client.scale`."""
        rpc = _control.scale(
            self.spec.key,
            replicas,
            min,
            max,
            device=device,
            memory_bytes=memory_bytes,
            placement=placement,
        )
        return self._engine.wait(rpc)
