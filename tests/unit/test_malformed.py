"""Row F7: whatever bytes come, each decoder gives a value or a typed error, in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import mmap
import operator
import os
import pickle
import resource
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from nos import _address, _control, _manifest, _profile, audio, video
from nos.errors import InternalError, NosError
from nos.types import Media
from nos.wire import frames, local, shared, signature, status, values
from nos.wire.limits import ERROR_KEY
from nos.wire.v1 import access_pb2, cluster_pb2, errors_pb2, inference_pb2, models_pb2, values_pb2
from nos_backend.cluster.device import WorkerSettings
from nos_backend.cluster.launch import PlaneSettings
from nos_backend.config import Settings, load_settings
from nos_backend.control.blobs import BlobStore, check_sha256
from nos_backend.control.catalogue import Catalogue
from nos_backend.control.describe import describe
from nos_backend.control.folders import check_files
from nos_backend.control.names import check_name, parse_reference
from nos_backend.control.registry import FILE_NAME, Registry
from nos_backend.control.requirements import normalize
from nos_backend.control.sweeping import sweep
from nos_backend.control.tickets import TicketSigner, TicketVerifier
from nos_backend.control.tokens import Tokens, make_token
from nos_backend.executor import images, loading
from nos_backend.executor.arena import Arena
from nos_backend.executor.failures import RefusedError
from nos_backend.executor.messages import (
    Decoder,
    MalformedError,
    ShortCall,
    ShortResult,
    check_block,
    check_node,
    encode,
)
from nos_backend.executor.values import ANY, Inputs, Want
from nos_backend.worker.arguments import check_arguments, from_node, to_node
from nos_backend.worker.executors import Executor
from nos_backend.worker.forms import Nodes
from nos_backend.worker.replies import Reply
from nos_jupyter import frames as page_frames

from tests.malformed import HOSTILE_NUMBERS, HOSTILE_TEXT, bytes_like, changed, examples, messages

pytestmark = pytest.mark.accept("F7")

#: What one decoder may hold at once, with whatever it imports; what it is given has some hundred bytes.
MAX_BYTES = 1 << 30
CPU = torch.device("cpu")
BLOCK = bytes(range(64))

SOURCE = """
import nos
from typing import Annotated, Literal
import torch

Batch = Annotated[torch.Tensor, "float32[batch, 3]"]

@nos.model(name="me/net", batch=8, env=["einops==0.8.*"])
class Net:
    '''Adds.'''

    def __init__(self, width: int = 3) -> None:
        self.width = width

    def __call__(self, x: Batch, how: Literal["up", "down"] = "up") -> Batch:
        return x + self.width

    def count(self, upto: int) -> list[int]:
        yield from range(upto)
"""
(NET,) = describe(SOURCE)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let a decoder have so much more memory and no more: beyond it, it fails with a MemoryError."""
    has_bytes = int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (has_bytes + MAX_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_what_takes_more_than_the_bound_fails() -> None:
    with pytest.raises(MemoryError):
        tried(lambda: bytearray(2 * MAX_BYTES))


def tried(decode: Callable[[], Any], *refusals: type[Exception]) -> bool:
    """Tell whether something was decoded; it may only be refused by these, or else by a typed error."""
    try:
        with bounded():
            decode()
    except (NosError, *refusals) as error:
        assert not isinstance(error, InternalError), "a defect of the sender's is called ours"  # noqa: PT017 - may pass
        assert len(str(error)) < 10_000  # noqa: PT017
        return False
    return True


def written(value: Any) -> values_pb2.Value:
    node = values_pb2.Value()
    values.write(value, node, values.Payload(), "x")
    return node


TREES = [
    written(tree).SerializeToString()
    for tree in (
        [1, 2.5, "text", None, True, (b"bytes",), {"a": {"b": [1]}}],
        np.ones((2, 3), np.float32),
        {"x": np.zeros((0, 3), np.int8), "y": [np.float64(2)]},
        [[[[[["deep"]]]]]],
    )
]
TREE = messages(values_pb2.Value.DESCRIPTOR) | changed(st.sampled_from(TREES)).map(
    lambda raw: parsed(values_pb2.Value, raw)
)


def parsed(kind: Any, raw: bytes) -> Any:
    """Return the message in some bytes, or none in them."""
    try:
        return kind.FromString(raw)
    except Exception:  # noqa: BLE001 - protobuf's DecodeError is no stable class
        return kind()


# What the SDK and the data plane share


@examples(40)
@given(TREE, st.integers(0, 64))
def test_a_tree_that_was_checked_can_be_read(node: values_pb2.Value, data_bytes: int) -> None:
    if tried(lambda: values.check(node, data_bytes, "x")):
        values.read(node, memoryview(BLOCK)[:data_bytes])


@examples(40)
@given(TREE, st.sampled_from(["", "count", "__init__"]), st.integers(0, 64))
def test_arguments_that_were_checked_can_be_made_by_an_executor(
    node: values_pb2.Value, method: str, data_bytes: int
) -> None:
    given_arguments = [values_pb2.Argument(value=node)]
    tried(lambda: check_arguments(NET.spec, method, given_arguments, data_bytes))
    anything = models_pb2.ModelSpec(methods=[{"name": "f", "parameters": [{"name": "x"}]}])  # type: ignore[list-item]
    calls: list[Any] = []
    if tried(lambda: calls.append(check_arguments(anything, "f", given_arguments, data_bytes))):
        ((_, made),) = calls[0].arguments
        check_node(made, data_bytes)
        for want in (ANY, Want("torch"), Want("numpy"), Want("image"), Want("bytes")):
            inputs = Inputs(memoryview(bytearray(BLOCK))[:data_bytes], CPU)
            tried(lambda want=want, inputs=inputs: inputs.read(made, want, "x"), RefusedError)  # type: ignore[misc]


@examples(40)
@given(
    messages(models_pb2.Method.DESCRIPTOR),
    st.lists(messages(values_pb2.Argument.DESCRIPTOR), max_size=3),
)
def test_any_signature_takes_or_refuses_any_arguments(
    method: models_pb2.Method, arguments: list[values_pb2.Argument]
) -> None:
    tried(lambda: signature.check_call(method, arguments))
    for parameter in method.parameters:
        assert len(signature.describe(parameter.type)) < 500


KINDS = (
    inference_pb2.StreamRequest,
    inference_pb2.StreamResponse,
    inference_pb2.RunRequest,
    inference_pb2.RunResponse,
)
MESSAGES = [
    kind(seq=3, data=BLOCK).SerializeToString() if hasattr(kind, "seq") else BLOCK for kind in KINDS
]


@pytest.mark.parametrize("kind", KINDS)
@examples(40)
@given(raw=bytes_like(*MESSAGES))
def test_messages_of_the_data_plane(kind: Any, raw: bytes) -> None:
    tried(lambda: frames.split(kind, raw))
    frames.split_seq(raw)


@examples(40)
@given(
    st.lists(
        bytes_like(*MESSAGES, *(shared.HEAD.pack(70, 0, shared.INLINE, 0) + BLOCK,)), max_size=4
    )
)
def test_messages_in_shared_memory(pieces: list[bytes]) -> None:
    end = shared.SharedEnd(memoryview(bytearray(4096)), memoryview(BLOCK))
    for piece in pieces:
        if not tried(lambda piece=piece: [bytes(block) for _, block in end.feed(piece)]):  # type: ignore[misc]
            break


@examples(40)
@given(bytes_like(errors_pb2.Error(reason=3, message="m", hint="h").SerializeToString()))  # type: ignore[arg-type]
def test_errors_of_a_server(raw: bytes) -> None:
    import grpc

    error = status.from_status(grpc.StatusCode.INTERNAL, "details", ((ERROR_KEY, raw),))
    assert isinstance(error, NosError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    status.to_message(error).SerializeToString()


@examples(40)
@given(
    messages(models_pb2.ModelInfo.DESCRIPTOR), messages(cluster_pb2.GetStatusResponse.DESCRIPTOR)
)
def test_what_a_newer_server_may_say_of_itself(
    info: models_pb2.ModelInfo, state: cluster_pb2.GetStatusResponse
) -> None:
    tried(lambda: _control.to_info(info))
    _control.to_status(state, "host:1", "argument", {})


@examples(40)
@given(st.text(max_size=60) | st.sampled_from(HOSTILE_TEXT))
def test_addresses(text: str) -> None:
    tried(lambda: _address.find(text, "token", None))


@examples(40)
@given(st.binary(max_size=40) | bytes_like(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"))
def test_media(raw: bytes) -> None:
    tried(lambda: Media.from_bytes(raw))


RECORD = json.dumps({"address": "127.0.0.1:1", "pid": os.getpid(), "token_file": "/t"}).encode()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@examples(40)
@given(
    raw=bytes_like(RECORD)
    | st.dictionaries(
        st.sampled_from(["address", "pid", "token_file", "start_ticks", "version"]), JSON_VALUES
    ).map(lambda it: json.dumps(it).encode())
)
def test_what_a_server_left_in_its_folder(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "record"
    folder.mkdir(exist_ok=True)
    (folder / local.RECORD_NAME).write_bytes(raw)
    record = local.read_backend(folder)
    assert record is None or (record.pid == os.getpid() and isinstance(record.address, str))


MANIFEST = b"""models:
- name: me/net
  inline: "def f(x: int): return x"
  init: {width: 3}
  env: [einops]
  replicas: {min: 0, max: 2}
  idle_unload_s: 2.5
"""


@examples(40)
@given(raw=bytes_like(MANIFEST) | st.integers(1, 400).map(lambda depth: b"models: " + b"[" * depth))
def test_files_of_models(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "models.yaml"
    path.write_bytes(raw)
    tried(lambda: _manifest.read(path))


@pytest.mark.parametrize(
    "raw",
    [
        b"models: " + b"[" * 600,
        b"a: &a [x,x]\n"
        + b"".join(b"%c: &%c [*%c,*%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 120)),
        b"models: [{name: a, inline: x, pin: 2001-99-99}]",
        b"models: [{name: a, inline: x, env: &a [*a]}]",
    ],
)
def test_files_of_models_that_mean_harm(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "models.yaml"
    path.write_bytes(raw)
    assert not tried(lambda: _manifest.read(path))


# What executors say

NODES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from((*HOSTILE_NUMBERS, "\ud800", "float32", "bfloat16", "image/png")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.builds(lambda key, content: {key: content}, st.sampled_from("tmludx"), inner)
        | st.tuples(
            st.sampled_from(["float32", "bfloat16", "bool"]),
            st.lists(st.sampled_from((0, 1, 2, 2**31, 2**62)), max_size=9),
            st.integers(0, 64),
        ).map(lambda it: {"t": list(it)})
    ),
    max_leaves=6,
)


@examples(40)
@given(NODES, st.integers(0, 64))
def test_a_node_that_was_checked_has_a_wire_form(node: Any, block_bytes: int) -> None:
    try:
        check_node(node, block_bytes)
    except MalformedError:
        return
    target = values_pb2.Value()
    try:
        from_node(node, target, 64)
    except InternalError as error:
        assert "malformed" in str(error)  # noqa: PT017 - text that is no Unicode, which checks leave to protobuf
        return
    values.check(target, 64 + block_bytes, "x")
    values.read(target, memoryview(bytes(64 + block_bytes)))
    to_node(target)


SAID: list[bytes] = [
    encode(
        {
            "op": "result",
            "id": 1,
            "node": {"t": ["uint8", [3], 0]},
            "block": [0, 3],
            "compute_s": 0.5,
        }
    ),
    encode({"op": "item", "id": 2, "node": ["a"], "block": None, "compute_s": 0.5}),
    encode({"op": "end", "id": 2, "compute_s": 1, "kept": True}),
    encode({"op": "error", "id": 3, "compute_s": 0, "error": {"reason": "MODEL_RAISED"}}),
    encode({"op": "done", "id": 1, "took_s": 0.5, "size_bytes": 3}),
    encode({"op": "failed", "id": 1, "error": {"reason": "LOAD_FAILED", "message": "x"}}),
    encode({"op": "unkept", "ids": [1, 2]}),
    encode({"op": "doomed", "reason": "x"}),
    encode({"op": "need"}),
    ShortResult(1, 0, 3, 0.5, False, False, b'{"t":["uint8",[3],0]}').encode(),
    ShortCall(1, 0, 0, 3, [1]).encode(),
]


@examples(40)
@given(st.lists(bytes_like(*SAID), max_size=4))
def test_messages_of_executors(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        if not tried(lambda piece=piece: decoder.feed(piece), MalformedError):  # type: ignore[misc]
            break


@examples(40)
@given(
    bytes_like(b'{"t":["uint8",[3],0]}', b'{"l":[1,{"m":["image/png",0,3]}]}', b"[" * 3000), NODES
)
def test_nodes_and_blocks_of_executors(raw: bytes, block: Any) -> None:
    tried(lambda: Nodes().read(raw, 64), MalformedError)
    tried(lambda: check_block(block, 64), MalformedError)


CHANGED_OBJECTS = st.fixed_dictionaries(
    {
        "op": st.sampled_from(
            ["result", "item", "end", "error", "done", "failed", "unkept", "ready"]
        )
    },
    optional={
        "id": st.integers(0, 4) | JSON_VALUES,
        "ids": st.lists(st.integers(0, 4)) | JSON_VALUES,
        "node": NODES,
        "block": st.just([0, 64]) | JSON_VALUES,
        "compute_s": st.floats() | JSON_VALUES,
        "took_s": st.floats() | JSON_VALUES,
        "kept": JSON_VALUES,
        "error": st.dictionaries(
            st.sampled_from(["reason", "message", "type_name", "text", "traceback", "hint"]),
            st.sampled_from(["MODEL_RAISED", "OUT_OF_MEMORY", "\ud800"]) | JSON_VALUES,
        ),
    },
).map(encode)


async def hear(pieces: list[bytes]) -> bool:
    """Have an executor say some bytes to its worker; tell whether it is still there."""
    ours, theirs = socket.socketpair()
    memory = Arena.create_fd(4096), Arena.create_fd(4096)
    arenas = Arena(memory[0]), Arena(memory[1])
    log_read, log_write = os.pipe()
    executor = Executor("test", "cpu", arenas, log_read)
    process = subprocess.Popen(["/bin/sleep", "600"])  # noqa: ASYNC220 - takes no time
    executor._process = process  # type: ignore[assignment] - what is to be ended
    await asyncio.get_running_loop().create_connection(lambda: executor, sock=ours)
    replies: list[Reply] = []
    try:
        for call_id in (1, 2, 3):
            executor.call(call_id, "m@v1", "__call__", [], None, replies.append)
        with bounded():
            for piece in pieces:
                executor.data_received(piece)
        is_there = executor._lost is None
        executor.kill("over")
        await asyncio.sleep(0)
        for reply in replies:
            assert 0 <= reply.compute_s < float("inf")
            if reply.error is not None:
                status.to_message(reply.error).SerializeToString()
        last = [reply for reply in replies if reply.kind != "item"]
        assert len(last) == 3
        assert is_there or process.wait(30)
    finally:
        replies.clear()
        process.kill()
        process.wait()
        executor._abandon()
        if not executor._ready.cancelled():
            executor._ready.exception()
        for descriptor in (log_write, theirs.detach(), *memory):
            os.close(descriptor)
        await asyncio.sleep(0)
    return is_there


def test_an_executor_that_says_anything_is_believed_or_ended() -> None:
    outcomes: set[bool] = set()

    @examples(30)
    @given(st.lists(bytes_like(*SAID) | CHANGED_OBJECTS, min_size=1, max_size=4))
    def say(pieces: list[bytes]) -> None:
        outcomes.add(asyncio.run(hear(pieces)))

    say()
    assert outcomes == {True, False}


# What authors send


@examples(40)
@given(
    changed(st.just(SOURCE.encode())).map(lambda raw: raw.decode(errors="replace"))
    | st.text(max_size=60)
)
def test_sources(source: str) -> None:
    for found in describe(source) if tried(lambda: describe(source)) else ():
        found.spec.SerializeToString()


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    '''\\ud800'''\n    def f(self): ...",
        "from typing import Literal\ndef f(x: Literal['\\ud800']): ...",
        "import nos\n@nos.model(name='\\ud800')\ndef f(): ...",
        "import nos\n@nos.model(memory_bytes=" + "9" * 5000 + ")\ndef f(): ...",
        "def f(x=" + "-" * 5000 + "1): ...",
        "def f(x=" + "(" * 500 + "): ...",
        "def f(x: " + "a." * 4000 + "b): ...",
        "def f(x=" + "[" * 90 + "]" * 90 + "): ...",
        "def f(x: '" + "list[" * 90 + "]" * 90 + "'): ...",
        "if 1:\n " + "if 1: pass\n " * 10 + "def f(): ...",
        "#!nos 9999999 x\ndef f(:",
        "\0",
        "def f(x=0" + "+1" * 5000 + "): ...",
        "def f(x=0x" + "f" * 5000 + "): ...",
        "class A(" + "A," * 5000 + "): def f(self): ...",
    ],
)
def test_sources_that_mean_harm(source: str) -> None:
    for found in describe(source) if tried(lambda: describe(source)) else ():
        found.spec.SerializeToString()


@examples(40)
@given(
    st.lists(
        st.sampled_from(["einops==1.*", "-r x", "a @ http://b", "a[b]>1;c"])
        | st.builds(
            operator.add,
            st.sampled_from(["environment.yml:", "conda:", "conda:python", "channel:"]),
            st.text(max_size=30) | st.text("[]{}-:,&* \nax=<>0.", max_size=60),
        )
        | st.text(max_size=30)
    ),
    st.text(max_size=30) | st.sampled_from(HOSTILE_TEXT),
    st.lists(messages(models_pb2.ModelFile.DESCRIPTOR), max_size=3),
)
def test_packages_names_and_files(
    requirements: list[str], text: str, files: list[models_pb2.ModelFile]
) -> None:
    for decode in (
        lambda: normalize(requirements),
        lambda: check_name(text),
        lambda: parse_reference(text),
        lambda: check_sha256(text),
        lambda: check_files(files),
        lambda: Tokens({}).authenticate(text),
        lambda: make_token(text, access_pb2.ROLE_USER, 0.0, text),
    ):
        tried(decode)


SIGNER = TicketSigner.generate()
TICKET = SIGNER.sign("m@v1", "ann", access_pb2.ROLE_USER, "t1", 60.0)


@examples(40)
@given(bytes_like(TICKET))
def test_tickets(raw: bytes) -> None:
    opened = tried(lambda: TicketVerifier(SIGNER.public_key_bytes).verify(raw, time.time()))
    assert (
        not opened
        or access_pb2.SignedTicket.FromString(raw).ticket
        == access_pb2.SignedTicket.FromString(TICKET).ticket
    )


# What lies on the disk


def damaged_registry(folder: Path, rows: dict[str, list[Any]]) -> None:
    folder.mkdir()
    Registry(folder, BlobStore(folder / "blobs")).close()
    with sqlite3.connect(folder / FILE_NAME) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for table, row in rows.items():
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)
    connection.close()


CELLS = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
)
TEXTS = JSON_VALUES.map(json.dumps) | st.text(max_size=5)


@examples(12)
@given(
    rows=st.fixed_dictionaries(
        {
            "versions": st.tuples(
                st.just("net"), st.just(1), TEXTS, TEXTS, st.binary(max_size=9), CELLS, CELLS
            ),
            "profiles": st.tuples(st.just("net"), st.just(1), TEXTS, TEXTS, st.binary(max_size=20)),
            "limits": st.tuples(st.just("net"), st.just(1), TEXTS),
            "tokens": st.tuples(
                st.just("t1"),
                st.binary(max_size=9),
                CELLS,
                CELLS,
                CELLS,
                CELLS,
                CELLS,
                CELLS,
                st.none(),
            ),
        }
    )
)
def test_rows_of_a_registry(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("registry") / "state"
    damaged_registry(folder, {"names": ["net", "ann", 1, 0], **rows})
    registry = Registry(folder, BlobStore(folder / "blobs"))
    try:
        catalogue = Catalogue()
        catalogue.restore(registry.read_models())
        assert not tried(lambda: catalogue.find("net@v1"))
        tokens = Tokens({})
        for token in registry.read_tokens():
            tokens.accept(token)
        registry.read_profiles()
        registry.read_limits()
        sweep(registry, folder / "blobs", folder / "folders")
    finally:
        registry.close()


# What users show and configure


def image_file(kind: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((9, 9), 50).save(file, kind)
    return file.getvalue()


@examples(40)
@given(bytes_like(image_file("PNG"), image_file("JPEG")))
def test_images(raw: bytes) -> None:
    tried(lambda: images.pixels(images.decode(raw, "x")), RefusedError)


def video_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two.mp4"
        with video.Writer(path) as writer:
            for level in (0, 200):
                writer.write(np.full((16, 16, 3), level, np.uint8))
        return path.read_bytes()


@examples(25)
@given(raw=bytes_like(video_file()))
def test_videos(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("video") / "it.mp4"
    path.write_bytes(raw)

    def read() -> None:
        with video.Video(path) as source:
            for _ in itertools.islice(source, 4):
                pass

    tried(read)


def audio_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tone.flac"
        with audio.Writer(path, 8000) as writer:
            writer.write(np.sin(np.arange(400)))
        return path.read_bytes()


@examples(25)
@given(raw=bytes_like(audio_file()))
def test_audio(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("audio") / "it.flac"
    path.write_bytes(raw)
    tried(lambda: audio.read(path))


@examples(40)
@given(raw=bytes_like(safetensors.torch.save({"w": torch.ones(2, 3), "b": torch.zeros(0)})))
def test_weights(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("weights") / "it.safetensors"
    path.write_bytes(raw)
    tried(lambda: loading._read_weights(path), RefusedError)


@examples(40)
@given(messages(models_pb2.GetProfileResponse.DESCRIPTOR).map(lambda it: it.SerializeToString()))
def test_profiles(raw: bytes) -> None:
    tried(lambda: str(_profile._to_profile(parsed(models_pb2.GetProfileResponse, raw).profile)))


@examples(40)
@given(
    bytes_like(page_frames.pack({"seq": 1}, b"jpeg"))
    | JSON_VALUES.map(lambda it: page_frames.pack({"it": it}))
    | st.just(page_frames._LENGTH.pack(50_000) + b"[" * 50_000)
)
def test_frames_of_a_page(raw: bytes) -> None:
    tried(lambda: page_frames.unpack(raw))


@examples(15)
@given(
    st.dictionaries(
        st.sampled_from(sorted(Settings.model_fields)),
        st.text(max_size=8)
        | st.integers()
        | st.floats()
        | st.sampled_from(
            ["0.0.0.0", "tls://[", "tls://x:y", "~nobody/x", "a=b", "9" * 5000, "1e400", "\0"]
        ),
        max_size=3,
    )
)
def test_settings(flags: dict[str, Any]) -> None:
    tried(lambda: load_settings(flags))


@examples(40)
@given(
    st.dictionaries(
        st.sampled_from(["NOS_WORKER_MAX_MODELS", "NOS_WORKER_PROFILE_S", "NOS_PLANE_DRAIN_S"]),
        st.text(max_size=8) | st.sampled_from(["9" * 5000, "²", "nan"]),
    )
)
def test_what_processes_are_told(environ: dict[str, str]) -> None:
    tried(lambda: WorkerSettings.from_environ(environ))
    tried(lambda: PlaneSettings.from_environ(environ))
