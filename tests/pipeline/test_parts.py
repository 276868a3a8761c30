"""The parts of one item: joined from slices in order, in memory up to a size, and beyond it in a file without a name."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest

from qvsplit.errors import DiskError, ItemError
from qvsplit.models.sampling import Clip
from qvsplit.pipeline import parts as parts_module
from qvsplit.pipeline.parts import Part, Parts
from qvsplit.store.features import Features, StoredTensor
from tests.support.fake_encoder import WIDTH, fake_config

BYTES = 4 * WIDTH  # of one token
CLIPS = [Clip(part, float(part), part + 1.0, 2, 2.0, (2 * part, 2 * part + 1)) for part in range(3)]


def features(*values: int) -> Features:
    """One token a value; two tensors."""
    raw = np.repeat(np.array(values, np.float32)[:, None], WIDTH, 1)
    tensors = {"pooler_output": raw, "deepstack_features_0": raw + 0.5}
    stored = {name: StoredTensor(one.view(np.uint8), "float32") for name, one in tensors.items()}
    return Features(fake_config(), stored, (len(values), 2, 2), (), kind="video")


def joined(slices: list[Features]) -> Features:
    return features(*(int(value) for one in slices for value in one["pooler_output"][:, 0]))


def values(parts: list[Part]) -> list[tuple[int | None, list[float], list[float]]]:
    return [
        (part.clip and part.clip.part, *(part.features[name][:, 0].tolist() for name in part.features))
        for part in parts
    ]


def test_an_image_is_one_part_as_it_is():
    def never(slices):
        raise AssertionError("an image has no slices")

    parts, image = Parts(never, None), features(7)
    parts.add(image, None)
    (part,) = parts.finish()
    assert part.features is image
    assert part.clip is None


def test_slices_are_joined_clip_by_clip_in_order():
    parts = Parts(joined, None)
    for clip in CLIPS:
        for frame in clip.indices:
            parts.add(features(frame), replace(clip))  # equal is enough: a clip may have crossed processes
    assert values(parts.finish()) == [
        (0, [0, 1], [0.5, 1.5]), (1, [2, 3], [2.5, 3.5]), (2, [4, 5], [4.5, 5.5])
    ]  # fmt: skip


def test_a_clip_is_joined_as_soon_as_it_is_whole():
    """So that its slices and the whole are not in memory together with those of the next."""
    calls = []
    parts = Parts(lambda slices: calls.append(len(slices)) or joined(slices), None)
    for number, clip in enumerate(CLIPS):
        parts.add(features(1), clip)
        parts.add(features(2), clip)
        assert calls == [2] * number
    parts.finish()
    assert calls == [2, 2, 2]


def test_a_clip_that_cannot_be_joined_is_an_item_error():
    def too_large(slices):
        raise MemoryError

    parts = Parts(too_large, None)
    parts.add(features(1), CLIPS[0])
    with pytest.raises(ItemError, match="does not fit into memory") as caught:
        parts.add(features(2), CLIPS[1])
    assert caught.value.kind == "memory"


def is_in_file(part: Part) -> bool:
    raws = [tensor.raw for tensor in part.features.tensors.values()]
    assert len({isinstance(raw, np.memmap) for raw in raws}) == 1
    return isinstance(raws[0], np.memmap)


def test_beyond_some_size_of_all_parts_together_they_are_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 2 * 2 * BYTES)  # two tensors of two tokens
    parts = Parts(joined, tmp_path)
    for clip in CLIPS:
        parts.add(features(clip.part), clip)
    done = parts.finish()
    assert [is_in_file(part) for part in done] == [False, False, True]
    parts = Parts(joined, tmp_path)
    for clip in CLIPS:
        parts.add(features(*range(10 * clip.part, 10 * clip.part + 10)), clip)
    done = parts.finish()
    assert all(map(is_in_file, done))
    assert values(done)[2] == (2, list(range(20, 30)), [value + 0.5 for value in range(20, 30)])
    assert values(done)[0] == (0, list(range(10)), [value + 0.5 for value in range(10)])
    assert [part.features.grid_thw for part in done] == [(10, 2, 2)] * 3
    assert not os.listdir(tmp_path)


def test_without_a_folder_they_stay_in_memory(monkeypatch):
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 0)
    parts = Parts(joined, None)
    parts.add(features(1), CLIPS[0])
    assert not is_in_file(parts.finish()[0])


def test_the_file_goes_with_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 0)
    parts = Parts(joined, tmp_path)
    for clip in CLIPS:
        parts.add(features(clip.part), clip)
    done = parts.finish()
    del parts
    gc.collect()
    assert [numbers for _, numbers, _ in values(done)] == [[0], [1], [2]]
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert any(name.startswith(str(tmp_path)) for name in opened)
    del done
    gc.collect()
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not any(name.startswith(str(tmp_path)) for name in opened)


def test_a_folder_that_does_not_take_the_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 0)
    parts = Parts(joined, tmp_path / "none")
    parts.add(features(1), CLIPS[0])
    with pytest.raises(DiskError, match=f"{tmp_path}/none: cannot be written"):
        parts.finish()


def test_on_a_full_disk_nothing_of_the_item_is_kept(tmp_path, monkeypatch):
    """What it takes is room for rows that are finished."""
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 2 * BYTES)
    monkeypatch.setattr(parts_module, "TemporaryFile", lambda dir: open("/dev/full", "r+b", 0))  # noqa: SIM115
    kept = []
    parts = Parts(lambda slices: kept.append(weakref.ref(slices[0])) or slices[0], tmp_path)
    parts.add(features(1), CLIPS[0])
    parts.add(features(2), CLIPS[1])
    gc.collect()
    assert kept[0]() is not None
    with pytest.raises(DiskError, match="the disk is full"):
        parts.finish()
    gc.collect()
    assert kept[0]() is None
