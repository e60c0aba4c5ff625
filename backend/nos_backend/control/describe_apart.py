"""Describing sources that may be costly, beside the gateway's loop.

Python's parser holds the interpreter lock, and takes a second and half a gigabyte for a dense source of a
megabyte. So everything but small sources is described in a process of its own, with limits.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from typing import Any, Final

from nos.errors import InvalidRequestError, NosError
from nos.wire import status
from nos.wire.v1 import errors_pb2, models_pb2

from nos_backend.control.describe import Description, describe

#: Up to this size the parser is done within some 20 ms.
_SMALL_BYTES: Final = 16 << 10
_MAX_MEMORY_BYTES: Final = 2 << 30
_MAX_CPU_S: Final = 20
_TIMEOUT_S: Final = 60.0


async def describe_apart(
    source: str, class_name: str, source_name: str, max_bytes: int
) -> list[Description]:
    """Do what `describe` does, without holding up the loop.

    Raises:
        InvalidRequestError: As `describe`, or if the source takes more than its limits.
        LimitExceededError: As `describe`.
    """
    if len(source) <= _SMALL_BYTES:
        return describe(source, class_name=class_name, source_name=source_name, max_bytes=max_bytes)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    asked = json.dumps([source, class_name, source_name, max_bytes]).encode()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            answer, _ = await process.communicate(asked)
    except TimeoutError:
        answer = b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0 or not answer:
        raise InvalidRequestError(
            f"{source_name} is too complicated to be described", "source", "a simpler source"
        )
    return _from_json(json.loads(answer))


def _from_json(answer: dict[str, Any]) -> list[Description]:
    if "error" in answer:
        message = errors_pb2.Error.FromString(bytes.fromhex(answer["error"]))
        raise status.from_message(message)
    return [
        Description(
            class_name=class_name,
            spec=models_pb2.ModelSpec.FromString(bytes.fromhex(spec)),
            init=models_pb2.Method.FromString(bytes.fromhex(init)),
        )
        for class_name, spec, init in answer["models"]
    ]


def _to_json(source: str, class_name: str, source_name: str, max_bytes: int) -> dict[str, Any]:
    try:
        descriptions = describe(
            source, class_name=class_name, source_name=source_name, max_bytes=max_bytes
        )
    except NosError as error:
        return {"error": status.to_message(error).SerializeToString().hex()}
    return {
        "models": [
            (
                found.class_name,
                found.spec.SerializeToString().hex(),
                found.init.SerializeToString().hex(),
            )
            for found in descriptions
        ]
    }


def main() -> None:
    """Describe what stands on standard input, on standard output."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S))
    sys.stdout.write(json.dumps(_to_json(*json.load(sys.stdin))))


if __name__ == "__main__":
    main()
