"""Fuzz the shard reader, or the reader of clips, with the numbers that a release is checked with.

python bench/fuzz.py [--cases 100000] [--seed 0]           see tests/support/fuzz.py
python bench/fuzz.py clips [--cases 400] [--seed 0]        see tests/support/nasty_clips.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import fuzz, nasty_clips

if __name__ == "__main__":
    if sys.argv[1:2] == ["clips"]:
        nasty_clips.main(sys.argv[2:])
    else:
        fuzz.main()
