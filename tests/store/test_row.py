"""What a row may hold, and what no writer writes."""

from __future__ import annotations

import json
import math

import pytest

from qvsplit.store import row as row_module
from qvsplit.store.row import (
    deleted_row,
    is_whole,
    item_row,
    parse_placeholder,
    placeholder_json,
    row_error,
    unknown_value,
)
from tests.support import rows


def error(row=None, *, config=None, **changes) -> str | None:
    return row_error(row or rows.row(**changes), config or rows.config())


def test_sound_rows_pass():
    assert error() is None
    assert error(rows.failed("b.png")) is None
    assert error(rows.failed("b.png", sha256=None)) is None
    assert error(rows.deleted("c.png")) is None
    assert error(name="//xff/ü 猫.png", has_features=False) is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"path": "../x"}, "leads out"), ({"path": "/etc/passwd"}, "leads out"), ({"path": "a//b"}, "leads out"),
        ({"path": "a//x2e//x2e"}, "leads out"), ({"path": ""}, "lacks"), ({"path": "a\0"}, "leads out"),
        ({"root": None}, "lacks"), ({"root": "a//b"}, "root"), ({"size": None}, "lacks"), ({"status": None}, "lacks"),
        ({"has_features": None}, "lacks"), ({"part": -1}, "part"), ({"part": None}, "part"),
        ({"generation": -1}, "generation"), ({"generation": None}, "generation"), ({"kind": None}, "kind"),
        ({"sha256": "A" * 64}, "hash"), ({"sha256": "a" * 63}, "hash"), ({"sha256": None}, "hash"),
        ({"n_tokens": None}, "token"), ({"n_tokens": -1}, "negative"), ({"n_tokens": 7}, "tokens"),
        ({"grid_thw": None}, "grid"), ({"grid_thw": (1, None, 6)}, "gap"), ({"grid_thw": (1, 3, 8)}, "divide"),
        ({"grid_thw": (0, 4, 6), "n_tokens": 0}, "divide"), ({"grid_thw": (1, 4)}, "gap"),
        ({"placeholder": None}, "placeholder"), ({"inputs": "x" * 65537}, "inputs"), ({"media": "猫" * 22_000}, "media"),
        ({"status": "failed"}, "claims features"), ({"status": "deleted"}, "claims features"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_writer_writes_is_named(changes, what):
    assert what in (error(**changes) or "")


def test_inputs_and_media_up_to_the_bound_pass():
    assert error(inputs="x" * 65536, media="猫" * 21_845) is None


def test_a_family_without_merged_patches_needs_no_grid():
    assert error(grid_thw=None, config=rows.config(processor={"size": [8, 8]})) is None


@pytest.mark.parametrize(("name", "value"), [("status", "fine"), ("kind", "audio"), ("error_kind", "solar-flare")])
def test_what_is_unknown_is_told_apart_from_damage(name, value):
    assert unknown_value(rows.row(**{name: value})) == f"{name} {value!r}"
    assert unknown_value(rows.row(**{name: None})) is None


def test_a_row_names_its_item_its_folder_and_its_content():
    one = rows.part("a/b/c.png", 2, 4)[0]
    assert (one.key, one.folder) == (("/photos", "a/b/c.png"), ("/photos", "a/b"))
    assert one.content == (rows.sha("a/b/c.png"), 2)
    assert rows.failed("x", sha256=None).content is None
    assert rows.row("top.png").folder == ("/photos", "")


def test_a_deleted_row_keeps_its_content_and_claims_nothing():
    before = rows.row(generation=3, error="e", error_kind="timeout")
    after = deleted_row(before, 9)
    assert (after.status, after.generation, after.has_features) == ("deleted", 9, False)
    assert (after.error, after.error_kind) == (None, None)
    assert (after.content, after.grid_thw) == (before.content, before.grid_thw)
    assert error(after) is None


def test_a_placeholder_comes_back_as_runs():
    runs = (("<|vision_start|>", 1), ('ü\n"x"', 1280), ("\u2028", 1))
    assert parse_placeholder(placeholder_json(runs)) == runs
    assert rows.row(placeholder=placeholder_json(runs)).placeholder_runs == runs
    assert rows.row(placeholder=None).placeholder_runs == ()
    assert len(placeholder_json((("<|image_pad|>", 1280),))) < 32


@pytest.mark.parametrize(
    "text",
    ["", "x", "{}", "null", '"x"', "[1]", '[["x"]]', '[["x", 1, 1]]', '[["x", 0]]', '[["x", -1]]', '[["x", 1.5]]',
     '[["x", true]]', '[["", 1]]', '[[1, "x"]]', '[["x", 2147483648]]', '[["x", "1"]]', "[" * 100_000, '[["x", NaN]]'],
)  # fmt: skip
def test_a_hostile_placeholder_is_refused(text):
    with pytest.raises(ValueError, match="has"):
        parse_placeholder(text)


def test_a_placeholder_has_a_bound_on_its_runs(monkeypatch):
    monkeypatch.setattr(row_module, "MAX_RUNS", 3)
    assert len(parse_placeholder(placeholder_json([("x", 1)] * 3))) == 3
    with pytest.raises(ValueError, match="no list of runs"):
        parse_placeholder(placeholder_json([("x", 1)] * 4))


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000])
def test_inputs_that_are_no_json_object_are_refused(text):
    with pytest.raises(ValueError, match="inputs"):
        _ = rows.row(inputs=text).inputs_by_name


def test_inputs_come_back_by_name():
    inputs = {
        "second_per_grid_ts": {"dtype": "float32", "shape": [1], "values": [0.5]},
        "image_sizes": {"dtype": "int64", "shape": [1, 2], "values": [120, 160]},
        "flag": {"dtype": "bool", "shape": [], "values": [True]},
    }
    assert rows.row(inputs=json.dumps(inputs)).inputs_by_name == inputs
    assert rows.row(inputs=None).inputs_by_name == {}


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "load"}, {"dtype": []}, {"dtype": None}, {"shape": [3]}, {"shape": []}, {"shape": [-1, -2]},
     {"shape": [1, True]}, {"shape": 2}, {"shape": [2, 1 << 40]}, {"values": "ab"}, {"values": [1, "2"]},
     {"values": [[1, 2]]}, {"values": None}, {"values": [1, 1 << 63]}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_inputs_that_are_no_tensors_are_refused(changes):
    one = {"dtype": "int64", "shape": [1, 2], "values": [120, 160]}
    assert rows.row(inputs=json.dumps({"x": one})).inputs_by_name == {"x": one}
    for wrong in (one | changes, None, [], "int64", {}):
        with pytest.raises(ValueError, match="has inputs that are no tensors"):
            _ = rows.row(inputs=json.dumps({"x": wrong})).inputs_by_name


def test_an_image_has_a_grid_where_the_processor_has_pixel_limits_and_may_have_one_elsewhere():
    whole, none = rows.row(), rows.row(grid_thw=None)
    limits = rows.PROCESSOR
    for processor, without in (
        (limits, "lacks a grid"),
        ({"merge_size": 2, "max_patches": 9}, None),
        ({"size": 3}, None),
    ):
        config = rows.config(processor=processor)
        wrong = row_module.row_error(none, config)
        assert wrong is None if without is None else without in wrong
    assert row_module.row_error(whole, rows.config(processor={"merge_size": 2})) is None


# ----------------------------------------------------------------------------------------------------------- parts


def clip(**changes):
    """The third of four parts."""
    return rows.part("c.mp4", 2, 4, **changes)[0]


def test_sound_rows_of_videos_pass():
    whole = rows.row("c.mp4", kind="video")
    for one in (whole, rows.row("c.mp4", kind="video", duration=7.25), *(row for row, _ in rows.parts("c.mp4", 3))):
        assert error(one) is None
        assert error(deleted_row(one, 2)) is None
    assert error(rows.failed("c.mp4", kind="video", duration=7.25)) is None
    assert error(clip(end=4.5, duration=4.5 - 1e-12)) is None  # a time that was computed in another way


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kind": "image"}, "is no video"), ({"kind": "image", "part": 0, "start": None, "end": None}, "is no video"),
        ({"start": None, "end": None}, "without its seconds"), ({"start": None}, "without its seconds"),
        ({"end": None}, "without its seconds"), ({"part": 0, "start": None}, "without its seconds"),
        ({"start": 4.5}, "begin before it ends"), ({"start": 9.0}, "begin before it ends"),
        ({"start": -1.0}, "begin before it ends"), ({"start": math.nan}, "begin before it ends"),
        ({"end": math.nan}, "begin before it ends"), ({"end": math.inf, "duration": 9.0}, "begin before it ends"),
        ({"duration": 4.0}, "behind the end"), ({"duration": None}, "behind the end"),
        ({"duration": math.nan}, "duration"), ({"duration": -1.0}, "duration"), ({"duration": math.inf}, "duration"),
        ({"part": 0}, "part 0 beginning at 3 s"), ({"start": 0.0}, "part 2 beginning at 0 s"),
        ({"part": 1, "start": 0.0, "end": 1.5}, "part 1 beginning at 0 s"),
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_no_writer_writes_are_named(changes, what):
    assert what in (error(clip(**changes)) or "")
    assert what in (error(deleted_row(clip(**changes), 2)) or "")  # whatever the status


def test_a_row_is_named_by_its_path_and_its_part():
    assert rows.row("a/b.png").name == "a/b.png"
    assert rows.row("a/b.mp4", kind="video", duration=9.0).name == "a/b.mp4"
    assert [row.name for row, _ in rows.parts("a/b.mp4", 3)] == ["a/b.mp4#0", "a/b.mp4#1", "a/b.mp4#2"]


def test_the_parts_of_an_item_are_known_to_be_all():
    parts = [row for row, _ in rows.parts("c.mp4", 3)]
    assert [row.is_last for row in parts] == [False, False, True]
    whole = [rows.row(), rows.row(kind="video", duration=9.0), rows.failed("x"), rows.part("c.mp4", 0, 1)[0]]
    assert all(one.is_last and is_whole([one]) for one in whole)
    assert is_whole(parts)
    for some in ([], parts[:1], parts[:2], parts[1:], parts[2:], [parts[0], parts[2]], parts[::-1], [*parts, parts[2]]):
        assert not is_whole(some)
    third = 1 / 3  # which ends where the video does, within rounding
    assert rows.part("c.mp4", 2, 3, seconds=third)[0].is_last
    assert rows.part("c.mp4", 2, 3, seconds=third, end=3 * third - 1e-12)[0].is_last
    assert not rows.part("c.mp4", 2, 3, seconds=third, end=0.999)[0].is_last


def test_an_item_is_stood_for_by_its_first_part_or_by_one_that_failed():
    parts = [row for row, _ in rows.parts("c.mp4", 3)]
    assert item_row(parts) == item_row(parts[::-1]) == parts[0]
    broken = rows.failed("c.mp4", kind="video", part=1)
    assert item_row([*parts[::2], broken]) == broken


def test_the_grid_of_a_video_is_its_own_processors():
    config = rows.config(videos={"settings": {"merge_size": 1}})
    assert error(rows.row("c.mp4", kind="video", grid_thw=(2, 3, 1)), config=config) is None
    assert "divide" in error(rows.row("c.png", grid_thw=(2, 3, 1)), config=config)
    assert "divide" in error(rows.row("c.mp4", kind="video", grid_thw=(2, 3, 1)))
    assert "lacks a grid" in error(rows.row("c.mp4", kind="video", grid_thw=None), config=config)
