"""Names of files: as they are stored in rows, as the file system has them, and which lies within which.

A stored name is valid UTF-8, whatever the locale; a byte that is not UTF-8 (a surrogate, in Python) is written as `//x`
and two hex digits. No normalised path holds two slashes in a row, so this is reversible. Standard library only.
"""

from __future__ import annotations

import os
import re
import sys

from qvsplit.errors import unescaped

_BYTES_BEYOND_UTF8 = re.compile(r"[\udc80-\udcff]")
_ESCAPED_BYTE = re.compile(r"//x([0-9a-f]{2})")
_PYTHON_DECODES_UTF8 = sys.getfilesystemencoding() == "utf-8"  # what it does unless a locale says otherwise


def utf8_text(text: str) -> str:
    """Give a name or a word of the command line as UTF-8 reads it; a byte that is not UTF-8 stays a surrogate."""
    if text.isascii() or _PYTHON_DECODES_UTF8:
        return text
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # Python cannot have decoded it by the locale
        return text


def stored_name(name: str) -> str:
    """Give `name`, as Python has it from the file system, in the form that goes into a row."""
    return _without_surrogates(utf8_text(name))


def typed_name(text: str) -> str:
    """Give a name that was typed on the command line, or pasted from what a command printed, in its stored form."""
    return _without_surrogates(unescaped(utf8_text(text)))


def name_on_disk(stored: str) -> str:
    """Invert `stored_name`."""
    name = _ESCAPED_BYTE.sub(lambda m: chr(0xDC00 + int(m[1], 16)), stored) if "//x" in stored else stored
    return name if name.isascii() or _PYTHON_DECODES_UTF8 else os.fsdecode(name.encode("utf-8", "surrogateescape"))


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else _BYTES_BEYOND_UTF8.sub(lambda m: f"//x{ord(m[0]) - 0xDC00:02x}", text)


def file_on_disk(root: str, path: str) -> str:
    """Give the file that `path` below `root` names, both in their stored form."""
    return os.path.join(name_on_disk(root), name_on_disk(path))


def absolute(name: str | os.PathLike[str]) -> str:
    """Give the whole path that opens what `name` opens; the links in it are kept where they can be.

    Unlike `os.path.abspath`: what stands before a `..` is resolved first, as `link/..` is the folder above the link's
    target.
    """
    parts = os.path.join(os.getcwd(), os.fspath(name)).split("/")
    if ".." in parts:
        behind = len(parts) - parts[::-1].index("..")
        parts = [os.path.realpath("/".join(parts[:behind])), *parts[behind:]]
    return os.path.normpath("/".join(parts))


def storable_mtime(mtime_ns: int) -> int:
    """Clip a file's time to 64 bits: some file systems keep times beyond."""
    return max(-(1 << 63), min(mtime_ns, (1 << 63) - 1))


def is_within(path: str, folder: str) -> bool:
    """Say whether `path` is `folder` or below it, by name alone; both are absolute and normalised."""
    return path == folder or path.startswith(folder if folder.endswith("/") else folder + "/")
