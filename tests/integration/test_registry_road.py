"""Tokens by the command line, and what a whole server keeps through its own end."""

import hashlib
import json
import os
import signal

import grpc
import nos as sdk
import pytest
from nos import cli
from nos.errors import LoadError, UnauthenticatedError
from nos.wire.limits import TOKEN_KEY
from nos.wire.v1 import blobs_pb2, blobs_pb2_grpc, models_pb2, models_pb2_grpc

from tests.integration.test_access import audit_of
from tests.servers import start_server, wait_for

SOURCE = "class Double:\n    def __call__(self, x: int) -> int:\n        return {} * x\n"


@pytest.fixture
def nos(server, monkeypatch, capsys):
    """Run a command line against the run's server: exit code, standard output, standard error."""
    monkeypatch.setenv("NOS_ADDRESS", server.address)
    monkeypatch.setenv("NOS_TOKEN_FILE", str(server.token_file))

    def run(*arguments):
        code = cli.run_command(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_token_is_made_listed_and_revoked(nos, server):
    code, out, _ = nos("token", "create", "ann", "--role", "viewer", "--expires", "1h", "--json")
    made = json.loads(out)
    assert (code, made["tenant"], made["role"]) == (0, "ann", "viewer")
    assert made["expires_s"] - made["created_s"] == pytest.approx(3600)
    listed = nos("token", "list")[1]
    assert made["token_id"] in listed
    assert made["secret"] not in listed
    with sdk.connect(server.address, token=made["secret"]) as viewer:
        assert viewer.models()
    assert nos("token", "revoke", made["token_id"])[0] == 0
    assert made["token_id"] not in nos("token", "list")[1]
    with pytest.raises(UnauthenticatedError):
        sdk.connect(server.address, token=made["secret"])


def test_secret_is_printed_once_on_a_line_of_its_own(nos):
    code, out, _ = nos("token", "create", "ann")
    (secret,) = [line for line in out.splitlines() if line.startswith("nos_user_")]
    assert (code, len(secret)) == (0, len("nos_user_") + 43)
    assert secret not in nos("token", "list", "--json")[1]


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (("create", "ann", "--role", "king"), "viewer, user, author, admin", 1),
        (("create", "ann", "--expires", "soon"), "90s, 30m, 12h, 7d or never", 2),
        (("create", "../x"), "tenant", 1),
        (("revoke", "nothing"), "`nos token list`", 1),
    ],
)
def test_wrong_use_is_one_sentence(nos, arguments, told, code):
    found, _, complaint = nos("token", *arguments)
    assert found == code
    assert told in complaint
    assert complaint.count("\n") == 1


def serve(folder):
    folder.mkdir(exist_ok=True)
    return start_server(folder, "--idle-shutdown-s", "0")


def test_models_tokens_and_replicas_survive_the_end_of_the_server_and_a_killed_gateway(tmp_path):
    server = serve(tmp_path)
    with sdk.connect(server.address, token_file=str(server.token_file)) as client:
        author = client.create_token("ann", role="author").secret
    with sdk.connect(server.address, token=author) as client:
        for number in (1, 2):
            client.register(SOURCE.format(number), name="mine", class_name="Double")
        assert client.model("mine")(4) == 8
        client.scale("mine", replicas=1, placement="pack")
        client.scale("mine@v1", min=0, max=3)
        client.unload("mine@v1")
    server.stop()
    server = serve(tmp_path)
    try:
        for _ in range(2):
            with sdk.connect(server.address, token=author) as client:
                assert client.info("mine").spec.owner == "ann"
                wait_for(lambda client=client: phases(client, "mine") == ["serving"], "it serves")
                assert client.info("mine").spec.placement == "pack"
                assert [client.model(f"mine@v{number}")(4) for number in (1, 2)] == [4, 8]
            gateway = next(
                process for process in server.processes() if "nos_backend.app" in process.cmdline()
            )
            os.kill(gateway.pid, signal.SIGKILL)
            wait_for(lambda server=server: answers(server, author), "the gateway is back")
    finally:
        server.stop()
    actions = [line[1] for line in audit_of(server.state_dir)]
    assert actions == ["create-token", "register", "update", *["scale"] * 3]


def phases(client, name):
    return [replica.phase for replica in client.info(name).replicas]


def answers(server, token):
    try:
        with sdk.connect(server.address, token=token) as client:
            return client.status().state == "ready"
    except sdk.NosError:
        return False


FILES = {
    "net/weights.txt": b"3",
    "net/deep/er.py": b"def times(a, b):\n    return a * b\n",
    "scale.py": b"from net.deep.er import times\n",
}
WITH_FILES = """
from pathlib import Path

from scale import times

class Scaled:
    def __init__(self):
        self.by = int(Path(__file__).with_name("net").joinpath("weights.txt").read_text())

    def __call__(self, x: int) -> int:
        return times(x, self.by)
"""


def register_with_files(address, token, files):
    """Upload the files and register a model that needs them; returns the answer."""
    metadata = ((TOKEN_KEY, f"Bearer {token}"),)
    request = models_pb2.RegisterModelRequest(
        name="scaled", source=WITH_FILES, source_name="/home/ann/model.py"
    )
    with grpc.insecure_channel(address) as channel:
        blobs = blobs_pb2_grpc.BlobServiceStub(channel)
        for path, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            part = blobs_pb2.UploadRequest(sha256=sha256, size_bytes=len(content), data=content)
            blobs.Upload(iter([part]), metadata=metadata)
            request.files.add(path=path, sha256=sha256, size_bytes=len(content))
        stub = models_pb2_grpc.ModelServiceStub(channel)
        return stub.RegisterModel(request, metadata=metadata).model


def test_model_with_files_imports_and_reads_them_also_after_a_restart(tmp_path):
    server = serve(tmp_path)
    for _ in range(2):
        made = register_with_files(server.address, server.token, FILES)
        assert made.spec.version == 1
    again = register_with_files(server.address, server.token, {**FILES, "net/weights.txt": b"5"})
    assert again.spec.version == 2
    server.stop()
    server = serve(tmp_path)
    try:
        with sdk.connect(server.address, token_file=str(server.token_file)) as client:
            assert client.model("scaled@v2")(4) == 20
            folders = list((server.state_dir / "folders").iterdir())
            assert len(folders) == 2
            assert not [path for path in folders if path.name.startswith(".")]
    finally:
        server.stop()


def test_damaged_registry_is_said_in_the_status(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "registry.db").write_bytes(b"no database " * 1000)
    server = serve(tmp_path)
    try:
        with sdk.connect(server.address, token_file=str(server.token_file)) as client:
            (notice,) = client.status().notices
            assert "quarantine" in notice
            assert notice in str(client.status())
    finally:
        server.stop()


@pytest.mark.long
def test_lost_source_is_a_load_error_that_says_what_to_do(tmp_path):
    server = serve(tmp_path)
    with sdk.connect(server.address, token_file=str(server.token_file)) as client:
        sha256 = client.register(
            SOURCE.format(2), name="mine", class_name="Double"
        ).spec.source_sha256
    server.stop()
    (server.state_dir / "blobs" / sha256[:2] / sha256).unlink()
    server = serve(tmp_path)
    try:
        with sdk.connect(server.address, token_file=str(server.token_file)) as client:
            assert client.info("mine").state == "failed"
            with pytest.raises(LoadError, match="Register it again"):
                client.load("mine")
    finally:
        server.stop()
