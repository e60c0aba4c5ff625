"""`python -m nos_backend.executor`: an executor without a fork server, started within its bounds."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields

from nos_backend.executor.loop import run
from nos_backend.executor.process import Start


def main() -> None:
    """Read the start from the command line and run."""
    parser = argparse.ArgumentParser(prog="nos_backend.executor")
    for field in fields(Start):
        kind = str if field.name in {"name", "device"} else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, required=True)
    start = Start(**vars(parser.parse_args()))
    for fd in (start.socket_fd, start.input_fd, start.output_fd):
        os.set_inheritable(fd, False)
    run(start)


if __name__ == "__main__":
    main()
