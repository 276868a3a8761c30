"""What the language model's forward pass is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qvsplit.models.forward import Forward


class Before:
    """As transformers 5.23 calls the cache."""

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=None):
        return input_ids, past_key_values

    def __call__(self, **given):
        ids, cache = self.forward(**given)
        return SimpleNamespace(last_hidden_state=ids + cache)


class Since(Before):
    """As 5.24 does."""

    def forward(self, input_ids, position_ids=None, cache=None, use_cache=None):
        return input_ids, cache


@pytest.mark.parametrize("inner", [Before, Since])
def test_the_cache_goes_to_the_model_by_its_own_name_for_it(inner):
    class Whole(Before):
        config = SimpleNamespace(get_text_config=lambda: None)
        model = inner()

    ids, cache = torch.tensor([[1, 2]]), torch.tensor([[10, 20]])
    assert Forward(Whole()).hidden(ids, None, cache).tolist() == [[11, 22]]
