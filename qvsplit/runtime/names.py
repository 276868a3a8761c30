"""Names of files: as they are stored in rows, as the file system has them, and which lies within which.

A stored name is valid UTF-8: a byte that is not UTF-8 (a surrogate, in Python) is written as `//x` and two hex digits.
No normalised path holds two slashes in a row, so this is reversible. Standard library only.
"""

from __future__ import annotations

import os
import re

_BYTES_BEYOND_UTF8 = re.compile(r"[\udc80-\udcff]")
_ESCAPED_BYTE = re.compile(r"//x([0-9a-f]{2})")


def stored_name(name: str) -> str:
    """Give `name`, as Python has it from the file system, in the form that goes into a row."""
    return name if name.isascii() else _BYTES_BEYOND_UTF8.sub(lambda m: f"//x{ord(m[0]) - 0xDC00:02x}", name)


def name_on_disk(stored: str) -> str:
    """Invert `stored_name`."""
    return _ESCAPED_BYTE.sub(lambda m: chr(0xDC00 + int(m[1], 16)), stored) if "//x" in stored else stored


def file_on_disk(root: str, path: str) -> str:
    """Give the file that `path` below `root` names, both in their stored form."""
    return os.path.join(name_on_disk(root), name_on_disk(path))


def storable_mtime(mtime_ns: int) -> int:
    """Clip a file's time to 64 bits: some file systems keep times beyond."""
    return max(-(1 << 63), min(mtime_ns, (1 << 63) - 1))


def is_within(path: str, folder: str) -> bool:
    """Say whether `path` is `folder` or below it, by name alone; both are absolute and normalised."""
    return path == folder or path.startswith(folder if folder.endswith("/") else folder + "/")
