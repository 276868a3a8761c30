"""The parts of loading a model, and who hears of them. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

CLUSTER = "cluster"
LIBRARIES = "libraries"
PROCESSOR = "config and processor"
TENSORS = "tensors"  # the only part that is counted, in bytes as the checkpoint stores them
LAYOUT = "laying out"
READY = "ready"

OnLoad = Callable[[str, int, int], None]  # the part; of tensors, how many bytes of how many have been read, else 0, 0


def nobody(part: str, done: int, total: int) -> None:
    """Say nothing."""
