"""The gateway process: `python -m nos_backend.app`. Started by the supervisor, and by tests.

Exit codes: 0 after SIGTERM, 1 if it cannot start, 75 (the customary "temporary failure", used here as
"nobody needs me") after `--idle-shutdown-s` without clients.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nos.errors import ConfigError, NosError
from nos.wire.host import is_loopback

from nos_backend import hub
from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.link import ClusterLink
from nos_backend.control.blobs import MAX_BLOB_BYTES, BlobStore
from nos_backend.control.catalogue import MAX_MODELS, Catalogue
from nos_backend.control.crew import CREW_NAME
from nos_backend.control.describe import MAX_SOURCE_BYTES
from nos_backend.control.registry import Registry
from nos_backend.control.sweeping import sweep
from nos_backend.control.tickets import TicketSigner
from nos_backend.control.tokens import Tokens
from nos_backend.own_memory import hide_memory
from nos_backend.rpc.server import GatewayServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

_logger = logging.getLogger("nos_backend.app")

EXIT_IDLE: Final = 75
DRAIN_GRACE_S: Final = 10.0

_MIN_IDLE_CHECK_S: Final = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway until a signal or idleness ends it; returns the exit code."""
    arguments = _parse(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    hide_memory()
    try:
        return asyncio.run(_serve(arguments))
    except NosError as error:
        sys.stderr.write(f"nos gateway: {error}\n")
        return 1


async def _serve(arguments: argparse.Namespace) -> int:
    if arguments.tls_cert is None and not is_loopback(arguments.host):
        raise ConfigError(
            "a public address needs TLS",
            "host",
            "--tls-cert and --tls-key, or an address of loopback",
            arguments.host,
        )
    stop = _signals()
    blobs = BlobStore(arguments.state_dir / "blobs", arguments.max_upload_bytes)
    registry = Registry(arguments.state_dir, blobs)
    catalogue = Catalogue(arguments.max_registered, arguments.max_source_bytes)
    catalogue.restore(registry.read_models())
    num_removed = sweep(registry, blobs.folder, arguments.state_dir / "folders")
    if num_removed:
        _logger.info("removed %d blobs and folders that no model needs", num_removed)
    catalogue.add_built_ins(hub.definitions())
    for folder in arguments.models:
        catalogue.add_folder(folder)
    tokens = Tokens.from_file(arguments.token_file)
    for token in registry.read_tokens():
        tokens.accept(token)
    signer = TicketSigner.generate(dict(arguments.weight))
    link = ClusterLink(folders=arguments.state_dir / "folders")
    ca_certificate = TlsFiles(arguments.tls_dir).ca.read_bytes() if arguments.tls_dir else b""
    server = GatewayServer(
        cluster=link,
        catalogue=catalogue,
        blobs=blobs,
        registry=registry,
        tokens=tokens,
        signer=signer,
        crew_file=arguments.run_dir / CREW_NAME,
        ca_certificate=ca_certificate,
        max_tenant_upload_bytes=arguments.max_tenant_upload_bytes,
    )

    async def connect() -> None:
        await link.connect(arguments.scheduler, arguments.tls_dir)
        await link.set_keys(signer.public_key_bytes)

    ready = arguments.run_dir / "gateway.ready"
    ready.unlink(missing_ok=True)
    try:
        tls = None
        if arguments.tls_cert is not None:
            tls = (arguments.tls_key.read_bytes(), arguments.tls_cert.read_bytes())
        address = await server.start(arguments.host, arguments.port, tls, arguments.metrics_port)
        if not await _unless(stop, connect()):
            return 0
        await server.open()
        _write(ready, address)
        _logger.info("serving %d models at %s", len(catalogue), address)
        is_idle = await _wait(stop, server, arguments.idle_shutdown_s)
        ready.unlink(missing_ok=True)
        if is_idle:
            return EXIT_IDLE
        stop.clear()
        await _unless(stop, server.drain(DRAIN_GRACE_S))
        return 0
    finally:
        await server.close()
        await link.close()
        registry.close()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`; returns False if a signal came first, and the work was dropped."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        await working
        return True
    working.cancel()
    await asyncio.wait({working})
    return False


async def _wait(stop: asyncio.Event, server: GatewayServer, idle_shutdown_s: float) -> bool:
    """Wait for a signal (False), or until the server was idle for that long (True; 0 is never)."""
    check_s = max(_MIN_IDLE_CHECK_S, idle_shutdown_s / 10) if idle_shutdown_s else None
    while True:
        try:
            async with asyncio.timeout(check_s):
                await stop.wait()
                return False
        except TimeoutError:
            if await server.is_idle(idle_shutdown_s):
                _logger.info("nobody called for %.0f s: leaving", idle_shutdown_s)
                return True


def _signals() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def _weight(text: str) -> tuple[str, float]:
    tenant, _, weight = text.rpartition("=")
    return tenant, float(weight)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nos_backend.app", description="The gateway.")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=50051, help="0 for any free one")
    parser.add_argument("--scheduler", required=True, help="address of the Dask scheduler")
    parser.add_argument("--tls-dir", type=Path, help="ca.pem, cert.pem, key.pem for the scheduler")
    parser.add_argument("--tls-cert", type=Path, help="certificate of the public port, PEM")
    parser.add_argument("--tls-key", type=Path, help="its private key, PEM")
    parser.add_argument("--state-dir", type=Path, required=True, help="what outlives a run")
    parser.add_argument("--run-dir", type=Path, required=True, help="where gateway.ready goes")
    parser.add_argument("--token-file", type=Path, required=True, help="holds the token")
    parser.add_argument(
        "--models", type=Path, action="append", default=[], help="a folder to serve"
    )
    parser.add_argument(
        "--weight", type=_weight, action="append", default=[], help="TENANT=SHARE of a device"
    )
    parser.add_argument("--max-registered", type=int, default=MAX_MODELS, help="names of models")
    parser.add_argument(
        "--max-source-bytes", type=int, default=MAX_SOURCE_BYTES, help="of one model"
    )
    parser.add_argument(
        "--max-upload-bytes", type=int, default=MAX_BLOB_BYTES, help="files of one model"
    )
    parser.add_argument(
        "--max-tenant-upload-bytes", type=int, default=0, help="of one tenant; 0 for no limit"
    )
    parser.add_argument("--metrics-port", type=int, default=0, help="0 for no metrics")
    parser.add_argument("--idle-shutdown-s", type=float, default=0.0, help="0 for never")
    parser.add_argument(
        "--log-level",
        default="info",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
