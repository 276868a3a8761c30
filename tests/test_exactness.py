"""The promise: what the two halves give, apart, is what the whole model of transformers gives."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import NEW_TOKENS, QUESTIONS, WholeModel, upright_rgb
from make_checkpoint import make_tiny

from qvsplit import vision
from qvsplit.album import open_album
from qvsplit.ask import Settings as AskSettings
from qvsplit.ask import open_asker
from qvsplit.checkpoint import DEMO_FOLDER, open_checkpoint
from qvsplit.extract import Settings, extract_pictures
from qvsplit.language import as_tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def asker(album_folder):
    return open_asker(open_album(album_folder), AskSettings(max_new_tokens=NEW_TOKENS))


@pytest.fixture(scope="module")
def halves(checkpoint):
    return vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=torch.float32)


def test_the_photographs_are_the_ones_that_matter(album_folder):
    rows = {row.path: row for row in open_album(album_folder)}
    assert len(rows) >= 12
    assert len({(row.width, row.height) for row in rows.values()}) >= 12
    same = rows["motorcycle_left.png"], rows["motorcycle_right.png"]
    assert same[0].grid_thw == same[1].grid_thw
    assert (rows["tall.png"].width, rows["tall.png"].height) == (9, 1350)
    assert (rows["one_pixel.png"].width, rows["one_pixel.png"].height) == (1, 1)
    assert rows["twenty_megapixels.jpg"].width * rows["twenty_megapixels.jpg"].height >= 20_000_000
    assert rows["turned.jpg"].height > rows["turned.jpg"].width  # upright by its EXIF orientation


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_from_the_shard_are_the_whole_models_token_for_token(asker, whole, photos, question):
    different = []
    for row in asker.album:
        expected = whole.answer([upright_rgb(photos / row.path)], question)
        answer = asker.answer(row, question)
        assert answer.prompt_tokens == whole.inputs([upright_rgb(photos / row.path)], question)["input_ids"].shape[1]
        if answer.tokens != expected:
            different.append((row.path, answer.tokens, expected))
    assert different == []


def test_answers_depend_on_the_picture(asker):
    """Were all answers alike, their identity would prove nothing."""
    answers = {tuple(asker.answer(row, QUESTIONS[0]).tokens) for row in asker.album}
    assert len(answers) >= len(asker.album) - 3


def test_two_pictures_of_one_size_together_and_in_either_order(asker, whole, photos):
    left, right = (asker.album.current(str(photos), f"motorcycle_{side}.png") for side in ("left", "right"))
    images = {row.path: upright_rgb(photos / row.path) for row in (left, right)}
    question = "What differs between the two pictures?"
    tokens = {}
    for pair in ((left, right), (right, left)):
        tokens[pair[0].path] = asker.answer(pair, question).tokens
        assert tokens[pair[0].path] == whole.answer([images[row.path] for row in pair], question)
    assert tokens["motorcycle_left.png"] != tokens["motorcycle_right.png"]


def test_three_pictures_of_different_sizes_together(asker, whole, photos):
    rows = [asker.album.current(str(photos), name) for name in ("tall.png", "chelsea.png", "one_pixel.png")]
    images = [upright_rgb(photos / row.path) for row in rows]
    assert asker.answer(rows, QUESTIONS[3]).tokens == whole.answer(images, QUESTIONS[3])


def test_a_system_message_is_the_templates_own_or_the_users(album_folder, whole, photos):
    asker = open_asker(open_album(album_folder), AskSettings(max_new_tokens=NEW_TOKENS, system="Answer\n in French."))
    row = asker.album.current(str(photos), "coffee.png")
    expected = whole.answer([upright_rgb(photos / row.path)], QUESTIONS[0], system="Answer\n in French.")
    assert asker.answer(row, QUESTIONS[0]).tokens == expected
    assert expected != whole.answer([upright_rgb(photos / row.path)], QUESTIONS[0])


def test_an_answer_does_not_depend_on_what_was_asked_before(asker, photos):
    row, other = (asker.album.current(str(photos), name) for name in ("coffee.png", "retina.jpg"))
    alone = asker.answer(row, QUESTIONS[0]).tokens
    asker.answer((other, row), QUESTIONS[1])
    assert asker.answer(row, QUESTIONS[0]).tokens == alone


def test_from_the_hubs_older_layout_too(tmp_path, hub_checkpoint, some_photos):
    """Flat config.json, preprocessor_config.json, chat_template.json: loaded by qvsplit and by transformers."""
    extract_pictures([some_photos], out=tmp_path / "embeds", settings=Settings(model=str(hub_checkpoint)))
    asker = open_asker(open_album(tmp_path / "embeds"), AskSettings(max_new_tokens=NEW_TOKENS))
    whole = WholeModel(hub_checkpoint)
    for row in asker.album:
        assert asker.answer(row, QUESTIONS[3]).tokens == whole.answer(
            [upright_rgb(some_photos / row.path)], QUESTIONS[3]
        )


@pytest.mark.parametrize("prefix", ["hub", "nested", "mixed"])
@pytest.mark.parametrize("files", [1, 7])
def test_the_tower_alone_is_the_tower_of_the_whole_model_bit_for_bit(tmp_path, prefix, files, photos):
    make_tiny(tmp_path / "model", prefix=prefix, files=files, layout="hub" if files == 1 else "today")
    alone = vision.load(
        open_checkpoint(tmp_path / "model", "vision"), device=CPU, dtype=torch.float32, kernels="reference"
    )
    whole = WholeModel(tmp_path / "model")
    images = [upright_rgb(photos / name) for name in ("chelsea.png", "coffee.png", "tall.png")]
    patches = [alone.prepare(image) for image in images]
    reference = whole.processor.image_processor(images=images, return_tensors="pt")
    assert torch.equal(torch.cat([alone.pixel_values(p) for p in patches]), reference["pixel_values"])
    assert [list(p.grid_thw) for p in patches] == reference["image_grid_thw"].tolist()
    for mine, theirs in zip(alone.encode(patches), whole.features(images), strict=True):
        assert torch.equal(mine, theirs)


def test_a_batch_is_its_pictures_one_by_one_within_float_tolerance(halves, photos):
    """The linear layers see another number of rows and may add up in another order: not bit for bit."""
    names = ["chelsea.png", "coffee.png", "coins.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png"]
    patches = [halves.prepare(upright_rgb(photos / name)) for name in names]
    together = halves.encode(patches)
    for one, alone in zip(together, [halves.encode([p])[0] for p in patches], strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[4], together[5], rtol=1e-2, atol=1e-2)  # same size, other picture


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_read_back_is_what_the_tower_gave_bit_for_bit(tmp_path, checkpoint, some_photos, dtype):
    settings = Settings(model=str(checkpoint), dtype=dtype, patch_budget=1)  # one picture a batch
    extract_pictures([some_photos], out=tmp_path / "embeds", settings=settings)
    album = open_album(tmp_path / "embeds")
    tower = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=getattr(torch, dtype))
    assert len(album) == 4
    for row in album:
        expected = tower.encode([tower.prepare(upright_rgb(some_photos / row.path))])[0]
        stored = album.embeds(row)
        assert as_tensor(stored).dtype == expected.dtype
        assert torch.equal(as_tensor(stored), expected)
        assert np.array_equal(stored.numpy(), expected.float().numpy() if dtype == "bfloat16" else expected.numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_answers_in_half_precision_are_the_whole_models_in_it(tmp_path, checkpoint, some_photos, dtype):
    settings = Settings(model=str(checkpoint), dtype=dtype, patch_budget=1)
    extract_pictures([some_photos], out=tmp_path / "embeds", settings=settings)
    asker = open_asker(open_album(tmp_path / "embeds"), AskSettings(dtype=dtype, max_new_tokens=NEW_TOKENS))
    whole = WholeModel(checkpoint, dtype=getattr(torch, dtype))
    assert asker.dtype_note() is None
    same = 0
    for row in asker.album:
        expected, gaps = _with_gaps(whole, upright_rgb(some_photos / row.path))
        got = asker.answer(row, QUESTIONS[0]).tokens
        same += got == expected
        if got != expected:  # a random model's logits lie close: the order of additions decides between neighbours
            place = next(index for index, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
            assert gaps[place] <= 4 * torch.finfo(getattr(torch, dtype)).eps * 4  # a few units in the last place
    assert same >= len(asker.album) - 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trained_models_answers_in_half_precision_are_the_whole_models(tmp_path, dtype):
    """Its logits lie apart: no rounding decides."""
    from qvsplit.demo import POSTCARDS, truths

    names = ("boats-in-snow.jpg", "parade.jpg", "seaside.jpg", "winter.jpg")
    for name in names:
        shutil.copyfile(POSTCARDS / name, tmp_path / name)
    extract_pictures([tmp_path], out=tmp_path / "embeds", settings=Settings(model="demo", dtype=dtype, patch_budget=1))
    asker = open_asker(open_album(tmp_path / "embeds"), AskSettings(dtype=dtype))
    whole = WholeModel(DEMO_FOLDER, dtype=getattr(torch, dtype))
    limits = json.loads((DEMO_FOLDER / "processor_config.json").read_text())["image_processor"]["size"]
    whole.processor.image_processor.size = limits
    asked = [*truths()[0], "How many dogs are there?", "Where is the house?"]
    for row in asker.album:
        expected = [whole.answer([upright_rgb(tmp_path / row.path)], question, new_tokens=64) for question in asked]
        assert [answer.tokens for answer in asker.answers(row, asked)] == expected


def _with_gaps(whole, image):
    """The whole model's tokens, and at each the gap between its two best logits."""
    inputs = whole.inputs([image], QUESTIONS[0])
    with torch.inference_mode():
        out = whole.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None,
                                   top_k=None, return_dict_in_generate=True, output_logits=True)  # fmt: skip
    best = [logits[0].float().topk(2).values for logits in out.logits]
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), [float(a - b) for a, b in best]


def test_pixel_limits_are_those_of_the_recipe(tmp_path, checkpoint, some_photos):
    settings = Settings(model=str(checkpoint), max_pixels=100 * 28 * 28)
    extract_pictures([some_photos], out=tmp_path / "embeds", settings=settings)
    asker = open_asker(open_album(tmp_path / "embeds"), AskSettings(max_new_tokens=NEW_TOKENS))
    whole = WholeModel(checkpoint, max_pixels=100 * 28 * 28)
    for row in asker.album:
        assert row.n_tokens <= 100
        assert asker.answer(row, QUESTIONS[0]).tokens == whole.answer(
            [upright_rgb(some_photos / row.path)], QUESTIONS[0]
        )


def test_a_stored_dtype_narrower_than_computed_is_rounded_once(tmp_path, checkpoint, some_photos):
    settings = Settings(model=str(checkpoint), store="bfloat16", patch_budget=1)
    extract_pictures([some_photos], out=tmp_path / "embeds", settings=settings)
    album = open_album(tmp_path / "embeds")
    tower = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=torch.float32)
    for row in album:
        expected = tower.encode([tower.prepare(upright_rgb(some_photos / row.path))])[0].to(torch.bfloat16)
        assert torch.equal(as_tensor(album.embeds(row)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda_too(tmp_path, checkpoint, some_photos, dtype):
    settings = Settings(model=str(checkpoint), device="cuda", dtype=dtype, patch_budget=1)
    extract_pictures([some_photos], out=tmp_path / "embeds", settings=settings)
    asker = open_asker(
        open_album(tmp_path / "embeds"), AskSettings(device="cuda", dtype=dtype, max_new_tokens=NEW_TOKENS)
    )
    whole = WholeModel(checkpoint, dtype=getattr(torch, dtype))
    whole.model.to("cuda")
    for row in asker.album:
        inputs = whole.inputs([upright_rgb(some_photos / row.path)], QUESTIONS[0]).to("cuda")
        with torch.inference_mode():
            out = whole.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert asker.answer(row, QUESTIONS[0]).tokens == out[0, inputs["input_ids"].shape[1] :].tolist()
