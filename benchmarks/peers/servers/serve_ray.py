"""Ray Serve with one replica. PORT GRPC_PORT FOLDER: where its proxy listens."""

import signal
import sys
import threading

import ray
import ray_app
import workloads
from ray import serve
from ray.serve.config import gRPCOptions


def main(http_port: int, grpc_port: int, folder: str) -> None:
    """Serve until told to stop."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300 << 20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": http_port},
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=["ray_app.add_to_server"]),
    )
    name = workloads.served().name
    serve.run(
        ray_app.application(name, workloads.wait_s()), name="default", route_prefix="/predict"
    )
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    over.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
