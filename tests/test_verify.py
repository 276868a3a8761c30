"""The library behind `qvsplit verify` and `inspect`: videos and their parts against the full model; counts."""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationMixin

import qvsplit
from qvsplit import verify
from qvsplit.errors import ShardDamaged, UsageError
from qvsplit.models import language
from qvsplit.runtime.loading import nobody
from qvsplit.store.opening import open_store
from qvsplit.store.shard_reader import open_shard
from tests.support import rows
from tests.support.clips import make_clip
from tests.support.extracting import OLD, PHOTOS, extractor

LIMITS = {"video_max_tokens": 40, "video_max_pixels": 32 * 32 * 4, "max_pixels": 32 * 32 * 8}
PARTS = ["long.mkv#0 (0:00 to 0:04)", "long.mkv#1 (0:04 to 0:08)", "long.mkv#2 (0:08 to 0:10.4)"]
SHORT = "short.mp4#0 (0:00 to 0:02)"
GIF = "wave.gif#0 (0:00 to 0:02.4)"


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Three small clips, one of them a GIF, and a photograph. Read only."""
    folder = tmp_path_factory.mktemp("films")
    make_clip(folder / "short.mp4", 50)
    make_clip(folder / "long.mkv", 250, size=(64, 96), rate=24)
    make_clip(folder / "wave.gif", 12, codec="gif", pixels="rgb8", rate=5)
    with Image.open(PHOTOS["coffee.png"]) as photo:
        photo.resize((120, 90)).save(folder / "photo.png")
    for file in folder.iterdir():
        os.utime(file, OLD)
    return folder


@pytest.fixture(scope="module")
def made(family_checkpoint, films, tmp_path_factory):
    """A store of the films by a family's tiny checkpoint. Read only."""

    @functools.cache
    def of(name: str, **options) -> Path:
        out = tmp_path_factory.mktemp(name) / "embeds"
        options = {"clip_seconds": 4.0, "gif": "video", "kernels": "reference"} | options
        extractor(str(family_checkpoint(name)), out)(films, **LIMITS, **options)
        return out

    return of


@pytest.fixture
def copied(made, films, tmp_path):
    """The store of Qwen3-VL as `change` has its rows and features, with sound checksums, and the checks of it."""

    def check(change=lambda row, features: (row, features), paths=None):
        (shard,) = made("qwen3_vl").glob("*.parquet")
        declared = open_store(shard).catalogue.shards[0].schema
        pairs = [change(row, features) for _, row, features in open_shard(shard)]
        rows.write_store(tmp_path / "embeds", pairs, declared=declared)
        store = open_store(tmp_path / "embeds")
        some = [row for row in store if paths is None or row.path in paths]
        return {check.path: check for check in verify.check_items(store, some)}

    return check


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_clips_and_parts_have_the_full_models_bits_and_tokens(made, name):
    store = open_store(made(name))
    checks = list(verify.check_items(store, list(store)))
    assert [check.path for check in checks] == [*PARTS, "photo.png", SHORT, GIF]
    assert {check.explanation for check in checks} == {"same bits, same tokens"}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_whole_videos_by_fused_kernels(made, name):
    store = open_store(made(name, clip_seconds=0.0, gif="image", kernels="fused"))
    checks = list(verify.check_items(store, list(store)))
    assert [check.path for check in checks] == ["long.mkv", "photo.png", "short.mp4", "wave.gif"]
    assert all(check.agrees and check.skipped is None for check in checks), checks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_reference_kernels_have_the_full_models_bits_and_tokens_in_half_precision(made, name, dtype):
    store = open_store(made(name, dtype=dtype))
    checks = list(verify.check_items(store, list(store), kernels="reference"))
    assert {check.explanation for check in checks} == {"same bits, same tokens"}
    assert {(check.dtype, check.feature_kernels, check.answer_kernels) for check in checks} == {
        (dtype, "reference", "reference")
    }


def test_answers_are_compared_as_they_are_asked_for(made, monkeypatch):
    """By a language model loaded like that of `ask`, and not by the full model's own modules."""
    loaded, real = [], language.load
    monkeypatch.setattr(
        language, "load", lambda checkpoint, **more: (loaded.append(more["kernels"]), real(checkpoint, **more))[1]
    )
    store = open_store(made("qwen3_vl"))
    assert next(verify.check_items(store, [store["photo.png"]])).same_tokens
    assert next(verify.check_items(store, [store["photo.png"]], kernels="reference")).same_tokens
    assert loaded == ["fused", "reference"]
    with pytest.raises(UsageError, match="`kernels` quick: choose one of fused, reference"):
        next(verify.check_items(store, [store["photo.png"]], kernels="quick"))


@pytest.mark.parametrize(
    ("how", "agrees", "said"),
    [
        ({"same_tokens": True}, True, "differs by 1.0e-03 of the largest value, same tokens"),
        ({"gap": 4 * 2.0**-7}, True, "differs by 1.0e-03 of the largest value, other tokens from a tie on (4.0 units in "
         "the last place below the best score)"),
        ({"gap": 5 * 2.0**-7}, False, "differs by 1.0e-03 of the largest value, OTHER tokens (5.0 units in the last "
         "place below the best score)"),
        ({"gap": 0.0, "same_bits": True}, True, "same bits, other tokens from a tie on (0.0 units in the last place "
         "below the best score)"),
        ({"gap": 0.0, "same_bits": True, "answer_kernels": "reference"}, False, "same bits, OTHER tokens (0.0 units in "
         "the last place below the best score)"),
        ({}, False, "differs by 1.0e-03 of the largest value, OTHER tokens"),
        ({"error": "shard.parquet: bad", "same_tokens": True}, False, "shard.parquet: bad"),
    ],
)  # fmt: skip
def test_only_rounding_may_decide_a_tie(how, agrees, said):
    check = verify.ItemCheck("a.png", max_difference=1e-3, within_tolerance=True, dtype="bfloat16")
    check = replace(check, **how)
    assert (check.agrees, check.explanation) == (agrees, said)


@pytest.fixture
def answered_otherwise(made, monkeypatch):
    """The check of a photograph whose answer has, in the third place, the token that the full model ranks so.

    The full model's second token there is two units in the last place below its first, and the third far below.
    """
    place, real, ask = 2, GenerationMixin.generate, language.LanguageModel.generate
    ranked: list[int] = []

    def generate(self, **inputs):
        answer = real(self, **inputs)
        scores = answer.scores[place][0]
        ranked[:] = scores.argsort(descending=True).tolist()
        best = float(scores[ranked[0]].abs())
        scores[:] = scores.where(scores >= scores[ranked[1]], scores - best)
        scores[ranked[1]] = scores[ranked[0]] - best * 2 * verify.EPSILON["float32"]
        return answer

    def check(rank):
        def other(self, questions, decoding):
            (completion,) = ask(self, questions, decoding)
            tokens = [*completion.tokens[:place], ranked[rank], *completion.tokens[place + 1 :]]
            return [replace(completion, tokens=tokens)]

        monkeypatch.setattr(GenerationMixin, "generate", generate)
        monkeypatch.setattr(language.LanguageModel, "generate", other)
        store = open_store(made("qwen3_vl"))
        (found,) = verify.check_items(store, [store["photo.png"]])
        return found

    return check


def test_a_tie_is_between_the_full_models_best_and_the_token_given(answered_otherwise):
    """A third token is none, however near one another the best two lie."""
    assert answered_otherwise(0).same_tokens
    second, third, last = (answered_otherwise(rank) for rank in (1, 2, -1))
    assert (second.agrees, second.gap) == (True, pytest.approx(2 * verify.EPSILON["float32"], rel=0.5))
    assert "other tokens from a tie on (" in second.explanation
    assert (third.agrees, third.gap > 0.5, last.agrees, last.gap) == (False, True, False, None)
    assert last.explanation == "same bits, OTHER tokens"


def test_scores_are_those_that_tokens_were_chosen_by(made, family_checkpoint, tmp_path, monkeypatch):
    """After what the checkpoint's settings make of the logits: here no token that was said may be the best again."""
    penalised = Path(shutil.copytree(family_checkpoint("qwen3_vl"), tmp_path / "penalised"))
    settings = penalised / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"repetition_penalty": 50.0}))
    seen, real = [], verify._Reference._features_and_answer
    monkeypatch.setattr(
        verify._Reference, "_features_and_answer", lambda self, item: (seen.append(real(self, item)), seen[-1])[1]
    )
    store = open_store(made("qwen3_vl"))
    assert next(verify.check_items(store, [store["photo.png"]], model=str(penalised))).same_tokens
    ((_, answered),) = seen
    assert {answered.gap(place, token) for place, token in enumerate(answered.tokens)} == {0.0}


def test_a_quantised_language_model_is_loaded_in_the_dtype_of_the_full_one(made, monkeypatch):
    loaded = []
    monkeypatch.setattr(language, "load", lambda checkpoint, **more: loaded.append(more["dtype"]))
    for settings in ({}, {"quantization_config": {"quant_method": "any"}}):
        reference = verify._Reference(open_store(made("qwen3_vl")), None, None, "cpu", "fused", nobody)
        reference.checkpoint.config.update(settings)
        reference.replaced_by_language_model(nobody)
    assert loaded == [torch.float32, torch.float32]


def test_an_omni_model_is_told_the_rate_of_the_store(made):
    """Its processor does not count it from the frames: the seconds of a step follow from what it is told."""
    store = open_store(made("qwen2_5_omni", fps=1.0))
    checks = list(verify.check_items(store, store.matching("long.mkv#2")))
    assert [check.explanation for check in checks] == ["same bits, same tokens"]


def test_the_reference_rounds_pixels_alone(made, monkeypatch):
    """The seconds of a video decide positions: of them the model is given all digits, whatever it computes in."""
    given = []
    real = GenerationMixin.generate

    def generate(self, **inputs):
        given.append({name: value.dtype for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return real(self, **inputs)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    store = open_store(made("qwen2_5_vl", dtype="bfloat16"))
    (check,) = verify.check_items(store, store.matching("long.mkv#1"))
    assert check.within_tolerance
    assert (given[0]["pixel_values_videos"], given[0]["second_per_grid_ts"]) == (torch.bfloat16, torch.float32)


def test_features_of_a_clip_that_are_not_the_models_are_found(copied):
    """The same frames in another order."""

    def change(row, features):
        if row.name != "long.mkv#1":
            return row, features
        tensors = dict(features.tensors)
        tensors["pooler_output"] = replace(tensors["pooler_output"], raw=np.roll(tensors["pooler_output"].raw, 1, 0))
        return row, replace(features, tensors=tensors)

    checks = copied(change)
    assert [path for path, check in checks.items() if not check.agrees] == [PARTS[1]]
    assert "differs by" in checks[PARTS[1]].explanation


def _with_frames(indices):
    def change(row, features):
        if row.name != "short.mp4#0":
            return row, features
        return replace(row, media=json.dumps(json.loads(row.media) | {"frames_indices": indices})), features

    return change


def test_a_row_of_other_frames_than_its_features_are_of_is_found(copied):
    checks = copied(_with_frames([1, 2, 3, 4]))
    assert [path for path, check in checks.items() if not check.agrees] == [SHORT]


@pytest.mark.parametrize("indices", [[0, 50], [3, 1], [], None, ["0"], [True]])
def test_a_row_that_names_frames_that_are_none_is_damage(copied, indices):
    """Of that row alone: the others are compared."""
    checks = copied(_with_frames(indices), ("photo.png", "short.mp4"))
    bad = checks.pop(SHORT)
    assert (bad.agrees, bad.skipped) == (False, None)
    assert bad.explanation.startswith("the row of short.mp4#0 names no frames, or such as its video of 50 frames")
    assert {check.explanation for check in checks.values()} == {"same bits, same tokens"}


@pytest.mark.parametrize("reads", [1, 2])
def test_features_that_cannot_be_read_are_the_damage_of_their_row(made, monkeypatch, reads):
    """Whether the full model is at work when they are found to be, or the language model."""
    store, counted = open_store(made("qwen3_vl")), []
    real = store.features

    def features(row):
        counted.append(row.name)
        if row.name == "short.mp4#0" and counted.count(row.name) == reads:
            raise ShardDamaged("shard-000001.parquet is damaged", "shard-000001.parquet", "damaged")
        return real(row)

    monkeypatch.setattr(store, "features", features)
    bad, good = verify.check_items(store, [store["short.mp4#0"], store["photo.png"]])
    assert (bad.agrees, bad.explanation) == (False, "shard-000001.parquet is damaged")
    assert good.explanation == "same bits, same tokens"


def test_what_cannot_be_compared_says_why(films, family_checkpoint, tmp_path, monkeypatch):
    """A file that has changed, one that is gone, and one that is too much at once."""
    folder = Path(shutil.copytree(films, tmp_path / "films"))
    extractor(str(family_checkpoint("qwen3_vl")), tmp_path / "embeds")(folder, gif="video", **LIMITS)
    with (folder / "short.mp4").open("ab") as file:
        file.write(b"\0")
    (folder / "wave.gif").unlink()
    monkeypatch.setattr(verify, "MAX_WHOLE_BYTES", 64 * 96 * 3)
    store = open_store(tmp_path / "embeds")
    checks = list(verify.check_items(store, list(store)))
    skipped = {check.path: check.skipped for check in checks}
    assert skipped.pop("photo.png") is None
    assert skipped.pop("short.mp4") == "its file has changed since it was encoded"
    assert skipped.pop("wave.gif") == "its file is no longer there"
    assert "as frames, and clips are compared whole: up to" in skipped.pop("long.mkv")
    with pytest.raises(UsageError, match="nothing could be compared: its file has changed since it was encoded, its"):
        verify.require_comparison([check for check in checks if check.path in {"short.mp4", "wave.gif"}])


def test_what_does_not_fit_into_memory_is_not_compared(made, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(verify, "processor_call", full)
    store = open_store(made("qwen3_vl"))
    (check,) = verify.check_items(store, [store["short.mp4"]])
    assert check.explanation == "not compared: its file does not fit into memory"


def test_a_store_of_another_reader_says_so(made, monkeypatch):
    monkeypatch.setattr(verify, "reader_versions", lambda: {**qvsplit_reader(), "av": "0.1"})
    store = open_store(made("qwen3_vl"))
    photo, short = verify.check_items(store, [store["photo.png"], store["short.mp4"]])
    assert photo.explanation == "same bits, same tokens"
    version = store.config.videos["av"]
    assert short.explanation == f"same bits, same tokens; the store's frames were read by av {version}"
    assert short.to_json()["other_reader"] == f"av {version}"


qvsplit_reader = verify.reader_versions


def test_settings_of_videos_are_the_stores(made, family_checkpoint, tmp_path):
    """A language model that was tuned elsewhere may come with another file of them."""
    other = Path(shutil.copytree(family_checkpoint("qwen3_vl"), tmp_path / "other"))
    changed = 0
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        if (other / name).exists():
            content = json.loads((other / name).read_text())
            settings = content.get("video_processor", content)
            settings |= {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 65536, "longest_edge": 1 << 20}}
            (other / name).write_text(json.dumps(content))
            changed += 1
    assert changed
    store = open_store(made("qwen3_vl"))
    (check,) = verify.check_items(store, [store["short.mp4"]], model=str(other))
    assert check.explanation == "same bits, same tokens"


# ---------------------------------------------------------------------------------------------------- without a model


def _video(name: str, of: int = 1):
    return rows.parts(name, of) if of > 1 else [rows.item(name, kind="video", duration=2.0)]


def test_a_sample_has_images_and_videos(tmp_path):
    images = [rows.item(f"{number:02d}.png") for number in range(20)]
    rows.write_store(tmp_path, [*images, *_video("05.mp4")])
    store = open_store(tmp_path)
    kinds = {number: [row.kind for row in verify.sample(store, number)] for number in (0, 1, 2, 7, 21, 30)}
    assert {number: len(chosen) for number, chosen in kinds.items()} == {0: 0, 1: 1, 2: 2, 7: 7, 21: 21, 30: 21}
    assert {number: chosen.count("video") for number, chosen in kinds.items()} == {0: 0, 1: 0, 2: 1, 7: 1, 21: 1, 30: 1}
    names = [row.name for row in verify.sample(store, 5)]
    assert names == ["00.png", "05.mp4", "05.png", "10.png", "15.png"]
    assert verify.sample(store, 5) == verify.sample(store, 5)


def test_a_sample_of_many_parts_has_an_image(tmp_path):
    rows.write_store(tmp_path, [rows.item("z.png"), *_video("film.mp4", 12)])
    names = [row.name for row in verify.sample(open_store(tmp_path), 3)]
    assert names == ["film.mp4#0", "film.mp4#6", "z.png"]


def test_a_sample_of_one_kind(tmp_path):
    rows.write_store(tmp_path, [*_video("film.mp4", 4)])
    assert [row.part for row in verify.sample(open_store(tmp_path), 2)] == [0, 2]


def test_what_lacks_features_is_named_by_its_part_and_counted_once(tmp_path):
    lacking = rows.without_features([rows.item("a.png"), *_video("film.mp4", 3)])
    rows.write_store(tmp_path, [*lacking, rows.item("b.png")])
    store = open_store(tmp_path)
    (said,) = verify.check_store(store)
    expected = "the features of 1 image and 3 clips of 1 video are in no shard given "
    assert said.startswith(expected + "(a.png, film.mp4#0, film.mp4#1 and 1 more)")
    assert qvsplit.describe(store)["without_features"] == 2


def test_items_are_counted_by_kind(tmp_path):
    gone = [(replace(row, status="deleted", has_features=False), None) for row, _ in _video("gone.mp4", 3)]
    failed = [(rows.failed("torn.mp4", kind="video"), None), (rows.failed("torn.png"), None)]
    rows.write_store(tmp_path, [rows.item("a.png"), *_video("film.mp4", 3), *_video("b.mp4"), *gone, *failed])
    description = qvsplit.describe(open_store(tmp_path))
    names = ("images", "videos", "clips", "video_seconds", "failed", "deleted", "without_features", "superseded")
    assert [description[name] for name in names] == [1, 2, 4, 6.5, 2, 1, 0, 0]


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(UsageError, match="nothing could be compared: the store holds no item to compare"):
        verify.require_comparison([])
