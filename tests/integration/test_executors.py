"""The worker's handle and real executors, made by a fork server and spawned: both keep every promise."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
from nos.errors import (
    CancelledError,
    ExecutorLostError,
    InvalidRequestError,
    InvalidTensorError,
    LimitExceededError,
    LoadError,
    MethodNotFoundError,
    ModelError,
    ModelNotFoundError,
    NosError,
    OverloadedError,
)
from nos_backend.definition import ModelDefinition
from nos_backend.executor.messages import ShortResult
from nos_backend.worker.executors import Executor, ForkServer, LoadedModel, Reply
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOURCE = """
import os, signal, sys, time
import numpy as np
import torch
from torch import nn
from PIL import Image
import nos

@nos.model(name="mix", gpu=False)
class Mix:
    def __init__(self, factor: float = 2.0, device: str = "?"):
        self.factor, self.device = factor, device
        self.net = nn.Linear(4, 4)
        self.last = None
        self.closed = 0
        self.later = None

    def __call__(self, x: torch.Tensor):
        assert isinstance(x, torch.Tensor) and not torch.is_grad_enabled()
        return x * self.factor

    def about(self): return {"device": self.device, "training": self.net.training, "factor": self.factor}
    def echo(self, x): return x
    def copy(self, x): return x.copy()
    def middle(self, x): return x[2:5]
    def kind(self, x): return type(x).__name__
    def image(self, x: Image.Image): return [type(x).__name__, list(x.size), x.mode]
    def pixels(self, x: np.ndarray): return x
    def tensors(self, xs: list[torch.Tensor]): return [type(x).__name__ for x in xs]
    def count(self, n: int):
        try:
            for i in range(n):
                yield np.full(1000, i)
        finally:
            self.closed += 1
    def num_closed(self): return self.closed
    def keep(self, x):
        before, self.last = self.last, x
        return before
    def spoil(self, x): x += 1; return x
    def hold(self, x): self.last = x; return x
    def spoil_last(self): self.last += 1
    def bad(self, x): return helper(x)
    def odd(self): return {1, 2}
    def quit(self): sys.exit(3)
    def nap(self, s): print("nap", s); time.sleep(s); return s
    def end(self, code): os._exit(code)
    def crash(self): os.kill(os.getpid(), signal.SIGSEGV)
    def say(self, text, times):
        for _ in range(times): print(text)
    def complain(self): print("about to fail", file=sys.stderr); os._exit(4)

def helper(x):
    raise ValueError(f"bad {x}")

def double(x): return x + x
"""


def definition(class_name: str = "Mix", source: str = SOURCE, **fields: Any) -> ModelDefinition:
    return ModelDefinition(
        **{
            "name": "test/" + class_name.lower(),
            "version": 1,
            "owner": "ann",
            "source": source,
            "source_name": "<notebook cell 7>",
            "class_name": class_name,
            **fields,
        }
    )


class Caller:
    """Calls one model of an executor, with arrays and bytes as arguments."""

    def __init__(self, executor: Executor, key: str) -> None:
        self.executor = executor
        self.key = key
        self.replies: dict[int, asyncio.Queue[Reply]] = {}

    def send(self, method: str, *values: Any) -> int:
        call_id = len(self.replies) + 1
        queue = self.replies[call_id] = asyncio.Queue()
        data = bytearray()
        nodes = [["", node(value, data)] for value in values]
        block = self.executor.allocate(len(data)) if data else None
        if block is not None:
            block.view[:] = data
        self.executor.call(call_id, self.key, method, nodes, block, queue.put_nowait)
        return call_id

    async def receive(self, call_id: int) -> Reply:
        async with asyncio.timeout(60):
            return await self.replies[call_id].get()

    async def __call__(self, method: str, *values: Any) -> Any:
        reply = await self.receive(self.send(method, *values))
        try:
            if reply.error is not None:
                raise reply.error
            return value_of(reply.node, reply.block)
        finally:
            reply.release()


def node(value: Any, data: bytearray) -> Any:
    data.extend(bytes(-len(data) % 64))
    offset = len(data)
    if isinstance(value, np.ndarray):
        data.extend(value.tobytes())
        return {"t": [value.dtype.name, list(value.shape), offset]}
    if isinstance(value, bytes):
        data.extend(value)
        return {"m": ["image/png", offset, len(value)]}
    if isinstance(value, list):
        return {"l": [node(item, data) for item in value]}
    return value


def value_of(content: Any, block: memoryview) -> Any:
    if not isinstance(content, dict):
        return content
    ((kind, body),) = content.items()
    if kind == "t":
        name, shape, offset = body
        return (
            np.frombuffer(block, np.uint8)[offset:]
            .view(np.uint8)[: int(np.prod(shape)) * np.dtype(name).itemsize]
            .view(name)
            .reshape(shape)
            .copy()
        )
    if kind == "m":
        return bytes(block[body[1] : body[1] + body[2]])
    if kind == "d":
        return {key: value_of(item, block) for key, item in body}
    items = [value_of(item, block) for item in body]
    return tuple(items) if kind == "u" else items


def png(width: int = 5, height: int = 3) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(file, "PNG")
    return file.getvalue()


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["forked", "spawned"])
async def forkserver(request: pytest.FixtureRequest) -> AsyncIterator[ForkServer | None]:
    server = await ForkServer.start() if request.param == "forked" else None
    yield server
    if server is not None:
        await server.close()


@contextlib.asynccontextmanager
async def running(
    forkserver: ForkServer | None, arena_bytes: int = 64 << 20
) -> AsyncIterator[Executor]:
    executor = await Executor.start(
        "test", device="cpu", num_threads=1, forkserver=forkserver, arena_bytes=arena_bytes
    )
    try:
        yield executor
    finally:
        await executor.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mix(forkserver: ForkServer | None) -> AsyncIterator[Caller]:
    """A loaded model that no test harms."""
    async with running(forkserver) as executor:
        await executor.load(definition(init=[("factor", 3.0)]), 60)
        yield Caller(executor, "test/mix@v1")


@contextlib.asynccontextmanager
async def fresh(forkserver: ForkServer | None, **options: Any) -> AsyncIterator[Caller]:
    async with running(forkserver, **options) as executor:
        await executor.load(definition(), 60)
        yield Caller(executor, "test/mix@v1")


async def test_tensors_come_as_annotated_and_results_go_back(mix: Caller) -> None:
    result = await mix("__call__", np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(result, np.array([0, 3, 6, 9], np.float32))


async def test_init_gets_its_arguments_and_the_device(mix: Caller) -> None:
    assert await mix("about") == {"device": "cpu", "training": False, "factor": 3.0}


@pytest.mark.accept("A8")
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1, 2, 1, 2, 1, 2, 1, 2)])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "uint64", "int16", "float16", "float64", "complex64"]
)
async def test_every_array_survives_the_hop(
    mix: Caller, dtype: str, shape: tuple[int, ...]
) -> None:
    sent = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    result = await mix("echo", sent)
    assert result.dtype == sent.dtype
    np.testing.assert_array_equal(result, sent)


async def test_structures_and_scalars_survive_the_hop(mix: Caller) -> None:
    assert await mix("echo", [1, 2.5, "é", None, True]) == [1, 2.5, "é", None, True]


async def test_a_list_of_tensors_is_read_item_by_item(mix: Caller) -> None:
    assert await mix("tensors", [np.zeros(2), np.zeros(3)]) == ["Tensor", "Tensor"]


async def test_encoded_images_are_decoded_where_arrays_are_wanted(mix: Caller) -> None:
    pixels = await mix("pixels", png())
    assert pixels.shape == (3, 5, 3)
    assert pixels[0, 0].tolist() == [10, 20, 30]


async def test_arrays_become_images_where_images_are_wanted(mix: Caller) -> None:
    assert await mix("image", np.zeros((3, 5, 3), np.uint8)) == ["Image", [5, 3], "RGB"]


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ((b"no image",), InvalidTensorError, "not an image"),
        ((png(300, 300)[:200],), InvalidTensorError, "truncated"),
        ((png(16_385, 1),), LimitExceededError, "too large"),
        (("text",), InvalidTensorError, "expected an array"),
        ((), InvalidRequestError, "missing a required argument: 'x'"),
    ],
)
async def test_bad_arguments_are_refused(
    mix: Caller, values: tuple[Any, ...], error: type[NosError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await mix("pixels", *values)


@pytest.mark.parametrize("method", ["nothing", "_private", "__init__", "net"])
async def test_only_public_methods_are_called(mix: Caller, method: str) -> None:
    with pytest.raises(MethodNotFoundError):
        await mix(method)


async def test_a_model_that_is_not_loaded_is_reported(mix: Caller) -> None:
    with pytest.raises(ModelNotFoundError):
        await Caller(mix.executor, "test/other@v1")("echo", 1)


@pytest.mark.accept("A10")
async def test_an_error_carries_type_text_and_the_frames_of_the_model(mix: Caller) -> None:
    with pytest.raises(ModelError, match="ValueError: bad 7") as caught:
        await mix("bad", 7)
    assert caught.value.type_name == "ValueError"
    assert caught.value.remote_message == "bad 7"
    frames = [line for line in caught.value.remote_traceback.splitlines() if "File" in line]
    assert [frame.split(",")[0].strip() for frame in frames] == ['File "<notebook cell 7>"'] * 2
    assert "def bad(self, x): return helper(x)" in caught.value.remote_traceback


async def test_a_result_without_a_wire_form_is_the_models_error(mix: Caller) -> None:
    with pytest.raises(ModelError, match="returned set, which has no wire form: return arrays"):
        await mix("odd")


async def test_sys_exit_in_a_model_is_the_error_of_that_call(mix: Caller) -> None:
    with pytest.raises(ModelError, match="SystemExit: 3"):
        await mix("quit")
    assert await mix("echo", 1) == 1


async def test_a_generator_sends_items_and_an_end(mix: Caller) -> None:
    call_id = mix.send("count", 200)
    kinds, firsts = [], []
    while not kinds or kinds[-1] == "item":
        reply = await mix.receive(call_id)
        kinds.append(reply.kind)
        if reply.kind == "item":
            firsts.append(int(value_of(reply.node, reply.block)[0]))
        reply.release()
    assert kinds == ["item"] * 200 + ["end"]
    assert firsts == list(range(200))


async def test_a_generator_waits_for_a_slow_reader_and_stops_when_cancelled(mix: Caller) -> None:
    closed_before = await mix("num_closed")
    call_id = mix.send("count", 10**9)
    held = [await mix.receive(call_id) for _ in range(64)]
    await asyncio.sleep(0.05)
    assert mix.replies[call_id].empty()
    mix.executor.cancel(call_id)
    last = await mix.receive(call_id)
    for reply in held:
        reply.release()
    assert isinstance(last.error, CancelledError)
    assert await mix("num_closed") == closed_before + 1


async def test_a_waiting_call_is_cancelled_and_a_running_one_ends(mix: Caller) -> None:
    running_id, waiting_id = mix.send("nap", 0.2), mix.send("nap", 60)
    await until(lambda: "nap 0.2" in mix.executor.log_tail())
    mix.executor.cancel(running_id)
    mix.executor.cancel(waiting_id)
    assert (await mix.receive(running_id)).node == 0.2
    assert isinstance((await mix.receive(waiting_id)).error, CancelledError)


async def test_input_that_a_model_keeps_is_not_overwritten(mix: Caller) -> None:
    assert await mix("keep", np.full(1000, 1)) is None
    for value in range(2, 6):
        await mix("echo", np.full(1000, -1))
        kept = await mix("keep", np.full(1000, value))
        assert (kept == value - 1).all()
    await mix("keep", None)
    await mix("echo", 1)
    assert mix.executor._input.used_bytes == 0


async def test_a_model_that_changes_its_input_changes_only_its_own(mix: Caller) -> None:
    calls = [mix.send("spoil", np.full(100, value)) for value in (1, 5)]
    replies = [await mix.receive(call_id) for call_id in calls]
    assert [int(value_of(reply.node, reply.block)[0]) for reply in replies] == [2, 6]
    for reply in replies:
        reply.release()


@pytest.mark.parametrize(("method", "kept"), [("echo", slice(None)), ("middle", slice(2, 5))])
async def test_a_result_that_lies_in_its_input_stays_there(
    mix: Caller, method: str, kept: slice
) -> None:
    sent = np.arange(1000)
    reply = await mix.receive(mix.send(method, sent))
    other = await mix.receive(mix.send("echo", np.zeros(1000)))  # takes other memory
    np.testing.assert_array_equal(value_of(reply.node, reply.block), sent[kept])
    memory = np.frombuffer(mix.executor._input.view, np.uint8)
    assert np.shares_memory(np.frombuffer(reply.block, np.uint8), memory)
    del memory
    for it in (reply, other):
        it.release()
    assert mix.executor._input.used_bytes == 0


async def test_a_result_that_the_model_holds_is_not_changed_by_it(mix: Caller) -> None:
    reply = await mix.receive(mix.send("hold", np.full(1000, 7)))
    await mix("spoil_last")
    assert (value_of(reply.node, reply.block) == 7).all()
    reply.release()
    await mix("keep", None)
    await mix("echo", 1)
    assert mix.executor._input.used_bytes == 0


async def test_a_full_input_arena_refuses_and_a_released_block_makes_room(mix: Caller) -> None:
    block = mix.executor.allocate(64 << 20)
    with pytest.raises(OverloadedError, match="no room"):
        mix.executor.allocate(1)
    block.release()
    block.release()
    mix.executor.allocate(1).release()
    with pytest.raises(LimitExceededError):
        mix.executor.allocate((64 << 20) + 1)


async def test_results_beyond_the_arena_wait_for_room_and_too_large_ones_fail(
    forkserver: ForkServer | None,
) -> None:
    async with fresh(forkserver, arena_bytes=1 << 20) as caller:
        big = np.zeros(600_000, np.uint8)
        first = caller.send("copy", big)
        held = await caller.receive(first)
        second = caller.send("copy", big)
        await asyncio.sleep(0.05)
        assert caller.replies[second].empty()
        held.release()
        assert (await caller.receive(second)).error is None
        with pytest.raises(ModelError):
            await caller("bad", 1)


async def test_a_function_is_a_model(forkserver: ForkServer | None) -> None:
    async with running(forkserver) as executor:
        await executor.load(definition("double"), 60)
        caller = Caller(executor, "test/double@v1")
        assert await caller("__call__", 21) == 42
        with pytest.raises(MethodNotFoundError):
            await caller("other", 1)


async def test_weights_are_counted_and_unloading_forgets(forkserver: ForkServer | None) -> None:
    async with running(forkserver) as executor:
        loaded = await executor.load(definition(), 60)
        assert isinstance(loaded, LoadedModel)
        assert loaded.weight_bytes == (16 + 4) * 4
        await executor.unload(loaded.key)
        with pytest.raises(ModelNotFoundError):
            await Caller(executor, loaded.key)("about")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_there", "No module named 'nothing_there'"),
        ("class Mix:\n    def __init__(self): self.x = 1 / 0", "self.x = 1 / 0"),
        ("class Other: pass", "no class or function 'Mix'"),
        ("class Mix(:", "SyntaxError"),
        ("import sys; sys.exit()", "SystemExit"),
        ("import nos; nos.connect()", "only nos.model is there"),
    ],
)
async def test_a_source_that_fails_is_a_load_error(mix: Caller, source: str, words: str) -> None:
    with pytest.raises(LoadError) as caught:
        await mix.executor.load(definition(source=source, name="test/broken"), 60)
    assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, NosError)


async def test_siblings_of_the_source_are_imported(mix: Caller, tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("ANSWER = 42")
    source = "import beside_it\ndef Here(): return [beside_it.ANSWER, __file__]"
    await mix.executor.load(
        definition("Here", source, folder=str(tmp_path), source_name=str(tmp_path / "here.py")), 60
    )
    assert await Caller(mix.executor, "test/here@v1")("__call__") == [
        42,
        str(tmp_path / "here.py"),
    ]


async def test_a_load_that_hangs_ends_the_executor(forkserver: ForkServer | None) -> None:
    async with running(forkserver) as executor:
        with pytest.raises(LoadError, match="did not load in time"):
            await executor.load(definition(source="while True: pass"), 0.3)
        assert "did not load within 0.3 s" in await executor.closed


@pytest.mark.accept("B9")
@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [("end", (7,), "exit code 7"), ("crash", (), "signal SIGSEGV")],
)
async def test_an_executor_that_ends_gives_every_call_one_error(
    forkserver: ForkServer | None, method: str, arguments: tuple[Any, ...], words: str
) -> None:
    async with fresh(forkserver) as caller:
        calls = [
            caller.send(method, *arguments),
            caller.send("echo", np.zeros(9)),
            caller.send("about"),
        ]
        for call_id in calls:
            error = (await caller.receive(call_id)).error
            assert isinstance(error, ExecutorLostError)
            assert words in str(error)
        assert await caller.executor.closed == words
        assert all(queue.empty() for queue in caller.replies.values())


@pytest.mark.accept("B9")
async def test_a_killed_executor_answers_at_once(
    forkserver: ForkServer | None, accept: Any
) -> None:
    async with fresh(forkserver) as caller:
        call_id = caller.send("nap", 60)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        caller.executor.kill("it took too long")
        error = (await caller.receive(call_id)).error
        assert isinstance(error, ExecutorLostError)
        assert "it took too long" in str(error)
        await caller.executor.closed
        accept.figure(loop.time() - started_s, 0.25, "s")
        late = caller.send("about")
        assert isinstance((await caller.receive(late)).error, ExecutorLostError)


async def test_processes_that_a_model_started_end_with_it(forkserver: ForkServer | None) -> None:
    source = "import subprocess\ndef Here(): return subprocess.Popen(['sleep', '1000']).pid"
    async with running(forkserver) as executor:
        await executor.load(definition("Here", source), 60)
        pid = await Caller(executor, "test/here@v1")("__call__")
        executor.kill("enough")
        await executor.closed
        await until(lambda: not is_running(pid))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - other processes make it true
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_what_a_model_prints_is_logged_and_kept(
    mix: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "nos_backend.executor.log")
    await mix("say", "hello from the model", 1)
    await until(lambda: "hello from the model" in mix.executor.log_tail())
    assert "test: hello from the model" in caplog.messages


async def test_a_flood_of_output_is_dropped_and_counted(forkserver: ForkServer | None) -> None:
    async with fresh(forkserver) as caller:
        await caller("say", "x" * 10_000, 5000)
        await caller.executor.close()
        tail = caller.executor.log_tail()
        assert len(tail) <= 200
        assert max(len(line) for line in tail) < 5000


async def test_the_last_words_of_an_executor_are_kept(forkserver: ForkServer | None) -> None:
    async with fresh(forkserver) as caller:
        call_id = caller.send("complain")
        assert (await caller.receive(call_id)).error is not None
        assert caller.executor.log_tail() == ["about to fail"]


async def test_an_executor_holds_nothing_of_ours(
    forkserver: ForkServer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NOS_TOKEN_FILE", "/secret")
    monkeypatch.setenv("ALL_PROXY", "http://user:secret@proxy")
    source = """
import os, resource, sys
def targets():
    for name in os.listdir("/proc/self/fd"):
        try: yield os.readlink("/proc/self/fd/" + name)
        except FileNotFoundError: pass  # the listing itself
def Look():
    status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return {
        "sockets": sum(target.startswith("socket") for target in targets()),
        "environment": sorted(k for k in os.environ if "NOS" in k or "TOKEN" in k or k == "ALL_PROXY"),
        "no_new_privs": status["NoNewPrivs"].strip(),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "leader": os.getpgrp() == os.getpid(),
        "modules": sorted({m.split(".")[0] for m in sys.modules} & {"grpc", "dask", "distributed"}),
    }
"""
    async with running(forkserver) as executor:
        await executor.load(definition("Look", source), 60)
        seen = await Caller(executor, "test/look@v1")("__call__")
    assert seen == {
        "sockets": 1,
        "environment": [],
        "no_new_privs": "1",
        "core": 0,
        "leader": True,
        "modules": [],
    }


async def test_calls_that_recur_are_told_apart_however_many_forms_there_are(
    forkserver: ForkServer | None,
) -> None:
    source = "def Sum(x, times):\n    return x.astype('uint16') * times\n"
    async with running(forkserver) as executor:
        await executor.load(definition("Sum", source), 60)
        forms = [[["", {"t": ["uint8", [1 + n % 7], 0]}], ["", n]] for n in range(300)]
        replies: asyncio.Queue[tuple[int, Reply]] = asyncio.Queue()
        for round_number in range(3):
            for number, arguments in enumerate(forms):
                block = executor.allocate(1 + number % 7)
                block.view[:] = bytes([round_number]) * (1 + number % 7)
                call_id = round_number * len(forms) + number + 1
                sink = partial(lambda number, reply: replies.put_nowait((number, reply)), number)
                executor.call(
                    call_id, "test/sum@v1", "__call__", arguments, block, sink, recurs=True
                )
            for expected in range(len(forms)):
                async with asyncio.timeout(60):
                    number, reply = await replies.get()
                assert reply.error is None
                array = value_of(reply.node, reply.block)
                assert number == expected
                np.testing.assert_array_equal(
                    array, np.full(1 + number % 7, round_number * number, np.uint16)
                )
                reply.release()


def in_place(offset: int, size: int) -> str:
    """A result that is said to lie in the input of the first call."""
    node = b'{"t":["uint8",[3],0]}'
    return ShortResult(1, offset, size, 0.0, False, True, node).encode()[4:].decode()


LIES = [
    in_place(64, 3),
    in_place(1, 3),
    "\x02" + "\x00" * 40,
    '{"op":"result","id":1,"compute_s":0,"node":{"t":["uint8",[99],0]},"block":[0,9]}',
    '{"op":"result","id":1,"compute_s":0,"node":1,"block":[0,1e999]}',
    '{"op":"result","id":[1],"compute_s":0,"node":1,"block":null}',
    '{"op":"end","id":1,"compute_s":"soon"}',
    '{"op":"error","id":1,"compute_s":0,"error":[]}',
    '{"op":"ready"}',
    "[]",
    "nonsense",
]


async def test_an_executor_that_breaks_the_protocol_is_killed(
    forkserver: ForkServer | None,
) -> None:
    source = """
import os, struct
def Lie(body, block):
    body = body.encode()
    for n in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{n}").startswith("socket"):
                os.write(int(n), struct.pack("<I", len(body)) + body)
        except OSError:
            pass
"""
    for lie in LIES if forkserver is not None else LIES[:1]:
        async with running(forkserver) as executor:
            await executor.load(definition("Lie", source), 60)
            caller = Caller(executor, "test/lie@v1")
            reply = await caller.receive(caller.send("__call__", lie, np.zeros(3, np.uint8)))
            assert isinstance(reply.error, ExecutorLostError), lie
            assert "broke the protocol" in await executor.closed


async def test_a_load_that_nobody_waits_for_any_more_is_undone(
    forkserver: ForkServer | None,
) -> None:
    async with running(forkserver) as executor:
        slow = definition("Slow", "import time\ntime.sleep(0.2)\ndef Slow(): pass")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await executor.load(slow, 60)
        with pytest.raises(ModelNotFoundError):
            await Caller(executor, slow.key)("__call__")


async def test_a_sink_that_fails_harms_nobody(
    mix: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Reply) -> None:
        raise ValueError("a defect")

    mix.executor.call(10**9, mix.key, "about", [], None, fail)
    assert await mix("echo", 1) == 1
    assert "the sink of a call to executor test failed" in caplog.messages


async def test_a_module_with_forward_is_a_model(forkserver: ForkServer | None) -> None:
    source = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = torch.nn.Linear(3, 2), torch.nn.Dropout(0.9)
    def forward(self, x: torch.Tensor, scale: float = 1):
        return {"y": self.drop(self.layer(x)) * 0 + scale, "grad": torch.is_grad_enabled()}
"""
    async with running(forkserver) as executor:
        await executor.load(definition("Net", source), 60)
        net = Caller(executor, "test/net@v1")
        result = await net("__call__", np.ones((4, 3), np.float32))
        assert result["grad"] is False
        np.testing.assert_array_equal(result["y"], np.ones((4, 2), np.float32))
        with pytest.raises(MethodNotFoundError):
            await net("train")


async def test_unloading_returns_the_memory(forkserver: ForkServer | None) -> None:
    source = """
import torch
class Big:
    def __init__(self): self.parts = [torch.ones(10_000) for _ in range(2_000)]
    def __call__(self): return len(self.parts)
"""
    async with running(forkserver) as executor:
        before = resident_bytes(executor.pid)
        loaded = await executor.load(definition("Big", source), 60)
        assert await Caller(executor, loaded.key)("__call__") == 2000
        assert resident_bytes(executor.pid) - before > 70 << 20
        await executor.unload(loaded.key)
        await until(lambda: resident_bytes(executor.pid) - before < 20 << 20)


def resident_bytes(pid: int) -> int:
    """Count what the process allocated; pages of libraries stay mapped once they were touched."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


async def test_an_executor_ends_by_a_signal_from_outside(forkserver: ForkServer | None) -> None:
    async with fresh(forkserver) as caller:
        call_id = caller.send("nap", 60)
        os.kill(caller.executor.pid, signal.SIGKILL)
        assert "signal SIGKILL" in str((await caller.receive(call_id)).error)
