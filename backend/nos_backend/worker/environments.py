"""Python environments of models that need packages which the server lacks: built once, used by hash.

An environment is a layer. Its own packages come first, then the server's torch, numpy and safetensors
with what these need, by a .pth file. pip counts those as installed and fetches another only where a
package asks for one that does not fit; it then lies in the layer, before the server's.

Of PyPI only wheels are installed, so that no package's code runs while one is built. Packages of conda may
have scripts that do.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nos.errors import LoadError
from nos.wire.environment import CONDA_CHANNEL, CONDA_PACKAGE

import nos_backend

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_logger = logging.getLogger(__name__)

#: What executors import themselves.
_BASE: Final = ("numpy", "safetensors", "torch")
_LOG_LINES: Final = 20
_POLL_S: Final = 0.1
_MEASURE_EVERY_S: Final = 2.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Build environments of conda, by the same arguments; the quickest first.
_CONDA_PROGRAMS: Final = ("micromamba", "mamba", "conda")
#: Is there once an environment is whole; its time says when it was last wanted.
_MARK: Final = ".nos-environment"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentOptions:
    """How environments are built."""

    folder: Path
    """Where they lie; several workers of one host may share it."""
    build_timeout_s: float = 600.0
    """The longest that one build may take."""
    max_bytes: int = 8 << 30
    """The most that one environment may take on disk."""
    keep_s: float = 30 * 86400.0
    """How long one that no model wants is kept."""


class Environments:
    """Belongs to one event loop."""

    def __init__(self, options: EnvironmentOptions) -> None:
        self._options = options
        #: Builds under way, by name.
        self._builds: dict[str, asyncio.Task[Path]] = {}

    async def python(self, requirements: Sequence[str]) -> str:
        """Return the interpreter of an environment, which is built if it is not there.

        However many ask at once, it is built once.

        Raises:
            LoadError: If it cannot be built; has the end of the installer's output.
        """
        name = name_of(requirements)
        folder = self._options.folder / name
        build = self._builds.get(name)
        if build is None:
            build = asyncio.create_task(self._ensure(folder, requirements), name=f"build {name}")
            self._builds[name] = build
            build.add_done_callback(lambda _: self._builds.pop(name, None))
        return str(await asyncio.shield(build) / "bin" / "python")

    def collect(self) -> None:
        """Delete what nobody wanted for long, and what builders that died left behind; any thread."""
        now_s = time.time()
        for folder in self._options.folder.glob("env-*"):
            if not folder.is_dir():
                continue
            mark = folder / _MARK
            with contextlib.suppress(OSError), _lock(folder.with_suffix("")) as is_ours:
                if is_ours and (
                    not mark.exists() or now_s - mark.stat().st_mtime > self._options.keep_s
                ):
                    _logger.info("deleting environment %s", folder.name)
                    shutil.rmtree(folder)

    async def close(self) -> None:
        """Stop the builds."""
        builds = list(self._builds.values())
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)

    async def _ensure(self, folder: Path, requirements: Sequence[str]) -> Path:
        mark = folder / _MARK
        if not mark.exists():
            try:
                self._options.folder.mkdir(parents=True, exist_ok=True, mode=0o755)
                await self._build_alone(folder, requirements)
            except OSError as error:
                raise LoadError(
                    "the environment cannot be built", "env", got=f"{type(error).__name__}: {error}"
                ) from error
        os.utime(mark)
        return folder

    async def _build_alone(self, folder: Path, requirements: Sequence[str]) -> None:
        """Build an environment unless another worker does so first."""
        while not (folder / _MARK).exists():
            with _lock(folder) as is_ours:
                if is_ours and not (folder / _MARK).exists():
                    await self._build(folder, requirements)
            await asyncio.sleep(_POLL_S)

    async def _build(self, folder: Path, requirements: Sequence[str]) -> None:
        started_s = time.monotonic()
        # Packages of conda know the folder that they were installed to, so they stay where they are.
        is_conda = any(_is_conda(text) for text in requirements)
        building = folder if is_conda else folder.with_suffix(f".{os.getpid()}")
        shutil.rmtree(folder, ignore_errors=True)  # of a builder that died
        try:
            await self._fill(building, requirements)
            building.rename(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        _logger.info("built environment %s in %.1f s", folder.name, time.monotonic() - started_s)

    async def _fill(self, folder: Path, requirements: Sequence[str]) -> None:
        """Make a whole environment of a folder that is not there.

        Raises:
            LoadError: If a step of it fails.
        """
        packages = [text for text in requirements if not _is_conda(text)]
        if len(packages) < len(requirements):
            command = _conda_command(folder, requirements)
        else:
            command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
        await self._run(command, folder)
        paths = {"base": str(folder), "platbase": str(folder)}
        site = Path(sysconfig.get_path("purelib", "venv", paths))
        (site / "nos-base.pth").write_text(f"{self._base_folder()}\n")
        # Not uv, even where it is present: it does not count the packages of the layer below as installed.
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        install = ["install", *options, "--no-warn-script-location", "--only-binary", ":all:"]
        if packages:
            await self._run([*pip, *install, *packages], folder)
        for name in _BASE:
            if (site / name).exists():
                _logger.info("environment %s has a %s of its own", folder.name, name)
        (folder / _MARK).write_text("\n".join(requirements) + "\n")

    async def _run(self, command: list[str], folder: Path) -> None:
        """Run a step of a build, and end it when it takes too long or too much room.

        Raises:
            LoadError: If it fails or is ended.
        """
        log = folder.with_name(f"{folder.name}.log")
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                env={**_harmless(os.environ), "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"},
            )
        with contextlib.suppress(ProcessLookupError):
            # What is unpacked grows faster than it is measured.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (self._options.max_bytes,) * 2)
        try:
            problem = await self._watch(process, folder)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            tail = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            log.unlink(missing_ok=True)
        if problem:
            said = "\n".join(tail)
            raise LoadError(f"the environment cannot be built: {problem}\n{said}", "env")

    async def _watch(self, process: asyncio.subprocess.Process, folder: Path) -> str:
        """Wait for a step's end; returns what is wrong, empty if nothing is."""
        options = self._options
        give_up_s = time.monotonic() + options.build_timeout_s
        while True:
            code = None
            try:
                left_s = max(give_up_s - time.monotonic(), 0.0)
                async with asyncio.timeout(min(left_s, _MEASURE_EVERY_S)):
                    code = await process.wait()
            except TimeoutError:
                if time.monotonic() >= give_up_s:
                    return f"it took longer than {options.build_timeout_s:g} s"
            if await asyncio.to_thread(size_bytes, folder) > options.max_bytes:
                return f"it takes more than {options.max_bytes} bytes"
            if code is not None:
                return f"exit code {code}" if code else ""

    def _base_folder(self) -> Path:
        """Return the folder that has what an executor imports of the server, and nothing else."""
        links = dict(_links(_closure(_BASE)))
        links["nos_backend"] = Path(nos_backend.__path__[0])
        text = "\n".join(f"{name} {target}" for name, target in sorted(links.items()))
        folder = self._options.folder / f"base-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not folder.exists():
            making = folder.with_suffix(f".{os.getpid()}")
            making.mkdir()
            for name, target in links.items():
                (making / name).symlink_to(target)
            try:
                making.rename(folder)
            except OSError:  # another worker was first
                shutil.rmtree(making)
        return folder


def name_of(requirements: Sequence[str]) -> str:
    """Return the name of the folder for these packages on this Python and this server's torch."""
    base = [f"{name}=={importlib.metadata.version(name)}" for name in _BASE]
    text = "\n".join([sys.version, sys.prefix, *base, *requirements])
    return f"env-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def size_bytes(folder: Path) -> int:
    """Return what a folder takes on disk."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, file)).st_size  # noqa: PTH118 - thousands
    return total


def _harmless(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what an installer may know: its settings are there, ours are none of its business."""
    return {
        name: value for name, value in variables.items() if not name.startswith(("DASK_", "NOS_"))
    }


def _is_conda(text: str) -> bool:
    return text.startswith((CONDA_CHANNEL, CONDA_PACKAGE))


def _conda_command(folder: Path, requirements: Sequence[str]) -> list[str]:
    """Return what installs the packages of conda among these, and our version of Python, to a folder.

    Raises:
        LoadError: If nothing on the PATH can.
    """
    found = next(filter(None, map(shutil.which, _CONDA_PROGRAMS)), None)
    if found is None:
        raise LoadError(
            "the environment has packages of conda, and this worker cannot install those",
            "env",
            f"{', '.join(_CONDA_PROGRAMS[:-1])} or {_CONDA_PROGRAMS[-1]} on its PATH",
            "none",
            "Install micromamba for the server, or ask for packages of PyPI",
        )
    channels = _behind(CONDA_CHANNEL, requirements)
    packages = _behind(CONDA_PACKAGE, requirements)
    python = f"python={sys.version_info.major}.{sys.version_info.minor}"
    options = ["--yes", "--quiet", "--override-channels"]
    options += [option for channel in channels for option in ("--channel", channel)]
    return [found, "create", *options, "--prefix", str(folder), python, *packages]


def _behind(start: str, texts: Sequence[str]) -> list[str]:
    return [text.removeprefix(start) for text in texts if text.startswith(start)]


def _name(requirement: str) -> str:
    match = _NAME.match(requirement)
    return match[0].lower() if match else ""


def _closure(names: Sequence[str]) -> list[importlib.metadata.Distribution]:
    """Return the distributions of these names and of all that they need here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra, or for another system
        needed = found[name].requires or ()
        waiting += [_name(requirement) for requirement in needed if "extra ==" not in requirement]
    return list(found.values())


def _links(
    distributions: Sequence[importlib.metadata.Distribution],
) -> Iterator[tuple[str, Path]]:
    """Yield each top-level file or folder of some distributions, and where it is."""
    for distribution in distributions:
        for file in distribution.files or ():
            top = file.parts[0]
            if top != ".." and top != "__pycache__":
                yield top, Path(str(distribution.locate_file(top)))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Take the right to change a folder, among all processes of the host; yields whether it was free."""
    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
