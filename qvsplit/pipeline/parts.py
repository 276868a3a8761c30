"""The features of an item's parts, joined from what went through the encoder slice by slice.

An image has one part, a video one a clip. All parts of an item are written together, so that they are kept until the
last is there: in memory, and beyond some size in a file without a name, which goes with the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from qvsplit.errors import DiskError, ItemError
from qvsplit.models.sampling import Clip
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.store.features import Features, StoredTensor

IN_MEMORY_BYTES = 128 << 20  # of the parts of one item


@dataclass(frozen=True)
class Part:
    """One part of an item: its features, and which clip of a video it is; None for an image."""

    features: Features
    clip: Clip | None = None


class Parts:
    """Collects the parts of one item, in order.

    Args:
        join: Makes the features of a clip of those of its temporal slices; may raise ItemError.
        scratch: The folder for what does not stay in memory.
    """

    def __init__(self, join: Callable[[list[Features]], Features], scratch: Path | None) -> None:
        self._join = join
        self._scratch = scratch
        self._done: list[Part] = []
        self._clip: Clip | None = None
        self._slices: list[Features] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def add(self, features: Features, clip: Clip | None) -> None:
        """Add an image, or the next slice of a clip.

        Raises:
            ItemError: The clip before cannot be joined.
            DiskError: The scratch file cannot be written; nothing of the item is kept.
        """
        if clip != self._clip:
            self._end_clip()
            self._clip = clip
        self._slices.append(features)

    def finish(self) -> list[Part]:
        """Give all parts. Raises what `add` does."""
        self._end_clip()
        return self._done

    def _end_clip(self) -> None:
        if self._slices:
            slices, self._slices = self._slices, []
            try:
                features = self._join(slices) if self._clip is not None else slices[0]
            except MemoryError:
                raise ItemError("does not fit into memory", "memory") from None
            self._done.append(Part(self._kept(features), self._clip))

    def _kept(self, features: Features) -> Features:
        """Give the same features, from the file where memory has had enough of them."""
        self._bytes += sum(tensor.raw.nbytes for tensor in features.tensors.values())
        if self._bytes <= IN_MEMORY_BYTES or self._scratch is None:
            return features
        try:
            with disk_errors(str(self._scratch)):
                if self._file is None:
                    self._file = TemporaryFile(dir=self._scratch)  # noqa: SIM115 - it goes with the features
                tensors = {name: self._mapped(tensor, self._file) for name, tensor in features.tensors.items()}
        except DiskError:
            self._done, self._file = [], None  # what they took is room for rows that are finished
            raise
        return replace(features, tensors=tensors)

    @staticmethod
    def _mapped(tensor: StoredTensor, file: IO[bytes]) -> StoredTensor:
        import numpy as np

        place = file.seek(0, 2)
        file.write(tensor.raw.data)
        file.flush()
        return StoredTensor(np.memmap(file, np.uint8, "r", place, tensor.raw.shape), tensor.dtype)
