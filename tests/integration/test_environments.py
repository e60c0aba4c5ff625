"""Environments of models, built by the real installer from wheels that the test makes.

What stands for a program of conda takes the same arguments, and makes a real environment.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import nos
import pytest
import pytest_asyncio
from nos.errors import InvalidRequestError, LoadError, ModelError
from nos_backend.worker.environments import EnvironmentOptions, Environments, name_of

from tests.accept import Accept
from tests.servers import start_server

pytestmark = pytest.mark.accept("F3")


def make_wheel(folder: Path, name: str, source: str, *, requires: str = "") -> None:
    """Write a wheel of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    with zipfile.ZipFile(
        folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as wheel:
        wheel.writestr(f"{name}.py", source)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )


def make_source_package(folder: Path, name: str, setup: str) -> None:
    """Write a package whose setup script is run where source packages are installed."""
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as package:
        member = tarfile.TarInfo(f"{name}-1.0/setup.py")
        member.size = len(setup)
        package.addfile(member, io.BytesIO(setup.encode()))


def exists(path: str | Path) -> bool:
    return Path(path).exists()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that no other index has."""
    folder = tmp_path / "wheels"
    make_wheel(folder, "nostestdep", "ANSWER = 41")
    make_wheel(
        folder,
        "nostestpkg",
        "import nostestdep\nANSWER = nostestdep.ANSWER + 1",
        requires="nostestdep",
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest_asyncio.fixture
async def environments(tmp_path: Path, wheels: Path) -> AsyncIterator[Environments]:
    made = Environments(EnvironmentOptions(folder=tmp_path / "environments"))
    yield made
    await made.close()


def ask(python: str, code: str) -> str:
    command = [python, "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.asyncio
async def test_many_who_want_one_build_it_once_and_for_good(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await asyncio.gather(*(environments.python(["nostestpkg"]) for _ in range(8)))
    assert len(set(found)) == 1
    folders = [path.name for path in (tmp_path / "environments").iterdir() if path.is_dir()]
    assert sorted(name.partition("-")[0] for name in folders) == ["base", "env"]
    assert ask(found[0], "import nostestpkg; print(nostestpkg.ANSWER)") == "42"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    later = Environments(EnvironmentOptions(folder=tmp_path / "environments"))
    assert await later.python(["nostestpkg"]) == found[0]


@pytest.mark.asyncio
async def test_one_has_the_servers_torch_and_nothing_else_of_it(environments: Environments) -> None:
    python = await environments.python(["nostestdep"])
    assert ask(python, "import torch, numpy; print(torch.ones(2).numpy().sum())") == "2.0"
    assert ask(python, "import nos_backend.executor.loop; print('there')") == "there"
    for module in ("grpc", "dask", "distributed", "pydantic"):
        wanted = f"import importlib.util; print(importlib.util.find_spec({module!r}))"
        assert ask(python, wanted) == "None"


@pytest.mark.asyncio
async def test_two_workers_build_it_once(tmp_path: Path, wheels: Path) -> None:
    options = EnvironmentOptions(folder=tmp_path / "environments")
    workers = [Environments(options), Environments(options)]
    found = await asyncio.gather(*(worker.python(["nostestdep"]) for worker in workers))
    assert found[0] == found[1]
    assert ask(found[0], "import nostestdep; print(nostestdep.ANSWER)") == "41"


@pytest.mark.asyncio
async def test_a_failed_build_tells_the_end_of_its_log(
    environments: Environments, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=r"(?s)cannot be built: exit code 1.*no-such-package"):
        await environments.python(["no-such-package"])
    left = [path.name for path in (tmp_path / "environments").iterdir() if path.is_dir()]
    assert [name for name in left if name.startswith("env")] == []


@pytest.mark.asyncio
async def test_a_source_package_is_never_run(environments: Environments, wheels: Path) -> None:
    told = wheels / "told"
    make_source_package(wheels, "evil", f"open({str(told)!r}, 'w')")
    with pytest.raises(LoadError, match="No matching distribution"):
        await environments.python(["evil"])
    assert not exists(told)


@pytest.mark.asyncio
async def test_one_that_takes_too_long_or_too_much_is_ended(tmp_path: Path, wheels: Path) -> None:
    folder = tmp_path / "environments"
    slow = Environments(EnvironmentOptions(folder=folder, build_timeout_s=0))
    with pytest.raises(LoadError, match="longer than 0 s"):
        await slow.python(["nostestdep"])
    large = Environments(EnvironmentOptions(folder=folder, max_bytes=1000))
    with pytest.raises(LoadError, match="more than 1000 bytes"):
        await large.python(["nostestdep"])


@pytest.mark.asyncio
async def test_a_package_that_unpacks_to_too_much_is_stopped_at_the_limit(
    tmp_path: Path, wheels: Path
) -> None:
    make_wheel(wheels, "bomb", "#" * (64 << 20))
    assert (wheels / "bomb-1.0-py3-none-any.whl").stat().st_size < 1 << 20
    folder = tmp_path / "environments"
    bounded = Environments(EnvironmentOptions(folder=folder, max_bytes=8 << 20))
    with pytest.raises(LoadError, match="File too large"):
        await bounded.python(["bomb"])
    left = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]
    assert left == []
    assert exists(await bounded.python(["nostestdep"]))


@pytest.mark.asyncio
async def test_what_nobody_wants_any_more_is_deleted(tmp_path: Path, wheels: Path) -> None:
    folder = tmp_path / "environments"
    kept = Environments(EnvironmentOptions(folder=folder))
    python = await kept.python(["nostestdep"])
    (folder / "env-abandoned.1").mkdir()
    kept.collect()
    assert exists(python)
    assert not exists(folder / "env-abandoned.1")
    Environments(EnvironmentOptions(folder=folder, keep_s=-1)).collect()
    assert not exists(python)


PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
CONDA = f"""#!{sys.executable}
import argparse, pathlib, subprocess, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("action", choices=["create"])
for flag in ("--yes", "--quiet", "--override-channels"):
    parser.add_argument(flag, action="store_true", required=True)
parser.add_argument("--channel", action="append", choices=["conda-forge", "nvidia"], required=True)
parser.add_argument("--prefix", type=pathlib.Path, required=True)
parser.add_argument("packages", nargs="+")
options = parser.parse_args()
here = pathlib.Path(__file__)
with (here.parent / "calls").open("a") as calls:
    print(here.name, *options.channel, *options.packages, file=calls)
python, *packages = options.packages
assert python == "python={PYTHON}", python
assert not options.prefix.exists()
subprocess.run([sys.executable, "-m", "venv", "--without-pip", options.prefix], check=True)
for package in packages:
    if package == "missing":
        sys.exit("nothing provides requested missing")
    name = package.partition("=")[0]
    site = options.prefix / "lib" / "python{PYTHON}" / "site-packages"
    (site / (name + ".py")).write_text(f"WHERE = {{str(options.prefix)!r}}")
"""


@pytest.fixture
def conda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with what stands for programs of conda, and their calls."""
    folder = tmp_path / "conda"
    folder.mkdir()
    for name in ("conda", "micromamba"):
        (folder / name).write_text(CONDA)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.asyncio
async def test_packages_of_conda_are_a_layer_too(
    environments: Environments, tmp_path: Path, conda: Path
) -> None:
    wanted = ["channel:nvidia", "channel:conda-forge", "conda:nosconda=1.0", "nostestdep"]
    folder = tmp_path / "environments" / name_of(wanted)
    folder.mkdir(parents=True)
    (folder / "of-one-that-died").touch()
    found = await asyncio.gather(*(environments.python(wanted) for _ in range(4)))
    assert set(found) == {str(folder / "bin" / "python")}
    calls = (conda / "calls").read_text()
    assert calls == f"micromamba nvidia conda-forge python={PYTHON} nosconda=1.0\n"
    assert not exists(folder / "of-one-that-died")
    seen = "nosconda.WHERE, nostestdep.ANSWER, numpy.ones(2).sum()"
    assert ask(found[0], f"import nosconda, nostestdep, numpy; print({seen})") == f"{folder} 41 2.0"
    environments.collect()
    assert exists(found[0])
    Environments(EnvironmentOptions(folder=tmp_path / "environments", keep_s=-1)).collect()
    assert not exists(folder)


@pytest.mark.asyncio
async def test_what_conda_cannot_build_leaves_nothing(
    environments: Environments, tmp_path: Path, conda: Path
) -> None:
    with pytest.raises(LoadError, match=r"(?s)exit code 1.*nothing provides requested missing"):
        await environments.python(["channel:conda-forge", "conda:missing"])
    folder = tmp_path / "environments"
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    slow = Environments(EnvironmentOptions(folder=folder, build_timeout_s=0))
    with pytest.raises(LoadError, match="longer than 0 s"):
        await slow.python(["channel:conda-forge", "conda:nosconda"])


@pytest.mark.asyncio
async def test_a_worker_without_conda_says_what_it_lacks(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        LoadError, match=r"micromamba, mamba or conda on its PATH.*packages of PyPI"
    ):
        await environments.python(["channel:conda-forge", "conda:gdal"])


MODEL = """
import nos

@nos.model(name="me/asks", env=["nostestpkg"])
class Asks:
    def __call__(self) -> int:
        import nostestpkg
        return nostestpkg.ANSWER
    def lacks(self) -> bool:
        import importlib.util
        return importlib.util.find_spec("dask") is None
"""


def test_a_model_runs_with_packages_that_the_server_lacks(
    tmp_path: Path, wheels: Path, conda: Path, accept: Accept
) -> None:
    with pytest.raises(ImportError):
        importlib.import_module("nostestpkg")
    server = start_server(tmp_path, "--idle-shutdown-s", "0")
    try:
        with nos.connect(server.address, token_file=server.token_file) as client:
            assert client.register(MODEL).spec.environment == ("nostestpkg",)
            model = client.model("me/asks")
            assert model() == 42
            assert model.lacks() is True
            started_s = time.monotonic()
            client.register(MODEL.replace("asks", "asks-too"))
            assert client.model("me/asks-too")() == 42
            accept.figure(time.monotonic() - started_s, 2, "s")
            plain = client.register("def plain(): import nostestpkg", name="me/plain")
            assert plain.spec.environment == ()
            with pytest.raises(ModelError, match="nostestpkg"):
                client.model("me/plain")()
            client.register("def broken(): ...", name="me/broken", env=["no-such-package"])
            with pytest.raises(LoadError, match="no-such-package"):
                client.load("me/broken")
            with pytest.raises(InvalidRequestError, match="no option of an installer"):
                client.register("def f(): ...", name="me/f", env=["--index-url http://evil"])
            file = tmp_path / "environment.yml"
            file.write_text(f"dependencies: [python={PYTHON}, nosconda=1.0, pip: [nostestdep]]")
            source = "def both(): import nosconda, nostestdep; return nostestdep.ANSWER"
            registered = client.register(source, name="me/both", env=file)
            assert registered.spec.environment[:2] == ("channel:conda-forge", "conda:nosconda=1.0")
            assert client.model("me/both")() == 41
            file.write_text("dependencies: [python=2.7]")
            with pytest.raises(InvalidRequestError, match="Python of the server"):
                client.register(source, name="me/both", env=str(file))
            assert model() == 42
    finally:
        server.stop()
