"""Generates `sdk/nos/wire/v1` from `proto/nos/v1`; with `--check`, compares instead of writing.

The generated modules live inside our package, so their imports of each other are rewritten from
`nos.v1` to `nos.wire.v1`; nothing else is touched. Run it by `make proto`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
TARGET = ROOT.parent / "sdk" / "nos" / "wire" / "v1"
HEADER = '"""Generated from proto/nos/v1 by `make proto`; never edited."""\n'


def generate(folder: Path) -> None:
    """Write all generated modules into `folder`.

    Raises:
        SystemExit: If the protocol compiler refuses a file.
    """
    protos = sorted(str(path) for path in (ROOT / "nos" / "v1").glob("*.proto"))
    # The stub plugins are console scripts of the environment that runs this file.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    well_known = str(resources.files("grpc_tools") / "_proto")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *protos]):
        raise SystemExit("protoc failed; its message stands above")
    nested = folder / "nos" / "v1"
    for path in nested.iterdir():
        text = re.sub(
            r"^from nos\.v1 import", "from nos.wire.v1 import", path.read_text(), flags=re.M
        )
        (folder / path.name).write_text(text)
        path.unlink()
    nested.rmdir()
    nested.parent.rmdir()
    (folder / "__init__.py").write_text(HEADER)


def main() -> None:
    """Generate, or compare and say which files differ."""
    if "--check" not in sys.argv[1:]:
        generate(TARGET)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder)
        fresh = {path.name: path.read_text() for path in folder.iterdir()}
    present = {path.name: path.read_text() for path in TARGET.iterdir() if path.is_file()}
    differing = sorted(
        name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name)
    )
    if differing:
        raise SystemExit(f"sdk/nos/wire/v1 is stale, run `make proto`: {', '.join(differing)}")


if __name__ == "__main__":
    main()
