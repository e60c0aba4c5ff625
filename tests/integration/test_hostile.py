"""Row F7, and of F6 the pickle: any bytes to any method of a real gateway and a real worker's port."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nos.wire.limits import TICKET_KEY
from nos.wire.v1 import access_pb2, models_pb2

from tests.integration.test_gateway import ADMIN, EVERY_METHOD, SOURCE, Gateway
from tests.plane import definitions, running_plane

#: What a server may say to nonsense: never that it failed, never what its code raised.
DEFECTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}
#: Methods that last have said nothing bad by then.
PATIENCE_S = 0.05
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "6"))
#: What the process may grow by over all of it, gateway, workers and tests together.
GROWTH_BYTES = 512 << 20

HOSTILE_TEXT = (
    "",
    "../../etc/passwd",
    "a\0b",
    "x" * 300,
    "😀" * 80,
    "double@v-1",
    "nos/../x",
    "%s%n",
)
HOSTILE_NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
RANGES = {
    **dict.fromkeys((5, 15, 17), (-(2**31), 2**31 - 1)),
    **dict.fromkeys((3, 16, 18), (-(2**63), 2**63 - 1)),
    **dict.fromkeys((13, 7), (0, 2**32 - 1)),
    **dict.fromkeys((4, 6), (0, 2**64 - 1)),
}
MAX_DEPTH = 4


class Trap:
    """Pickled, it opens a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.open, (str(self.path), os.O_CREAT)


def values(field: FieldDescriptor, depth: int, extra: bytes) -> st.SearchStrategy[Any]:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return st.sampled_from(HOSTILE_TEXT) | st.text(max_size=40)
        case FieldDescriptor.TYPE_BYTES:
            return st.just(extra) | st.binary(max_size=100)
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return st.floats(width=32)
        case FieldDescriptor.TYPE_ENUM:
            return st.integers(0, 2**31 - 1)
        case FieldDescriptor.TYPE_MESSAGE:
            return messages(field.message_type, depth + 1, extra)
        case _:
            low, high = RANGES[field.type]
            return st.sampled_from([it for it in HOSTILE_NUMBERS if low <= it <= high])


def messages(kind: Any, depth: int, extra: bytes) -> st.SearchStrategy[Any]:
    """Make messages of a kind, with values that mean harm in every field."""
    cls = message_factory.GetMessageClass(kind)
    fields = [it for it in kind.fields if depth < MAX_DEPTH or it.message_type is None]

    def fill(given_values: dict[str, Any]) -> Any:
        message = cls()
        for name, value in given_values.items():
            field = kind.fields_by_name[name]
            target = getattr(message, name)
            if field.message_type and field.message_type.GetOptions().map_entry:
                continue
            if field.is_repeated and field.message_type:
                target.add().CopyFrom(value)
            elif field.is_repeated:
                target.append(value)
            elif field.message_type:
                target.CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    return st.fixed_dictionaries(
        {}, optional={it.name: values(it, depth, extra) for it in fields}
    ).map(fill)


def requests(method: str, extra: bytes) -> st.SearchStrategy[bytes]:
    service, _, name = method.strip("/").partition("/")
    described = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    whole = messages(described.input_type, 0, extra).map(lambda it: it.SerializeToString())
    cut = st.tuples(whole, st.integers(0, 60)).map(lambda it: it[0][: it[1]])
    return whole | cut | st.binary(max_size=200) | st.just(extra)


class Target:
    """Something to send bytes to, from this thread."""

    def __init__(self, channel: Any, metadata: Any) -> None:
        self.channel, self.metadata = channel, metadata

    def send(self, method: str, kind: tuple[bool, bool], raw: bytes) -> grpc.StatusCode:
        name = f"{'stream' if kind[0] else 'unary'}_{'stream' if kind[1] else 'unary'}"
        call = getattr(self.channel, name)(method)
        try:
            answer = call(
                iter([raw]) if kind[0] else raw, metadata=self.metadata, timeout=PATIENCE_S
            )
            if kind[1]:
                for _ in answer:
                    pass
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A gateway in a thread of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    started: Future[str] = Future()
    ended = threading.Event()

    async def serve() -> None:
        running = Gateway(folder)
        await running.start()
        started.set_result(running.address)
        await asyncio.to_thread(ended.wait)
        await running.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    with grpc.insecure_channel(started.result(60)) as channel:
        yield Target(channel, ADMIN)
    ended.set()
    thread.join()


@pytest.fixture(scope="module")
def worker() -> Any:
    """A worker's port, with a model."""
    models = definitions(SOURCE, "double.py")
    with running_plane({model.name: model for model in models}) as running:
        ticket = running.ticket(models[0].key, role=access_pb2.ROLE_ADMIN)
        yield Target(running.channel, ((TICKET_KEY, ticket),))


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trap") / "sprung"


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous"))


def attack(target: Target, method: str, kind: tuple[bool, bool], trap: Path) -> None:
    payload = pickle.dumps(Trap(trap))

    @settings(
        max_examples=EXAMPLES,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(raw=requests(method, payload))
    def send(raw: bytes) -> None:
        assert target.send(method, kind, raw) not in DEFECTS, raw

    before_bytes = anonymous_bytes()
    assert target.send(method, kind, payload) not in DEFECTS
    send()
    assert anonymous_bytes() - before_bytes < GROWTH_BYTES
    assert not trap.exists()


@pytest.mark.accept("F6", "F7")
@pytest.mark.parametrize(("method", "kind"), EVERY_METHOD)
def test_no_bytes_break_a_method_of_the_gateway(gateway, method, kind, trap):
    attack(gateway, method, kind, trap)
    found = gateway.channel.unary_unary("/nos.v1.ModelService/ListModels")(
        b"", metadata=ADMIN, timeout=30
    )
    models_pb2.ListModelsResponse.FromString(found)


@pytest.mark.accept("F6", "F7")
@pytest.mark.parametrize(
    ("method", "kind"), [it for it in EVERY_METHOD if "InferenceService" in it.values[0]]
)
def test_no_bytes_break_a_method_of_a_workers_port(worker, method, kind, trap):
    attack(worker, method, kind, trap)


def test_the_trap_springs_where_something_unpickles(trap):
    other = trap.with_name("sprung here")
    os.close(pickle.loads(pickle.dumps(Trap(other))))
    assert other.exists()
