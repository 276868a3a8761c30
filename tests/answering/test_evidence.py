"""What shows that features are of a model's own encoder; see also tests/test_adapter.py."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from tests.support.adapters import change_config, change_tensors, make_adapter
from tests.support.extracting import PHOTOS

QUESTION = "What is in the picture?"


def trained_on(adapter):
    change_tensors(adapter, lambda tensors: {name: one * 2 for name, one in tensors.items()})


def without_the_encoder(adapter):
    change_tensors(adapter, lambda tensors: {name: one for name, one in tensors.items() if "visual" not in name})
    change_config(adapter, target_modules=["q_proj"])


@pytest.mark.parametrize("change", [trained_on, without_the_encoder])
def test_the_stores_own_adapter_that_has_changed_is_said_to_have(change, run_cli, checkpoint, tmp_path):
    """Wherever it is taken: not that it was another, nor that it be given, which it is."""
    images, adapter, store = (tmp_path / name for name in ("images", "adapter", "embeds"))
    images.mkdir()
    with Image.open(PHOTOS["chelsea.png"]) as photo:
        photo.resize((56, 56)).save(images / "cat.png")
    make_adapter(checkpoint, adapter, target_modules=["q_proj", "qkv"])
    named = ["--adapter", adapter]
    assert run_cli("extract", images, "-o", store, "-m", checkpoint, *named)[0] == 0
    change(adapter)
    more = tmp_path / "more.png"
    shutil.copy(PHOTOS["coffee.png"], more)
    for command in (
        ["ask", "-e", store, QUESTION], ["ask", "-e", store, QUESTION, *named], ["verify", store, "--sample", 1],
        ["extract", images, "-o", store, *named], ["extract", images, more, "-o", store],
        ["extract", images, more, "-o", store, *named],
    ):  # fmt: skip
        code, _, err = run_cli(*command, "--quiet")
        assert code == 4, err
        assert f"{adapter} has changed since the store was made with it; bring its old files back" in err
        assert "or extract again with --rebuild" in err
    assert run_cli("extract", images, "-o", store, "--rebuild")[0] == 0
    assert run_cli("ask", "-e", store, QUESTION)[0] == 0
