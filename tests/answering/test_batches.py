"""A prompt that is longer than the model's context says what to do about what it shows."""

from __future__ import annotations

import pytest

from qvsplit.answering.batches import PreparedRequest, within_context
from qvsplit.answering.engine import Decoding, Request
from qvsplit.errors import UsageError
from qvsplit.models.prompt import ITEM_TYPES, Placeholder, Prompt

TOKENS = 40  # of an item


def prepared(*kinds: str) -> PreparedRequest:
    """A question of four tokens about items of these kinds, with two tokens in front of each."""
    ids, types = [], []
    for number, kind in enumerate(kinds):
        ids += [1, 2, *[100 + number] * TOKENS]
        types += [0, 0, *[ITEM_TYPES[kind]] * TOKENS]
    placeholders = [Placeholder((), TOKENS, kind=kind, name=f"{number}.{kind}") for number, kind in enumerate(kinds)]
    prompt = Prompt([*ids, 5, 6, 7, 8], [*types, 0, 0, 0, 0], {}, placeholders)
    return PreparedRequest(Request("0", (), (), decoding=Decoding(max_new_tokens=4)), prompt)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["image"], "0.image takes 42: extract it with a lower `max_pixels`"),
        (
            ["video"],
            "0.video takes 42: extract it with fewer frames (`fps`, `max_frames`) or tokens "
            "(`video_max_tokens`), or in parts (`clip_seconds`)",
        ),
        (["image", "image"], "0 of its 2 images would fit: ask about fewer together"),
        (["video", "video"], "0 of its 2 videos would fit: ask about fewer together"),
        (["image", "video"], "0 of its 2 images and videos would fit: ask about fewer together"),
    ],
)
def test_it_says_of_what_there_is_too_much(kinds, said):
    with pytest.raises(UsageError, match="the answer included") as refused:
        within_context(prepared(*kinds), 30)
    assert str(refused.value).endswith(f"; {said}")


def test_what_fits_is_left_as_it_is():
    one = prepared("video", "image")
    assert within_context(one, 2 * (TOKENS + 2) + 4 + 4) is one


def test_items_stand_in_the_text_in_another_order_than_in_the_conversation():
    whole = prepared("video", "image").prompt
    assert [whole.begins_with(items) for items in (1, 2)] == [True, True]
    turned = Prompt(whole.input_ids, whole.item_types, {}, whole.placeholders[::-1])
    assert [turned.begins_with(items) for items in (1, 2)] == [False, True]
