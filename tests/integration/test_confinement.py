"""What executors are held to: tried on real processes, with the bounds that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from nos_backend.executor.confinement import Bounds, landlock_version
from nos_backend.worker.bounds import BoundsOptions, Confinement, confined

needs_landlock = pytest.mark.skipif(not landlock_version(), reason="the kernel has no landlock")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes users")


def run_held(confinement: Confinement, owner: str, code: str) -> str:
    """Run code as an owner's executor runs it; returns what it printed."""
    bounds = confinement.bounds(owner)
    rules = confinement.rules(bounds)
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    try:
        done = subprocess.run(
            confined(command, bounds, rules),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            pass_fds=() if rules is None else (rules,),
        )
    finally:
        if rules is not None:
            os.close(rules)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def reading(path: Path) -> str:
    return f"""
        try:
            print(open({str(path)!r}).read())
        except OSError as error:
            print(type(error).__name__)
        """


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder as the supervisor leaves it, in a folder that others may enter."""
    folder = tmp_path / "state"
    for name in ("folders", "run"):
        (folder / name).mkdir(parents=True, mode=0o700)
    (folder / "folders").chmod(0o711)
    for path in (folder / "token", folder / "run" / "key.pem", folder / "folders" / "weights"):
        path.write_text("canary")
        path.chmod(0o600)
    (folder / "folders" / "weights").chmod(0o644)
    folder.chmod(0o711)
    return folder


@pytest.fixture
def confinement(state: Path) -> Confinement:
    """The strongest that this machine has."""
    return Confinement(
        BoundsOptions(closed=[state], readable=[state / "folders"], homes=state / "homes")
    )


@needs_landlock
@pytest.mark.accept("F6")
def test_secrets_are_closed_and_files_of_models_are_not(confinement, state):
    for secret in (state / "token", state / "run" / "key.pem"):
        assert run_held(confinement, "ann", reading(secret)) == "PermissionError"
    assert run_held(confinement, "ann", reading(state / "folders" / "weights")) == "canary"


@needs_landlock
def test_without_rules_the_same_code_reads_them(state):
    """The test before can fail: what closes the secrets is the bounds."""
    off = Confinement(BoundsOptions(is_off=True, closed=[state]))
    assert off.tier == "off"
    assert run_held(off, "ann", reading(state / "token")) == "canary"


@needs_root
@needs_landlock
def test_owners_are_other_users_and_keep_their_homes(confinement):
    who = "import os; print(os.getresuid(), os.getcwd())"
    ann, bob = run_held(confinement, "ann", who), run_held(confinement, "bob", who)
    assert "own user" in confinement.tier
    assert len({ann, bob, run_held(confinement, "ann", who)}) == 2
    run_held(confinement, "ann", "open('mine', 'w').write('canary')")
    mine = Path(confinement.bounds("ann").home) / "mine"
    assert run_held(confinement, "ann", reading(mine)) == "canary"
    assert run_held(confinement, "bob", reading(mine)) == "PermissionError"


@needs_landlock
def test_nothing_outside_is_signalled(confinement):
    kill = f"""
        import os
        try:
            os.kill({os.getpid()}, 0)
        except PermissionError:
            print("refused")
        """
    if landlock_version() < 6 and os.geteuid() != 0:
        pytest.skip("this landlock knows no signals")
    assert run_held(confinement, "ann", kill) == "refused"


@needs_root
def test_root_keeps_no_capability_but_reading(confinement):
    status = run_held(confinement, "ann", "print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) in (0, 1 << 2)
    assert fields["NoNewPrivs"] == "1"


@needs_root
@needs_landlock
def test_disks_are_closed(confinement):
    disks = [path for path in Path("/dev").iterdir() if path.is_block_device()]
    for disk in disks[:3]:
        assert run_held(confinement, "ann", reading(disk)) == "PermissionError"


def test_memory_is_counted():
    limited = Confinement(BoundsOptions(is_off=True, memory_bytes=256 << 20))
    code = """
        try:
            print(len(bytearray(1 << 30)))
        except MemoryError:
            print("MemoryError")
        """
    assert run_held(limited, "ann", code) == "MemoryError"


@needs_landlock
def test_what_comes_beside_a_closed_folder_is_open_to_the_next(confinement, state):
    (state.parent / "before").write_text("seen")
    assert run_held(confinement, "ann", reading(state.parent / "before")) == "seen"
    (state.parent / "after").write_text("seen")
    assert run_held(confinement, "ann", reading(state.parent / "after")) == "seen"


def test_it_says_what_holds_and_why_not_more(confinement):
    described = confinement.describe()
    assert described["tier"]
    assert described["covers"]
    weakest = described["tier"] in ("own process", "off")
    assert not weakest or described["lacks"]


def test_bounds_travel_as_text():
    bounds = Bounds(uid=7, home="/home", memory_bytes=1, num_processes=2)
    assert Bounds.read(bounds.write()) == bounds
