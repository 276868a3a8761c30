"""Do qvsplit and a second decoder see the same image in a file? For every file below FOLDERs, each content once.

    pip install 'pyvips[binary]' tifffile imagecodecs pygame-ce
    python -m bench.decoders FOLDER... [--details FILE] [--images FOLDER] [--seconds 20]

The second decoder is libvips; where that has no reader or refuses, tifffile, imagecodecs and SDL_image (pygame) are
tried in turn. What they give is brought to what qvsplit promises (docs/images.md): upright, 8-bit RGB, over white where
transparent, no colour profile, the first frame, 16 bits by their high byte. qvsplit and the second decoder run in
processes of their own, so that a crash or a hang is a line of the table like any other.

    agree           no value differs by more than 2 levels
    near            they differ by more, but by 1.5 levels on average at the most, at 32 dB or better, in an AVIF or
                    HEIF: their decoders filter smaller colour planes each in its own way, and round as they like
    both refuse     neither gives an image
    only second     qvsplit refuses what a second decoder reads
    only qvsplit    qvsplit reads what no second decoder reads
    differ          another size, or other pixels

A line for each file that is not of the first three; `--details` writes them all, as JSON lines; `--images` writes,
for each that differs, both images and their difference side by side. Last line: one JSON object with the counts.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.second_decoder import SecondDecoder, Seen, missing
from qvsplit.errors import ItemError
from qvsplit.sources.decoder import Decoder
from qvsplit.sources.images import optional_readers
from qvsplit.sources.source import Entry

SAME_LEVELS = 2  # rounding: YCbCr, alpha over white and scaling of floats by two pieces of code
NEAR_LEVELS, NEAR_DECIBELS = 1.5, 32.0  # a wrong plane, turn or gamma is far beyond
NEAR_FORMATS = ("AVIF", "HEIF")  # of all others the decoders' colours are the same to the level
QUIET = ("agree", "near", "both refuse")


def main() -> None:
    """Compare, print what differs, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--details", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for a file and decoder [default: 20]")
    arguments = parser.parse_args()
    if packages := missing():
        sys.exit("no second decoder to compare with: pip install " + " ".join(f"'{name}'" for name in packages))
    counts: collections.Counter[str] = collections.Counter()
    folders: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    first, second = Decoder(arguments.seconds), SecondDecoder(arguments.seconds)
    with open(arguments.details or os.devnull, "w") as details:
        for folder, path in contents(arguments.folders):
            ours, theirs = decode(first, path), second.decode(path)
            found = compare(ours, theirs)
            verdict = found["verdict"]
            counts[verdict] += 1
            folders[str(folder)][verdict] += 1
            print(json.dumps({"file": str(path), **found}), file=details, flush=True)
            if verdict not in QUIET:
                print("\t".join([verdict, str(path), found["qvsplit"], found["second"], numbers(found)]), flush=True)
            if verdict == "differ" and arguments.images is not None:
                write_images(arguments.images, path, ours, theirs)
    first.close()
    second.close()
    readers = optional_readers(videos=False)
    print(json.dumps({"files": counts.total(), **counts, "folders": folders, "readers": readers}))


def contents(folders: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Give each folder with each of its files, but those whose content came before."""
    known = set()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in known:
                known.add(digest)
                yield folder, path


def decode(decoder: Decoder, path: Path) -> Seen:
    """Decode a file as `extract` does."""
    entry = Entry(str(path.parent), path.name, path.stat().st_size, None, None)
    try:
        image = decoder.decode(entry, decoder.read(entry))
    except ItemError as error:
        return Seen(None, error.args[0])
    return Seen(image.pixels.copy(), image.format)


def numbers(found: dict[str, Any]) -> str:
    """Say by how much two images of one size differ; nothing for any other pair."""
    return f"max {found['max']} mean {found['mean']} share {found['share']}" if "max" in found else ""


def compare(ours: Seen, theirs: Seen) -> dict[str, Any]:
    """Give the verdict, a word on each decoder, and by how much two images of one size differ.

    `max` and `mean` are in levels of 255, `share` is that of the pixels that differ by more than SAME_LEVELS.
    """
    words = {"qvsplit": ours.word, "second": theirs.word}
    if ours.pixels is None or theirs.pixels is None:
        read = "only qvsplit" if ours.pixels is not None else "only second"
        return {"verdict": "both refuse" if ours.pixels is theirs.pixels else read, **words}
    if ours.pixels.shape != theirs.pixels.shape:
        sizes = (f"{one.shape[1]}×{one.shape[0]}" for one in (ours.pixels, theirs.pixels))
        return {"verdict": "differ", **{who: f"{words[who]}, {size}" for who, size in zip(words, sizes, strict=True)}}
    apart = np.abs(ours.pixels.astype(np.int16) - theirs.pixels)
    most, mean, square = int(apart.max()), float(apart.mean()), float(np.square(apart, dtype=np.float64).mean())
    near = mean <= NEAR_LEVELS and square <= 255**2 / 10 ** (NEAR_DECIBELS / 10) and ours.word in NEAR_FORMATS
    return {
        "verdict": "agree" if most <= SAME_LEVELS else "near" if near else "differ",
        **words,
        "max": most,
        "mean": round(mean, 3),
        "share": round(float((apart.max(axis=2) > SAME_LEVELS).mean()), 4),
    }


def write_images(folder: Path, path: Path, ours: Seen, theirs: Seen) -> None:
    """Write qvsplit's image, the second decoder's, and their difference, side by side, as a PNG named as the file."""
    images = [seen.pixels for seen in (ours, theirs) if seen.pixels is not None]
    if images[0].shape == images[1].shape:
        images.append(np.abs(images[0].astype(np.int16) - images[1]).astype(np.uint8))
    sheet = Image.new("RGB", (sum(one.shape[1] + 4 for one in images), max(one.shape[0] for one in images)), "red")
    left = 0
    for one in images:
        sheet.paste(Image.fromarray(one), (left, 0))
        left += one.shape[1] + 4
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / f"{path.parent.name}_{path.name}.png")


if __name__ == "__main__":
    main()
