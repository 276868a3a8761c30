"""`qvsplit inspect`: what a store holds."""

from __future__ import annotations

import json
from dataclasses import replace

from qvsplit.store import layout
from qvsplit.store.opening import open_store
from tests.support import rows
from tests.support.terminal import on_terminal


def test_inspect(run_cli, small_store, checkpoint):
    code, out, _ = run_cli("inspect", small_store)
    assert code == 0
    assert "items       4 images ok (0 by the features of another), 0 failed, 0 deleted" in out
    assert str(checkpoint) in out
    description = json.loads(run_cli("inspect", small_store, "--json")[1])
    assert (description["images"], description["config"]["compute_dtype"], description["width"]) == (4, "float32", 128)
    assert description["tokens"] == sum(row.n_tokens for row in open_store(small_store))
    assert description["without_features"] == description["superseded"] == 0


def test_how_features_were_computed_and_images_resized(run_cli, tmp_path):
    on_device = rows.config(kernels="fused", processor={**rows.PROCESSOR, "prepared_on": "device"})
    for config, *said in ((rows.config(), "reference", "cpu"), (on_device, "fused", "device")):
        store = rows.write_store(tmp_path / said[0], [rows.item("a.png")], declared=rows.schema(config=config)).location
        lines = run_cli("inspect", store)[1].splitlines()
        assert f"kernels     {said[0]}, of images resized on the {said[1]}" in lines
        description = json.loads(run_cli("inspect", store, "--json")[1])
        assert [description["kernels"], description["prepared_on"]] == said


def test_what_failed_and_why(run_cli, postcards):
    _, out, _ = run_cli("inspect", postcards)
    assert "13 images ok (1 by the features of another), 1 failed, 0 deleted" in out
    assert "failed      torn.jpg is a JPEG file that is cut off or damaged" in out
    assert "run         20" in out
    assert "12 encoded, 1 copied, 1 failed in " in out
    description = json.loads(run_cli("inspect", postcards, "--json")[1])
    assert [failure["path"] for failure in description["failures"]] == ["torn.jpg"]


def test_advice_that_has_been_followed_is_not_given(run_cli, extract, some_photos, out, monkeypatch):
    """Where the reader is there by now that an image lacked, inspect does not say to install it."""
    (some_photos / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    monkeypatch.setattr("qvsplit.sources.images._known_formats", lambda: ("JPEG", "PNG"))
    monkeypatch.setattr("qvsplit.sources.images.optional_readers", lambda **_: ("PIL 1",))
    monkeypatch.setattr("qvsplit.pipeline.view.optional_readers", lambda **_: ("PIL 1",))
    extract(some_photos)
    assert "x.heic is a HEIF image, which needs pillow-heif: pip install" in run_cli("inspect", out)[1]
    monkeypatch.setattr("qvsplit.sources.images.optional_readers", lambda **_: ("PIL 1", "pillow_heif 2"))
    said = run_cli("inspect", out)[1]
    assert "x.heic failed for a reason that has changed since; the next `qvsplit extract` tries it again" in said
    assert "pip install" not in said


def test_videos_are_counted_with_their_clips_and_seconds(run_cli, tmp_path):
    parts = [
        rows.item("film.mp4", kind="video", part=part, start=50.0 * part, end=50.0 * part + 50, duration=150.0)
        for part in range(3)
    ]
    whole = rows.item("whole.mp4", kind="video", duration=30.0)
    rows.write_store(tmp_path, [rows.item("a.png"), *parts, whole, (rows.failed("torn.mp4", kind="video"), None)])
    code, out, _ = run_cli("inspect", tmp_path)
    assert code == 0
    first = "items       1 image and 4 clips of 2 videos (3 min of video) ok (0 by the features of another), 1 failed"
    assert out.startswith(first)
    description = json.loads(run_cli("inspect", tmp_path, "--json")[1])
    counts = {name: description[name] for name in ("images", "videos", "clips", "video_seconds", "failed")}
    assert counts == {"images": 1, "videos": 2, "clips": 4, "video_seconds": 180.0, "failed": 1}


def test_a_store_of_several_tensors(run_cli, tmp_path):
    rows.write_store(tmp_path, [rows.item("a.png", 6, levels=2)], declared=rows.schema(levels=2))
    out = run_cli("inspect", tmp_path)[1]
    tensors = ["pooler_output", "deepstack_features_0", "deepstack_features_1"]
    assert f"tokens      6, each 3 × {rows.WIDTH} values in bfloat16 ({', '.join(tensors)})\n" in out
    description = json.loads(run_cli("inspect", tmp_path, "--json")[1])
    assert (description["tensors"], description["raw_bytes"]) == (tensors, 6 * 3 * rows.WIDTH * 2)


def test_a_family_without_pixel_limits(run_cli, tmp_path):
    config = rows.config(family="llava", processor={"crop_size": 336})
    declared = replace(rows.schema(), config=config)
    row, features = rows.item("a.png", 6, grid_thw=None)
    rows.write_store(tmp_path, [(row, replace(features, config=config, grid_thw=None))], declared=declared)
    out = run_cli("inspect", tmp_path)[1]
    assert "pixels      as the model's processor resizes them\n" in out
    assert f"tokens      6, each {rows.WIDTH} values in bfloat16\n" in out


def test_a_single_shard(run_cli, small_store):
    (shard,) = small_store.glob("*.parquet")
    assert run_cli("inspect", shard)[0] == run_cli("inspect", "--embeds", shard)[0] == 0


def test_a_bar_counts_the_shards_where_many_have_to_be_read(tmp_path):
    storage = rows.write_store(tmp_path, *([rows.item(f"{number}.png")] for number in range(9)))
    words = ["inspect", str(tmp_path)]
    assert "shards read" in on_terminal(words, NO_COLOR="", TERM="xterm")
    assert (storage.folder / layout.CATALOGUE).exists()
    assert "shards read" not in on_terminal(words, NO_COLOR="", TERM="xterm")


def test_warnings_of_rows_are_counted_by_kind(run_cli, tmp_path):
    cut = "its last bytes are missing, and with them a part of the last {} rows of its pixels"
    frames = "only the first of 3 frames was looked at"
    said = {"a.jpg": cut.format(12), "b.jpg": f"{cut.format('1,200')}; {frames}", "c.gif": frames, "d.png": None}
    rows.write_store(tmp_path, [rows.item(name, warnings=text) for name, text in said.items()])
    kinds = {cut.format("N"): 2, "only the first of N frames was looked at": 2}
    assert json.loads(run_cli("inspect", tmp_path, "--json")[1])["warnings"] == kinds
    out = run_cli("inspect", tmp_path)[1]
    assert [line for line in out.splitlines() if line.startswith("warnings")] == [
        f"warnings    2 rows: {kind}" for kind in kinds
    ]
