"""Merging an adapter into one half of a model whose other half is not there; see also tests/test_adapter.py."""

from __future__ import annotations

import pytest
import torch

from qvsplit.checkpoints.adapter import open_adapter
from qvsplit.checkpoints.fingerprint import adapter_digest
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError
from qvsplit.weights import load_encoder_weights, load_language_model
from tests.support.adapters import change_config, change_tensors, full_model, make_adapter, merged_model
from tests.support.checkpoints import make_tiny

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]}


def opened(folder, adapter):
    return open_checkpoint(folder, "both", adapter=open_adapter(adapter))


def changed_by_peft(folder, adapter):
    """The tensors of the full model that PEFT's merge changes, after it."""
    before = dict(full_model(folder).named_parameters())
    after = dict(merged_model(folder, adapter).named_parameters())
    return {name: one for name, one in after.items() if not torch.equal(one, before[name])}


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "qwen2_vl, tied"])
def test_all_linear_layers_of_a_family_with_tied_embeddings_have_the_bits_of_peft_in_both_halves(
    family, family_checkpoint, tmp_path
):
    """Whose encoder has no input embedding, for which PEFT asks where embeddings are tied."""
    if family == "qwen2_vl, tied":
        make_tiny(folder := tmp_path / "tied", tied=True)
    else:
        folder = family_checkpoint(family)
    made = make_adapter(folder, tmp_path / "adapter", target_modules="all-linear")
    changed, whole = changed_by_peft(folder, made), opened(folder, made)
    encoder = load_encoder_weights(whole, device=torch.device("cpu"), dtype=torch.float32).model
    language = load_language_model(whole, dtype=torch.float32, kernels="reference")
    halves = [dict(half.named_parameters()) for half in (encoder, language)]
    assert all(half.keys() & changed.keys() for half in halves)
    mine = halves[0] | halves[1]
    assert [name for name, one in changed.items() if not torch.equal(mine[name], one)] == []


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_may_name_experts(pattern, family_checkpoint, tmp_path):
    """Which are parameters, and no modules."""
    folder = family_checkpoint("qwen3_vl_moe")
    made = make_adapter(folder, tmp_path / "adapter", **EXPERTS, **{pattern: {"experts.gate_up_proj": 2}})
    plain = make_adapter(folder, tmp_path / "plain", **EXPERTS)
    changed, others = changed_by_peft(folder, made), changed_by_peft(folder, plain)
    mine = dict(load_language_model(opened(folder, made), dtype=torch.float32, kernels="reference").named_parameters())
    assert [name for name, one in changed.items() if not torch.equal(mine[name], one)] == []
    (name,) = (name for name in changed if name.endswith("layers.0.mlp.experts.gate_up_proj"))
    assert not torch.equal(changed[name], others[name])
    change_config(made, **{pattern: {"experts.of_none": 2}})
    with pytest.raises(ModelError, match=rf"its {pattern} names experts\.of_none, and it has no such module or param"):
        load_language_model(opened(folder, made), dtype=torch.float32)


def test_all_linear_layers_of_a_model_whose_experts_peft_names_by_itself(family_checkpoint, tmp_path):
    folder = family_checkpoint("glm4v_moe")
    made = make_adapter(folder, tmp_path / "adapter", target_modules="all-linear")
    assert "gate_up_proj" in str(open_adapter(made).settings["rank_pattern"])
    changed = changed_by_peft(folder, made)
    mine = dict(load_language_model(opened(folder, made), dtype=torch.float32, kernels="reference").named_parameters())
    assert [name for name in mine.keys() & changed.keys() if not torch.equal(mine[name], changed[name])] == []
    assert any("language_model" in name for name in changed)


def test_an_adapter_for_what_neither_half_has_is_refused(family_checkpoint, tmp_path):
    """Janus makes images as well; nothing of that is loaded."""
    folder = family_checkpoint("janus")
    made = make_adapter(folder, tmp_path / "adapter", target_modules=["generation_aligner.fc1"])
    whole = opened(folder, made)
    assert [adapter_digest(whole, half) for half in ("encoder", "language")] == [None, None]
    expected = r"changes nothing here: it is for model\.generation_aligner\.fc1, which neither the vision encoder nor"
    with pytest.raises(ModelError, match=expected):
        load_encoder_weights(whole, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ModelError, match=expected):
        load_language_model(whole, dtype=torch.float32)


def test_each_module_that_the_model_has_not_is_named_once(checkpoint, tmp_path):
    made = make_adapter(checkpoint, tmp_path / "adapter", target_modules=["q_proj"])
    change_tensors(made, lambda all_: {name.replace(".q_proj.", ".o_projection."): one for name, one in all_.items()})
    layers = [f"model.language_model.layers.{number}.self_attn.o_projection" for number in range(4)]
    with pytest.raises(ModelError) as raised:
        load_language_model(opened(checkpoint, made), dtype=torch.float32)
    assert f"the model has no {', '.join(layers)}; give the model it was trained on" in str(raised.value)


def test_a_file_of_an_adapter_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"is a file; give the folder that it is in, {tmp_path}/mine$"):
        open_adapter("mine/adapter_config.json")
