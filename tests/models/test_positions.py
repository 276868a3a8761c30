"""Positions of what follows an image or video are those of the whole prompt, by the model's own rule."""

from __future__ import annotations

import pytest
import torch

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models import language
from qvsplit.models.asking import PrefixedQuestion
from qvsplit.models.decoding import Decoding
from qvsplit.models.prompt import Placeholder, Prompt
from tests.support.full_model import NEW_TOKENS
from tests.support.language_models import TinyLanguageModel, features_of

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.fixture(scope="module")
def model(checkpoint):
    return language.load(open_checkpoint(checkpoint, "language"), device=torch.device("cpu"), dtype=torch.float32)


def video(frames: int, rows: int, columns: int) -> Placeholder:
    """A clip of so many pairs of frames; rows and columns in patches."""
    tokens = frames * rows * columns // 4
    return Placeholder((("<|video_pad|>", tokens),), tokens, (frames, rows, columns), "video", "a clip")


@pytest.mark.parametrize("question", ["?", "What happens in this long and quiet clip, and who is in it, if anybody?"])
@pytest.mark.parametrize("frames", [1, 9, 40])
def test_behind_a_video_of_any_length(model, whole, frames, question):
    """Behind one that has more frames than rows or columns, the next position is not one above the largest."""
    clip = video(frames, 4, 6)
    prompt = model.prompter.ask(question, [clip])
    torch.manual_seed(frames)
    pixels = torch.randn(frames * 4 * 6, 3 * 2 * 14 * 14)
    grid = torch.tensor([clip.grid_thw])
    with torch.inference_mode():
        features = whole.model.get_video_features(pixels, grid, return_dict=True)
        ids = torch.tensor([prompt.input_ids])
        expected = whole.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pixels, video_grid_thw=grid,
            mm_token_type_ids=torch.tensor([prompt.token_types["mm_token_type_ids"]]), max_new_tokens=NEW_TOKENS, **GREEDY,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
    prefix = model.prefill(prompt, [features_of(features)])
    suffix = prompt.input_ids[prompt.prefix_tokens :]
    (got,) = model.generate([PrefixedQuestion(prefix, suffix)], Decoding(max_new_tokens=NEW_TOKENS))
    assert got.tokens == expected
    start = prompt.token_types["mm_token_type_ids"].index(2)
    assert prefix.next_position == start + 3  # columns, as the model has it


def test_types_and_counts_are_those_of_the_clip(model):
    clip = video(9, 4, 6)
    prompt = model.prompter.ask("?", [clip])
    assert prompt.token_types["mm_token_type_ids"].count(2) == clip.n_tokens
    assert prompt.grids("video") == [clip.grid_thw]
    assert prompt.grids("image") == []


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni", "qwen3_omni_moe"])
def test_time_counts_as_the_family_has_it(name, tmp_path):
    """Seconds a frame move positions in some families, in others each frame stands by itself behind its time."""
    tiny = TinyLanguageModel(name, tmp_path / "checkpoint")
    full, config, frames, rows, columns = tiny.full.model, tiny.full.model.config, 5, 4, 6
    start, end = (getattr(config, f"vision_{what}_token_id") for what in ("start", "end"))
    token = config.video_token_id if hasattr(config, "video_token_id") else config.video_token_index
    run = [start, *[token] * (rows * columns // 4), end]
    if name in ("qwen3_vl", "qwen3_5"):
        shown = [one for frame in range(frames) for one in (30 + frame, 31, *run)]
    else:
        shown = [start, *[token] * (frames * rows * columns // 4), end]
    ids = [11, 12, 13, *shown, 21, 22, 23, 24]
    types = [2 * int(one == token) for one in ids]
    patch = config.vision_config.patch_size
    torch.manual_seed(0)
    pixels, grid = torch.randn(frames * rows * columns, 3 * 2 * patch**2), torch.tensor([[frames, rows, columns]])
    given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    kinds = {} if "omni" in name else {"mm_token_type_ids": types}
    seconds = {"qwen2_5_vl": "second_per_grid_ts", "qwen2_5_omni": "video_second_per_grid", "qwen3_omni_moe": "video_second_per_grid"}  # fmt: skip
    inputs = {seconds[name]: {"dtype": "float32", "shape": [1], "values": [1.5]}} if name in seconds else {}
    with torch.inference_mode():
        features = features_of(full.get_video_features(pixels, grid, return_dict=True))
        expected = full.generate(
            **given, **{kind: torch.tensor([values]) for kind, values in kinds.items()},
            **{kind: torch.tensor(value["values"]) for kind, value in inputs.items()},
            pixel_values_videos=pixels, video_grid_thw=grid, max_new_tokens=NEW_TOKENS, **GREEDY,
        )[0, len(ids) :].tolist()  # fmt: skip
    clip = Placeholder((), features.n_tokens, (frames, rows, columns), "video", "a clip", inputs)
    prompt = Prompt(ids, types, kinds, [clip])
    prefix = tiny.language.prefill(prompt, [features])
    (got,) = tiny.language.generate([tiny.question(prefix, prompt)], Decoding(max_new_tokens=NEW_TOKENS))
    assert got.tokens == expected
