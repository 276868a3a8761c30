"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import os
import platform


def machine() -> dict[str, str | int | None]:
    """Give the processor, its cores, and Python's version."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
