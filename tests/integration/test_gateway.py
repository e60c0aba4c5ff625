"""The gateway on a real port: who gets in, what passes through, what comes back when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from nos import errors
from nos.wire import status
from nos.wire.options import CHANNEL_OPTIONS
from nos.wire.v1 import (
    access_pb2,
    access_pb2_grpc,
    blobs_pb2,
    blobs_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    models_pb2,
    models_pb2_grpc,
    values_pb2,
)
from nos_backend.control.blobs import BlobStore
from nos_backend.control.catalogue import Catalogue
from nos_backend.control.logins import Logins
from nos_backend.control.registry import Registry
from nos_backend.control.tickets import TicketSigner
from nos_backend.control.tokens import Tokens
from nos_backend.rpc.access import LEAST_ROLE
from nos_backend.rpc.guard import Activity, Guard
from nos_backend.rpc.server import GatewayServer

from tests.fakes.cluster import FAILURE, FakeCluster, FakeWorker

TOKENS = {role: f"token-of-{role}-{'x' * 20}" for role in ("viewer", "user", "author", "admin")}
ADMIN = (("authorization", f"Bearer {TOKENS['admin']}"),)
MODEL = "double"
SOURCE = "class Double:\n    '''Doubles.'''\n    def __call__(self, x: int) -> int: return 2 * x\n"
STREAM_METADATA = (*ADMIN, ("nos-model", MODEL))
TICKET_TTL_S = 0.6
HELLO = inference_pb2.StreamRequest(hello=inference_pb2.Hello(versions=[1]))

pytestmark = pytest.mark.asyncio


class Gateway:
    """One gateway, its fake cluster and worker, and a channel to it."""

    def __init__(self, folder, **options):
        self.signer = TicketSigner.generate()
        self.worker = FakeWorker(self.signer.public_key_bytes)
        self.cluster = FakeCluster()
        blobs = BlobStore(folder / "blobs")
        self.registry = Registry(folder, blobs)
        self.catalogue = Catalogue()
        (folder / "models").mkdir()
        (folder / "models" / f"{MODEL}.py").write_text(SOURCE)
        (folder / "models" / "broken.py").write_text("class Broken\n")
        self.catalogue.add_folder(folder / "models")
        roles = {name: access_pb2.Role.Value(f"ROLE_{name.upper()}") for name in TOKENS}
        self.server = GatewayServer(
            cluster=self.cluster,
            catalogue=self.catalogue,
            blobs=blobs,
            registry=self.registry,
            tokens=Tokens({TOKENS[name]: ("local", role) for name, role in roles.items()}),
            signer=self.signer,
            ticket_ttl_s=TICKET_TTL_S,
            **options,
        )

    async def start(self):
        await self.worker.start()
        self.cluster.worker_address = self.worker.address
        self.address = await self.server.start("127.0.0.1", 0)
        await self.server.open()
        self.channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self.models = models_pb2_grpc.ModelServiceStub(self.channel)
        self.clusters = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        self.blobs = blobs_pb2_grpc.BlobServiceStub(self.channel)

    async def stop(self):
        await self.channel.close()
        await self.server.close()
        self.registry.close()
        await self.worker.stop()

    def stream(self, metadata=STREAM_METADATA):
        call = self.channel.stream_stream(
            "/nos.v1.InferenceService/Stream",
            request_serializer=inference_pb2.StreamRequest.SerializeToString,
            response_deserializer=inference_pb2.StreamResponse.FromString,
        )
        return call(metadata=metadata)


@pytest_asyncio.fixture
async def gateway(tmp_path):
    gateway = Gateway(tmp_path)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


async def until(condition, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - polls what has no event
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def raises(cls, match=""):
    """Expect a failed RPC, and hand out the typed error that it carried."""
    found = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield found
    failure = caught.value
    error = status.from_status(failure.code(), failure.details(), failure.trailing_metadata())
    assert type(error) is cls, error
    assert match in str(error)
    assert failure.code() == status.code_of(error)
    found.append(error)


def frame(seq, method="", data=b""):
    argument = values_pb2.Argument(value=values_pb2.Value(integer=seq))
    request = inference_pb2.Frame(method=method, arguments=[argument], data_bytes=len(data))
    return inference_pb2.StreamRequest(seq=seq, frame=request, data=data)


# Who gets in


def methods_of_the_contract():
    pool = descriptor_pool.Default()
    for name in ("access", "blobs", "cluster", "inference", "models"):
        services = pool.FindFileByName(f"nos/v1/{name}.proto").services_by_name.values()
        for service in services:
            for method in service.methods:
                yield pytest.param(
                    f"/{service.full_name}/{method.name}",
                    (method.client_streaming, method.server_streaming),
                    id=f"{service.name}.{method.name}",
                )


EVERY_METHOD = list(methods_of_the_contract())


def call_raw(channel, method, kind, metadata, raw=b""):
    """Call any method with one message."""
    streams_in, streams_out = kind
    name = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
    call = getattr(channel, name)(method)
    return call(iter([raw]) if streams_in else raw, metadata=metadata, timeout=1)


async def outcome(call, kind):
    try:
        if kind[1]:
            await call.read()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code() if call.done() else grpc.StatusCode.OK


@pytest.mark.parametrize(("method", "kind"), EVERY_METHOD)
async def test_no_method_answers_without_the_right_token(gateway, method, kind):
    for metadata in (
        (),
        (("authorization", "Bearer wrong-token-of-some-length"),),
        (("authorization", f"Basic {TOKENS['admin']}"),),
    ):
        call = call_raw(gateway.channel, method, kind, metadata)
        assert await outcome(call, kind) == grpc.StatusCode.UNAUTHENTICATED
        call.cancel()


@pytest.mark.parametrize(("method", "kind"), EVERY_METHOD)
async def test_each_method_admits_its_role_and_none_below(gateway, method, kind):
    names = list(TOKENS)
    least = LEAST_ROLE[method] - access_pb2.ROLE_VIEWER
    for index, name in enumerate(names):
        metadata = (("authorization", f"Bearer {TOKENS[name]}"),)
        call = call_raw(gateway.channel, method, kind, metadata)
        refused = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
        code = await outcome(call, kind)
        call.cancel()
        if index < least:
            assert code == grpc.StatusCode.PERMISSION_DENIED
        else:
            assert code not in refused


async def test_every_method_of_the_contract_is_served_and_declared(gateway):
    contract = {parameters.values[0] for parameters in EVERY_METHOD}
    assert contract <= set(gateway.server.methods) <= set(LEAST_ROLE)


async def test_undeclared_method_stops_the_start(gateway):
    guard = Guard(Tokens({}), Activity(), Logins(gateway.registry))
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    with pytest.raises(errors.ConfigError, match="permission"):
        guard.add_registered_method_handlers("nos.v1.ModelService", {"Backdoor": handler})


async def test_refusal_says_what_to_do_next(gateway):
    with raises(errors.UnauthenticatedError, "NOS_TOKEN_FILE"):
        await gateway.models.ListModels(models_pb2.ListModelsRequest())


async def test_who_am_i(gateway):
    stub = access_pb2_grpc.AccessServiceStub(gateway.channel)
    token = (await stub.WhoAmI(access_pb2.WhoAmIRequest(), metadata=ADMIN)).token
    assert (token.tenant, token.role) == ("local", access_pb2.ROLE_ADMIN)
    assert TOKENS["admin"] not in str(token)


async def test_health_needs_no_token_and_reflection_lists_the_services(gateway):
    health = health_pb2_grpc.HealthStub(gateway.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection.ServerReflectionInfo(iter([asked]), metadata=ADMIN)
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"nos.v1.ModelService", "grpc.health.v1.Health"} <= names
    call.cancel()


# What comes back when it fails


async def test_bytes_of_no_message_are_an_invalid_request(gateway):
    call = gateway.channel.unary_unary("/nos.v1.ModelService/GetModelInfo")
    with raises(errors.InvalidRequestError, "got 3 other bytes"):
        await call(b"\xff\xff\xff", metadata=ADMIN)


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\x09ab", b"\x0a\x02\xff\xfe"])
async def test_hostile_bytes_are_nobodys_defect(gateway, raw):
    for parameters in EVERY_METHOD:
        method, kind = parameters.values
        if "InferenceService" in method:
            continue  # passes bytes on unread; the worker parses them
        call = call_raw(gateway.channel, method, kind, ADMIN, raw)
        defects = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
        assert await outcome(call, kind) not in defects, method
        call.cancel()


async def test_defect_tells_the_client_an_id_and_no_text(gateway, caplog):
    gateway.cluster.failure = RuntimeError("secret")
    with caplog.at_level(logging.ERROR), raises(errors.InternalError) as found:
        await gateway.models.LoadModel(models_pb2.LoadModelRequest(model=MODEL), metadata=ADMIN)
    assert "secret" not in str(found[0])
    assert [record.message for record in caplog.records if found[0].error_id in record.message]


async def test_error_of_any_size_fits_the_trailer(gateway):
    gateway.cluster.failure = errors.ModelError("it raised", "ValueError", "é" * 9000, "t" * 90_000)
    with raises(errors.ModelError) as found:
        await gateway.models.LoadModel(models_pb2.LoadModelRequest(model=MODEL), metadata=ADMIN)
    assert found[0].type_name == "ValueError"


async def test_oversized_message_is_refused_and_the_server_goes_on(gateway):
    call = gateway.channel.unary_unary("/nos.v1.ModelService/ListModels")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(bytes(20 << 20), metadata=ADMIN)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await gateway.models.ListModels(models_pb2.ListModelsRequest(), metadata=ADMIN)


# The catalogue


async def test_models_are_listed_with_those_that_cannot_be_served(gateway):
    answer = await gateway.models.ListModels(models_pb2.ListModelsRequest(), metadata=ADMIN)
    broken, double = answer.models
    assert (broken.spec.name, broken.state) == ("broken", models_pb2.MODEL_STATE_FAILED)
    assert "line 1" in broken.error.message
    assert (double.spec.doc, double.state) == ("Doubles.", models_pb2.MODEL_STATE_REGISTERED)


async def test_load_and_unload_change_the_state(gateway):
    request = models_pb2.LoadModelRequest(model=MODEL)
    info = (await gateway.models.LoadModel(request, metadata=ADMIN)).model
    assert (info.state, info.replicas[0].device_bytes) == (models_pb2.MODEL_STATE_DEVICE, 1000)
    request = models_pb2.UnloadModelRequest(model=MODEL)
    info = (await gateway.models.UnloadModel(request, metadata=ADMIN)).model
    assert (info.state, len(info.replicas)) == (models_pb2.MODEL_STATE_REGISTERED, 0)


def file(path, sha256="0" * 64):
    return models_pb2.ModelFile(path=path, sha256=sha256)


@pytest.mark.parametrize(
    ("fields", "cls", "told"),
    [
        ({"source": "class A\n"}, errors.InvalidRequestError, "line 1"),
        ({"name": "a b"}, errors.InvalidRequestError, "letters"),
        ({"name": ""}, errors.InvalidRequestError, "got nothing"),
        ({"name": "nos/x"}, errors.AlreadyExistsError, "server's own"),
        ({"class_name": "B"}, errors.InvalidRequestError, "expected one of A"),
        ({"device": "tpu"}, errors.InvalidRequestError, "auto, cpu, cuda"),
        ({"isolation": "vm"}, errors.InvalidRequestError, "shared, process"),
        ({"source": "#" * (1 << 20) + "\n"}, errors.LimitExceededError, "1048576"),
        ({"files": [file("x", "x")]}, errors.InvalidRequestError, "no sha256"),
        ({"files": [file("x", "0" * 64)]}, errors.ModelNotFoundError, "blob is not here"),
        ({"files": [file("../x")]}, errors.InvalidRequestError, "without '..'"),
        ({"files": [file("/etc/x")]}, errors.InvalidRequestError, "without '..'"),
        ({"files": [file("a\\..\\x")]}, errors.InvalidRequestError, "without '..'"),
        ({"files": [file("a\0b")]}, errors.InvalidRequestError, "without '..'"),
        ({"files": [file("")]}, errors.InvalidRequestError, "without '..'"),
        ({"files": [file("x" * 300)]}, errors.InvalidRequestError, "without '..'"),
        ({"files": [file("x"), file("x")]}, errors.InvalidRequestError, "twice"),
        ({"files": [file("x"), file("x/y")]}, errors.InvalidRequestError, "x and x/y"),
        (
            {"files": [file(f"{number}") for number in range(1001)]},
            errors.LimitExceededError,
            "at most 1000 files",
        ),
        (
            {"init_arguments": [values_pb2.Argument(name="deep")]},
            errors.InvalidRequestError,
            "no parameter 'deep'",
        ),
        (
            {
                "init_arguments": [
                    values_pb2.Argument(name="width", value=values_pb2.Value(text="wide"))
                ]
            },
            errors.InvalidRequestError,
            "whole number",
        ),
    ],
)
async def test_wrong_registration_is_refused(gateway, fields, cls, told):
    source = "class A:\n  def __init__(self, width: int = 1): ...\n  def f(self): ..."
    request = models_pb2.RegisterModelRequest(**{"name": "mine", "source": source, **fields})
    with raises(cls, told):
        await gateway.models.RegisterModel(request, metadata=ADMIN)
    answer = await gateway.models.ListModels(models_pb2.ListModelsRequest(), metadata=ADMIN)
    assert len(answer.models) == 2


async def test_registered_source_reaches_the_cluster_with_its_init(gateway):
    request = models_pb2.RegisterModelRequest(
        name="mine",
        source="class A:\n  def __init__(self, width: int): ...\n  def f(self): ...",
        source_name="<cell 3>",
        init_arguments=[values_pb2.Argument(value=values_pb2.Value(integer=7))],
    )
    info = (await gateway.models.RegisterModel(request, metadata=ADMIN)).model
    assert (info.spec.name, info.spec.version, info.spec.owner) == ("mine", 1, "local")
    await gateway.models.LoadModel(models_pb2.LoadModelRequest(model="mine"), metadata=ADMIN)
    definition = gateway.cluster.loaded["mine@v1"]
    assert (definition.init, definition.source_name) == ([("width", 7)], "<cell 3>")


async def test_deleted_model_is_unloaded_and_gone(gateway):
    await gateway.models.LoadModel(models_pb2.LoadModelRequest(model=MODEL), metadata=ADMIN)
    await gateway.models.DeleteModel(models_pb2.DeleteModelRequest(model=MODEL), metadata=ADMIN)
    assert not gateway.cluster.loaded
    with raises(errors.ModelNotFoundError):
        request = models_pb2.GetModelInfoRequest(model=MODEL)
        await gateway.models.GetModelInfo(request, metadata=ADMIN)


async def test_a_number_of_replicas_reaches_the_cluster(gateway):
    request = models_pb2.ScaleModelRequest(model=MODEL, min_replicas=2, max_replicas=3)
    await gateway.models.ScaleModel(request, metadata=ADMIN)
    assert list(gateway.cluster.scaled.values()) == [(2, 3)]


@pytest.mark.parametrize(("low", "high"), [(2, 1), (0, 0), (0, 100_000)])
async def test_numbers_of_replicas_that_make_no_sense_are_refused(gateway, low, high):
    request = models_pb2.ScaleModelRequest(model=MODEL, min_replicas=low, max_replicas=high)
    with raises(errors.InvalidRequestError, f"got {low} to {high}"):
        await gateway.models.ScaleModel(request, metadata=ADMIN)
    assert not gateway.cluster.scaled


async def test_scaling_an_unknown_model_is_refused(gateway):
    request = models_pb2.ScaleModelRequest(model="nobody", min_replicas=1, max_replicas=1)
    with raises(errors.ModelNotFoundError):
        await gateway.models.ScaleModel(request, metadata=ADMIN)


async def test_watching_models_starts_with_all_and_goes_on_with_changes(gateway):
    call = gateway.models.WatchModels(models_pb2.WatchModelsRequest(), metadata=ADMIN)
    assert [(await call.read()).model.spec.name for _ in range(2)] == ["broken", MODEL]
    await gateway.models.LoadModel(models_pb2.LoadModelRequest(model=MODEL), metadata=ADMIN)
    while (await call.read()).model.state != models_pb2.MODEL_STATE_DEVICE:
        pass
    await gateway.models.DeleteModel(models_pb2.DeleteModelRequest(model=MODEL), metadata=ADMIN)
    while not (await call.read()).is_deleted:
        pass
    call.cancel()


# The way to a model


async def test_concurrent_resolves_load_once(gateway):
    gateway.cluster.load_s = 0.1
    request = cluster_pb2.ResolveRequest(model=MODEL)
    ways = await asyncio.gather(
        *(gateway.clusters.Resolve(request, metadata=ADMIN) for _ in range(10))
    )
    assert gateway.cluster.loads == ["double@v1"]
    assert {way.endpoints[0].address for way in ways} == {gateway.worker.address}


async def test_ticket_names_the_model_version_and_the_caller(gateway):
    request = cluster_pb2.ResolveRequest(model=MODEL)
    way = await gateway.clusters.Resolve(request, metadata=ADMIN)
    signed = access_pb2.SignedTicket.FromString(way.ticket)
    ticket = access_pb2.Ticket.FromString(signed.ticket)
    assert (ticket.model, ticket.tenant, ticket.role) == ("double@v1", "local", 4)
    assert (way.spec.version, way.ticket_ttl_s) == (1, TICKET_TTL_S)


async def test_caller_that_leaves_does_not_stop_the_load(gateway):
    gateway.cluster.load_s = 0.2
    call = gateway.models.LoadModel(models_pb2.LoadModelRequest(model=MODEL), metadata=ADMIN)
    await until(lambda: gateway.cluster.loads)
    call.cancel()
    await gateway.clusters.Resolve(cluster_pb2.ResolveRequest(model=MODEL), metadata=ADMIN)
    assert gateway.cluster.loads == ["double@v1"]


async def test_failed_load_is_told_and_tried_again_next_time(gateway):
    gateway.cluster.failure = errors.LoadError("no such file", "weights")
    request = cluster_pb2.ResolveRequest(model=MODEL)
    with raises(errors.LoadError, "no such file"):
        await gateway.clusters.Resolve(request, metadata=ADMIN)
    gateway.cluster.failure = None
    assert (await gateway.clusters.Resolve(request, metadata=ADMIN)).endpoints


async def test_lost_worker_is_not_resolved_to_again(gateway):
    request = cluster_pb2.ResolveRequest(model=MODEL)
    await gateway.clusters.Resolve(request, metadata=ADMIN)
    gateway.cluster.worker_address = "127.0.0.1:1"
    gateway.cluster.tell("worker-lost")
    way = await gateway.clusters.Resolve(request, metadata=ADMIN)
    assert way.endpoints[0].address == "127.0.0.1:1"


async def test_status_shows_devices_with_their_models(gateway):
    await gateway.models.LoadModel(models_pb2.LoadModelRequest(model=MODEL), metadata=ADMIN)
    answer = await gateway.clusters.GetStatus(cluster_pb2.GetStatusRequest(), metadata=ADMIN)
    (worker,) = answer.workers
    assert (answer.state, answer.num_models, worker.device.used_bytes) == ("ready", 2, 1000)
    assert (worker.device.models[0].model, worker.device.models[0].device_bytes) == (MODEL, 1000)


async def test_events_come_between_status_snapshots(gateway):
    request = cluster_pb2.WatchEventsRequest(status_interval_s=0.001)
    call = gateway.clusters.WatchEvents(request, metadata=ADMIN)
    first, second = await call.read(), await call.read()
    assert (first.kind, second.kind) == ("status", "status")
    assert second.time_s - first.time_s > 0.08
    gateway.cluster.tell("executor-lost", "double@v1")
    while (event := await call.read()).kind == "status":
        pass
    assert (event.kind, event.model, event.worker) == ("executor-lost", "double@v1", "fake-0")
    call.cancel()


# What passes through


async def test_run_passes_and_keeps_the_token(gateway):
    call = gateway.channel.unary_unary("/nos.v1.InferenceService/Run")
    argument = values_pb2.Argument(value=values_pb2.Value(integer=5))
    request = inference_pb2.RunRequest(arguments=[argument], data=b"abc").SerializeToString()
    raw = await call(request, metadata=STREAM_METADATA)
    assert inference_pb2.RunResponse.FromString(raw).data == b"abc"


async def test_error_of_the_worker_arrives_whole(gateway):
    call = gateway.channel.unary_unary("/nos.v1.InferenceService/Run")
    request = inference_pb2.RunRequest(method="refuse").SerializeToString()
    with raises(errors.InvalidRequestError) as found:
        await call(request, metadata=STREAM_METADATA)
    assert found[0].args == FAILURE.args
    stream = gateway.stream()
    await stream.write(frame(1, "refuse"))
    with raises(errors.InvalidRequestError, "the argument is wrong"):
        await stream.read()


async def test_stream_passes_frames_of_any_size_in_order_and_drains(gateway):
    stream = gateway.stream()
    await stream.write(HELLO)
    sizes = [0, 16, 921_600, 8 << 20]
    for seq, size in enumerate(sizes, 1):
        await stream.write(frame(seq, data=bytes([seq]) * size))
    await stream.done_writing()
    assert (await stream.read()).welcome.version == 1
    for seq, size in enumerate(sizes, 1):
        message = await stream.read()
        assert (message.seq, message.data) == (seq, bytes([seq]) * size)
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() == grpc.StatusCode.OK


async def test_stream_without_a_model_is_refused(gateway):
    with raises(errors.InvalidRequestError, "nos-model"):
        await gateway.stream(ADMIN).read()
    with raises(errors.ModelNotFoundError, "Did you mean 'double'"):
        await gateway.stream((*ADMIN, ("nos-model", "duoble"))).read()


async def test_cancelled_client_cancels_at_the_worker(gateway):
    stream = gateway.stream()
    await stream.write(frame(1, "hang"))
    await until(lambda: "frame" in gateway.worker.heard)
    stream.cancel()
    await until(lambda: gateway.worker.num_cancelled == 1 and gateway.worker.num_open == 0)
    await until(lambda: gateway.server.activity.num_in_flight == 0)


async def test_lost_worker_is_a_retryable_error_within_two_seconds(gateway):
    stream = gateway.stream()
    await stream.write(HELLO)
    await stream.write(frame(1, "mute"))
    await until(lambda: "frame" in gateway.worker.heard)
    await gateway.worker.stop()
    async with asyncio.timeout(10):
        with raises(errors.UnavailableError, "fake-0 is gone"):
            while await stream.read() is not grpc.aio.EOF:
                pass
            await stream.wait_for_connection()


async def test_reader_that_does_not_read_stops_the_worker(gateway):
    stream = gateway.stream()
    await stream.write(frame(1, "flood", bytes(1 << 18)))
    sent = -1
    while sent != gateway.worker.num_sent:
        sent = gateway.worker.num_sent
        await asyncio.sleep(0.5)
    assert 0 < sent * (1 << 18) < 64 << 20
    stream.cancel()


async def test_tickets_are_renewed_but_never_before_the_first_message(gateway):
    stream = gateway.stream()
    await asyncio.sleep(1.2 * TICKET_TTL_S)
    await stream.write(HELLO)
    await until(lambda: gateway.worker.heard.count("renewal") >= 2)
    assert gateway.worker.heard[0] == "hello"
    await stream.write(frame(1))
    await stream.done_writing()
    while (message := await stream.read()) is not grpc.aio.EOF:
        last = message
    assert last.result.value.integer == 1


async def test_drain_tells_streams_and_watchers_and_waits_for_work(gateway):
    watch = gateway.clusters.WatchEvents(cluster_pb2.WatchEventsRequest(), metadata=ADMIN)
    stream = gateway.stream()
    await stream.write(HELLO)
    await stream.read()
    await until(lambda: gateway.server.activity.num_in_flight == 2)
    draining = asyncio.create_task(gateway.server.drain(10.0))
    assert (await stream.read()).draining.grace_s == 10.0
    health = health_pb2_grpc.HealthStub(gateway.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with raises(errors.UnavailableError, "shutting down"):
        while (await watch.read()) is not grpc.aio.EOF:
            pass
    with raises(errors.UnavailableError, "shutting down"):
        await gateway.models.ListModels(models_pb2.ListModelsRequest(), metadata=ADMIN)
    await stream.write(frame(1))
    assert (await stream.read()).seq == 1
    assert not draining.done()
    await stream.done_writing()
    async with asyncio.timeout(30):
        await draining


# Blobs


def upload(content, offset=0, sha256="", size=None, piece=1 << 20):
    digest = sha256 or hashlib.sha256(content).hexdigest()
    size = len(content) if size is None else size
    yield blobs_pb2.UploadRequest(
        sha256=digest,
        size_bytes=size,
        offset_bytes=offset,
        data=content[offset : offset + piece],
    )
    for start in range(offset + piece, len(content), piece):
        yield blobs_pb2.UploadRequest(data=content[start : start + piece])


CONTENT = bytes(range(256)) * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


async def stat(gateway):
    answer = await gateway.blobs.Stat(blobs_pb2.StatRequest(sha256=SHA256), metadata=ADMIN)
    return answer.received_bytes, answer.is_complete


async def fetch(gateway, offset=0):
    request = blobs_pb2.FetchRequest(sha256=SHA256, offset_bytes=offset)
    return b"".join([part.data async for part in gateway.blobs.Fetch(request, metadata=ADMIN)])


async def test_blob_comes_back_as_it_went(gateway):
    assert await stat(gateway) == (0, False)
    answer = await gateway.blobs.Upload(upload(CONTENT), metadata=ADMIN)
    assert answer.size_bytes == len(CONTENT)
    assert await stat(gateway) == (len(CONTENT), True)
    assert await fetch(gateway) == CONTENT
    assert await fetch(gateway, 1_000_000) == CONTENT[1_000_000:]


async def test_interrupted_upload_resumes_where_it_stopped(gateway):
    with raises(errors.InvalidRequestError, "ended early"):
        await gateway.blobs.Upload(
            upload(CONTENT[:1_500_000], 0, SHA256, len(CONTENT)), metadata=ADMIN
        )
    assert await stat(gateway) == (1_500_000, False)
    with raises(errors.InvalidRequestError, "expected 1500000, got 0"):
        await gateway.blobs.Upload(upload(CONTENT), metadata=ADMIN)
    await gateway.blobs.Upload(upload(CONTENT, 1_500_000), metadata=ADMIN)
    assert await fetch(gateway) == CONTENT


async def test_tenant_uploads_up_to_its_limit_and_no_more(tmp_path):
    gateway = Gateway(tmp_path, max_tenant_upload_bytes=2 * len(CONTENT) - 1)
    await gateway.start()
    await gateway.blobs.Upload(upload(CONTENT), metadata=ADMIN)
    await gateway.blobs.Upload(upload(CONTENT[:-1]), metadata=ADMIN)
    with raises(errors.LimitExceededError, f"at most {2 * len(CONTENT) - 1} bytes"):
        await gateway.blobs.Upload(upload(b"x"), metadata=ADMIN)
    await gateway.stop()


async def test_cancelled_upload_frees_the_blob_for_the_next(gateway):
    call = gateway.blobs.Upload(metadata=ADMIN)
    await call.write(next(upload(CONTENT)))
    async with asyncio.timeout(30):
        while (await stat(gateway))[0] < 1 << 20:
            pass
    call.cancel()
    await until(lambda: gateway.server.activity.num_in_flight == 0)
    await gateway.blobs.Upload(upload(CONTENT, 1 << 20), metadata=ADMIN)
    assert await stat(gateway) == (len(CONTENT), True)


async def test_wrong_hash_is_dropped(gateway):
    wrong = CONTENT[:-1] + b"!"
    with raises(errors.InvalidRequestError, SHA256):
        await gateway.blobs.Upload(upload(wrong, 0, SHA256), metadata=ADMIN)
    assert await stat(gateway) == (0, False)


async def test_two_uploads_of_one_blob_do_not_mix(gateway):
    first = gateway.blobs.Upload(metadata=ADMIN)
    await first.write(next(upload(CONTENT, piece=10)))
    async with asyncio.timeout(30):
        while await stat(gateway) != (10, False):
            pass
    with raises(errors.UnavailableError, "under way"):
        await gateway.blobs.Upload(upload(CONTENT, 10), metadata=ADMIN)
    first.cancel()


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", SHA256.upper(), SHA256[1:]])
async def test_name_that_is_no_hash_is_refused(gateway, sha256):
    with raises(errors.InvalidRequestError, "sha256"):
        await gateway.blobs.Stat(blobs_pb2.StatRequest(sha256=sha256), metadata=ADMIN)
    with raises(errors.InvalidRequestError):
        requests = iter([blobs_pb2.UploadRequest(sha256=sha256, size_bytes=1, data=b"x")])
        await gateway.blobs.Upload(requests, metadata=ADMIN)


async def test_more_bytes_than_announced_are_refused(gateway):
    with raises(errors.InvalidRequestError, "more bytes"):
        await gateway.blobs.Upload(upload(CONTENT, 0, SHA256, 100), metadata=ADMIN)


async def test_missing_blob_is_not_found(gateway):
    with raises(errors.ModelNotFoundError, "Upload it"):
        await fetch(gateway)
