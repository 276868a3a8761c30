"""Named tensors of one item, and how a store declares them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.store.features import StoredTensor, TensorSpec, containers_of
from tests.support import rows
from tests.support.fake_encoder import fake_config


def test_float32_and_float16_are_given_as_they_are():
    for dtype, kind in (("float32", np.float32), ("float16", np.float16)):
        raw = rows.values(5, dtype)
        tensor = StoredTensor(raw, dtype)
        assert (tensor.n_tokens, tensor.width, tensor.numpy().dtype) == (5, rows.WIDTH, kind)
        assert tensor.numpy().tobytes() == raw.tobytes()


def test_bfloat16_widens_exactly():
    raw = rows.values(5, "bfloat16")
    words = raw.view("<u2")
    values = StoredTensor(raw, "bfloat16").numpy()
    assert values.dtype == np.float32
    assert np.array_equal(values.view(np.uint32) >> 16, words)
    assert not (values.view(np.uint32) & 0xFFFF).any()


def test_int8_is_multiplied_by_each_tokens_scale():
    raw = rows.values(5, "int8")
    tensor = StoredTensor(raw, "int8")
    expected = raw[:, : rows.WIDTH].view(np.int8).astype(np.float32) * raw[:, rows.WIDTH :].copy().view(np.float32)
    assert (tensor.n_tokens, tensor.width) == (5, rows.WIDTH)
    assert np.array_equal(tensor.numpy(), expected)


def test_features_are_named_as_the_models_output_names_them():
    one = rows.features(6, levels=2)
    assert list(one) == ["pooler_output", "deepstack_features_0", "deepstack_features_1"]
    assert np.array_equal(one["deepstack_features_1"], one.tensors["deepstack_features_1"].numpy())
    assert one.n_tokens == 6


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_they_are_named_arrays_and_tensors_in_the_shape_of_the_encoders_output(dtype):
    made = rows.features(6, dtype, levels=1)
    one = dataclasses.replace(made, shapes={"pooler_output": (2, 3, rows.WIDTH)})
    arrays, tensors = dict(one), one.torch()
    assert set(arrays) == set(tensors) == set(one) and len(one) == 2 and "pooler_output" in one
    for name, shape in (("pooler_output", (2, 3, rows.WIDTH)), ("deepstack_features_0", (6, rows.WIDTH))):
        assert arrays[name].shape == tuple(tensors[name].shape) == shape
        assert tensors[name].dtype == getattr(torch, dtype if dtype != "int8" else "float32")
        assert np.array_equal(tensors[name].float().numpy(), arrays[name].astype(np.float32))
        if dtype != "int8":
            assert tensors[name].view(torch.uint8).numpy().tobytes() == one.tensors[name].raw.tobytes()
    with pytest.raises(KeyError, match="no tensor 'embeds'; there are pooler_output, deepstack_features_0"):
        one["embeds"]
    assert f"pooler_output 6×{rows.WIDTH} {dtype}" in repr(one)


def test_each_tensor_has_a_column_and_comes_back_from_json():
    specs = rows.specs("int8", levels=2)
    assert [spec.column for spec in specs] == ["embeds", "deepstack_features_0", "deepstack_features_1"]
    assert specs[0].token_bytes == rows.WIDTH + 4
    for spec in specs:
        assert TensorSpec.from_json(spec.to_json(), "x.parquet") == spec


@pytest.mark.parametrize("changes", [{"name": "audio"}, {"dtype": "int4"}, {"container": "set"}, {"scale": 2}], ids=str)
def test_an_unknown_tensor_was_made_by_a_newer_version(changes):
    with pytest.raises(ConfigError, match=r"x\.parquet was made by a newer qvsplit"):
        TensorSpec.from_json(rows.specs()[0].to_json() | changes, "x.parquet")


@pytest.mark.parametrize(
    "changes",
    [{"name": None}, {"dtype": None}, {"dtype": []}, {"container": 7}, {"width": 0}, {"width": -1}, {"width": 1 << 21},
     {"width": 8.0}, {"width": True}, {"width": "8"}, {"column": "path"}, {"column": None}, {"level": 0}],
    ids=str,
)  # fmt: skip
def test_a_tensor_that_cannot_be_is_damage(changes):
    with pytest.raises(StoreDamaged, match=r"x\.parquet"):
        TensorSpec.from_json(rows.specs()[0].to_json() | changes, "x.parquet")


@pytest.mark.parametrize("level", [-1, 64, True, 0.0, "0", None])
def test_a_level_that_cannot_be_is_damage(level):
    spec = rows.specs(levels=1)[1].to_json() | {"level": level, "column": f"deepstack_features_{level}"}
    with pytest.raises(StoreDamaged, match="cannot be"):
        TensorSpec.from_json(spec, "x.parquet")


def test_containers_of_videos_are_their_own():
    """A model may give one tensor for an image, and a list with one an item for videos."""
    specs = (
        TensorSpec("pooler_output", "float32", 4, "tensor"),
        TensorSpec("deepstack_features", "float32", 4, "list", 0),
    )
    config = fake_config()
    assert containers_of(specs, config) == {"pooler_output": "tensor"}
    assert containers_of(specs, config, "video") == {}
    videos = {"containers": {"deepstack_features_0": "tuple"}}
    assert containers_of(specs, dataclasses.replace(config, videos=videos), "video") == {
        "deepstack_features_0": "tuple"
    }
    assert containers_of(specs, dataclasses.replace(config, videos=videos)) == {"pooler_output": "tensor"}
