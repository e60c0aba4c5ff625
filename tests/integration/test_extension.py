"""The Jupyter server extension behind Jupyter's own doors: real servers, real requests."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
import websocket
from nos_jupyter import frames
from nos_jupyter.routes import ROUTES
from PIL import Image

from tests.browser.lab import TOKEN, Jupyter, jupyter
from tests.servers import Server, wait_for

HEALTH = "nos/api/v1/health"
NOBODY = "127.0.0.1:9"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
DENY = """
from jupyter_server.auth import Authorizer
class DenyNos(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return not (resource or "").startswith("nos")
"""
#: One path of each route.
PATHS = [
    pattern.replace("(.+)", "nos/digits").replace("(.*/ws)", "status/ws").replace("(.*)", "status")
    for pattern, _ in ROUTES
]
POSTED = [path for path in PATHS if path.endswith(("load", "unload", "start", "stop"))]
SOCKETS = [path for path in PATHS if "/ws" in path]
READ = [path for path in PATHS if path not in POSTED + SOCKETS and "dask" not in path]


@pytest.fixture(scope="module")
def without_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """A server whose configured backend does not answer, under an odd base URL."""
    folder = tmp_path_factory.mktemp("down")
    flags = (f"--NosApp.address={NOBODY}", "--ServerApp.allow_unauthenticated_access=False")
    with jupyter(folder, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def denying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """A server that lets nobody read `nos`, started by a user who set an address."""
    folder = tmp_path_factory.mktemp("deny")
    (folder / "denying.py").write_text(DENY)
    flags = (
        "--ServerApp.authorizer_class=denying.DenyNos",
        f"--NosApp.address={NOBODY}",
        "--NosApp.token_file=/a/token",
    )
    with jupyter(folder, *flags, environment={"NOS_ADDRESS": "gpu1:50051"}) as running:
        yield running


@pytest.fixture(scope="module")
def with_backend(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Jupyter]:
    """A server beside the run's backend."""
    flags = (f"--NosApp.address={server.address}", f"--NosApp.token_file={server.token_file}")
    folder = tmp_path_factory.mktemp("up")
    with jupyter(folder, *flags, "--NosApp.dask_dashboard=True") as running:
        yield running


def connect(jupyter: Jupyter, path: str, cookie: str, origin: str) -> websocket.WebSocket:
    url = f"{jupyter.origin}{jupyter.base_url}{path}".replace("http", "ws", 1)
    return websocket.create_connection(url, cookie=cookie, origin=origin, timeout=60)


@contextmanager
def connected(jupyter: Jupyter, path: str) -> Iterator[websocket.WebSocket]:
    url = f"{jupyter.origin}{jupyter.base_url}{path}".replace("http", "ws", 1)
    header = [f"Authorization: token {TOKEN}"]
    socket = websocket.create_connection(url, header=header, timeout=60)
    try:
        yield socket
        socket.close()
    finally:
        socket.shutdown()  # one that the server closed first is still open here


def kernel_environment(server: Jupyter) -> dict[str, str]:
    """Start a kernel and return its environment."""
    assert server.fetch("api/kernels", method="POST", body=b"{}").code == 201

    def found() -> dict[str, str] | None:
        for process in psutil.Process(server.process.pid).children(recursive=True):
            if "ipykernel_launcher" in process.cmdline():
                return process.environ()
        return None

    return dict(wait_for(found, "a kernel runs"))


@pytest.mark.accept("G3")
@pytest.mark.parametrize("headers", [{}, {"Authorization": "token wrong"}], ids=["none", "wrong"])
def test_every_route_and_method_wants_the_right_token(
    without_backend: Jupyter, headers: dict[str, str]
) -> None:
    for path in PATHS:
        answered = ("POST",) if path in POSTED else ("GET",)
        for method in METHODS:
            body = b"{}" if method in ("POST", "PUT", "PATCH") else None
            code = without_backend.fetch(path, method=method, headers=headers, body=body).code
            assert code in ((403,) if method in answered else (403, 405)), (method, path)
        # Jupyter answers a preflight without a token, and says nothing in it.
        preflight = without_backend.fetch(path, method="OPTIONS", headers=headers)
        assert path in SOCKETS or preflight.body == b""
        assert "Access-Control-Allow-Origin" not in preflight.headers


@pytest.mark.accept("G3")
@pytest.mark.parametrize("path", POSTED)
def test_a_cookie_without_an_xsrf_header_changes_nothing(
    without_backend: Jupyter, path: str
) -> None:
    cookies = without_backend.fetch("api/me").cookies
    assert cookies
    answer = without_backend.fetch(path, method="POST", headers={"Cookie": cookies}, body=b"{}")
    assert answer.code == 403


@pytest.mark.accept("G3")
@pytest.mark.parametrize("path", SOCKETS)
def test_a_websocket_opens_for_its_own_pages_only(without_backend: Jupyter, path: str) -> None:
    cookies = without_backend.fetch("api/me").cookies
    own = without_backend.origin
    for cookie, origin in (("", own), (cookies, "http://evil.example")):
        with pytest.raises(websocket.WebSocketBadStatusException) as caught:
            connect(without_backend, path, cookie, origin)
        assert caught.value.status_code == 403, (cookie, origin)
    if "dask" not in path:
        connect(without_backend, path, cookies, own).close()


@pytest.mark.accept("G3")
def test_a_page_of_another_origin_gets_nothing(without_backend: Jupyter) -> None:
    cookies = without_backend.fetch("api/me").cookies
    own = {"Cookie": cookies, "Origin": without_backend.origin}
    foreign = {"Cookie": cookies, "Origin": "http://evil.example"}
    assert without_backend.fetch(HEALTH, headers=own).code == 502
    answer = without_backend.fetch(HEALTH, headers=foreign)
    assert answer.code in (403, 404)
    assert NOBODY not in answer.body.decode()


@pytest.mark.accept("G3")
def test_an_authorizer_that_denies_is_obeyed(denying: Jupyter) -> None:
    for path in PATHS:
        method = "POST" if path in POSTED else "GET"
        assert denying.fetch(path, method=method, body=b"").code == 403, path
    assert denying.fetch("api/me").code == 200


@pytest.mark.accept("G3")
@pytest.mark.parametrize("path", READ)
def test_a_backend_that_is_down_is_a_502_with_a_sentence(
    without_backend: Jupyter, path: str
) -> None:
    answer = without_backend.fetch(path)
    assert answer.code == 502
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    message = answer.json()["message"]
    assert NOBODY in message
    assert "\n" not in message


@pytest.mark.accept("G3")
def test_pages_start_and_stop_no_backend_but_the_users_own(without_backend: Jupyter) -> None:
    for act in ("start", "stop"):
        answer = without_backend.fetch(f"nos/api/v1/backend/{act}", method="POST", body=b"")
        assert answer.code == 409
        assert NOBODY in answer.json()["message"]


@pytest.mark.accept("G3")
def test_health_tells_versions_and_latency_and_no_token(
    with_backend: Jupyter, server: Server
) -> None:
    answer = with_backend.fetch(HEALTH)
    assert answer.code == 200
    assert answer.json()["backend"]["state"] == "ready"
    assert answer.json()["backend"]["address"] == server.address
    assert 0 < answer.json()["backend"]["latency_s"] < 10
    assert server.token not in answer.body.decode()
    assert server.token not in with_backend.log_path.read_text()


def test_models_are_listed_loaded_and_unloaded(with_backend: Jupyter) -> None:
    listed = with_backend.fetch("nos/api/v1/models?q=edges").json()["models"]
    assert [model["spec"]["name"] for model in listed] == ["nos/edges"]
    path = "nos/api/v1/models/nos/edges"
    assert with_backend.fetch(f"{path}/load", method="POST", body=b"").json()["state"] == "device"
    assert with_backend.fetch("nos/api/v1/devices").json()["workers"]
    assert with_backend.fetch(f"{path}/unload", method="POST", body=b"").code == 200
    missing = with_backend.fetch("nos/api/v1/models/nos/none")
    assert missing.code == 404
    assert "nos/none" in missing.json()["message"]


def test_events_come_over_a_websocket(with_backend: Jupyter) -> None:
    with connected(with_backend, "nos/api/v1/ws/events?interval_s=0.001") as socket:
        event = json.loads(socket.recv())
        while event["kind"] != "status":
            event = json.loads(socket.recv())
    assert event["status"]["workers"]


def test_frames_go_through_a_model_and_a_bad_one_fails_alone(with_backend: Jupyter) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), "white").save(file, "JPEG")
    answers = []
    with connected(with_backend, "nos/api/v1/ws/stream/nos/edges") as socket:
        socket.send(json.dumps({"method": "__call__", "arguments": {"gain": 2.0}}))
        for seq, payload in ((1, file.getvalue()), (2, b"no image"), (3, file.getvalue())):
            socket.send_binary(frames.pack({"seq": seq}, payload))
            answers.append(frames.unpack(socket.recv()))
    assert [header["seq"] for header, _ in answers] == [1, 2, 3]
    assert answers[1][0]["failure"]["name"] == "InvalidTensorError"
    assert answers[2][0]["view"] == {"kind": "pixels", "shape": [24, 32]}
    assert len(answers[2][1]) == 24 * 32


@pytest.mark.parametrize(
    ("model", "first"),
    [("nos/none", "{}"), ("nos/digits", '{"method": "__call__"}'), ("nos/edges", "no json")],
)
def test_a_stream_that_cannot_be_is_closed_with_a_sentence(
    with_backend: Jupyter, model: str, first: str
) -> None:
    with connected(with_backend, f"nos/api/v1/ws/stream/{model}") as socket:
        socket.send(first)
        opcode, said = socket.recv_data()
    assert opcode == websocket.ABNF.OPCODE_CLOSE
    assert int.from_bytes(said[:2], "big") == 1008
    assert len(said) > 10


@pytest.mark.accept("G3")
def test_the_dashboard_is_read_only_and_off_unless_configured(
    with_backend: Jupyter, without_backend: Jupyter
) -> None:
    page = with_backend.fetch("nos/dask/status")
    assert page.code == 200
    assert "Dask" in page.body.decode()
    assert page.headers["Content-Type"].startswith("text/html")
    for method in ("HEAD", "POST", "PUT", "PATCH", "DELETE"):
        body = None if method == "HEAD" else b"{}"
        answer = with_backend.fetch("nos/dask/status", method=method, body=body)
        assert answer.code in (403, 405), method
    assert without_backend.fetch("nos/dask/status").code == 404


def test_kernels_inherit_the_configured_backend(without_backend: Jupyter) -> None:
    assert kernel_environment(without_backend)["NOS_ADDRESS"] == NOBODY


def test_the_users_address_goes_first_and_gets_no_other_backends_token(denying: Jupyter) -> None:
    environment = kernel_environment(denying)
    assert environment["NOS_ADDRESS"] == "gpu1:50051"
    assert "NOS_TOKEN_FILE" not in environment


def test_a_server_that_has_only_the_sdk_loads_nothing_heavy() -> None:
    code = (
        "import sys, nos_jupyter; nos_jupyter._jupyter_server_extension_points();"
        "heavy = {'grpc', 'torch', 'dask', 'numpy', 'anywidget', 'ipywidgets', 'IPython'};"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
