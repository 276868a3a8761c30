"""Lay out the demo: a small random checkpoint and real photographs, below the folder given.

    python tools/make_demo.py OUT

The checkpoint has the real classes and random weights: it shows the plumbing, and its answers mean nothing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from make_checkpoint import make_tiny
from sample_photos import copy_to


def main() -> None:
    """Make what is not there yet."""
    folder = Path(sys.argv[1])
    if not (folder / "checkpoint").exists():
        half_made = folder / "checkpoint.new"
        shutil.rmtree(half_made, ignore_errors=True)
        make_tiny(half_made)
        half_made.rename(folder / "checkpoint")
    copy_to(folder / "photos")
    print(
        f"{folder}: a random checkpoint (its answers mean nothing) and "
        f"{len(list((folder / 'photos').iterdir()))} photographs"
    )


if __name__ == "__main__":
    main()
