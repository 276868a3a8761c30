"""Find the control groups that this process is in, of either version. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def group_folders(controller: str, groups: Path = GROUPS, mounted: Path = MOUNTED) -> Iterator[tuple[int, Path]]:
    """Give version and folder of each group that this process is in for a controller, inner ones first.

    A limit of any of them holds. In a container the path that the kernel names may be the host's, of which nothing is
    to be seen inside: then the container's own group is what is mounted, and comes last.

    Args:
        controller: `cpu`, `memory` and so on, as version 1 names its folder.
        groups: The kernel's account of the groups of this process.
        mounted: Where the groups are to be seen.
    """
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            version, top = (1, mounted / controller) if controllers else (2, mounted)
            inner = top / path.strip("/")
            for folder in (inner, *inner.parents):
                yield version, folder
                if folder == top:
                    break
