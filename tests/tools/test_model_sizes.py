"""The tool that says what models take: what it counts without weights is what lies in checkpoints."""

from __future__ import annotations

from pathlib import Path

import model_sizes
import pytest

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES
from tests.support.families import make_checkpoint

HARDWARE = Path(__file__).parents[2] / "docs" / "hardware.md"


def stored(checkpoint, names):
    """How many values these tensors have in the checkpoint's files."""
    return sum(place.size // SAFETENSORS_BYTES[place.dtype] for place in checkpoint.places(names).values())


def test_the_demos_halves_are_counted_as_its_files_have_them():
    checkpoint = open_checkpoint("demo", "both")
    encoder, language, embedding, is_tied = model_sizes.count(checkpoint)
    assert encoder == stored(checkpoint, checkpoint.encoder_names)
    assert language == stored(checkpoint, checkpoint.language_names)
    assert embedding == stored(checkpoint, ["model.embed_tokens.weight"])
    assert is_tied == ("lm_head.weight" not in checkpoint.files)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gemma3"])
def test_so_are_experts_and_projectors(tmp_path, family):
    make_checkpoint(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path, "both")
    encoder, language, *_ = model_sizes.count(checkpoint)
    assert encoder == stored(checkpoint, checkpoint.encoder_names)
    assert language == stored(checkpoint, checkpoint.language_names)


def test_a_row_is_that_of_the_published_files():
    qwen = next(model for model in model_sizes.MODELS if model.name == "Qwen2-VL 2B")
    sizes = model_sizes.sizes_of(qwen)
    # what the bench's checkpoint of that shape has in its files: 4,417,971,200 bytes of bfloat16
    assert 2 * (sizes.encoder + sizes.language) == 4_417_971_200
    assert (sizes.tokens, sizes.width, sizes.tensors) == (1230, 1536, 1)
    page = HARDWARE.read_text().splitlines()
    for table in (model_sizes.memory_table, model_sizes.disk_table):
        assert set(table({qwen.name: sizes}).splitlines()) <= set(page)
