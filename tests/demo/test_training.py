"""The drawings, the questions about them and the training of the embedded model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from train_demo import postcards, questions

from qvsplit import demo
from qvsplit.checkpoints.opening import DEMO_FOLDER, open_checkpoint


def test_a_scene_is_a_function_of_its_seed():
    assert postcards.make_scene("a") == postcards.make_scene("a") != postcards.make_scene("b")
    one, two = (postcards.draw(postcards.make_scene("a"), 300, 200) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_drawing_keeps_its_promises():
    """Every thing lies within the card, clear of the thirds' borders, and is drawn where the scene says."""
    for number in range(300):
        scene = postcards.make_scene(f"promise {number}")
        spots = [spot for group in scene.groups for spot in group.spots]
        assert 0 <= len(spots) <= 16
        for x, y in spots:
            assert 0.05 < x < 0.95
            assert 0.05 < y < 0.95
            assert min(abs(x - edge) for edge in postcards.EDGES) > 0.03
    house = postcards.Group("house", "red", ((0.25, 0.7),))
    empty = postcards.Scene("s", "meadow", "day", "clear", 1.5, (), None)
    with_house = postcards.Scene("s", "meadow", "day", "clear", 1.5, (house,), None)
    a, b = (np.asarray(postcards.draw(scene, 300, 200)).astype(int) for scene in (empty, with_house))
    ys, xs = np.nonzero(np.abs(a - b).sum(-1))
    assert 0.15 < xs.min() / 300 < 0.25 < xs.max() / 300 < 0.35
    assert 0.5 < ys.min() / 200 < 0.7 < ys.max() / 200 < 0.9
    assert (b[135:145, 60:70] == postcards.COLOURS["red"]).all(-1).any()


def test_truths_by_hand():
    scene = postcards.Scene(
        "s", "sea", "night", "rainy", 1.5,
        (
            postcards.Group("person", "orange", ((0.2, 0.7), (0.8, 0.7))),
            postcards.Group("dog", "red", ((0.5, 0.8),)),
            postcards.Group("kite", "blue", ((0.9, 0.2),)),
        ),
        (0.1, 0.2),
    )  # fmt: skip
    right = {
        ("what", "colour", "red"): "the dog",
        ("what", "colour", "orange"): "the people",
        ("what", "colour", "green"): None,
        ("colour", "kind", "kite"): "blue",
        ("colour", "kind", "house"): "there is no house",
        ("how many", "kind", "person"): "two",
        ("how many", "kind", "car"): "none",
        ("where", "kind", "dog"): "in the middle",
        ("where", "kind", "moon"): "on the left",
        ("where", "kind", "person"): None,
        ("where", "kind", "sun"): "there is no sun",
        ("is there", "kind", "moon"): "yes",
        ("is there", "kind", "sun"): "no",
    }
    for (kind, name, value), answer in right.items():
        assert questions.truth(scene, kind, {name: value}) == answer, (kind, value)
    assert questions.truth(scene, "is there", {"kind": "dog", "shade": "blue"}) == "no"
    assert questions.truth(scene, "is there", {"kind": "dog", "shade": "red"}) == "yes"
    assert questions.truth(scene, "left of", {"a": "kite", "b": "dog"}) == "the dog"
    assert questions.truth(scene, "left of", {"a": "person", "b": "dog"}) is None
    assert questions.truth(scene, "day or night", {}) == "night"
    assert questions.truth(scene, "weather", {}) == "rainy"
    assert questions.truth(scene, "place", {}) == "by the sea"
    assert questions.truth(scene, "list", {}) == "two people, a dog, a kite, the moon"
    said = "A rainy night by the sea with two orange people, a red dog, a blue kite and the moon."
    assert questions.truth(scene, "describe", {}) == said


@pytest.mark.parametrize("two", [0.0, 1.0])
def test_training_computes_what_transformers_computes(two):
    from train_demo import model as training
    from train_demo.train import Postcards

    tokenizer = training.make_tokenizer()
    torch.manual_seed(0)
    model = training.make_model(tokenizer).eval()
    batch = Postcards("test", 4, tokenizer, 3, two, "train").batch("one")
    torch.set_num_threads(2)
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(min_pixels=training.MIN_PIXELS, max_pixels=training.MAX_PIXELS)
    images = [Image.fromarray(image.numpy()) for image in batch.images]
    features = processor(images=images, return_tensors="pt")
    with torch.inference_mode():
        embeds = training.vision_forward(model.model.visual, training.patches_of(batch.images), batch.grid)
        reference = model.model.visual(features["pixel_values"], grid_thw=features["image_grid_thw"]).pooler_output
        torch.testing.assert_close(embeds.flatten(0, 1), reference, rtol=1e-4, atol=1e-4)
        logits, places = training.language_forward(model, batch.packed, embeds)
        packer, each = training.Packer(tokenizer), batch.packed.pictures
        pixels = features["pixel_values"].view(4, -1, features["pixel_values"].shape[-1])
        done = 0
        for sequence, several in enumerate(batch.asked):
            mine = slice(sequence * each, (sequence + 1) * each)
            for question in several:
                answer = packer.encode(question.answer + "<|im_end|>")
                asked = packer.prefix(each, batch.grid) + packer.encode(question.text + training.AFTER)
                ids = torch.tensor([asked + answer])
                whole = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                    pixel_values=pixels[mine].flatten(0, 1), image_grid_thw=features["image_grid_thw"][mine],
                ).logits[0, len(asked) - 1 : -1]  # fmt: skip
                torch.testing.assert_close(logits[done : done + len(answer)], whole, rtol=1e-4, atol=1e-4)
                done += len(answer)
        assert done == len(places)


def test_a_stopped_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """One run of two stages; one that stops in the midst of each. Same weights, and no batch drawn twice."""
    from train_demo import train

    stages = (
        train.Stage("encoder", 3, 4, 0, 0.0, "first", 1e-3, 0.3, 5.0, 0.0),
        train.Stage("both", 3, 4, 2, 0.0, "train", 1e-3, 0.3, 1.0, 0.5),
    )
    tokenizer = train.make_tokenizer()
    monkeypatch.setattr(train, "make_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(train.Run, "exact", lambda self, batches: {})
    drawn = []
    monkeypatch.setattr(train.Run, "batches", lambda self, stage, start: recorded(self, stage, start))

    def recorded(run, stage, start):
        cards = train.Postcards(
            stage.name, stage.pictures, run.tokenizer, stage.questions_each, stage.two, stage.wordings, start=start
        )
        for number in range(start, 10):
            drawn.append((stage.name, number))
            yield cards.batch(f"{stage.name} {number}")

    def go(name, *untils):
        run = train.Run(tmp_path / name, torch.device("cpu"), 1)
        for stage, until in zip(stages, untils, strict=False):
            run.stage(stage, until=until)
        return run

    in_one = go("a", 3, 3)
    whole_way = list(drawn)
    drawn.clear()
    go("b", 2)
    go("b", 3, 2)
    in_parts = go("b", 3, 3)
    assert whole_way == drawn == [(name, number) for name in ("encoder", "both") for number in range(3)]
    for part in ("model", "heads"):
        one, other = (getattr(run, part).state_dict() for run in (in_one, in_parts))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "a" / "checkpoint" / "model.safetensors").exists()
    monkeypatch.setattr(train, "STAGES", stages[:1])
    with pytest.raises(SystemExit, match="other stages"):
        go("b", 3)


def test_the_shipped_model_is_of_this_training():
    """Its tokenizer and config are what the training makes today; docs/demo.md tells its true size."""
    from train_demo import model as training

    tokenizer = training.make_tokenizer()
    mine, shipped = (json.loads(text) for text in (tokenizer.backend_tokenizer.to_str(),
                                                  (DEMO_FOLDER / "tokenizer.json").read_text()))  # fmt: skip
    assert mine["model"]["vocab"] == shipped["model"]["vocab"]
    assert mine["model"]["merges"] == shipped["model"]["merges"]
    config = open_checkpoint("demo", "both").config
    for part in ("text_config", "vision_config"):
        made = training.make_config(tokenizer).to_dict()[part]
        assert {name: value for name, value in config[part].items() if name in made and name != "dtype"} == {
            name: value for name, value in made.items() if name in config[part] and name != "dtype"
        }
    model = training.make_model(tokenizer)
    page = (demo.HERE.parent.parent / "docs" / "demo.md").read_text()
    assert f"{sum(p.numel() for p in model.parameters()):,}" in page
    assert f"{sum(p.numel() for p in model.model.visual.parameters()):,}" in page
    assert f"a vocabulary of {len(tokenizer)}" in page
