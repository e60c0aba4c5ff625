"""Registers models until told to stop, and says on a socket what was acknowledged: for fault injection.

`python registering.py FOLDER FIRST COUNT DESCRIPTOR`. It writes nothing itself, so that every failed write is
one of the registry's.
"""

import asyncio
import socket
import sys
from pathlib import Path

from nos.errors import NosError
from nos_backend.control.blobs import BlobStore
from nos_backend.control.catalogue import Catalogue
from nos_backend.control.describe import describe
from nos_backend.control.registrar import Registrar
from nos_backend.control.registry import Actor, Registry
from nos_backend.definition import ModelDefinition

ACTOR = Actor(token_id="t", peer="p")


def source_of(number: int) -> str:
    return f"class Net:\n    def __call__(self, x: int) -> int: return x + {number}\n"


async def register(registrar: Registrar, number: int) -> None:
    source = source_of(number)
    definition = ModelDefinition(
        name=f"net-{number}",
        version=0,
        owner="ann",
        source=source,
        source_name="<test>",
        class_name="Net",
    )
    await registrar.register(definition, describe(source)[0], ACTOR)


async def main(folder: Path, first: int, count: int, says: socket.socket) -> None:
    try:
        registry = Registry(folder, BlobStore(folder / "blobs"))
    except NosError as error:
        says.send(f"refused to start: {error}\n".encode())
        return
    catalogue = Catalogue()
    catalogue.restore(registry.read_models())
    registrar = Registrar(catalogue, registry)
    for number in range(first, first + count):
        try:
            await register(registrar, number)
        except NosError as error:
            says.send(f"failed {number} {type(error).__name__}\n".encode())
        else:
            says.send(f"acknowledged {number}\n".encode())
    registry.close()


if __name__ == "__main__":
    folder, first, count, descriptor = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as says:
        asyncio.run(main(Path(folder), int(first), int(count), says))
