"""Roles: every method, whoever comes; what a revoked token had under way ends."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time

import grpc
import pytest
import pytest_asyncio
from nos.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    PermissionDeniedError,
    StreamClosedError,
    UnauthenticatedError,
)
from nos.wire.limits import TICKET_KEY
from nos.wire.v1 import (
    access_pb2,
    access_pb2_grpc,
    blobs_pb2,
    cluster_pb2,
    models_pb2,
)
from nos_backend.control.logins import MAX_DELAY_S, Failures
from nos_backend.control.tickets import TicketSigner
from nos_backend.rpc.access import LEAST_ROLE

from tests.integration.test_gateway import (
    ADMIN,
    EVERY_METHOD,
    HELLO,
    SOURCE,
    Gateway,
    call_raw,
    frame,
    outcome,
    raises,
    until,
)
from tests.plane import Plane, definitions, running_plane

OK = None
REFUSED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
CREDENTIALS = ("none", "wrong", "expired", "revoked", "viewer", "user", "author", "admin")
ROLES = {name: access_pb2.Role.Value(f"ROLE_{name.upper()}") for name in CREDENTIALS[4:]}
REVOKED_WITHIN_S = 5.0


class Doors(Gateway):
    """A gateway that does not slow down who guesses, and a token of each kind, made by an admin."""

    async def start(self):
        await super().start()
        self.is_running = True
        self.access = access_pb2_grpc.AccessServiceStub(self.channel)
        self.ids = {}
        self.secrets = {"none": "", "wrong": "nos_wrong_" + "x" * 30}
        for name, role in ROLES.items():
            await self.create(name, role=role)
        await self.create("revoked", role=access_pb2.ROLE_ADMIN)
        await self.revoke("revoked")
        await self.create("expired", role=access_pb2.ROLE_ADMIN, ttl_s=1e-6)

    async def stop(self):
        if self.is_running:
            self.is_running = False
            await super().stop()

    async def create(self, name, **fields):
        request = access_pb2.CreateTokenRequest(**{"tenant": "ann", "label": name, **fields})
        made = await self.access.CreateToken(request, metadata=ADMIN)
        self.ids[name], self.secrets[name] = made.token.token_id, made.secret
        return made

    async def revoke(self, name):
        request = access_pb2.RevokeTokenRequest(token_id=self.ids[name])
        await self.access.RevokeToken(request, metadata=ADMIN)

    def metadata(self, name):
        secret = self.secrets[name]
        return (("authorization", f"Bearer {secret}"), ("nos-model", "double")) if secret else ()


@pytest_asyncio.fixture
async def doors(tmp_path):
    doors = Doors(tmp_path, failures=Failures(1e9))
    await doors.start()
    try:
        yield doors
    finally:
        await doors.stop()


def expected(method, credential):
    """Return what the table of roles says: a status, or None for admitted."""
    if credential not in ROLES:
        return REFUSED
    return OK if ROLES[credential] >= LEAST_ROLE[method] else DENIED


@pytest.mark.accept("F5")
@pytest.mark.asyncio
@pytest.mark.parametrize(("method", "kind"), EVERY_METHOD)
async def test_every_method_of_the_gateway_admits_exactly_whom_the_table_says(doors, method, kind):
    found = {}
    for credential in CREDENTIALS:
        call = call_raw(doors.channel, method, kind, doors.metadata(credential))
        code = await outcome(call, kind)
        found[credential] = code if code in {REFUSED, DENIED} else OK
        call.cancel()
    assert found == {credential: expected(method, credential) for credential in CREDENTIALS}


async def opened(doors, method, metadata):
    """Open a call that lasts, and wait until it is under way."""
    if method.endswith("InferenceService/Stream"):
        call = doors.stream(metadata)
        await call.write(HELLO)
        await call.write(frame(1, method="mute"))
        await call.read()
        return call
    if method.endswith("Upload"):
        call = doors.blobs.Upload(metadata=metadata)
        sha256 = hashlib.sha256(repr(metadata).encode()).hexdigest()
        await call.write(blobs_pb2.UploadRequest(sha256=sha256, size_bytes=9, data=b"x"))
        return call
    if method.endswith("WatchModels"):
        call = doors.models.WatchModels(models_pb2.WatchModelsRequest(), metadata=metadata)
    else:
        request = cluster_pb2.WatchEventsRequest(status_interval_s=0.1)
        call = doors.clusters.WatchEvents(request, metadata=metadata)
    await call.read()
    return call


async def ended(call):
    """Read a call to its end, which a client of gRPC has to do before it learns the status."""
    if isinstance(call, grpc.aio.StreamUnaryCall):
        await call
    while await call.read() is not grpc.aio.EOF:
        pass


LASTING = [
    "/nos.v1.InferenceService/Stream",
    "/nos.v1.BlobService/Upload",
    "/nos.v1.ModelService/WatchModels",
    "/nos.v1.ClusterService/WatchEvents",
]


@pytest.mark.accept("F5")
@pytest.mark.asyncio
@pytest.mark.parametrize("method", LASTING)
async def test_revoking_a_token_ends_its_calls_and_no_others(doors, method, accept):
    mine = await opened(doors, method, doors.metadata("author"))
    other = await opened(doors, method, doors.metadata("admin"))
    started_s = time.monotonic()
    await doors.revoke("author")
    with raises(UnauthenticatedError, "revoked"):
        await ended(mine)
    accept.figure(time.monotonic() - started_s, REVOKED_WITHIN_S, "s")
    assert not other.done()
    other.cancel()
    assert doors.cluster.revoked == [doors.ids["revoked"], doors.ids["author"]]


@pytest.mark.asyncio
async def test_revoking_cuts_a_stream_whose_reader_is_flooded(doors):
    call = doors.stream(doors.metadata("user"))
    await call.write(HELLO)
    await call.write(frame(1, method="flood", data=bytes(100_000)))
    await until(lambda: doors.worker.num_sent > 20)
    await doors.revoke("user")
    await until(lambda: doors.worker.num_open == 0)
    with raises(UnauthenticatedError, "revoked"):
        await ended(call)


@pytest.mark.asyncio
async def test_token_that_expires_ends_its_calls_and_tickets(doors):
    await doors.create("short", role=access_pb2.ROLE_ADMIN, ttl_s=1.0)
    call = await opened(doors, LASTING[0], doors.metadata("short"))
    request = cluster_pb2.ResolveRequest(model="double")
    way = await doors.clusters.Resolve(request, metadata=doors.metadata("short"))
    assert way.ticket_ttl_s <= 1.0
    with raises(UnauthenticatedError, "expired"):
        await ended(call)


@pytest.mark.asyncio
async def test_admin_may_revoke_its_own_token(doors):
    request = access_pb2.RevokeTokenRequest(token_id=doors.ids["admin"])
    await doors.access.RevokeToken(request, metadata=doors.metadata("admin"))
    with raises(UnauthenticatedError, "wrong"):
        await doors.access.RevokeToken(request, metadata=doors.metadata("admin"))


@pytest.mark.asyncio
async def test_tokens_are_listed_without_secrets_and_only_hashes_are_kept(doors, tmp_path):
    listed = await doors.access.ListTokens(access_pb2.ListTokensRequest(), metadata=ADMIN)
    labels = {token.label for token in listed.tokens}
    assert labels == {"", "expired", *ROLES}
    await doors.stop()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for name in (*ROLES, "revoked", "expired"):
        assert doors.secrets[name].startswith("nos_")
        assert doors.secrets[name] not in str(listed)
        assert doors.secrets[name].encode() not in everything


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tenant": "nos"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "../x"}, "tenant"),
        ({"role": access_pb2.ROLE_UNSPECIFIED}, "viewer, user, author or admin"),
        ({"role": 9}, "viewer, user, author or admin"),
        ({"ttl_s": -1.0}, "cannot last"),
        ({"ttl_s": float("nan")}, "cannot last"),
        ({"label": "x" * 101}, "101 characters"),
        ({"label": "a\nb"}, "one line"),
    ],
)
async def test_wrong_token_is_refused(doors, fields, told):
    with raises(InvalidRequestError, told):
        await doors.create("new", **{"role": access_pb2.ROLE_USER, **fields})


@pytest.mark.asyncio
async def test_revoking_what_cannot_be_is_refused(doors):
    listed = await doors.access.ListTokens(access_pb2.ListTokensRequest(), metadata=ADMIN)
    for token_id, told in (("nothing", "no such token"), (listed.tokens[0].token_id, "generated")):
        with raises(InvalidRequestError, told):
            request = access_pb2.RevokeTokenRequest(token_id=token_id)
            await doors.access.RevokeToken(request, metadata=ADMIN)


# Owners


@pytest.mark.asyncio
async def test_only_the_owner_or_an_admin_changes_a_model(doors):
    await doors.create("bob", tenant="bob", role=access_pb2.ROLE_AUTHOR)
    request = models_pb2.RegisterModelRequest(name="mine", source=SOURCE)
    await doors.models.RegisterModel(request, metadata=doors.metadata("author"))
    changed = models_pb2.RegisterModelRequest(name="mine", source=SOURCE + "# changed\n")
    with raises(AlreadyExistsError, "taken"):
        await doors.models.RegisterModel(changed, metadata=doors.metadata("bob"))
    with raises(PermissionDeniedError, "another owner's"):
        request = models_pb2.DeleteModelRequest(model="mine")
        await doors.models.DeleteModel(request, metadata=doors.metadata("bob"))
    info = (await doors.models.RegisterModel(changed, metadata=ADMIN)).model
    assert (info.spec.version, info.spec.owner) == (2, "ann")
    await doors.models.DeleteModel(request, metadata=ADMIN)


# Who guesses


def test_peer_has_ten_failures_a_minute_free_and_then_waits_ever_longer():
    failures = Failures()
    assert [failures.add("a", 0.0) for _ in range(10)] == [0.0] * 10
    assert [failures.add("a", 0.0) for _ in range(7)] == [1, 2, 4, 8, 16, MAX_DELAY_S, MAX_DELAY_S]
    assert failures.add("b", 0.0) == 0.0
    assert failures.add("a", 3600.0) == 0.0


@pytest.mark.asyncio
async def test_who_guesses_waits_and_who_knows_does_not(tmp_path):
    gateway = Gateway(tmp_path, failures=Failures(max_failures=2))
    await gateway.start()
    wrong = (("authorization", "Bearer nos_guess"),)
    request = models_pb2.ListModelsRequest()
    for _ in range(2):
        with raises(UnauthenticatedError):
            await gateway.models.ListModels(request, metadata=wrong, timeout=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.models.ListModels(request, metadata=wrong, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await gateway.models.ListModels(request, metadata=ADMIN, timeout=0.5)
    await gateway.stop()
    lines = audit_of(tmp_path)
    assert [line[1:] for line in lines] == [("refused", "the token is wrong")] * 3
    assert all(line[0].startswith("ipv4:127.0.0.1:") for line in lines)


@pytest.mark.asyncio
async def test_tokens_and_refusals_are_in_the_audit_log(doors, tmp_path):
    with raises(PermissionDeniedError):
        await doors.models.RegisterModel(
            models_pb2.RegisterModelRequest(), metadata=doors.metadata("viewer")
        )
    await doors.stop()
    actions = [line[1] for line in audit_of(tmp_path)]
    assert actions == [*["create-token"] * 5, "revoke-token", "create-token", "refused"]


def audit_of(folder):
    with sqlite3.connect(folder / "registry.db") as connection:
        rows = connection.execute("SELECT peer, action, outcome FROM audit ORDER BY number")
        found = rows.fetchall()
    connection.close()
    return found


# The worker's port


@pytest.fixture(scope="module")
def plane():
    models = definitions(SOURCE, "double.py", owner="ann")
    with running_plane({model.name: model for model in models}) as running:
        running.key = models[0].key
        yield running


def tickets(plane: Plane):
    """Return a ticket for each credential; those of tokens that are to be revoked are revoked."""
    plane.verifier.revoke(["gone"])
    found = {name: plane.ticket(plane.key, role=role) for name, role in ROLES.items()}
    stranger = TicketSigner.generate()
    admin = access_pb2.ROLE_ADMIN
    return {
        **found,
        "none": b"",
        "wrong": stranger.sign(plane.key, "ann", admin, "t1", 60.0),
        "expired": plane.ticket(plane.key, role=admin, ttl_s=-1.0),
        "revoked": plane.ticket(plane.key, role=admin, token_id="gone"),
    }


@pytest.mark.accept("F5")
@pytest.mark.parametrize(("method", "kind"), EVERY_METHOD)
def test_every_method_of_a_workers_port_admits_exactly_whom_the_table_says(plane, method, kind):
    found = {}
    given = tickets(plane)
    is_served = "InferenceService" in method
    for credential in CREDENTIALS:
        metadata = ((TICKET_KEY, given[credential]),) if given[credential] else ()
        streams = f"{'stream' if kind[0] else 'unary'}_{'stream' if kind[1] else 'unary'}"
        call = getattr(plane.channel, streams)(method)
        raw = b""
        try:
            answer = call(iter([raw]) if kind[0] else raw, metadata=metadata, timeout=5)
            if kind[1]:
                next(iter(answer), None)
            code = OK
        except grpc.RpcError as error:
            code = error.code()
        if not is_served and credential in ROLES and code is grpc.StatusCode.UNIMPLEMENTED:
            code = OK
        found[credential] = code if code in {REFUSED, DENIED} else OK
        if credential not in ROLES or (is_served and credential == "viewer"):
            assert code in {REFUSED, DENIED}, credential
    wanted = {
        credential: expected("/nos.v1.InferenceService/Run", credential)
        for credential in CREDENTIALS
    }
    assert found == wanted


@pytest.mark.accept("F5")
def test_revoking_a_token_ends_its_streams_on_a_worker_and_no_others(plane, accept):
    mine, other = plane.stream(plane.key, token_id="t7"), plane.stream(plane.key, token_id="t8")
    for stream in (mine, other):
        stream.hello()
    started_s = time.monotonic()
    plane.verifier.revoke(["t7"])
    plane.data_plane.revoke(["t7"])
    with pytest.raises(UnauthenticatedError, match="revoked"):
        mine.read()
    accept.figure(time.monotonic() - started_s, REVOKED_WITHIN_S, "s")
    other.send(4)
    assert other.result() == (1, 8)
    other.half_close()


# All of it: `nos serve`, and the SDK on the direct and on the relayed way


@pytest.mark.accept("F5")
@pytest.mark.parametrize("via", ["direct", "relay"])
def test_revoking_cuts_live_streams_of_the_sdk(server, client, via, accept):
    import nos

    made = client.create_token("ann", role="user", label="to be revoked")
    with nos.connect(server.address, token=made.secret, via=via) as mine:
        stream = mine.model("nos/echo").stream()
        stream.send("x")
        assert next(stream).value == "x"
        started_s = time.monotonic()
        client.revoke_token(made.info.token_id)
        with pytest.raises((UnauthenticatedError, StreamClosedError)):
            go_on(stream, started_s + 10 * REVOKED_WITHIN_S)
        accept.figure(time.monotonic() - started_s, REVOKED_WITHIN_S, "s")
        with pytest.raises(UnauthenticatedError):
            mine.models()


def go_on(stream, until_s):
    """Send one frame after the other."""
    while time.monotonic() < until_s:
        stream.send("y")
        result = next(stream)
        if result.error is not None:
            raise result.error
        time.sleep(0.01)


def test_async_client_makes_lists_and_revokes_tokens(server):
    import nos

    async def work():
        client = await nos.AsyncClient.connect(server.address, token_file=str(server.token_file))
        made = await client.create_token("ann", role="viewer", ttl_s=60.0, label="here")
        assert made.secret not in repr(made)
        listed = await client.list_tokens()
        assert made.info in listed
        assert "here" in str(listed)
        await client.revoke_token(made.info.token_id)
        assert made.info not in await client.list_tokens()
        await client.close()

    asyncio.run(work())
