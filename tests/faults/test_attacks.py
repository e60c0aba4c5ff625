"""Models that attack their server: others are served all the while, and `docs/security.md` tells the rest.

`python -m tests.faults.test_attacks` runs the attacks on this machine, with the server's bounds and without,
and writes their table into that page.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nos
import psutil
import pytest
from nos.errors import NosError, UnavailableError

from tests.servers import ROOT, Server, start_server, wait_for

PAGE = ROOT / "docs" / "security.md"
ATTACKER = Path(__file__).with_name("attacker.py")
#: Main memory for one executor, and what the attack takes.
EXECUTOR_BYTES = 2 << 30
CANARY = "canary-7f3a"
BEGIN, END = "<!-- attacks -->\n", "<!-- end of attacks -->"
FLAGS = ("--idle-shutdown-s", "0", "--device", "cpu", "--profile-s", "0")


@dataclass
class Neighbour:
    """Calls a model of another owner again and again, and counts what comes of it."""

    client: Any
    num_answers: int = 0
    errors: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Fail unless every call meanwhile is answered, and rightly."""
        ended, before = threading.Event(), self.num_answers

        def call() -> None:
            model = self.client.model("nos/echo")
            while not ended.is_set():
                try:
                    answer = model(self.num_answers)
                except NosError as error:
                    self.errors.append(str(error))
                else:
                    if answer != self.num_answers:
                        self.errors.append(f"{answer} for {self.num_answers}")
                    self.num_answers += 1
                ended.wait(0.01)

        thread = threading.Thread(target=call)
        thread.start()
        try:
            yield
        finally:
            wait_for(lambda: self.num_answers > before or self.errors, "a neighbour's answer")
            ended.set()
            thread.join()
        assert not self.errors


@dataclass
class Field:
    """A server of its own, one attacking model, and who else uses the server."""

    server: Server
    client: Any
    neighbour: Neighbour
    model: str = ""

    def run(self, name: str) -> dict[str, str]:
        """Register an attacker for one kind of attack, and run it: what it tried and what came of it."""
        self.model = f"eve/{name.replace(' ', '-')}"
        options = f"@nos.model(name={self.model!r}, call_timeout_s=8)"
        source = ATTACKER.read_text().replace("class Attacker", f"{options}\nclass Attacker")
        self.client.register(f"import nos\n{source}")
        return dict(ATTACKS[name](self))

    @property
    def tier(self) -> str:
        """What holds the model."""
        return str(self.client.status().workers[0].confinement.tier)

    def attack(self, method: str, *arguments: Any) -> Any:
        """Run one attack while the neighbour is served; returns what came of it."""
        with self.neighbour.served():
            return wait_for(lambda: self._try(method, *arguments), "the attacker is there again")

    def _try(self, method: str, *arguments: Any) -> Any:
        try:
            return self.client.model(self.model).method(method)(*arguments)
        except NosError as error:
            # It says just this while the attacker's executor is made anew.
            return None if type(error) is UnavailableError else type(error).__name__

    def pid(self, part: str) -> int:
        """Return the process of the server's with this in its command line."""
        return next(
            each.pid for each in self.server.processes() if part in " ".join(each.cmdline())
        )


@contextlib.contextmanager
def running_field(*flags: str) -> Iterator[Field]:
    """Start a server, and have the neighbour's model loaded."""
    with contextlib.ExitStack() as stack:
        # Not in pytest's folder: whoever has a user of their own may enter this one.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nos-attacks-")))
        folder.chmod(0o755)
        limit = ("--executor-bytes", str(EXECUTOR_BYTES))
        secret = {"AWS_SECRET_ACCESS_KEY": CANARY, "CUDA_CANARY_TOKEN": CANARY}
        server = start_server(folder, *FLAGS, *limit, *flags, environment=secret)
        stack.callback(server.stop)
        admin = stack.enter_context(nos.connect(server.address, token_file=server.token_file))
        eve = admin.create_token("eve", role="author").secret
        client = stack.enter_context(nos.connect(server.address, token=eve))
        assert admin.model("nos/echo")(1) == 1
        yield Field(server, client, Neighbour(admin))


# The attacks. Each returns what it tried and what came of it, and asserts what always holds.


def reads_secrets(at: Field) -> Iterator[tuple[str, str]]:
    state, server = at.server.state_dir, at.server
    files = {
        "the token's file": server.token_file,
        "the registry": state / "registry.db",
        "a TLS key": state / "run" / "tls" / "key.pem",
        "a log": state / "logs" / "gateway.log",
    }
    for name, path in files.items():
        assert path.exists()
        yield f"reads {name}", at.attack("read", str(path))
    yield "changes the registry", at.attack("write", str(state / "registry.db"))
    gateway = at.pid("nos_backend.app")
    for name, pid in {
        "supervisor": server.process.pid,
        "gateway": gateway,
        "scheduler": at.pid("dask_scheduler"),
        "nanny": at.pid("dask_worker"),
        "worker": at.client.status().workers[0].pid,
    }.items():
        read = {at.attack("read", f"/proc/{pid}/{file}") for file in ("environ", "mem")}
        yield f"reads environment and memory of the {name}", " / ".join(sorted(read))
    yield "signals the gateway", at.attack("kill", gateway)
    environment = at.attack("environment")
    assert CANARY not in environment
    assert server.token not in environment
    yield "looks for secrets in its own environment", "nothing there"


def executor_of_eve(at: Field) -> psutil.Process:
    """Return the process that her models run in; others come and go meanwhile."""
    for each in at.server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.name().startswith("nos:eve"):
                return each
    raise AssertionError(at.server.log())


def forks(at: Field) -> Iterator[tuple[str, str]]:
    yield "forks without end", at.attack("fork")
    daemon = at.attack("daemon")
    executor = executor_of_eve(at)
    executor.kill()
    wait_for(lambda: not is_alive(daemon), "what it left behind ends", 60)
    yield "leaves a process behind", "ends with its executor"


def fills_memory(at: Field) -> Iterator[tuple[str, str]]:
    said = at.attack("fill", EXECUTOR_BYTES + (64 << 20))
    assert said == "MemoryError", said
    yield "takes more memory than `--executor-bytes`", "runs out of memory, alone"


def writes_past_its_slot(at: Field) -> Iterator[tuple[str, str]]:
    yield "shrinks and overwrites the memory it shares with the worker", at.attack("overwrite")
    said = at.attack("babble")
    assert said == "ExecutorLostError", said
    yield "sends nonsense to the worker", "its executor is ended"


def spins(at: Field) -> Iterator[tuple[str, str]]:
    said = at.attack("spin")
    assert said == "DeadlineExceededError", said
    yield "holds the interpreter lock for ever", "ended at its time limit"


ATTACKS = {
    "reads secrets": reads_secrets,
    "forks": forks,
    "fills memory": fills_memory,
    "writes past its slot": writes_past_its_slot,
    "spins": spins,
}


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def at() -> Iterator[Field]:
    with running_field() as field_of_this_module:
        yield field_of_this_module


@pytest.mark.long
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.accept("F6")
def test_others_are_served_and_what_comes_of_it_is_in_the_docs(at: Field, name: str) -> None:
    found = at.run(name)
    assert at.neighbour.num_answers > 0
    if told := read_page().get(column_of(at.tier)):
        assert found == {tried: told[tried] for tried in found}


def column_of(tier: str) -> str:
    """Return under which heading the page has a tier."""
    return "own user, landlock" if "user" in tier and "landlock" in tier else tier


def read_page() -> dict[str, dict[str, str]]:
    """Return the page's table: by tier, what was tried and what came of it."""
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in table.splitlines()
        if not re.match(r"\|[-| ]+\|$", line)
    ]
    if not rows:
        return {}
    return {
        tier: {row[1]: row[index] for row in rows[1:]}
        for index, tier in enumerate(rows[0])
        if index > 1
    }


def main() -> None:
    """Run every attack, held and not, and write the table."""
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for flags in ((), ("--confinement", "off")):
        with running_field(*flags) as at_hand:
            found = columns.setdefault(column_of(at_hand.tier), {})
            for name in ATTACKS:
                found.update({(name, tried): said for tried, said in at_hand.run(name).items()})
    lines = [
        f"| model | tries | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
        *(
            f"| {name} | {tried} | {' | '.join(column[name, tried] for column in columns.values())} |"
            for name, tried in next(iter(columns.values()))
        ),
    ]
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
