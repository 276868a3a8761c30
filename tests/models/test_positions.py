"""Positions of what follows an image or video are those of the whole prompt, by the model's own rule."""

from __future__ import annotations

import pytest
import torch

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models import language
from qvsplit.models.asking import PrefixedQuestion
from qvsplit.models.decoding import Decoding
from qvsplit.models.prompt import Placeholder
from tests.support.full_model import NEW_TOKENS
from tests.support.language_models import features_of

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
