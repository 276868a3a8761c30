"""Which version of a package is installed, also where its metadata is missing."""

from __future__ import annotations

from importlib import metadata

UNKNOWN = "unknown"


def installed_version(name: str) -> str | None:
    """Give the version that a package's metadata names; None where it is not installed, or only sources."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
