"""Fakes of the sources wing: a Source of a few lines, and decoders without processes of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qvsplit.errors import ItemError
from qvsplit.runtime.names import file_on_disk
from qvsplit.sources import files, images
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.source import Entry, Listing, Presence, Scope, listing_digest, local_file
from qvsplit.sources.videos import VideoInfo


def entry(path: str, *, root: str = "/photos", size: int = 1, version: str = "1") -> Entry:
    """An entry whose version is its modification time."""
    return Entry(root, path, size, version, int(version))


class FakeSource:
    """Items by (root, path): each its size and version. What is in `away` cannot be looked at."""

    def __init__(self, items: Mapping[tuple[str, str], tuple[int, int]], *, away=(), empty_folders=None):
        self.items = dict(items)
        self.away = set(away)
        self.empty_folders = dict(empty_folders or {})  # key → the empty folder above it

    def list(self, known_digests):
        folders: dict[tuple[str, str], list[str]] = {}
        for (root, path), (size, version) in sorted(self.items.items()):
            folder, _, name = path.rpartition("/")
            folders.setdefault((root, folder), []).append(f"{name}\0{size}\0{version}")
        for (root, folder), lines in folders.items():
            known = known_digests.get((root, folder)) == listing_digest(lines)
            yield Listing(root, folder, () if known else tuple(lines), len(lines), known=known)

    @property
    def scope(self):
        return Scope(tuple(dict.fromkeys(root for root, _ in self.items)), ())

    def stat(self, keys):
        return {key: self._presence(key) for key in keys}

    def _presence(self, key):
        if key in self.items:
            size, version = self.items[key]
            return Presence("present", Entry(*key, size, str(version), version))
        if key in self.empty_folders:
            return Presence("unknown", empty_folder=self.empty_folders[key])
        return Presence("unknown" if key in self.away else "absent")

    def fetch(self, entry):
        return Path(file_on_disk(*entry.key))


FAKE_VIDEO = b"fake video "  # then its measures as JSON


def fake_video(n_frames: int = 6, fps: float = 2.0, width: int = 80, height: int = 60, *, breaks_at=None) -> bytes:
    """The bytes of a video for `InThreadDecoders`, whose frames are grey by their number; decoding may break."""
    return FAKE_VIDEO + json.dumps([n_frames, fps, width, height, breaks_at]).encode()


class InThreadDecoders:
    """In place of a DecoderPool: reads and decodes in the calling thread. Videos are fakes: see `fake_video`."""

    def __init__(self, item_timeout: float = 60.0, fetch=local_file, gifs_are_videos=False, max_image_pixels=10**9):
        self.item_timeout = item_timeout
        self.max_image_pixels = max_image_pixels
        self.fetch = fetch

    def mine(self):
        return self

    def read(self, entry):
        file = files.read(entry, str(self.fetch(entry)))
        kind = "video" if file.data.startswith(FAKE_VIDEO) else "image"
        return replace(file.info, kind=kind, frames=images.frames(file.data))

    def _measures(self, entry):
        return json.loads(files.read(entry, str(self.fetch(entry))).data.removeprefix(FAKE_VIDEO))

    def scan(self, entry, info):
        n_frames, fps, width, height, _ = self._measures(entry)
        return VideoInfo(n_frames, fps, n_frames / fps, width, height, 0, "fake", "fake", 0, None)

    def frames(self, entry, info, indices):
        _, _, width, height, breaks_at = self._measures(entry)
        for index in indices:
            if index == breaks_at:
                raise ItemError("ends early")
            yield np.full((height, width, 3), 10 * index % 256, np.uint8)

    def decode(self, entry, info, on_size=lambda width, height: None):
        file = files.read(entry, str(self.fetch(entry)))
        if file.sha256 != info.sha256:
            raise ItemError("was changed while it was being read")
        image, metadata = images.decode_with_metadata(file.data, on_size=on_size, max_pixels=self.max_image_pixels)
        about = metadata.taken_at, metadata.format, metadata.cut_rows
        return DecodedImage(np.array(image), image.width, image.height, *about)

    def measure(self, entry, info=None):
        return images.measure(files.read(entry, str(self.fetch(entry))).data)

    def peak_memory(self):
        return 0

    def close(self):
        pass
