"""What is counted from config and headers is what is loaded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qvsplit import weights
from qvsplit.checkpoints import sizes
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES
from tests.support.every_model import further
from tests.support.families import ALL

# tied and not, experts, a recurrent decoder, one with convolutions, latent keys, a tensor of both halves
COUNTED = ("qwen2_vl", "qwen3_vl_moe", "qwen3_5", "gemma3", "llava_onevision", "lfm2_vl", "kimi_k25")
REFUSED = {"llama4", "idefics2", "ovis2", "granite4_vision", "hunyuan_vl", "gemma3n", "perception_lm", "fast_vlm"}


@pytest.mark.parametrize(
    "name", [name if name in COUNTED else pytest.param(name, marks=further) for name in ALL if name not in REFUSED]
)
def test_parameters_and_cache_are_those_of_the_loaded_halves(name, family_checkpoint):
    checkpoint = open_checkpoint(family_checkpoint(name), "both")
    counted = sizes.count(checkpoint)
    encoder = weights.load_encoder_weights(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert counted.encoder * 4 == encoder.encoder_bytes
    model = weights.load_language_model(checkpoint, dtype=torch.bfloat16, kernels="reference")
    loaded = sum(parameter.nbytes for parameter in model.parameters())
    kept_wide = sum(p.nbytes // 2 for p in model.parameters() if p.dtype == torch.float32)  # routers of experts
    assert counted.language * 2 == loaded - kept_wide
    assert counted.embedding == model.get_input_embeddings().weight.numel()
    assert counted.is_tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    layers = model(input_ids=torch.tensor([[1]]), use_cache=True).past_key_values.layers
    states = [getattr(layer, kind, None) for layer in layers for kind in ("keys", "values")]
    assert counted.cached in (None, sum(state.numel() for state in states if torch.is_tensor(state)))
    assert (counted.cached is None) == (
        name in {"qwen4_exp", "step3p7"}
    )  # of which no token is computed without memory


def test_what_files_hold_is_read_off_their_headers(family_checkpoint):
    checkpoint = open_checkpoint(family_checkpoint("qwen2_5_omni"), "both")
    places = checkpoint.places(list(checkpoint.files))
    halves = [*checkpoint.encoder_names, *checkpoint.language_names]
    rest = sizes.not_loaded(checkpoint)
    assert {name: len(names) for name, names in rest.items()} == {"talker": 1, "audio_tower": 24, "token2wav": 1}
    assert Counter(halves) + Counter(name for names in rest.values() for name in names) == Counter([*checkpoint.files])
    found = sizes.stored(checkpoint.encoder_names, places)
    values = sum(place.size // SAFETENSORS_BYTES[place.dtype] for place in places.values() if "visual" in place.name)
    assert (found.tensors, found.dtypes, found.bytes) == (
        len(checkpoint.encoder_names),
        {"F32": 4 * values},
        4 * values,
    )
    unseen = sizes.stored(checkpoint.encoder_names, {name: places[name] for name in checkpoint.encoder_names[:1]})
    assert (unseen.tensors, unseen.unknown, unseen.bytes) == (found.tensors, found.tensors - 1, None)


def test_layers_that_predict_further_tokens_are_not_loaded(family_checkpoint):
    checkpoint = open_checkpoint(family_checkpoint("qwen3_5"), "both")
    ((module, names),) = sizes.not_loaded(checkpoint).items()
    assert module == "mtp"
    assert set(names) < set(checkpoint.language_names)


@pytest.mark.parametrize(
    ("stored", "name"),
    [("BF16", "bfloat16"), ("F8_E4M3", "float8_e4m3"), ("I32", "int32"), ("U8", "uint8"), ("BOOL", "bool"), ("F64", "float64")],
)  # fmt: skip
def test_dtypes_have_torchs_names(stored, name):
    assert sizes.dtype_name(stored) == name


@pytest.mark.parametrize(
    ("is_tied", "value_bytes", "stored_bytes", "beside"),
    [(True, 4, 2, 20), (False, 4, 2, -20), (True, 2, 2, 0), (False, 2, 4, 20), (True, 2, 4, 40)],
)
def test_rows_of_the_embedding_are_looked_up_as_they_are_stored(is_tied, value_bytes, stored_bytes, beside):
    loaded = sizes.Loaded(encoder=0, language=100, embedding=10, is_tied=is_tied, cached=None)
    assert loaded.embedding_beside(value_bytes, stored_bytes) == beside
