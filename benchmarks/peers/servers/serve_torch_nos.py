"""torch-nos 0.3.0, its own server without its Docker runtime. PORT FOLDER.

Python 3.11 refuses a default in one of its dataclasses; such classes are made hashable before it is imported.
Its zoo of models wants torchvision and is left out.
"""

import dataclasses
import os
import sys
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_dataclass = dataclasses.dataclass

CATALOG = """\
models:
  peers/{workload}:
    runtime_env: cpu
    model_cls: Peer
    model_path: {source}
    default_method: __call__
    init_kwargs: {{workload: {workload}}}
    deployment: {{resources: {{device: cpu}}}}
"""


def hashable(cls: Any = None, /, **options: Any) -> Any:
    """Stand in for `dataclasses.dataclass`."""

    def wrap(found: Any) -> Any:
        is_theirs = found.__module__.startswith("nos.") and "__hash__" not in vars(found)
        if is_theirs and not options.get("frozen"):
            options["unsafe_hash"] = True
        return _dataclass(found, **options)

    return wrap if cls is None else wrap(cls)


def main(port: str, folder: str) -> None:
    """Serve until killed."""
    os.environ |= {
        "NOS_HOME": folder,
        "NOS_RAY_OBJECT_STORE_MEMORY": str(300 << 20),
        "NOS_LOGGING_LEVEL": "ERROR",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    import ray

    start = ray.init

    def start_small(*args: Any, **options: Any) -> Any:
        if options.get("address") == "local":
            options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "num_cpus": 2}
        return start(*args, **options)

    ray.init = start_small
    sys.modules["nos.models"] = types.ModuleType("nos.models")
    catalog = Path(folder) / "catalog.yaml"
    source = HERE / "torch_nos_model.py"
    catalog.write_text(CATALOG.format(workload=os.environ["PEER_WORKLOAD"], source=source))
    dataclasses.dataclass = hashable
    from nos.server._service import async_serve

    dataclasses.dataclass = _dataclass
    async_serve(address=f"127.0.0.1:{port}", catalog=str(catalog))


if __name__ == "__main__":
    main(*sys.argv[1:])
