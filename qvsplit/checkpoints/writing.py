"""Write safetensors files, and checkpoints of them, from bytes that lie elsewhere. No torch.

Bytes are copied as they are. The header comes first and says where everything will lie, so a file is written in one
pass. What is not whole has another name and is gone if writing fails. What is not guaranteed: that a disk which lies
about syncing keeps its word.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from qvsplit.checkpoints.files import INDEX_FILE, NOTE_FILE, SINGLE_FILE
from qvsplit.checkpoints.tensors import TensorPlace, on_disk_order, read_in_pieces
from qvsplit.errors import DiskError, ModelError, size
from qvsplit.runtime.atomic_files import disk_errors, sync_folder, written_whole

FILE_BYTES = 5_000_000_000  # of tensors in one file, as the hub's checkpoints are mostly cut
_ALIGNMENT = 8  # of the first tensor's bytes, as the format's own library writes them


def writing_order(places: Mapping[str, TensorPlace]) -> list[str]:
    """Sort the names of tensors as they are to lie in one file: the widest values first, then as they lie now.

    Then each tensor begins at a multiple of its values' width, which some readers need. Of a file that the safetensors
    library wrote it is the order in which its tensors lie.
    """
    return sorted(on_disk_order(places), key=lambda name: -_bytes_a_value(places[name]))


def header_of(places: Mapping[str, TensorPlace]) -> bytes:
    """Give the first bytes of a safetensors file in which the tensors lie one after another, in the order of `places`.

    They are the length of what follows (8 bytes, little-endian), and JSON, filled up with blanks to a multiple of 8.
    Format: github.com/huggingface/safetensors, README.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in places.items():
        start, end = end, end + place.size
        content[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _nobody(count: int) -> None:
    """Say nothing."""


def write_safetensors(
    file: Path, places: Mapping[str, TensorPlace], on_written: Callable[[int], None] = _nobody
) -> None:
    """Copy tensors into the new `file`, under the names of `places`; it appears when it is whole and on the disk.

    `on_written` hears how many more bytes of tensors have been written.

    Raises:
        ModelError: A file that is copied from ends too early, or has changed.
        OSError: The disk is full, or the folder cannot be written.
    """
    names = writing_order(places)
    with written_whole(file) as stream:
        stream.write(header_of({name: places[name] for name in names}))
        for piece in read_in_pieces([places[name] for name in names]):
            stream.write(piece)
            on_written(len(piece))


def fill_checkpoint(
    folder: Path,
    places: Mapping[str, TensorPlace],
    *,
    small: Iterable[Path],
    note: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
    on_written: Callable[[int], None] = _nobody,
) -> None:
    """Write a checkpoint that holds some tensors of another into `folder`, which is there and empty.

    Args:
        folder: Where.
        places: Where the tensors lie now, by the names they are to have.
        small: Configs, tokenizer, templates: files that are copied.
        note: What qvsplit.json is to say of it.
        file_bytes: The most bytes of tensors in one file, unless one tensor alone has more; with several files there
            is an index.
        on_written: Hears how many more bytes of tensors have been written.

    Raises:
        ModelError: A file that is copied from ends too early, or has changed.
        OSError: The disk is full, or the folder cannot be written.
    """
    parts = _parts(places, file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file_name = SINGLE_FILE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file_name, {name: places[name] for name in names}, on_written)
        weight_map |= dict.fromkeys(names, file_name)
    if len(parts) > 1:
        total = sum(place.size for place in places.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_small_files(folder, small, note)


def write_small_files(folder: Path, small: Iterable[Path], note: Mapping[str, Any]) -> None:
    """Copy the `small` files into `folder`, and write qvsplit.json, which says what the checkpoint is. Raises OSError.

    The note comes last: where it is, the others are.
    """
    for path in small:
        with written_whole(folder / path.name) as stream:
            stream.write(path.read_bytes())
    write_json(folder / NOTE_FILE, note)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as `file`, which appears when it is whole and on the disk. Raises OSError."""
    with written_whole(file) as stream:
        stream.write(json.dumps(content).encode() + b"\n")


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raise DiskError where a disk has less room than is to be written on it. `sizes`: bytes by the folder for them."""
    needed: dict[int, int] = {}
    for folder, count in sizes.items():
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + count
    for folder in sizes:
        there, count = shutil.disk_usage(folder), needed[folder.stat().st_dev]
        if there.total and there.free < count:  # some file systems do not say
            raise DiskError(
                f"{folder.parent}: {size(count)} are to be written and {size(there.free)} are free; make room and "
                "run again, or choose another disk"
            )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to be filled, which appears as `folder` when the block ends without error, and else is removed.

    What a process left that was killed while it filled the same `folder` is removed first.

    Raises:
        ModelError: `folder` exists.
        DiskError: What the block writes does not fit on the disk, or the folder cannot be written.
    """
    if os.path.lexists(folder):
        raise ModelError(f"{folder} exists; give a new folder")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(folder, kept="nothing of it is left"), ExitStack() as held:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        try:
            unfinished.mkdir()
            with suppress(OSError):  # some file systems have no locks: then nobody removes what is left there
                held.enter_context(_locked(unfinished))
            yield unfinished
            sync_folder(unfinished)
            os.rename(unfinished, folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what was to become `folder` and nobody is filling: whoever fills one holds a lock, which dies with it."""
    for path in folder.parent.glob(".*.tmp"):
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.\d+\.tmp", path.name):
            with suppress(OSError), _locked(path):
                shutil.rmtree(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder inside the block. OSError where another process has it, or the disk has no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _parts(places: Mapping[str, TensorPlace], most: int) -> list[list[str]]:
    """Cut the tensors, as they lie on disk, into runs of at most `most` bytes, of at least one tensor each."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name in on_disk_order(places):
        if parts[-1] and filled + places[name].size > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += places[name].size
    return parts


def _bytes_a_value(place: TensorPlace) -> int:
    return place.size // (math.prod(place.shape) or 1)
