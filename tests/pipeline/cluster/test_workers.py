"""What runs on the nodes of a cluster, called as Ray Data calls it: with fakes, in this process, without Ray."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from qvsplit.errors import ConfigError, DiskError, ItemError, ItemNotFound, ModelError, ProcessError, QvsplitError
from qvsplit.pipeline import devices, reading
from qvsplit.pipeline.cluster import workers
from qvsplit.pipeline.cluster.contents import Contents
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.packing import Numbered, items_in, numbered_table, rows_in
from qvsplit.pipeline.cluster.workers import EncodeItems, ReadItems, Writer, declare
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.items import Known, Result, Staged
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.rows import encoded_rows
from qvsplit.pipeline.runner import Load, LocalRunner, RunnerOptions
from qvsplit.pipeline.stages import Prepare
from qvsplit.pipeline.summary import Summary
from qvsplit.runtime.clock import active_seconds
from qvsplit.sources import files
from qvsplit.sources.source import Entry
from qvsplit.store.config import Provenance, installed_versions
from qvsplit.store.row import Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shard_writer import encoded
from qvsplit.store.staging import Staging
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.fake_encoder import FakeEncoder, FakeModel, FakePreparer, fake_config
from tests.support.fake_source import InThreadDecoders, fake_video

GENERATION = 7


class Fakes:
    """What a node loads. Counts it, and raises what `error` is, in place of it."""

    def __init__(self):
        self.model = FakeModel()
        self.prepares = 0
        self.error: QvsplitError | None = None

    def load_devices(self, *words):
        if self.error is not None:
            raise self.error
        return self.model.load_devices(*words)

    def load_prepare(self, options, own):
        if self.error is not None:
            raise self.error
        self.prepares += 1
        return Prepare(FakePreparer())


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(devices, "load_devices", made.load_devices)
    monkeypatch.setattr(devices, "load_prepare", made.load_prepare)
    monkeypatch.setattr("qvsplit.pipeline.runner.DecoderPool", InThreadDecoders)
    return made


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder for what is extracted."""
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture
def job(tmp_path, fakes) -> Job:
    staging = Staging(tmp_path / "store", "run-7")
    staging.create()
    config = fake_config()
    own = StoreDeclares(
        "store", config, FakeEncoder(config).tensors, Provenance("fake", None, "cpu", dict(installed_versions()))
    )
    return Job(ExtractOptions(model="fake", device="cpu"), RunnerOptions(), own, GENERATION, staging, 1)


def image(folder: Path, name: str, colour: int = 0, size: tuple[int, int] = (120, 60)) -> Entry:
    """An image of one colour; in another one, other bytes."""
    Image.new("RGB", size, (colour, 2 * colour % 256, 3 * colour % 256)).save(folder / name, "PNG")
    return listed(folder, name)


def video(folder: Path, name: str, *measures: object, **more: object) -> Entry:
    (folder / name).write_bytes(fake_video(*measures, **more))
    return listed(folder, name)


def listed(folder: Path, name: str) -> Entry:
    os.utime(folder / name, (1_600_000_000, 1_600_000_000))
    status = (folder / name).stat()
    return Entry(str(folder), name, status.st_size, str(status.st_mtime_ns), status.st_mtime_ns)


def block_of(entries: Iterable[Entry], first: int = 0) -> pa.Table:
    return numbered_table([Numbered(number, entry) for number, entry in enumerate(entries, first)])


def reader(job: Job, *, claim=lambda sha256, number: True) -> ReadItems:
    return ReadItems(job, claim)


def at_times(monkeypatch, job: Job, *times: float) -> Job:
    """Give the job with an end at 100 s; items are begun at these times."""
    following = iter(times)
    monkeypatch.setattr(workers, "time", SimpleNamespace(time=lambda: next(following)))
    return dataclasses.replace(job, ends_at=100.0)


def read(job: Job, entries: Iterable[Entry], **how) -> pa.Table:
    """What a reader gives of these entries, as one block."""
    return pa.concat_tables(reader(job, **how)(block_of(entries)))


def encoded_block(job: Job, entries: Iterable[Entry], encoder: EncodeItems | None = None, **how) -> pa.Table:
    """What leaves an encoder of these entries, as one block."""
    return pa.concat_tables((encoder or EncodeItems(job))(read(job, entries, **how)))


def by_path(block: pa.Table) -> dict[str, tuple[Result, object]]:
    return {item.entry.path: (item, large) for item, large in rows_in(block)}


def outcomes(block: pa.Table) -> dict[str, object]:
    return {item.entry.path: item.outcome for item in items_in(block)}


def plain_rows(job: Job, entries: Iterable[Entry]) -> dict[str, list[tuple[Row, dict[str, bytes]]]]:
    """The rows, and the bytes of their features, as the local runner has them."""
    loaded = FakeModel().load_devices(job.options, job.own, Summary(), lambda line: None)
    load = Load(lambda: loaded.devices, lambda: devices.load_clips(loaded, job.own))
    runner = LocalRunner(RunnerOptions(workers=1), load, lambda content: False)
    try:
        with closing(runner.run(list(entries))) as results:
            return {
                one.entry.path: [(row, rows.raws(its)) for row, its in encoded_rows(one, one.outcome, GENERATION)]
                for one in results
                if isinstance(one.outcome, list)
            }
    finally:
        runner.close()


def shard_of(job: Job, name: str) -> Shard:
    return Shard(LocalStorage(job.staging.folder), name)


def in_shard(shard: Shard) -> list[tuple[Row, dict[str, bytes]]]:
    return [(row, rows.raws(features)) for _, row, features in shard]


# ------------------------------------------------------------------------------------------------------------- readers


def test_a_reader_gives_each_image_with_what_was_prepared(job, fakes, photos):
    items = [image(photos, f"{number}.png", number) for number in range(3)]
    one = reader(job)
    assert fakes.prepares == 1  # as it starts, while other workers do
    tables = list(one(block_of(items)))
    assert [len(table) for table in tables] == [1, 1, 1]  # an item's pixels are let go of before the next one's come
    for number, ((item, prepared),) in enumerate(map(rows_in, tables)):
        assert (item.entry, item.outcome, item.info.size, item.width, item.height, item.format) == (
            items[number], None, items[number].size, 120, 60, "PNG",
        )  # fmt: skip
        assert item.image is item.prepared is None and item.pixels == 0
        colour = (number, 2 * number, 3 * number)
        expected = FakePreparer().prepare(np.tile(np.array(colour, np.uint8), (60, 120, 1)))
        assert torch.equal(prepared.values["pixels"], expected.values["pixels"])
        assert dataclasses.replace(prepared, values={}) == dataclasses.replace(expected, values={})
        assert {"read and decode", "preprocess"} <= item.seconds.keys()
    list(one(block_of(items, 3)))
    assert fakes.prepares == 1


def test_what_is_wrong_with_an_item_is_its_outcome_and_stops_nothing(job, photos):
    (photos / "bad.png").write_bytes(b"no image")
    image(photos, "slim.png", 5, (3000, 2))
    items = [
        image(photos, "a.png", 1), listed(photos, "bad.png"), Entry(str(photos), "gone.png", 9, "1", 1),
        listed(photos, "slim.png"), image(photos, "z.png", 2),
    ]  # fmt: skip
    block = read(job, items)
    found = outcomes(block)
    assert list(found) == ["a.png", "bad.png", "gone.png", "slim.png", "z.png"]
    assert [type(outcome) for outcome in found.values()] == [
        type(None), ItemError, ItemNotFound, ItemError, type(None)
    ]  # fmt: skip
    assert str(found["slim.png"]) == "is 3000×2, too slim"
    assert [large is not None for _, large in rows_in(block)] == [True, False, False, False, True]
    assert by_path(block)["bad.png"][0].info.sha256  # what was read of it goes into its row


def test_a_copy_whose_content_another_item_has_is_read_and_no_more(job, photos, monkeypatch):
    asked, decoded = [], []
    real = InThreadDecoders.decode
    monkeypatch.setattr(
        InThreadDecoders, "decode", lambda self, one, *more: (decoded.append(one.path), real(self, one, *more))[1]
    )

    def claim(sha256: str, number: int) -> bool:
        asked.append((sha256, number))
        return number != 12

    items = [image(photos, name, colour) for name, colour in (("a.png", 1), ("b.png", 2), ("copy.png", 1))]
    block = pa.concat_tables(reader(job, claim=claim)(block_of(items, 10)))
    assert [type(outcome) for outcome in outcomes(block).values()] == [type(None), type(None), Known]
    hashes = [files.read(one, one.file).sha256 for one in items]
    assert asked == list(zip(hashes, [10, 11, 12], strict=True))  # by the numbers of the plan
    assert decoded == ["a.png", "b.png"]
    item, large = by_path(block)["copy.png"]
    assert (item.info.sha256, large) == (hashes[0], None)


def test_a_block_that_is_read_again_by_another_reader_is_the_same(job, photos, tmp_path):
    """Its process has died: what it has claimed is its items' still."""
    contents = Contents(str(tmp_path / "none"))
    items = [image(photos, name, 1) for name in ("a.png", "copy.png")]
    first, again = (read(job, items, claim=contents.claim) for _ in range(2))
    assert [type(outcome) for outcome in outcomes(first).values()] == [type(None), Known]
    assert [(item.entry, type(item.outcome)) for item in items_in(again)] == [
        (item.entry, type(item.outcome)) for item in items_in(first)
    ]


def test_once_the_time_is_over_nothing_is_begun(job, photos, monkeypatch):
    items = [image(photos, f"{number}.png", number) for number in range(4)]
    claimed = []
    job = at_times(monkeypatch, job, 99.0, 100.0, 99.9, 101.0)
    block = read(job, items, claim=lambda sha256, number: (claimed.append(number), True)[1])
    assert [(item.info is not None, item.outcome) for item in items_in(block)] == [
        (True, None), (False, None), (True, None), (False, None)
    ]  # fmt: skip
    assert claimed == [0, 2]


def test_of_a_video_the_reader_gives_what_its_packets_say(job, photos):
    block = read(job, [video(photos, "a.mp4", 6, 2.0), video(photos, "b.mp4", 4, 2.0)])
    assert [(item.video.n_frames, item.width, item.height, item.outcome) for item in items_in(block)] == [
        (6, 80, 60, None), (4, 80, 60, None)
    ]  # fmt: skip
    assert [large for _, large in rows_in(block)] == [None, None]


def test_videos_that_are_left_out_fail_with_a_reason(job, photos):
    job = dataclasses.replace(job, bounds=RunnerOptions(videos=False))
    (outcome,) = outcomes(read(job, [video(photos, "a.mp4")])).values()
    assert (outcome.kind, str(outcome)) == ("reader-missing", "is a video, and `videos=False` leaves videos out")


@pytest.mark.timeout(20)
def test_a_reader_waits_for_nobody_whatever_the_sizes(job, photos, monkeypatch):
    """The pixels that may be in memory are those of one item."""
    monkeypatch.setattr(reading, "PIXELS_IN_FLIGHT", 100)
    (photos / "bad.png").write_bytes(b"no image")
    items = [image(photos, "a.png", 1), listed(photos, "bad.png"), image(photos, "slim.png", 1, (3000, 2))]
    one = reader(job)
    for _ in range(3):
        assert len(list(one(block_of(items)))) == 3


class DecodedPreparer:
    """Leaves resizing to the encoder's device, which takes the pixels as they were decoded."""

    def prepare(self, image):
        return dataclasses.replace(FakePreparer().prepare(image), values={"decoded": torch.from_numpy(image)})


@pytest.mark.timeout(20)
def test_pixels_that_wait_for_the_encoder_are_in_a_block_and_no_more_in_the_reader(job, photos, monkeypatch):
    monkeypatch.setattr(reading, "PIXELS_IN_FLIGHT", 100)
    monkeypatch.setattr(devices, "load_prepare", lambda options, own: Prepare(DecodedPreparer()))
    items = [image(photos, f"{number}.png", number) for number in range(3)]
    for item, prepared in rows_in(read(job, items)):
        assert (item.image, item.pixels) == (None, 0)
        assert prepared.values["decoded"].shape == (60, 120, 3)


ON_THIS = f"on {socket.gethostname()}: "  # a checkpoint that is not there is missing on one node, and not on others


@pytest.mark.parametrize(
    ("error", "said"),
    [(ModelError("no such model"), ON_THIS + "no such model"), (DiskError("the disk is full"), "the disk is full")],
)
def test_what_a_reader_cannot_load_is_a_value(job, fakes, photos, error, said):
    fakes.error = error
    one = reader(job)
    for _ in range(2):
        (block,) = one(block_of([image(photos, "a.png"), image(photos, "b.png")]))
        ((again, large),) = rows_in(block)
        assert (type(again), str(again), large) == (type(error), said, None)
        assert again.__traceback__ is None
    fakes.error = None
    assert [type(outcome) for outcome in outcomes(read(job, [listed(photos, "a.png")])).values()] == [type(None)]


# ------------------------------------------------------------------------------------------------------- other machines


def with_versions(monkeypatch, **changes: str) -> None:
    versions = {**installed_versions(), **changes}
    monkeypatch.setattr(
        "qvsplit.pipeline.cluster.job.installed_versions", lambda: {name: one for name, one in versions.items() if one}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "0.1"}, f"torch 0.1 instead of {installed_versions()['torch']}"),
        ({"python": "3.99.1"}, f"python 3.99.1 instead of {installed_versions()['python']}"),
        ({"pillow": ""}, f"pillow None instead of {installed_versions().get('pillow')}"),
        ({"another": "1"}, "another 1 instead of None"),
    ],
)
def test_a_node_of_other_versions_is_refused_by_name(job, photos, monkeypatch, changes, said):
    assert set(changes) <= {*installed_versions(), "another"}
    items = [image(photos, "a.png"), video(photos, "a.mp4")]
    blocks = [read(job, [one]) for one in items]  # of a node that is as it should be
    with_versions(monkeypatch, **changes)
    refused = [reader(job)(block_of(items)), *(EncodeItems(job)(block) for block in blocks)]
    for tables in refused:
        (error,) = (item for table in tables for item in items_in(table))
        assert type(error) is ConfigError and error.exit_code == 4
        assert str(error).startswith(f"{socket.gethostname()} has other versions than the rest of the cluster")
        assert said in str(error)
    assert list(job.staging.folder.iterdir()) == []


def test_what_declares_no_versions_is_held_against_none(job):
    own = dataclasses.replace(job.own, provenance=None)
    with pytest.raises(ConfigError):
        dataclasses.replace(job, own=own).check_node()
    job.check_node()


def test_a_node_without_the_folder_of_the_run_is_refused(job, photos):
    items = [image(photos, "a.png"), video(photos, "a.mp4")]
    blocks = [read(job, [one]) for one in items]
    shutil.rmtree(job.staging.store)
    for tables in (reader(job)(block_of(items)), *(EncodeItems(job)(block) for block in blocks)):
        (error,) = (item for table in tables for item in items_in(table))
        assert type(error) is DiskError
        assert str(job.staging.folder) in str(error) and socket.gethostname() in str(error)
    assert not job.staging.store.exists()


# ------------------------------------------------------------------------------------------------------------ encoders


def test_images_are_encoded_as_on_one_machine(job, fakes, photos):
    sizes = [(120, 60), (60, 60), (300, 60), (60, 500), (56, 56)]
    items = [image(photos, f"{number}.png", number, size) for number, size in enumerate(sizes)]
    job = dataclasses.replace(job, options=dataclasses.replace(job.options, patch_budget=12))
    encoder = EncodeItems(job)
    assert fakes.model.loads == 1  # as it starts, while other workers do
    block = encoded_block(job, items, encoder)
    expected = plain_rows(job, items)
    assert sorted(expected) == [item.entry.path for item in items_in(block)] == [one.path for one in items]
    for path, (item, its) in by_path(block).items():
        assert item.outcome == Staged(
            tuple(row for row, _ in expected[path]), None, None, sum(one.bytes for one in its)
        )
        again = [encoded(*one, encoder._loaded.schema) for one in _with_features(job, items, path)]
        assert [(one.row, {name: bytes(blob) for name, blob in one.blobs.items()}) for one in its] == [
            (one.row, {name: bytes(blob) for name, blob in one.blobs.items()}) for one in again
        ]
        assert item.image is item.prepared is None
    assert max(sum(batch) for batch in fakes.model.batches if len(batch) > 1) <= 12  # batches are filled as ever
    encoded_block(job, items, encoder)
    assert fakes.model.loads == 1


def _with_features(job: Job, items: Iterable[Entry], path: str):
    loaded = FakeModel().load_devices(job.options, job.own, Summary(), lambda line: None)
    runner = LocalRunner(RunnerOptions(workers=1), Load(lambda: loaded.devices, lambda: None), lambda content: False)
    (result,) = runner.run([one for one in items if one.path == path])
    runner.close()
    return list(encoded_rows(result, result.outcome, GENERATION))


def test_what_needs_no_encoding_goes_through(job, fakes, photos, monkeypatch):
    (photos / "bad.png").write_bytes(b"no image")
    job = at_times(monkeypatch, job, 1.0, 1.0, 100.0, 1.0)
    items = [listed(photos, "bad.png"), Entry(str(photos), "gone.png", 9, "1", 1), image(photos, "late.png", 3)]
    copy = image(photos, "copy.png", 1)
    block = read(job, [*items, copy], claim=lambda sha256, number: number < 3)
    after = pa.concat_tables(EncodeItems(job)(block))
    assert [type(outcome) for outcome in outcomes(after).values()] == [ItemError, ItemNotFound, type(None), Known]
    assert next(items_in(after)).info == next(items_in(block)).info is not None
    assert all(large is None for _, large in rows_in(after))
    assert fakes.model.batches == []


def test_what_ends_the_run_goes_through(job, fakes, photos):
    fakes.error = ModelError("no such model")
    block = read(job, [image(photos, "a.png")])
    (error,) = (item for table in EncodeItems(job)(block) for item in items_in(table))
    assert (type(error), str(error)) == (ModelError, ON_THIS + "no such model")
    assert fakes.model.loads == 0


def test_what_an_encoder_cannot_load_is_a_value(job, fakes, photos):
    (photos / "bad.png").write_bytes(b"no image")
    block = read(job, [listed(photos, "bad.png"), image(photos, "a.png"), video(photos, "a.mp4")])
    fakes.error = ConfigError("made under another extraction config")
    (error,) = (item for table in EncodeItems(job)(block) for item in items_in(table))
    assert type(error) is ConfigError and error.__traceback__ is None
    fakes.error = ModelError("there are no weights")
    (error,) = (item for table in EncodeItems(job)(block) for item in items_in(table))
    assert (type(error), str(error), error.exit_code) == (ModelError, ON_THIS + "there are no weights", 3)
    fakes.error = None
    assert isinstance(outcomes(encoded_block(job, [listed(photos, "a.png")]))["a.png"], Staged)


def test_an_item_that_the_encoder_refuses_is_a_value(job, photos, monkeypatch):
    real = FakeEncoder.encode
    monkeypatch.setattr(FakeEncoder, "encode", lambda self, batch: [ItemError("not finite"), *real(self, batch)[1:]])
    items = [image(photos, f"{number}.png", number) for number in range(3)]
    block = encoded_block(job, items)
    assert [type(outcome) for outcome in outcomes(block).values()] == [ItemError, Staged, Staged]
    assert [large is not None for _, large in rows_in(block)] == [False, True, True]


def test_an_encoder_has_the_threads_that_it_is_given(job, photos, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    encoded_block(dataclasses.replace(job, threads=3), [image(photos, "a.png")])
    assert given == [3]


# -------------------------------------------------------------------------------------------------------------- videos


def with_clips(job: Job, seconds: float | None) -> Job:
    return dataclasses.replace(job, options=dataclasses.replace(job.options, clip_seconds=seconds))


@pytest.mark.parametrize("seconds", [None, 1.0, 2.5])
def test_videos_are_encoded_as_on_one_machine_beside_images(job, photos, seconds):
    job = with_clips(job, seconds)
    items = [video(photos, "a.mp4", 6, 2.0), image(photos, "b.png", 1), video(photos, "c.mp4", 7, 2.0, 200, 60)]
    block = encoded_block(job, items)
    expected = plain_rows(job, items)
    found = by_path(block)
    assert sorted(found) == sorted(expected) == ["a.mp4", "b.png", "c.mp4"]
    clips = FakeEncoder(videos=devices.video_options(job.options)).load_clips().config.videos
    for path, (item, its) in found.items():
        assert item.outcome.rows == tuple(row for row, _ in expected[path])
        assert item.outcome.videos == (None if path == "b.png" else clips)
        assert (item.outcome.shard, len(its)) == (None, len(expected[path]))
    schema = ShardSchema(dataclasses.replace(fake_config(), videos=clips), FakeEncoder().tensors, (job.own.provenance,))
    name, _ = Writer().write_shard(job.staging, schema, [item.outcome.rows for item in items_in(block)], block)
    assert in_shard(shard_of(job, name)) == [one for item in items_in(block) for one in expected[item.entry.path]]


@pytest.mark.parametrize("beside", [False, True])
def test_a_video_too_large_to_share_a_shard_is_written_at_once(job, photos, monkeypatch, beside):
    monkeypatch.setattr(workers, "ITEM_BYTES", 250)  # each second has 96 bytes
    job = with_clips(job, 1.0)
    items = [
        video(photos, "long.mp4", 20, 2.0),
        *([video(photos, "short.mp4", 4, 2.0), image(photos, "b.png")] * beside),
    ]
    block, expected = encoded_block(job, items), plain_rows(job, items)
    found = by_path(block)
    item, large = found.pop("long.mp4")
    assert large is None
    assert item.outcome.rows == tuple(row for row, _ in expected["long.mp4"])
    assert (item.outcome.bytes, item.outcome.videos["clip_seconds"]) == (960, 1.0)
    assert [path.name for path in job.staging.folder.iterdir()] == [item.outcome.shard]
    shard = shard_of(job, item.outcome.shard)
    assert in_shard(shard) == expected["long.mp4"]
    assert shard.config.videos == item.outcome.videos
    for _, (other, its) in found.items():
        assert other.outcome.shard is None and its is not None
    # it is not written twice: a shard of the block's other items has not it
    name, _ = Writer().write_shard(job.staging, shard.schema, [one.outcome.rows for one, _ in found.values()], block)
    assert in_shard(shard_of(job, name)) == [one for path in found for one in expected[path]]


@pytest.mark.parametrize(
    ("seconds", "n_frames", "alone"), [(None, 20, False), (1.0, 4, False), (1.0, 5, True), (1.0, 6, True)]
)
def test_what_has_a_shard_of_its_own_is_what_goes_on_when_there_is_too_much(
    job, photos, monkeypatch, seconds, n_frames, alone
):
    """A part alone is in memory anyway: as the writer of a run on one machine has it."""
    monkeypatch.setattr(workers, "ITEM_BYTES", 192)
    (outcome,) = outcomes(encoded_block(with_clips(job, seconds), [video(photos, "a.mp4", n_frames, 2.0)])).values()
    assert (outcome.shard is not None) == alone
    assert len(list(job.staging.folder.iterdir())) == alone


def test_a_large_video_whose_shard_cannot_be_written_ends_the_run(job, photos, monkeypatch):
    monkeypatch.setattr(workers, "ITEM_BYTES", 100)
    block = read(job, [video(photos, "a.mp4", 20, 2.0)])
    encoder = EncodeItems(with_clips(job, 1.0))
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    (error,) = (item for table in encoder(block) for item in items_in(table))
    monkeypatch.setattr(os, "fsync", real)
    assert type(error) is DiskError and "the disk is full" in str(error)
    assert list(job.staging.folder.iterdir()) == []


def test_a_large_video_that_is_not_whole_leaves_nothing(job, photos, monkeypatch):
    """A mistake of ours: nothing of it may be committed."""
    monkeypatch.setattr(workers, "ITEM_BYTES", 100)
    monkeypatch.setattr(workers, "is_whole", lambda rows: False)
    with pytest.raises(ValueError, match="all its parts"):
        encoded_block(with_clips(job, 1.0), [video(photos, "a.mp4", 20, 2.0)])
    assert list(job.staging.folder.iterdir()) == []


def test_a_video_that_is_bad_fails_alone(job, photos):
    job = with_clips(job, 1.0)
    items = [video(photos, "bad.mp4", 6, 2.0, breaks_at=3), video(photos, "good.mp4", 6, 2.0)]
    block = encoded_block(job, items)
    found = outcomes(block)
    assert (type(found["bad.mp4"]), str(found["bad.mp4"])) == (ItemError, "ends early")
    assert isinstance(found["good.mp4"], Staged)
    assert by_path(block)["bad.mp4"][1] is None


@pytest.mark.parametrize("change", ["video", "image", "gone"])
def test_a_video_that_is_another_when_it_is_decoded(job, photos, change):
    items = [video(photos, "a.mp4", 6, 2.0), video(photos, "b.mp4", 5, 2.0)]
    block = read(job, items)
    before = by_path(block)["a.mp4"][0]
    if change == "gone":
        (photos / "a.mp4").unlink()
    elif change == "image":
        image(photos, "a.mp4", 1)
    else:
        video(photos, "a.mp4", 4, 2.0)
    after = by_path(pa.concat_tables(EncodeItems(job)(block)))
    item, large = after["a.mp4"]
    assert large is None
    assert item.info == before.info  # by which its content is let go of
    if change == "gone":
        assert isinstance(item.outcome, ItemNotFound)
    else:
        assert str(item.outcome) == files.CHANGED
    assert isinstance(after["b.mp4"][0].outcome, Staged)


def test_a_video_that_was_begun_is_encoded_whatever_bounds_the_run(job, photos):
    """They were kept when it was begun."""
    job = dataclasses.replace(job, bounds=RunnerOptions(limit=1, deadline=active_seconds() - 1, workers=8))
    block = encoded_block(job, [video(photos, "a.mp4", 6, 2.0), video(photos, "b.mp4", 5, 2.0)])
    assert [type(outcome) for outcome in outcomes(block).values()] == [Staged, Staged]


def test_without_what_videos_need_they_fail_and_images_do_not(job, photos, monkeypatch):
    def load_clips(self):
        raise ModelError("there is no processor for videos")

    monkeypatch.setattr(FakeEncoder, "load_clips", load_clips)
    block = encoded_block(job, [video(photos, "a.mp4"), image(photos, "b.png"), video(photos, "c.mp4", 3)])
    found = outcomes(block)
    assert "there is no processor for videos" in str(found["a.mp4"]) == str(found["c.mp4"])
    assert found["b.png"].videos is None and isinstance(found["b.png"], Staged)


def test_videos_under_other_settings_than_the_stores_end_the_run(job, photos):
    videos = FakeEncoder(videos=devices.video_options(ExtractOptions(clip_seconds=3.0))).load_clips().config.videos
    own = dataclasses.replace(job.own, config=dataclasses.replace(job.own.config, videos=videos))
    block = read(job, [video(photos, "a.mp4")])
    one = dataclasses.replace(with_clips(job, 1.0), own=own)
    (error,) = (item for table in EncodeItems(one)(block) for item in items_in(table))
    assert type(error) is ConfigError and "extraction config" in str(error)


def test_clips_are_loaded_once_and_with_the_first_video(job, photos, monkeypatch):
    loads = []
    real = FakeEncoder.load_clips
    monkeypatch.setattr(FakeEncoder, "load_clips", lambda self: (loads.append(1), real(self))[1])
    encoder = EncodeItems(job)
    encoded_block(job, [image(photos, "a.png")], encoder)
    assert loads == []
    for name in ("a.mp4", "b.mp4"):
        encoded_block(job, [video(photos, name)], encoder)
    assert loads == [1]


# ------------------------------------------------------------------------------------------------ describing, writing


def test_what_is_described_has_all_but_what_is_large(job, photos):
    (photos / "bad.png").write_bytes(b"no image")
    first = encoded_block(job, [image(photos, "a.png", 1, (2000, 1000)), listed(photos, "bad.png")])
    second = encoded_block(job, [video(photos, "c.mp4")])
    items = [Writer().describe(block) for block in (first, second)]
    assert items[1] == list(items_in(second))
    assert [sorted(item.entry.path for item in block) for block in items] == [["a.png", "bad.png"], ["c.mp4"]]
    assert first["large"].nbytes > 25_000 > 5_000 > first["item"].nbytes
    spoilt = first.set_column(1, "large", pa.array([b"no pickle"] * 2, pa.large_binary()))
    assert [type(item.outcome) for item in Writer().describe(spoilt)] == [type(item.outcome) for item in items[0]]


def staged_blocks(job: Job, photos: Path) -> tuple[list[pa.Table], list[tuple[Row, ...]], dict]:
    """Blocks of encoders with the rows that they have, and what is in a shard of them."""
    (photos / "bad.png").write_bytes(b"no image")
    parts = [
        [image(photos, "a.png", 1), listed(photos, "bad.png"), image(photos, "b.png", 2, (60, 300))],
        [video(photos, "c.mp4", 6, 2.0), Entry(str(photos), "gone.png", 9, "1", 1)],
        [image(photos, "d.png", 3)],
    ]
    blocks = [encoded_block(job, part) for part in parts]
    counted = [
        item.outcome.rows for block in blocks for item in Writer().describe(block) if isinstance(item.outcome, Staged)
    ]
    plain = plain_rows(job, [one for part in parts for one in part if one.path not in {"bad.png", "gone.png"}])
    return blocks, counted, plain


def schema_of(job: Job) -> ShardSchema:
    videos = FakeEncoder(videos=devices.video_options(job.options)).load_clips().config.videos
    config = dataclasses.replace(fake_config(), videos=videos)
    return ShardSchema(config, FakeEncoder().tensors, (job.own.provenance,))


def test_the_shard_of_some_blocks_is_that_of_their_items(job, photos):
    job = with_clips(job, 1.0)
    blocks, counted, plain = staged_blocks(job, photos)
    schema = schema_of(job)
    name, size = Writer().write_shard(job.staging, schema, counted, *blocks)
    assert [path.name for path in job.staging.folder.iterdir()] == [name]
    assert (job.staging.folder / name).stat().st_size == size
    shard = shard_of(job, name)
    assert in_shard(shard) == [one for (row, *_) in counted for one in plain[row.path]]
    assert sorted({row.path for row in shard.rows}) == sorted(plain)
    assert shard.schema == schema
    job.staging.commit(LocalStorage(job.staging.store), name, 1)
    assert [row.path for row in Shard(LocalStorage(job.staging.store), "shard-000001.parquet").rows] == [
        row.path for rows_ in counted for row in rows_
    ]


def test_two_attempts_at_a_shard_do_not_meet(job, photos):
    blocks, counted, _ = staged_blocks(job, photos)
    (one, size), (two, again) = (Writer().write_shard(job.staging, schema_of(job), counted, *blocks) for _ in range(2))
    assert one != two and size == again
    assert in_shard(shard_of(job, one)) == in_shard(shard_of(job, two))


@pytest.mark.parametrize("what", ["missing", "more", "order", "other", "nothing"])
def test_what_was_made_again_and_is_not_what_was_counted_is_not_written(job, photos, what):
    blocks, counted, _ = staged_blocks(job, photos)
    changes = {
        "missing": [*counted, (rows.row("z.png"),)],
        "more": counted[1:],
        "order": counted[::-1],
        "other": [(dataclasses.replace(counted[0][0], sha256=rows.sha("other")),), *counted[1:]],
        "nothing": [],
    }
    error = Writer().write_shard(job.staging, schema_of(job), changes[what], *blocks)
    assert type(error) is ProcessError and "is not what had been counted" in str(error)
    assert error.__traceback__ is None
    assert list(job.staging.folder.iterdir()) == []


def test_a_disk_that_fails_is_a_value_and_nothing_is_left(job, photos, monkeypatch):
    blocks, counted, _ = staged_blocks(job, photos)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    error = Writer().write_shard(job.staging, schema_of(job), counted, *blocks)
    monkeypatch.setattr(os, "fsync", real)
    assert type(error) is DiskError and "the disk is full" in str(error)
    assert list(job.staging.folder.iterdir()) == []
    job.staging.remove()
    error = Writer().write_shard(job.staging, schema_of(job), counted, *blocks)
    assert type(error) is DiskError and "is not there on" in str(error)
    assert not job.staging.folder.exists()


def test_a_mistake_of_ours_is_raised_and_leaves_nothing(job, photos, monkeypatch):
    blocks, counted, _ = staged_blocks(job, photos)

    def fail(*words):
        raise ValueError("a mistake")

    monkeypatch.setattr(workers.ShardWriter, "add_encoded", fail)
    with pytest.raises(ValueError, match="a mistake"):
        Writer().write_shard(job.staging, schema_of(job), counted, *blocks)
    assert list(job.staging.folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- the first encoder


def test_the_first_encoder_declares_what_shards_do(job, fakes, monkeypatch):
    def load_devices(options, own, summary, on_note):
        on_note("a note")
        summary.encoder_bytes, summary.weights_bytes_read, summary.stages["load libraries"] = 3, 4, 0.5
        return fakes.model.load_devices(options, own, summary, on_note)

    monkeypatch.setattr(devices, "load_devices", load_devices)
    declared = declare(job.options, job.own)
    assert declared.schema.config == fake_config() and declared.provenance == declared.schema.provenance[0]
    assert (declared.model, declared.notes, declared.patch_budget) == ("fake", ("a note",), 500)
    assert (declared.encoder_bytes, declared.weights_bytes_read, declared.seconds["load libraries"]) == (3, 4, 0.5)


@pytest.mark.parametrize("error", [ModelError("no such model"), ConfigError("another config")], ids=str)
def test_what_the_first_encoder_cannot_load_is_a_value(job, fakes, error):
    fakes.error = error
    again = declare(job.options, job.own)
    assert (type(again), str(again), again.__traceback__) == (type(error), str(error), None)
