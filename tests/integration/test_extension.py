"""The Jupyter server extension behind Jupyter's own doors: real servers, real requests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from nos_jupyter.extension import ROUTES

from tests.browser.lab import Jupyter, jupyter
from tests.servers import Server, wait_for

HEALTH = "nos/api/v1/health"
NOBODY = "127.0.0.1:9"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
DENY = """
from jupyter_server.auth import Authorizer
class DenyNos(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return resource != "nos"
"""


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
    for path, _ in ROUTES:
        for method in METHODS:
            body = b"{}" if method in ("POST", "PUT", "PATCH") else None
            code = without_backend.fetch(path, method=method, headers=headers, body=body).code
            assert code in ((403,) if method == "GET" else (403, 405)), (method, path)
        # Jupyter answers a preflight without a token, and says nothing in it.
        preflight = without_backend.fetch(path, method="OPTIONS", headers=headers)
        assert preflight.body == b""
        assert "Access-Control-Allow-Origin" not in preflight.headers


@pytest.mark.accept("G3")
def test_a_cookie_without_an_xsrf_header_changes_nothing(without_backend: Jupyter) -> None:
    cookies = without_backend.fetch("api/me").cookies
    assert cookies
    answer = without_backend.fetch(HEALTH, method="POST", headers={"Cookie": cookies}, body=b"{}")
    assert answer.code == 403


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
    assert denying.fetch(HEALTH).code == 403
    assert denying.fetch("api/me").code == 200


@pytest.mark.accept("G3")
def test_a_backend_that_is_down_is_a_502_with_a_sentence(without_backend: Jupyter) -> None:
    answer = without_backend.fetch(HEALTH)
    assert answer.code == 502
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    message = answer.json()["message"]
    assert NOBODY in message
    assert "\n" not in message


@pytest.mark.accept("G3")
def test_health_tells_versions_and_latency_and_no_token(server: Server, tmp_path: Path) -> None:
    flags = (f"--NosApp.address={server.address}", f"--NosApp.token_file={server.token_file}")
    with jupyter(tmp_path, *flags) as running:
        answer = running.fetch(HEALTH)
    assert answer.code == 200
    assert answer.json()["backend"]["state"] == "ready"
    assert 0 < answer.json()["backend"]["latency_s"] < 2
    assert server.token not in answer.body.decode()
    assert server.token not in running.log_path.read_text()


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
