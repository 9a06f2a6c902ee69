"""``python -m edgeguard``: the same command line as ``edgeguard``."""

from __future__ import annotations

from edgeguard.cli import main

if __name__ == "__main__":
    main(prog_name="edgeguard")
