"""The client for asyncio: the names of `nos.client`, to be awaited.

It shares the engine of `nos.client`, whose threads do the waiting, so both behave alike, also in forked
children; gRPC's own asyncio stack is not used: it supports one event loop per process.
"""

from __future__ import annotations

import asyncio
import operator
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from nos import _address, _control, _profile, _registering, _stats, _timeline, _tokens
from nos._channel import check_listening
from nos._engine import Engine, Feed, Via
from nos._link import GRACE_S, out_of_time
from nos._stream import Policy, StreamCore, flow_of
from nos.client import DEFAULT_TIMEOUT_S, MAX_IN_FLIGHT
from nos.errors import NosError, StreamClosedError
from nos.handles import HandleCore, MethodCore

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterable,
        AsyncIterator,
        Callable,
        Iterable,
        Mapping,
        Sequence,
    )
    from pathlib import Path
    from typing import Self

    import numpy as np
    import numpy.typing as npt

    from nos._control import Rpc
    from nos._link import Call, Flow
    from nos._profile import Profile
    from nos._stats import ModelStats, StatsList
    from nos._timeline import MemoryHistory
    from nos._tokens import NewToken, TokenList
    from nos.types import Event, LogLine, Memory, ModelChange, ModelInfo, ModelList, Result, Status
    from nos.wire.v1 import models_pb2

T = TypeVar("T")


async def _answer(engine: Engine, rpc: Rpc[T], timeout_s: float | None = None) -> T:
    return await asyncio.wrap_future(engine.call(rpc, timeout_s))


async def _send(engine: Engine, key: str, call: Call, timeout_s: float | None) -> Any:
    engine.submit(key, call)
    return await _wait(call, timeout_s)


async def _wait(call: Call, timeout_s: float | None) -> Any:
    """Wait for a call as `Call.wait` does."""
    limit_s = timeout_s + GRACE_S if timeout_s else None
    try:
        return await asyncio.wait_for(asyncio.wrap_future(call), limit_s)
    except TimeoutError as error:
        if isinstance(error, NosError):
            raise
        raise out_of_time(timeout_s) from error


class AsyncClient:
    """A connection to a server, for one event loop; `await nos.AsyncClient.connect()` makes it."""

    def __init__(
        self, target: _address.Target, *, timeout_s: float = DEFAULT_TIMEOUT_S, via: Via = "auto"
    ) -> None:
        self._target = target
        self._engine = Engine(target, timeout_s, via)

    @classmethod
    async def connect(
        cls,
        address: str | None = None,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        via: Via = "auto",
    ) -> Self:
        """Connect to a running server; see `nos.connect`."""
        target = _address.find(address, token, token_file)
        await asyncio.to_thread(check_listening, target.address)
        client = cls(target, timeout_s=timeout_s, via=via)
        try:
            await client.status()
        except BaseException:
            client._engine.close()
            raise
        return client

    @property
    def address(self) -> str:
        """The gateway's address."""
        return self._target.url

    async def status(self, *, timeout_s: float | None = None) -> Status:
        """See `Client.status`."""
        target = self._target
        rpc = _control.get_status(target.address, target.source, self._engine.routes())
        return await _answer(self._engine, rpc, timeout_s)

    async def memory(self, *, timeout_s: float | None = None) -> Memory:
        """See `Client.memory`."""
        return (await self.status(timeout_s=timeout_s)).memory

    async def memory_history(self, *, timeout_s: float | None = None) -> MemoryHistory:
        """See `Client.memory_history`."""
        return await _answer(self._engine, _timeline.get(), timeout_s)

    async def models(self, pattern: str = "", *, timeout_s: float | None = None) -> ModelList:
        """See `Client.models`."""
        return await _answer(self._engine, _control.list_models(pattern), timeout_s)

    async def info(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """See `Client.info`."""
        return await _answer(self._engine, _control.get_info(name), timeout_s)

    async def model(self, name: str, *, timeout_s: float | None = None) -> AsyncModelHandle:
        """See `Client.model`."""
        spec = await _answer(self._engine, _control.get_spec(name), timeout_s)
        return AsyncModelHandle(self._engine, spec)

    async def load(
        self, name: str, *, pin: bool | None = None, timeout_s: float | None = None
    ) -> ModelInfo:
        """See `Client.load`."""
        return await _answer(self._engine, _control.load(name, pin=pin), timeout_s)

    async def unload(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """See `Client.unload`."""
        return await _answer(self._engine, _control.unload(name), timeout_s)

    async def profile(self, name: str, *, timeout_s: float | None = None) -> Profile:
        """See `Client.profile`."""
        return await _answer(self._engine, _profile.get(name), timeout_s)

    @overload
    async def stats(self, name: str, *, timeout_s: float | None = None) -> ModelStats: ...

    @overload
    async def stats(self, *, timeout_s: float | None = None) -> StatsList: ...

    async def stats(
        self, name: str = "", *, timeout_s: float | None = None
    ) -> ModelStats | StatsList:
        """See `Client.stats`."""
        if name:
            return await _answer(self._engine, _stats.get(name), timeout_s)
        return await _answer(self._engine, _stats.get_all(), timeout_s)

    async def scale(
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
        """See `Client.scale`."""
        rpc = _control.scale(
            name, replicas, min, max, device=device, memory_bytes=memory_bytes, placement=placement
        )
        return await _answer(self._engine, rpc, timeout_s)

    async def scale_workers(
        self,
        count: int | None = None,
        *,
        min: int = 1,
        max: int = 1,
        timeout_s: float | None = None,
    ) -> list[str]:
        """See `Client.scale_workers`."""
        return await _answer(self._engine, _control.scale_workers(count, min, max), timeout_s)

    async def logs(
        self, name: str, *, max_lines: int = 0, timeout_s: float | None = None
    ) -> list[LogLine]:
        """See `Client.logs`."""
        return await _answer(self._engine, _control.get_logs(name, max_lines), timeout_s)

    async def register(
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
        """See `Client.register`."""
        return await asyncio.to_thread(
            _registering.register,
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

    async def unregister(self, name: str, *, timeout_s: float | None = None) -> None:
        """See `Client.unregister`."""
        await _answer(self._engine, _control.delete(name), timeout_s)

    async def create_token(
        self,
        tenant: str,
        *,
        role: str = "user",
        ttl_s: float = 0.0,
        label: str = "",
        timeout_s: float | None = None,
    ) -> NewToken:
        """See `Client.create_token`."""
        return await _answer(self._engine, _tokens.create(tenant, role, ttl_s, label), timeout_s)

    async def list_tokens(self, *, timeout_s: float | None = None) -> TokenList:
        """See `Client.list_tokens`."""
        return await _answer(self._engine, _tokens.list_all(), timeout_s)

    async def revoke_token(self, token_id: str, *, timeout_s: float | None = None) -> None:
        """See `Client.revoke_token`."""
        await _answer(self._engine, _tokens.revoke(token_id), timeout_s)

    def watch(self) -> AsyncFeed[ModelChange]:
        """See `Client.watch`."""
        return AsyncFeed(self._engine.feed(_control.watch_models()))

    def events(self, *, status_interval_s: float = 0.0) -> AsyncFeed[Event]:
        """See `Client.events`."""
        rpc = _control.watch_events(status_interval_s, self.address)
        return AsyncFeed(self._engine.feed(rpc))

    async def close(self) -> None:
        """See `Client.close`."""
        self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<nos.AsyncClient of {self.address}>"


class AsyncFeed(Generic[T]):
    """News from the server, as they come; iterate over it in one task."""

    def __init__(self, feed: Feed[T]) -> None:
        self._feed = feed
        self._arrived: asyncio.Queue[tuple[T] | NosError | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def pump() -> None:
            end: NosError | None = None
            try:
                for news in feed:
                    loop.call_soon_threadsafe(self._arrived.put_nowait, (news,))
            except NosError as error:
                end = error
            except RuntimeError:  # the loop is closed: nobody waits
                return
            _call_soon(loop, lambda: self._arrived.put_nowait(end))

        threading.Thread(target=pump, name="nos-feed", daemon=True).start()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        got = await self._arrived.get()
        if isinstance(got, tuple):
            return got[0]
        self._arrived.put_nowait(None)
        if got is not None:
            raise got
        raise StopAsyncIteration

    def close(self) -> None:
        """End it."""
        self._feed.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncItems:
    """The items of a generator method, as the model yields them."""

    def __init__(self, engine: Engine, key: str, call: Call) -> None:
        self._call = call
        self._arrived: asyncio.Queue[tuple[Any] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        put = self._arrived.put_nowait
        call.stream_items(lambda value: _call_soon(loop, lambda: put((value,))))
        call.add_done_callback(lambda _: _call_soon(loop, lambda: put(None)))
        engine.submit(key, call)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        got = await self._arrived.get()
        if got is not None:
            return got[0]
        self._arrived.put_nowait(None)
        if not self._call.cancelled():
            self._call.result()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the generator on the server."""
        self._call.cancel()


class AsyncMethod(MethodCore):
    """A method of a remote model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return an awaitable result; of a generator, an asynchronous iterator. See `Method.__call__`."""
        timeout_s = self._pop_timeout(kwargs)
        call = self._prepare(args, kwargs, timeout_s)
        if self.info.is_generator:
            return AsyncItems(self._engine, self._spec.key, call)
        return _send(self._engine, self._spec.key, call, timeout_s)

    def submit(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Start it and return a future; see `Method.submit`."""
        call = self._prepare(args, kwargs, self._pop_timeout(kwargs))
        self._engine.submit(self._spec.key, call)
        return asyncio.wrap_future(call)

    async def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        progress: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """Run it on each item and yield the results in order; see `Method.map`."""
        bar: Any = None
        if progress:
            from tqdm.auto import tqdm  # picks the notebook's bar; not needed otherwise

            total = operator.length_hint(items) or None
            bar = tqdm(total=total, desc=self._spec.name, unit="call")
        calls: deque[Call] = deque()
        try:
            async for item in _each(items):
                call = self._prepare((item,), {}, timeout_s)
                self._engine.submit(self._spec.key, call)
                calls.append(call)
                if len(calls) >= max(1, max_in_flight):
                    yield await _wait(calls.popleft(), timeout_s)
                    if bar is not None:
                        bar.update()
            while calls:
                yield await _wait(calls.popleft(), timeout_s)
                if bar is not None:
                    bar.update()
        finally:
            for call in calls:
                call.cancel()
            if bar is not None:
                bar.close()

    def stream(
        self,
        *,
        max_pending: int | None = None,
        policy: Policy = "block",
        ordered: bool = True,
    ) -> AsyncStream:
        """Open a stream for frames of this method; see `AsyncStream`."""
        flow = flow_of(policy, ordered=ordered)
        return AsyncStream(self, self._engine, self._spec.key, max_pending, flow)

    def _prepare_frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return self._prepare(args, kwargs, self._pop_timeout(kwargs))


class AsyncStream:
    """Frames in, results out; as `nos.client.Stream`, with tasks in place of threads."""

    def __init__(
        self, method: AsyncMethod, engine: Engine, key: str, max_pending: int | None, flow: Flow
    ) -> None:
        self._method = method
        self._max_pending = max_pending
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        #: Set and replaced at each change; touched by the loop only.
        self._changed = self._loop.create_future()
        self._core = StreamCore(engine, key, flow, self._change)

    @property
    def route(self) -> str:
        """Which way the frames go; empty until that is known."""
        return self._core.route

    def buffer(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = "uint8"
    ) -> np.ndarray[Any, Any]:
        """Return an array to fill and `send` once; see `Stream.buffer`."""
        self._check_pid()
        return self._core.buffer(shape, dtype)

    async def send(self, *args: Any, **kwargs: Any) -> int:
        """Send a frame; waits while the server's window is full. See `Stream.send`."""
        self._check_pid()
        call = self._method._prepare_frame(args, kwargs)  # noqa: SLF001 - of this module
        results = self._core.results
        if self._max_pending is not None:
            while results.num_pending >= self._max_pending and not results.is_finished:
                await asyncio.shield(self._changed)
        if results.is_finished:
            raise StreamClosedError("the stream is finished: it takes no more frames")
        seq = results.on_send(asyncio.current_task())
        admitted = self._loop.create_future()

        def on_admitted() -> None:
            _call_soon(self._loop, lambda: None if admitted.done() else admitted.set_result(None))

        self._core.submit(call, seq, on_admitted)
        if not self._core.is_blocking:
            return seq
        try:
            await admitted
        except BaseException:
            call.cancel()
            raise
        return seq

    def __aiter__(self) -> AsyncIterator[Result]:
        return self

    async def __anext__(self) -> Result:
        self._check_pid()
        me = asyncio.current_task()
        try:
            while (result := self._core.results.take(me)) is None:
                await asyncio.shield(self._changed)
        except StopIteration:
            raise StopAsyncIteration from None
        self._wake()
        return result

    async def finish(self) -> None:
        """Say that no frame will follow; results still come."""
        self._check_pid()
        self._core.results.is_finished = True
        self._wake()
        self._core.finish()

    async def close(self) -> None:
        """End at once: frames without an end are withdrawn; idempotent."""
        if os.getpid() != self._pid:
            return
        self._core.results.is_finished = True
        self._wake()
        self._core.close()

    def _change(self, apply: Callable[[], None]) -> None:
        def run() -> None:
            apply()
            self._wake()

        _call_soon(self._loop, run)

    def _wake(self) -> None:
        changed, self._changed = self._changed, self._loop.create_future()
        changed.set_result(None)

    def _check_pid(self) -> None:
        if os.getpid() != self._pid:
            raise StreamClosedError(
                "the stream was opened before this process was forked", hint="Open another here"
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncModelHandle(HandleCore):
    """A remote model whose methods are awaited; see `nos.client.ModelHandle`."""

    def _make_method(self, engine: Engine, spec: Any, method: models_pb2.Method) -> AsyncMethod:
        return AsyncMethod(engine, spec, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see `AsyncMethod.__call__`."""
        return self.method(None)(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Start the model and return a future; see `Method.submit`."""
        future: asyncio.Future[Any] = self.method(None).submit(*args, **kwargs)
        return future

    def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        method: str | None = None,
        progress: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """Run the model, or one of its methods, on each item; see `Method.map`."""
        found: AsyncMethod = self.method(method)
        return found.map(items, progress=progress, max_in_flight=max_in_flight, timeout_s=timeout_s)

    def stream(
        self,
        method: str | None = None,
        *,
        max_pending: int | None = None,
        policy: Policy = "block",
        ordered: bool = True,
    ) -> AsyncStream:
        """Open a stream for frames of one method, by default of the model's call."""
        found: AsyncMethod = self.method(method)
        return found.stream(max_pending=max_pending, policy=policy, ordered=ordered)

    @property
    def methods(self) -> dict[str, AsyncMethod]:
        """All methods by name, whatever the handle itself has of that name."""
        return dict(self._methods)

    async def info(self) -> ModelInfo:
        """Return how the model stands now."""
        return await _answer(self._engine, _control.get_info(self.spec.key))

    async def load(self, *, pin: bool | None = None) -> ModelInfo:
        """Place it on a device; see `Client.load`."""
        return await _answer(self._engine, _control.load(self.spec.key, pin=pin))

    async def unload(self) -> ModelInfo:
        """Take it off its devices; see `Client.unload`."""
        return await _answer(self._engine, _control.unload(self.spec.key))

    async def scale(
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
        return await _answer(self._engine, rpc)


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _call_soon(loop: asyncio.AbstractEventLoop, run: Callable[[], None]) -> None:
    """Run something in the loop, or not at all where the loop is closed."""
    try:
        loop.call_soon_threadsafe(run)
    except RuntimeError:
        return
