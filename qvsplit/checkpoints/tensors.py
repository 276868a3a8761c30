"""Read tensors from safetensors files: where each lies, and its raw bytes. No torch.

Bytes are read, not mapped: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qvsplit.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
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
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def torch_dtype_name(safetensors_name: str) -> str:
    """Give torch's name of a safetensors dtype. ModelError for one that nothing is computed in."""
    if safetensors_name not in _TORCH_NAMES:
        raise ModelError(f"its tensors are stored as {safetensors_name}; qvsplit reads {', '.join(_TORCH_NAMES)}")
    return _TORCH_NAMES[safetensors_name]


def is_computed_in(safetensors_name: str) -> bool:
    """Say whether `torch_dtype_name` has a name for a dtype."""
    return safetensors_name in _TORCH_NAMES


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Read every tensor's place in a safetensors `file`.

    The safetensors library checks the file first (lengths, overlaps, truncation); the offsets, which it does not
    give away, are then read from the same header: 8 bytes of length, little-endian, and JSON.
    Format: github.com/huggingface/safetensors, README.

    Raises:
        ModelError: The file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too large")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ModelError(f"{file.parent} lacks {file.name}; download the checkpoint again") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged or cut short ({error}); download it again") from None
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: TensorPlace(
            name, file, entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }  # fmt: skip


def read_tensors(places: Mapping[str, TensorPlace]) -> Iterator[tuple[str, bytearray]]:
    """Read each tensor's bytes, in the order in which they lie on disk; give them by the names of `places`.

    Raises:
        ModelError: A file ends too early.
    """
    for name in on_disk_order(places):
        raw = bytearray(places[name].size)
        with places[name].file.open("rb", buffering=0) as stream:
            _read_exactly(stream.fileno(), places[name], memoryview(raw))
        yield name, raw


def read_ahead(
    places: Mapping[str, TensorPlace], memory: Callable[[TensorPlace], memoryview]
) -> Iterator[tuple[str, memoryview]]:
    """Read each tensor's bytes into `memory(place)`, in the order in which they lie on disk.

    While a tensor is being used the next one is read, by a thread. So the memory of two is in use at a time, and that
    of a tensor may be given again for the next but one.

    Raises:
        ModelError: A file ends too early.
    """

    def read(place: TensorPlace, view: memoryview) -> memoryview:
        with place.file.open("rb", buffering=0) as stream:
            _read_exactly(stream.fileno(), place, view)
        return view

    names = on_disk_order(places)
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, places[name], memory(places[name])) for name in names[:1]]
        for name, following in zip(names, [*names[1:], None], strict=False):
            view = coming.pop().result()
            if following is not None:
                coming.append(pool.submit(read, places[following], memory(places[following])))
            yield name, view


def on_disk_order(places: Mapping[str, TensorPlace]) -> list[str]:
    """Sort the names of tensors as these lie on disk, file by file."""
    return sorted(places, key=lambda name: (places[name].file, places[name].start))


def _read_exactly(descriptor: int, place: TensorPlace, view: memoryview) -> None:
    done = 0
    while done < place.size:
        got = os.preadv(descriptor, [view[done:]], place.start + done)
        if got == 0:
            raise ModelError(f"{place.file} ends inside tensor {place.name}; download the checkpoint again")
        done += got
