"""Where qvsplit keeps what it can always have again: fingerprints, what a dry run found, encoders fetched from a hub.

The last are large. Any of it may be deleted at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give where qvsplit keeps what it can always have again: `QVSPLIT_CACHE`, else XDG's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("QVSPLIT_CACHE") or os.path.join(base, "qvsplit"))
