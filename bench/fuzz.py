"""Fuzz the shard reader with the numbers that a release is checked with: see tests/support/fuzz.py.

python bench/fuzz.py [--cases 100000] [--seed 0]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.fuzz import main

if __name__ == "__main__":
    main()
