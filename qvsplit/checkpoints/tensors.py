"""Read tensors from safetensors files: where each lies, and its raw bytes. No torch.

Bytes are read, not mapped: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvsplit.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
PIECE_BYTES = 16 << 20  # of what is copied, in memory at a time
# safetensors' names for the dtypes a checkpoint may hold, and their bytes a value
SAFETENSORS_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# torch's names of those that are computed in, and of what batch norms count in
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies: `size` bytes from `start` in `file`, row-major, little-endian.

    Attributes:
        name: As the checkpoint has it, with its prefix.
        dtype: safetensors' name: F32, BF16, F16, …
        written: Inode and time of modification of the file whose header said so.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    written: tuple[int, int] | None = None


def torch_dtype_name(safetensors_name: str) -> str:
    """Give torch's name of a safetensors dtype. ModelError for one that nothing is computed in."""
    if safetensors_name not in _TORCH_NAMES:
        raise ModelError(f"its tensors are stored as {safetensors_name}; qvsplit reads {', '.join(_TORCH_NAMES)}")
    return _TORCH_NAMES[safetensors_name]


def is_computed_in(safetensors_name: str) -> bool:
    """Say whether `torch_dtype_name` has a name for a dtype."""
    return safetensors_name in _TORCH_NAMES


def described(places: Sequence[TensorPlace]) -> str:
    """Say in a few words how many tensors these are, one of their names, and their dtypes."""
    dtypes = " and ".join(sorted({place.dtype for place in places}))
    more = f" and {len(places) - 1:,} more" if len(places) > 1 else ""
    return f"{places[0].name}{more} in {dtypes}"


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Read every tensor's place in a safetensors `file`.

    Raises:
        ModelError: The file is missing or damaged.
    """
    try:
        return parse_header(file)
    except FileNotFoundError:
        raise ModelError(f"{file.parent} lacks {file.name}; download the checkpoint again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged or cut short ({error}); download it again") from None


def parse_header(file: Path) -> dict[str, TensorPlace]:
    """Read every tensor's place in a safetensors `file`; raises OSError, or ValueError where the header is wrong.

    The safetensors library checks the file first (lengths, overlaps, truncation); the offsets, which it does not
    give away, are then read from the same header: 8 bytes of length, little-endian, and JSON.
    Format: github.com/huggingface/safetensors, README.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    with file.open("rb") as stream:
        written = _written(os.fstat(stream.fileno()))
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("its header is too large")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_without_repetition)
        except RecursionError as error:
            raise ValueError(str(error)) from None
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: TensorPlace(
            name, file, entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0], written,
        )
        for name, entry in header.items()
    }  # fmt: skip


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs: of a name that is there twice, readers would take one or the other."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return content


def read_tensors(places: Mapping[str, TensorPlace]) -> Iterator[tuple[str, bytearray]]:
    """Read each tensor's bytes, in the order in which they lie on disk; give them by the names of `places`.

    Raises:
        ModelError: A file ends too early, or has changed.
    """
    with _Files() as files:
        for name in on_disk_order(places):
            raw = bytearray(places[name].size)
            files.read(places[name], memoryview(raw))
            yield name, raw


def read_ahead(
    places: Mapping[str, TensorPlace], memory: Callable[[TensorPlace], memoryview]
) -> Iterator[tuple[str, memoryview]]:
    """Read each tensor's bytes into `memory(place)`, in the order in which they lie on disk.

    While a tensor is being used the next one is read, by a thread. So the memory of two is in use at a time, and that
    of a tensor may be given again for the next but one.

    Raises:
        ModelError: A file ends too early, or has changed.
    """
    names = on_disk_order(places)
    with _Files() as files, ThreadPoolExecutor(1) as pool:

        def start(name: str) -> tuple[Future[None], memoryview]:
            view = memory(places[name])
            return pool.submit(files.read, places[name], view), view

        coming = [start(name) for name in names[:1]]
        for name, following in zip(names, [*names[1:], None], strict=False):
            reading, view = coming.pop()
            reading.result()
            del reading
            if following is not None:
                coming.append(start(following))
            yield name, view
            del view  # its memory may be given again


def read_in_pieces(places: Iterable[TensorPlace], most: int = PIECE_BYTES) -> Iterator[memoryview]:
    """Read the tensors' bytes one after another, in pieces of at most `most` bytes, each of them good until the next.

    Raises:
        ModelError: A file ends too early, or has changed.
    """
    memory = memoryview(bytearray(most))
    with _Files() as files:
        for place in places:
            for done in range(0, place.size, most):
                piece = memory[: min(most, place.size - done)]
                files.read(replace(place, start=place.start + done, size=len(piece)), piece)
                yield piece


def on_disk_order(places: Mapping[str, TensorPlace]) -> list[str]:
    """Sort the names of tensors as these lie on disk, file by file."""
    return sorted(places, key=lambda name: (places[name].file, places[name].start))


class _Files:
    """The file that is being read, open once for all of its tensors: what is renamed over it meanwhile is not mixed in.

    Nor is what is written into it: its time of modification must be the same at the end.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1
        self._seen: tuple[int, int] = 0, 0

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._close()
        elif self._path is not None:
            os.close(self._descriptor)

    def read(self, place: TensorPlace, view: memoryview) -> None:
        """Fill `view` with a tensor's bytes. ModelError if the file ends too early, or has changed."""
        if place.file != self._path:
            self._close()
            self._descriptor = os.open(place.file, os.O_RDONLY)
            self._path, self._seen = place.file, self._state()
            if place.written not in (None, self._seen):
                os.close(self._descriptor)
                self._refuse()
        done = 0
        while done < place.size:
            got = os.preadv(self._descriptor, [view[done:]], place.start + done)
            if got == 0:
                raise ModelError(f"{place.file} ends inside tensor {place.name}; download the checkpoint again")
            done += got

    def _state(self) -> tuple[int, int]:
        return _written(os.fstat(self._descriptor))

    def _close(self) -> None:
        if self._path is None:
            return
        changed = self._state() != self._seen
        os.close(self._descriptor)
        if changed:
            self._refuse()
        self._path = None

    def _refuse(self) -> None:
        path, self._path = self._path, None
        raise ModelError(f"{path} changed while it was read; load it again when it is whole")


def _written(status: os.stat_result) -> tuple[int, int]:
    """Give what tells a file that was written anew: inode and time of modification."""
    return status.st_ino, status.st_mtime_ns
