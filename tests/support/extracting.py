"""What tests of extractions need: a folder's photographs changed, and what a store holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks, Summary
from qvsplit.store.opening import open_store
from tests.support.photographs import photographs

OLD = (1_600_000_000, 1_600_000_000)  # times of a file whose stat can be trusted
LATER = (1_600_000_500, 1_600_000_500)
PHOTOS = {path.name: path for path in photographs()}


@dataclass
class Ran:
    """What one extraction did, and what it said while it ran. Attributes of the summary are also its own."""

    summary: Summary
    notes: list[str]
    failures: list[tuple[str, str]]
    planned: list[int]
    done: list[str]

    def __getattr__(self, name: str):
        return getattr(self.summary, name)


def extractor(model: str | None, out: Path) -> Callable[..., Ran]:
    """A function that extracts paths into `out`, or another store, with `model`, or another.

    Its `ended` has the summary of every run, also of those that an exception ended.
    """

    def extract(*paths, out=out, on_item=None, **options) -> Ran:
        options.setdefault("model", model)
        notes, failures, planned, done = [], [], [], []
        callbacks = ExtractCallbacks(
            on_plan=planned.append, on_item=on_item or done.append, on_note=notes.append,
            on_failure=lambda path, reason: failures.append((path, reason)), on_end=ended.append,
        )  # fmt: skip
        before = len(ended)
        summary = extract_files(list(paths), out=out, options=ExtractOptions(**options), callbacks=callbacks)
        assert len(ended) == before + 1 and ended[-1] is summary  # heard once
        return Ran(summary, notes, failures, planned, done)

    ended = extract.ended = []
    return extract


def contents(folder: Path) -> dict[tuple[str, str], tuple]:
    """What a store holds: key → status, grid, and the features' bytes."""
    store = open_store(folder)
    return {
        row.key: (
            row.status,
            row.grid_thw,
            store.features(row).tensors["pooler_output"].raw.tobytes() if row.status == "ok" else None,
        )
        for row in store.rows
    }


def by_path(folder: Path) -> dict[str, tuple]:
    """`contents` by the path alone."""
    return {path: held for (_, path), held in contents(folder).items()}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a store but nothing of the lock's content: size and modification time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def shards(folder: Path) -> list[Path]:
    """A store's shards, the oldest first."""
    return sorted(folder.glob("shard-*.parquet"))


def add(folder: Path, name: str, photo: str = "rocket.jpg", *, shift: int = 0) -> Path:
    """Write an image of its own: a piece of a photograph, not fresh."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with Image.open(PHOTOS[photo]) as image:
        image.convert("RGB").crop((shift, shift, shift + 80, shift + 60)).save(folder / name)
    os.utime(folder / name, OLD)
    return folder / name


def add_bad(folder: Path, *names: str) -> None:
    """Write files that are no images, not fresh."""
    for name in names:
        (folder / name).write_text(f"no image: {name}")
        os.utime(folder / name, OLD)


def many(folder: Path, number: int) -> Path:
    """Write a folder of small images, each a piece of a photograph of its own."""
    for index in range(number):
        add(folder, f"{index:04d}.png", shift=index)
    return folder


def flip(path: Path, at: float) -> None:
    """Change one byte, `at` that part of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    path.write_bytes(data)
