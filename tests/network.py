"""Other machines: network namespaces, each with a link to this one that can be cut. Takes root and ip."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess

import pytest

_numbers = itertools.count(2)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Host:
    """Another machine, which reaches this one at `gateway` and is reached at `address`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """Make it; the stack takes it away.

        Raises:
            pytest.skip.Exception: Where none can be made.
        """
        if not shutil.which("ip") or os.geteuid():
            pytest.skip("making a network namespace takes root and iproute2")
        number, pid = next(_numbers), os.getpid()
        network = f"10.{200 + pid // 250 % 50}.{pid % 250}"
        self.name, self._link = f"nos-{pid}-{number}", f"n{pid}-{number}"
        self.gateway, self.address = f"{network}.1", f"{network}.{number}"
        #: What a command line begins with that runs there.
        self.inside = ("ip", "netns", "exec", self.name)
        try:
            run("ip", "netns", "add", self.name)
            stack.callback(run, "ip", "netns", "del", self.name)
            self._connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")

    def _connect(self) -> None:
        run("ip", "link", "add", self._link, "type", "veth", "peer", "far", "netns", self.name)
        ends = (
            ((), self._link, self.gateway, self.address),
            (self.inside, "far", self.address, self.gateway),
        )
        for inside, device, own, other in ends:
            run(*inside, "ip", "address", "add", own, "peer", other, "dev", device)
            run(*inside, "ip", "link", "set", device, "up")
        run(*self.inside, "ip", "link", "set", "lo", "up")

    def cut(self) -> None:
        """Have packets vanish, both ways: they go to an address that nobody has."""
        nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
        run("ip", "neigh", "replace", self.address, "dev", self._link, *nobody)
        run(*self.inside, "ip", "neigh", "replace", self.gateway, "dev", "far", *nobody)

    def mend(self) -> None:
        """Take back `cut`."""
        run("ip", "neigh", "del", self.address, "dev", self._link)
        run(*self.inside, "ip", "neigh", "del", self.gateway, "dev", "far")
