"""Triton with its own Python backend, from the wheel of PyTriton. PORT GRPC_PORT METRICS_PORT FOLDER.

Becomes tritonserver, with a repository of one model in the folder.
"""

import importlib.util
import os
import sys
from pathlib import Path

import workloads

HERE = Path(__file__).resolve().parent
WORKLOAD = workloads.served()
_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


def configuration() -> str:
    """Return what Triton wants to know of the model."""
    is_frame = WORKLOAD.name == "frame"
    shape = WORKLOAD.shape if is_frame else WORKLOAD.shape[1:]
    answer = WORKLOAD.answer_shape if is_frame else WORKLOAD.answer_shape[1:]
    delay_us = round(workloads.wait_s() * 1e6) if WORKLOAD.max_batch > 1 else 0
    return "\n".join(
        [
            f'name: "{WORKLOAD.name}"',
            'backend: "python"',
            f"max_batch_size: {4 if is_frame else workloads.MAX_BATCH}",
            f'input [{{ name: "x" data_type: {_TYPES[WORKLOAD.dtype]} dims: {list(shape)} }}]',
            f'output [{{ name: "y" data_type: TYPE_FP32 dims: {list(answer)} }}]',
            "instance_group [{ kind: KIND_CPU count: 1 }]",
            f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}",
            'parameters [{ key: "FORCE_CPU_ONLY_INPUT_TENSORS" value: { string_value: "yes" } }]',
        ]
    )


def main(http_port: str, grpc_port: str, metrics_port: str, folder: Path) -> None:
    """Write the repository and become the server."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise SystemExit("PyTriton is not installed")
    package = Path(spec.origin).parent / "tritonserver"
    model = folder / "models" / WORKLOAD.name
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(configuration())
    # The stub's interpreter knows of no environment.
    paths = [str(HERE.parent), str(package.parent.parent)]
    text = (HERE / "triton_model.py").read_text()
    (model / "1" / "model.py").write_text(f"import sys\n\nsys.path[:0] = {paths}\n{text}")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (package / "backends" / "python").iterdir():
        (backend / file.name).symlink_to(file)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    (backend / stub.name).symlink_to(stub)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(package.parent.parent / "nvidia_pytriton.libs"),
    }
    local = "127.0.0.1"
    flags = {
        "model-repository": folder / "models",
        "backend-directory": folder / "backends",
        "http-address": local,
        "http-port": http_port,
        "grpc-address": local,
        "grpc-port": grpc_port,
        "metrics-address": local,
        "metrics-port": metrics_port,
        "log-info": "false",
        "allow-gpu-metrics": "false",
    }
    binary = str(package / "bin" / "tritonserver")
    os.execve(binary, [binary, *(f"--{name}={it}" for name, it in flags.items())], environment)  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
