"""`python -m nos_backend serve`: the server's command line without the client's."""

from __future__ import annotations

import sys

from nos_backend.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
