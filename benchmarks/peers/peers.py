"""Which servers are compared: how each is installed and started, and the roads to it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT: Final = Path(__file__).resolve().parents[2]
HERE: Final = Path(__file__).resolve().parent
#: One virtual environment per peer; nothing of theirs meets ours.
VENVS: Final = Path(os.environ.get("PEERS_VENVS", ROOT / "build" / "peers"))
WORKLOADS: Final = ("echo", "frame", "mlp")
_TORCH_INDEX: Final = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Road:
    """One way to send requests to a peer."""

    client: str
    """Of `clients.CLIENTS`."""
    port: int = 0
    """Which of the server's ports."""
    path: str = "/predict"
    """Of HTTP."""
    workloads: Sequence[str] = WORKLOADS


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One server."""

    venv: str
    """Name of its environment."""
    command: str
    """Its program in that environment and the arguments; `{0}`, `{1}`, ... are free ports."""
    package: str
    """What its version is that of."""
    roads: Mapping[str, Road]
    """By name; the first is the one that tells when the server is ready."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the server's variables; ports as in `command`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Venv:
    """What an environment holds."""

    packages: Sequence[str]
    needs_torch: bool = True
    python: str = "python3"
    """It is made by this interpreter."""
    extra: Sequence[str] = ()
    """Packages whose own wishes for others are not followed."""


VENV_OF: Final[Mapping[str, Venv]] = {
    "load": Venv(
        packages=["numpy", "psutil", "uvloop", "grpcio", "tqdm", "tritonclient[grpc]", "protobuf"],
        needs_torch=False,
    ),
    "mosec": Venv(packages=["mosec"]),
    "litserve": Venv(packages=["litserve"]),
    "bentoml": Venv(packages=["bentoml"]),
    # Its stub is linked to the library of the distribution's own Python.
    "pytriton": Venv(packages=["nvidia-pytriton"], python="/usr/bin/python3"),
    "ray": Venv(packages=["ray[serve,serve-grpc]"]),
    # It asks for a grpcio-tools that has no wheel for Python 3.11.
    "torch-nos": Venv(
        packages=[
            *(
                "ray[default]",
                "cloudpickle",
                "docker",
                "grpcio",
                "grpcio-tools",
                "humanize",
                "loguru",
            ),
            *("pillow", "psutil", "pydantic>=2.5", "python-multipart", "pyyaml", "rich", "typer"),
            *("tqdm", "pandas", "requests", "tenacity", "py-cpuinfo", "gitpython", "jinja2"),
            *("sentry-sdk", "opencv-python-headless", "setuptools<81", "huggingface_hub"),
            *("safetensors", "tabulate", "pyarrow", "protobuf", "filelock", "agi-pack"),
        ],
        extra=["torch-nos==0.3.0"],
    ),
}


def install(name: str) -> str:
    """Make an environment if it is not there; return why it cannot be made, or nothing."""
    venv, folder = VENV_OF[name], VENVS / name
    stamp = folder / ".stamp"
    if stamp.exists():
        return ""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--no-input", "-qq"]
    pip += ["--disable-pip-version-check"]
    torch = ["--retries", "1", "install", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    steps = [
        [venv.python, "-m", "venv", str(folder)],
        [*pip, "install", "pip>=25.1"],
        *([[*pip, *torch, "--extra-index-url", _TORCH_INDEX, "torch"]] * venv.needs_torch),
        [*pip, "install", "numpy", *venv.packages, *(["torch"] * venv.needs_torch)],
        *([[*pip, "install", "--no-deps", *venv.extra]] if venv.extra else []),
    ]
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip says nothing"])[-1][:200]
    stamp.touch()
    return ""


def version_of(name: str) -> str:
    """Return which version of a peer is installed."""
    peer = PEERS[name]
    code = f"import importlib.metadata as m; print(m.version({peer.package!r}))"
    command = [str(python_of(peer.venv)), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def python_of(venv: str) -> Path:
    """Return an environment's interpreter."""
    folder = ROOT / ".venv" if venv == "nos" else VENVS / venv
    return folder / "bin" / "python"


_ECHO_AND_FRAME: Final = ("echo", "frame")
_TRITON_ROADS: Final = {
    "http": Road(client="triton-http"),
    "grpc stream": Road(client="triton-stream", port=1),
    "shared memory": Road(client="triton-shared", port=1, workloads=["frame"]),
}
_RAY: Final = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
_RAY_ROADS: Final = {"http": Road(client="http"), "grpc": Road(client="ray-grpc", port=1)}

PEERS: Final[Mapping[str, Peer]] = {
    "nos": Peer(
        venv="nos",
        command="-m nos_backend serve --port {0} --state-dir {folder}/state --device cpu"
        " --workers 1 --models servers/nos_models",
        package="nos-inference",
        roads={"shared memory": Road(client="nos"), "grpc": Road(client="nos-direct")},
    ),
    "grpc.aio, bare": Peer(
        venv="load",
        command="servers/serve_floor.py {0}",
        package="grpcio",
        roads={"stream": Road(client="grpc-stream", workloads=_ECHO_AND_FRAME)},
    ),
    "mosec": Peer(
        venv="mosec",
        command="servers/serve_mosec.py --address 127.0.0.1 --port {0} --log-level error"
        " --timeout 60000",
        package="mosec",
        roads={"http": Road(client="http", path="/inference")},
    ),
    "mosec, no batches": Peer(
        venv="mosec",
        command="servers/serve_mosec.py --address 127.0.0.1 --port {0} --log-level error"
        " --timeout 60000",
        package="mosec",
        roads={"http": Road(client="http", path="/inference", workloads=["echo"])},
        environment={"PEER_BATCH": "1"},
    ),
    "triton": Peer(
        venv="pytriton",
        command="servers/serve_triton.py {0} {1} {2} {folder}",
        package="nvidia-pytriton",
        roads=_TRITON_ROADS,
    ),
    "pytriton": Peer(
        venv="pytriton",
        command="servers/serve_pytriton.py {0} {1} {2}",
        package="nvidia-pytriton",
        roads={"http": _TRITON_ROADS["http"]},
    ),
    # The replica itself listens on the first two ports, the proxy on the others.
    "ray, direct": Peer(
        venv="ray",
        command="servers/serve_ray.py {2} {3} {folder}",
        package="ray",
        roads=_RAY_ROADS,
        environment={
            **_RAY,
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "{0}",
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "{0}",
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": "{1}",
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": "{1}",
        },
    ),
    "ray": Peer(
        venv="ray",
        command="servers/serve_ray.py {0} {1} {folder}",
        package="ray",
        roads=_RAY_ROADS,
        environment=_RAY,
    ),
    "litserve": Peer(
        venv="litserve",
        command="servers/serve_litserve.py {0}",
        package="litserve",
        roads={"http": Road(client="http")},
    ),
    "bentoml": Peer(
        venv="bentoml",
        command="-m bentoml serve serve_bentoml:Peer --working-dir servers --host 127.0.0.1"
        " --port {0} --timeout 60",
        package="bentoml",
        roads={
            "http": Road(client="http", workloads=_ECHO_AND_FRAME),
            "http, JSON": Road(client="http-json", path="/batched", workloads=["mlp"]),
        },
        environment={"BENTOML_DO_NOT_TRACK": "1"},
    ),
    "torch-nos": Peer(
        venv="torch-nos",
        command="servers/serve_torch_nos.py {0} {folder}",
        package="torch-nos",
        roads={"grpc": Road(client="torch-nos")},
    ),
}
