"""The worker's handles to executors and to the fork server that makes them.

Everything here belongs to one event loop: call it from the loop's thread only. That thread must live as
long as the worker, since an executor that was spawned dies with the thread that spawned it. What comes
from an executor is checked like input from the network; one that breaks the protocol is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from nos.errors import (
    ExecutorLostError,
    InternalError,
    LimitExceededError,
    LoadError,
    NosError,
    OutOfDeviceMemoryError,
    OverloadedError,
)

from nos_backend.executor.arena import DEFAULT_ARENA_BYTES, Arena, ArenaFullError
from nos_backend.executor.confinement import Bounds
from nos_backend.executor.log_lines import LogLines
from nos_backend.executor.messages import (
    MAX_SHORT_FREED,
    Decoder,
    MalformedError,
    Message,
    ShortCall,
    ShortResult,
    check_block,
    check_node,
    encode,
)
from nos_backend.worker.blocks import Block, Blocks
from nos_backend.worker.forms import Forms, Nodes
from nos_backend.worker.limits import WorkLimits
from nos_backend.worker.processes import START_TIMEOUT_S, ForkServer, ProcessRequest, make_process
from nos_backend.worker.replies import (
    NO_BYTES,
    NO_LEASE,
    TRACEBACK_TAIL_LINES,
    Constructed,
    Lease,
    LoadedModel,
    Reply,
    to_error,
    to_load_error,
    to_seconds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nos_backend.definition import ModelDefinition
    from nos_backend.worker.arguments import Call
    from nos_backend.worker.processes import Process

__all__ = ["Block", "Blocks", "Constructed", "Executor", "ForkServer", "LoadedModel", "Reply"]

logger = logging.getLogger(__name__)
#: What models print.
log_output = logging.getLogger("nos_backend.executor.log")

#: How long a dead executor's socket may take to say so.
_DRAIN_TIMEOUT_S: Final = 1.0
_CLOSE_TIMEOUT_S: Final = 2.0
_LOG_READ_BYTES: Final = 1 << 16
#: Freed output that is not announced yet; more of it is announced at once.
_LAZY_FREE_BYTES: Final = 64 << 20
_FULL_PIPE_S: Final = 0.005
_REASON_CHARS: Final = 300

#: What comes of taking apart a message that is not as it should be.
_NONSENSE: Final = (
    AttributeError,
    KeyError,
    MalformedError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(slots=True)
class _Call:
    key: str
    sink: Callable[[Reply], None]
    block: Block | Blocks | None


class Executor(asyncio.Protocol):
    """A process that runs models of one owner on one device."""

    def __init__(self, name: str, device: str, arenas: tuple[Arena, Arena], log_fd: int) -> None:
        self.name = name
        self.device = device
        self.pid = 0
        self._loop = asyncio.get_running_loop()
        #: Resolves with why it ended: a `kill` reason, exit code or signal in words.
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self._input, self._output = arenas
        self._log_fd = log_fd
        self._log = LogLines()
        #: Called with a model and a line that it printed.
        self._on_line: Callable[[str, str], None] = _no_line
        #: The model that runs or loads, or did last.
        self._speaker = ""
        self._decoder = Decoder()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._disconnected: asyncio.Future[None] = self._loop.create_future()
        self._request_ids = itertools.count(1)
        #: Everything but calls that has no answer yet.
        self._requests: dict[int, asyncio.Future[dict[str, Any] | NosError]] = {}
        #: The transport's, which has no way to send descriptors.
        self._socket: socket.socket
        #: Calls without their last reply.
        self._calls: dict[int, _Call] = {}
        #: Blocks of ended calls whose input a model still refers to.
        self._kept: dict[int, Block | Blocks] = {}
        self._forms = Forms()
        self._nodes = Nodes()
        self._freed: list[int] = []
        self._freed_bytes = 0
        self._released: list[int] = []
        #: Whether the executor waits for memory, so that what is freed is announced at once.
        self._is_needy = False
        #: What is to be sent at once; None while everything is.
        self._corked: list[bytes] | None = None
        #: Why it was killed, or that it ended by itself; nothing is sent to it any more.
        self._lost: str | None = None
        self._transport: asyncio.Transport
        self._process: Process
        self._watch: asyncio.Task[None]
        os.set_blocking(log_fd, False)
        self._loop.add_reader(log_fd, self._read_log)

    @classmethod
    async def start(
        cls,
        name: str,
        *,
        device: str,
        num_threads: int,
        forkserver: ForkServer | None,
        python: str = sys.executable,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        bounds: Bounds | None = None,
        rules_fd: int | None = None,
        on_line: Callable[[str, str], None] | None = None,
        limits: WorkLimits | None = None,
    ) -> Executor:
        """Start one and wait until it takes calls.

        Args:
            name: For logs and `ps`.
            device: As torch writes it.
            num_threads: Threads of one torch operation.
            forkserver: Whose child it becomes; without one it is spawned.
            python: The interpreter, where it is spawned.
            arena_bytes: Size of each of its two arenas; only what is used takes memory.
            bounds: What it is held to; None holds it to the least.
            rules_fd: Rules of landlock beside them; stays the caller's.
            on_line: Called on the loop with a model's key and each line that it printed.
            limits: What its models may be given, and print; None for what is usual.

        Raises:
            ExecutorLostError: If it does not start, or the fork server is dead.
        """
        with contextlib.ExitStack() as descriptors:
            ours, theirs = socket.socketpair()
            descriptors.enter_context(theirs)
            input_fd, output_fd = Arena.create_fd(arena_bytes), Arena.create_fd(arena_bytes)
            log_read, log_write = os.pipe()
            for fd in (input_fd, output_fd, log_write):
                descriptors.callback(os.close, fd)
            self = cls(name, device, (Arena(input_fd), Arena(output_fd, writable=False)), log_read)
            self._socket = ours
            self._on_line = on_line or _no_line
            limits = limits or WorkLimits()
            self._log = LogLines(limits.max_log_lines)
            await self._loop.create_connection(lambda: self, sock=ours)
            request = ProcessRequest(
                name=name,
                device=device,
                num_threads=num_threads,
                max_image_pixels=limits.max_image_pixels,
                python=python,
                socket_fd=theirs.fileno(),
                input_fd=input_fd,
                output_fd=output_fd,
                log_fd=log_write,
                bounds=bounds or Bounds(),
                rules_fd=rules_fd,
            )
            try:
                self._process = await make_process(request, forkserver)
            except BaseException:
                self._abandon()
                raise
        self.pid = self._process.pid
        self._watch = self._loop.create_task(self._watch_process())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready
        except TimeoutError as error:
            self.kill("it did not start in time")
            raise ExecutorLostError(f"executor {name} did not start in time") from error
        except BaseException:
            self.kill("its start was given up")
            raise
        return self

    async def load(self, definition: ModelDefinition, timeout_s: float) -> LoadedModel:
        """Load a model version; calls wait meanwhile.

        Raises:
            LoadError: If its source fails, with a `ModelError` of the whole traceback as the cause; or if it
                takes longer than `timeout_s`, and then the executor is killed.
            OutOfDeviceMemoryError: If the device's memory does not suffice.
            ExecutorLostError: If the executor ends before.
        """
        fields = _fields(definition)
        done = await self._load("load", definition.key, timeout_s, definition=fields)
        return LoadedModel(definition.key, int(done["weight_bytes"]), float(done["took_s"]))

    async def construct(self, definition: ModelDefinition, timeout_s: float) -> Constructed:
        """Make a model here without serving it; calls wait meanwhile.

        Raises:
            NosError: As `load`.
        """
        fields = _fields(definition)
        done = await self._load("construct", definition.key, timeout_s, definition=fields)
        loose = done["loose"]
        return Constructed(
            _size(done["size_bytes"]),
            _size(done["skeleton_bytes"]),
            str(done["reason"]),
            str(done["made_first"]),
            tuple(str(name) for name in loose),
            float(done["took_s"]),
        )

    async def attempt(
        self, definition: ModelDefinition, call: Call, data: bytes, timeout_s: float
    ) -> None:
        """Make one call of what was constructed; its result is dropped.

        Args:
            definition: Of the model.
            call: Which call.
            data: What its nodes' offsets count into.
            timeout_s: How long it may take.

        Raises:
            NosError: As `load`.
        """
        with _in_memory(data) as fd:
            await self._load(
                "try",
                definition.key,
                timeout_s,
                (fd,),
                definition={"source_name": definition.source_name},
                method=call.method,
                args=call.arguments,
                size_bytes=len(data),
            )

    async def store(self, key: str, weights_fd: int, skeleton_fd: int, timeout_s: float) -> None:
        """Have what was constructed written to shared memory, of which nothing stays mapped.

        Raises:
            NosError: As `load`.
        """
        await self._load("store", key, timeout_s, (weights_fd, skeleton_fd))

    async def adopt(self, key: str, weights_fd: int | None, timeout_s: float) -> None:
        """Serve what was constructed here, its weights mapped from shared memory if they are there.

        Raises:
            NosError: As `load`.
        """
        await self._load("adopt", key, timeout_s, () if weights_fd is None else (weights_fd,))

    async def bind(
        self,
        definition: ModelDefinition,
        weights: tuple[int, int],
        skeleton: tuple[int, int],
        timeout_s: float,
    ) -> float:
        """Serve a model that was constructed elsewhere; runs its source and not its constructor.

        Args:
            definition: What was constructed.
            weights: Descriptor and bytes of what `store` wrote.
            skeleton: As well.
            timeout_s: The most that it may take.

        Returns:
            Seconds that it took.

        Raises:
            NosError: As `load`.
        """
        done = await self._load(
            "bind",
            definition.key,
            timeout_s,
            (weights[0], skeleton[0]),
            definition=_fields(definition),
            size_bytes=weights[1],
            skeleton_bytes=skeleton[1],
        )
        return float(done["took_s"])

    async def evict(self, key: str) -> float:
        """Take a model's weights off the device, behind the calls before it; returns the seconds it took.

        Raises:
            NosError: If it has no run of weights here, or the executor ends before.
        """
        return float((await self._ask({"op": "evict", "key": key}))["took_s"])

    async def reload(self, key: str) -> float:
        """Bring an evicted model's weights back; returns the seconds it took.

        Raises:
            NosError: As `evict`; OutOfDeviceMemoryError if the device has no room.
        """
        return float((await self._ask({"op": "reload", "key": key}))["took_s"])

    async def profile(self, message: dict[str, Any], data: bytes) -> Any:
        """Have a method predicted or measured; returns the points, which nobody has checked.

        Args:
            message: `predict` or `measure` as in `executor/messages.py`.
            data: The sample's bytes.

        Raises:
            NosError: What the model raised, or that the executor ended.
        """
        with _in_memory(data) as fd:
            done = await self._ask({**message, "size_bytes": len(data)}, (fd,))
        return done["points"]

    async def _load(
        self, operation: str, key: str, timeout_s: float, fds: tuple[int, ...] = (), **fields: Any
    ) -> dict[str, Any]:
        """Have one step of a load done; a caller that leaves makes the executor forget the model."""
        if not self._calls:
            self._let_speak(key)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask({"op": operation, "key": key, **fields}, fds)
        except TimeoutError as error:
            self.kill(f"{key} did not load within {timeout_s:g} s")
            raise LoadError(
                f"{key} did not load in time",
                expected=f"at most {timeout_s:g} s",
                got="\n".join(self.log_tail()[-TRACEBACK_TAIL_LINES:]),
            ) from error
        except asyncio.CancelledError:
            self._send({"op": "unload", "key": key})
            raise
        except ExecutorLostError:
            raise
        except NosError as error:
            raise to_load_error(key, error) from error

    async def _ask(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """Send a request and return what comes of it."""
        # Descriptors do not go through the transport, and must not overtake what waits in it.
        while fds and self._transport.get_write_buffer_size() and self._lost is None:  # noqa: ASYNC110
            await asyncio.sleep(_FULL_PIPE_S)
        if self._lost is not None:
            raise self._loss()
        if fds:
            self._send_fds(fds)
            message["num_fds"] = len(fds)
        request_id = next(self._request_ids)
        future: asyncio.Future[dict[str, Any] | NosError] = self._loop.create_future()
        self._requests[request_id] = future
        self._send({**message, "id": request_id})
        try:
            outcome = await future
        finally:
            del self._requests[request_id]
        if isinstance(outcome, NosError):
            raise outcome
        return outcome

    def _send_fds(self, fds: tuple[int, ...]) -> None:
        data = encode({"op": "fds"})
        try:
            is_sent = socket.send_fds(self._socket, [data], fds) == len(data)
        except OSError:
            is_sent = False
        if not is_sent:
            self.kill("its socket takes nothing")
            raise self._loss()

    async def unload(self, key: str) -> None:
        """Forget a model after the calls before it; one that is not loaded is no error."""
        self._send({"op": "unload", "key": key})

    def allocate(self, size: int) -> Block:
        """Reserve `size` bytes for a call's input.

        Raises:
            OverloadedError: If the input arena has no room now.
            LimitExceededError: If it never has.
            ExecutorLostError: If the executor has ended.
        """
        if self._lost is not None:
            raise self._loss()
        if size > self._input.size_bytes:
            raise LimitExceededError(
                "the frame is too large",
                expected=f"at most {self._input.size_bytes} bytes",
                got=str(size),
            )
        try:
            return Block(self._input, size)
        except ArenaFullError as error:
            raise OverloadedError(
                "no room for the frame",
                got=f"{size} bytes beside {self._input.used_bytes} in use",
                hint="Retry later, or send fewer frames at once",
            ) from error

    def copy(self, block: Block) -> Block:
        """Return another block of the same bytes; fails as `allocate`."""
        made = self.allocate(len(block.view))
        made.view[:] = block.view
        return made

    def call(
        self,
        call_id: int,
        key: str,
        method: str,
        arguments: list[list[Any]],
        block: Block | Blocks | None,
        sink: Callable[[Reply], None],
        *,
        recurs: bool = False,
        is_each: bool = False,
    ) -> None:
        """Run a method behind the calls before it; never blocks.

        Args:
            call_id: Names it for `cancel`; of no other call of this executor, past or present, unless that
                ran out of memory.
            key: The model version.
            method: `__call__` or a public method.
            arguments: [name, node] pairs; an empty name means by position.
            block: Where the nodes' bytes are; becomes the executor's to release.
            sink: Gets any number of items and then exactly one last reply, never before this returns.
            recurs: Whether `arguments` is the very list of other calls of the method; never changed then.
            is_each: Whether `arguments` are those of several calls, of whose results the result is a list.

        Raises:
            TypeError: If the arguments are no nodes; then nothing was sent, and the block is the caller's.
        """
        if self._lost is not None:
            if block is not None:
                block.release()
            self._loop.call_soon(sink, Reply("error", error=self._loss()))
            return
        if not self._calls:
            self._let_speak(key)
        self._calls[call_id] = _Call(key, sink, block)
        form = self._forms.find(key, method, arguments) if recurs else None
        if form is not None and isinstance(block, Block) and self._send_short(call_id, form, block):
            return
        message: dict[str, Any] = {
            "op": "call",
            "id": call_id,
            "key": key,
            "method": method,
            "args": arguments,
            "block": None,
        }
        if is_each:
            message["each"] = True
        if isinstance(block, Blocks):
            message["block"], message["pieces"] = [0, block.size], block.pieces
        elif block is not None:
            message["block"] = [block.offset, len(block.view)]
            if recurs:
                if self._forms.is_full:
                    self._forms.clear()
                    self._send({"op": "forget"})
                message["form"] = self._forms.add(key, method, arguments)
        try:
            self._send(message)
        except BaseException:
            del self._calls[call_id]
            self._forms.clear()
            raise

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """Send what is said within as one."""
        corked: list[bytes] = []
        self._corked = corked
        try:
            yield
        finally:
            self._corked = None
            if corked and self._lost is None:
                self._transport.write(b"".join(corked))

    def _write(self, data: bytes) -> None:
        if self._corked is not None:
            self._corked.append(data)
        else:
            self._transport.write(data)

    def _send_short(self, call_id: int, form: int, block: Block) -> bool:
        """Send a call of a form that the executor knows; return False if more has to be said."""
        if len(self._freed) > MAX_SHORT_FREED or self._released:
            return False
        freed, self._freed, self._freed_bytes = self._freed, [], 0
        call = ShortCall(call_id, form, block.offset, len(block.view), freed)
        self._write(call.encode())
        return True

    def cancel(self, call_id: int) -> None:
        """Stop a call that waits, or a generator at its next item; others run to their end."""
        if call_id in self._calls:
            self._send({"op": "cancel", "id": call_id})

    def kill(self, reason: str) -> None:
        """End it at once; every call gets an `ExecutorLostError` that says why."""
        if self._lost is None:
            logger.info("executor %s (pid %d) is killed: %s", self.name, self.pid, reason)
            self._process.kill()
            self._lose(f"killed: {reason}")

    async def close(self) -> None:
        """End it: politely when it has no calls; else these get an `ExecutorLostError`."""
        if self._lost is None and not self._calls:
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await asyncio.shield(self.closed)
        self.kill("closed")
        await asyncio.shield(self.closed)

    def log_tail(self) -> list[str]:
        """Return the last lines that its models printed."""
        return list(self._log.tail)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream socket's is one
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._disconnected.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._lost is not None:
            return
        try:
            for message in self._decoder.feed(data):
                self._handle(message)
                if self._lost is not None:
                    return
        except _NONSENSE as error:
            logger.warning("executor %s broke the protocol: %r", self.name, error)
            self.kill("it broke the protocol")

    def _handle(self, message: Message) -> None:
        match message:
            case ShortResult(call_id, offset, size, compute_s, is_kept, is_in_place, raw):
                if is_in_place:
                    view, lease = self._in_place(self._calls[call_id], offset, size)
                else:
                    check_block([offset, size], self._output.size_bytes)
                    view = self._output.view[offset : offset + size]
                    lease = Lease(lambda: self._release(offset, size, None)) if size else NO_LEASE
                compute_s = to_seconds(compute_s)
                node, known = self._nodes.read(raw, size)
                reply = Reply("result", node, view, compute_s, raw_node=known, _lease=lease)
                self._end_call(call_id, reply, is_kept=is_kept)
            case dict():
                self._handle_object(message)
            case _:
                raise MalformedError("a message that only a worker sends")

    @staticmethod
    def _in_place(call: _Call, offset: int, size: int) -> tuple[memoryview, Lease]:
        """Return a part of a call's input that is its result; the block is the reply's from now on."""
        block = call.block
        start = offset - block.offset if isinstance(block, Block) else -1
        if not isinstance(block, Block) or not 0 <= start <= len(block.view) - size:
            raise MalformedError(f"{size} bytes at {offset} as a result, outside the call's input")
        call.block = None
        return block.view[start : start + size], Lease(block.release)

    def _handle_object(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "result" | "item" | "end" | "error":
                self._reply(message)
            case "doomed":
                self.kill(f"it lost its device: {str(message['reason'])[:_REASON_CHARS]}")
            case "need":
                self._is_needy = True
                self._flush()
            case "unkept":
                for call_id in message["ids"]:
                    self._kept.pop(call_id).release()
            case "done":
                to_seconds(message["took_s"])
                self._end_request(message["id"], message)
            case "failed":
                self._end_request(message["id"], to_error(message["error"]))
            case "ready" if not self._ready.done():
                self._ready.set_result(None)
            case _:
                raise MalformedError("unknown message")

    def _end_request(self, request_id: int, outcome: dict[str, Any] | NosError) -> None:
        request = self._requests.get(request_id)
        if request is not None and not request.done():  # else its caller left
            request.set_result(outcome)

    def _reply(self, message: dict[str, Any]) -> None:
        kind, call_id = message["op"], message["id"]
        compute_s = to_seconds(message["compute_s"])
        error = to_error(message["error"]) if kind == "error" else None
        node, view, lease = None, NO_BYTES, NO_LEASE
        if kind in {"result", "item"}:
            node = message["node"]
            offset, size = 0, 0
            if message["block"] is not None:
                offset, size = check_block(message["block"], self._output.size_bytes)
            check_node(node, size)
            view = self._output.view[offset : offset + size]
            item_of = call_id if kind == "item" else None
            if size or item_of is not None:
                lease = Lease(lambda: self._release(offset, size, item_of))
        reply = Reply(kind, node, view, compute_s, error, _lease=lease)
        if kind == "item":
            self._tell(self._calls[call_id], reply)
        else:
            self._end_call(call_id, reply, is_kept=message.get("kept") is True)

    def _end_call(self, call_id: int, reply: Reply, *, is_kept: bool) -> None:
        call = self._calls.pop(call_id)
        if self._calls:
            self._let_speak(next(iter(self._calls.values())).key)
        self._is_needy = False
        if call.block is not None:
            if is_kept:
                self._kept[call_id] = call.block
            elif isinstance(reply.error, OutOfDeviceMemoryError):
                reply = Reply.repeatable(reply, call.block.release)
            else:
                call.block.release()
        elif isinstance(reply.error, OutOfDeviceMemoryError):
            reply = Reply.repeatable(reply, None)
        self._tell(call, reply)

    def _tell(self, call: _Call, reply: Reply) -> None:
        try:
            call.sink(reply)
        except Exception:  # the defect is the sink's, and not what an executor is killed for
            logger.exception("the sink of a call to executor %s failed", self.name)

    def _release(self, offset: int, size: int, item_of: int | None) -> None:
        if self._lost is not None:
            return
        if size:
            self._freed.append(offset)
            self._freed_bytes += size
        if item_of is not None:
            self._released.append(item_of)
        if self._is_needy or self._freed_bytes > _LAZY_FREE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._freed or self._released:
            self._send({"op": "free"})

    def _send(self, message: dict[str, Any]) -> None:
        """Send, with what was freed since the last message."""
        if self._lost is not None:
            return
        if self._freed:
            message["free"] = self._freed
        if self._released:
            message["released"] = self._released
        self._write(encode(message))
        if self._freed:
            self._freed, self._freed_bytes = [], 0
        if self._released:
            self._released = []

    def _loss(self) -> ExecutorLostError:
        return ExecutorLostError(f"executor {self.name} ended", got=self._lost or "")

    def _lose(self, why: str) -> None:
        """Stop talking to it, and answer everybody who waits; sinks run in the loop's next round."""
        self._lost = why
        self._transport.abort()
        if not self._ready.done():
            self._ready.set_exception(self._loss())
        for request in self._requests.values():
            if not request.done():
                request.set_result(self._loss())
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if call.block is not None:
                call.block.release()
            self._loop.call_soon(call.sink, Reply("error", error=self._loss()))
        self._kept.clear()

    async def _watch_process(self) -> None:
        """See it end: its last replies and words first, then everybody who still waits."""
        exited = self._process.exited
        waited: set[asyncio.Future[Any]] = {exited, self._disconnected}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():
            # A process that is alone has nothing to do; one that closed its socket is not ours any more.
            await asyncio.wait({exited}, timeout=_DRAIN_TIMEOUT_S)
            self._process.kill()
        why = await exited
        await asyncio.wait({self._disconnected}, timeout=_DRAIN_TIMEOUT_S)
        self._read_log()
        self._stop_log()
        if self._lost is None:
            logger.info("executor %s (pid %d) ended: %s", self.name, self.pid, why)
            self._lose(why)
        self.closed.set_result(self._lost or why)
        self._input.close()
        self._output.close()

    def _abandon(self) -> None:
        """Take back what `start` made before there was a process."""
        self._lost = "not started"
        self._transport.abort()
        self._stop_log()
        self._ready.cancel()
        self._input.close()
        self._output.close()

    def _read_log(self) -> None:
        try:
            data = os.read(self._log_fd, _LOG_READ_BYTES)
        except BlockingIOError:
            return
        for line in self._log.feed(data, self._loop.time()):
            log_output.debug("%s: %s", self.name, line)
            self._on_line(self._speaker, line)
        if not data:
            self._loop.remove_reader(self._log_fd)

    def mute(self) -> None:
        """Count what is printed from now on as no model's."""
        self._on_line = _no_line

    def _let_speak(self, key: str) -> None:
        """What is printed from now on is of this model."""
        if key != self._speaker:
            self._read_log()
            self._speaker = key

    def _stop_log(self) -> None:
        self._loop.remove_reader(self._log_fd)
        os.close(self._log_fd)


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[int]:
    """Give a descriptor of a file in memory that holds `data`."""
    fd = os.memfd_create("nos-sample", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        yield fd
    finally:
        os.close(fd)


def _no_line(_key: str, _line: str) -> None:
    """Nobody listens."""


def _fields(definition: ModelDefinition) -> dict[str, Any]:
    fields = asdict(definition)
    del fields["spec"], fields["profiles"]  # bytes, and of no use there
    return fields


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise InternalError("an executor told nonsense about a model", got=repr(value)[:100])
    return value
