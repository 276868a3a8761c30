"""The tool that says what models take. That its counts are those of checkpoints: tests/checkpoints/test_sizes.py."""

from __future__ import annotations

from pathlib import Path

import model_sizes

HARDWARE = Path(__file__).parents[2] / "docs" / "hardware.md"


def test_a_row_is_that_of_the_published_files():
    qwen = next(model for model in model_sizes.MODELS if model.name == "Qwen2-VL 2B")
    sizes = model_sizes.sizes_of(qwen)
    # what the bench's checkpoint of that shape has in its files: 4,417,971,200 bytes of bfloat16
    assert 2 * (sizes.halves.encoder + sizes.halves.language) == 4_417_971_200
    assert (sizes.tokens, sizes.width, sizes.tensors) == (1230, 1536, 1)
    page = HARDWARE.read_text().splitlines()
    for table in (model_sizes.memory_table, model_sizes.disk_table):
        assert set(table({qwen.name: sizes}).splitlines()) <= set(page)
