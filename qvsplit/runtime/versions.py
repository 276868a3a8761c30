"""Which version of a package is installed, also where its metadata is missing, and whether it is one that is wanted."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from qvsplit.errors import QvsplitWarning

UNKNOWN = "unknown"


class VersionWarning(QvsplitWarning):
    """Answers were held against other versions of a library than the one that is installed."""


@dataclass(frozen=True)
class OutOfBounds:
    """A package whose installed version is not within the bounds that another's metadata names."""

    name: str
    version: str
    bounds: str

    def __str__(self) -> str:
        """Give all of it in a few words."""
        return f"{self.name} {self.version} ({self.bounds})"


def installed_version(name: str) -> str | None:
    """Give the version that a package's metadata names; None where it is not installed, or only sources."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def out_of_bounds(package: str = "qvsplit") -> Iterator[OutOfBounds]:
    """Give what is installed in a version that a package does not want. Of mere sources nothing is known."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(package) or ()]
    except metadata.PackageNotFoundError:
        return
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(one.name)
        if version is not None and not one.specifier.contains(version, prereleases=True):
            yield OutOfBounds(one.name, version, str(one.specifier))


@functools.cache
def warn_of_other_versions(name: str) -> None:
    """Warn, once a process, where answers were held against other versions of a library than the installed one."""
    for one in out_of_bounds():
        if one.name == name:
            warnings.warn(
                f"{name} {one.version} is not one of the versions that answers were held against ({one.bounds}): "
                "install one of them, or compare answers with the full model's by `qvsplit verify` with a `sample`",
                VersionWarning,
                stacklevel=2,
            )
