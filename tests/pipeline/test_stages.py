"""The stages: picklable, the same to the bit in another process; errors are values; nothing shared is changed."""

from __future__ import annotations

import functools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.models.encoder import Encoded, EncoderSpec, load_encoder
from qvsplit.pipeline import stages
from qvsplit.pipeline.stages import Decode, Encode, JoinSlices, Prepare, Quantize, Read
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.source import Entry
from qvsplit.store.features import POOLER_OUTPUT
from tests.support.extracting import PHOTOS, add_bad
from tests.support.fake_encoder import WIDTH, FakeEncoder, FakePreparer, fake_config
from tests.support.forked import start_program

ELSEWHERE = """
import pickle, sys, torch
torch.set_num_threads(2)
read, decode, prepare, encode, quantize, entries = pickle.load(open(sys.argv[1], "rb"))
results = []
for entry in entries:
    info = read(entry)
    image = decode(entry, info)
    prepared = prepare(image.pixels)
    (encoded,) = encode([prepared])
    results.append((info, image, prepared, encoded, quantize(encoded)))
results.append((read(entries[0].__class__("/", "no such file.png", 1, "1", 1)), encode.encoder.config))
read.pool.close()
decode.pool.close()
pickle.dump(results, open(sys.argv[2], "wb"))
"""


def entry_of(path) -> Entry:
    return Entry(str(path.parent), path.name, path.stat().st_size, "1", 1)


@pytest.mark.parametrize("kernels", ["fused"])
def test_every_stage_gives_the_same_bits_in_another_process(checkpoint, tmp_path, kernels):
    spec = EncoderSpec(open_checkpoint(checkpoint, "encoder"), "cpu", "float32", "bfloat16", kernels=kernels)
    encoder = load_encoder(spec)
    stages = (
        Read(DecoderPool()), Decode(DecoderPool()), Prepare(encoder.preparer),
        Encode(functools.partial(load_encoder, spec), encoder), Quantize(encoder.config, encoder.tensors),
    )  # fmt: skip
    entries = [entry_of(PHOTOS[name]) for name in ("coins.png", "rocket.jpg")]
    (tmp_path / "stages").write_bytes(pickle.dumps((*stages, entries)))
    words = ["", str(tmp_path / "stages"), str(tmp_path / "results")]
    program = start_program(f"import sys\nsys.argv = {words!r}\n{ELSEWHERE}")
    _, said = program.communicate()
    assert program.returncode == 0, said
    *there, (missing, config) = pickle.loads((tmp_path / "results").read_bytes())
    assert isinstance(missing, ItemNotFound)
    assert config == encoder.config
    read, decode, prepare, encode, quantize = stages
    try:
        for entry, (info, image, prepared, encoded, features) in zip(entries, there, strict=True):
            assert read(entry) == info
            here = decode(entry, info)
            assert np.array_equal(here.pixels, image.pixels)
            assert (here.width, here.height, here.format) == (image.width, image.height, image.format)
            own = prepare(here.pixels)
            assert torch.equal(own.values["pixels"], prepared.values["pixels"])
            assert (own.grid_thw, own.placeholder, own.n_tokens) == (
                prepared.grid_thw, prepared.placeholder, prepared.n_tokens
            )  # fmt: skip
            (mine,) = encode([own])
            assert torch.equal(mine.tensors[POOLER_OUTPUT], encoded.tensors[POOLER_OUTPUT])
            stored = quantize(mine)
            assert np.array_equal(stored.tensors[POOLER_OUTPUT].raw, features.tensors[POOLER_OUTPUT].raw)
            assert stored.tensors[POOLER_OUTPUT].dtype == features.tensors[POOLER_OUTPUT].dtype == "bfloat16"
            assert (stored.config, stored.grid_thw, stored.placeholder) == (
                features.config, features.grid_thw, features.placeholder
            )  # fmt: skip
    finally:
        read.pool.close()
        decode.pool.close()


def test_a_pickled_encode_holds_what_loads_the_encoder_and_not_the_encoder():
    encode = Encode(functools.partial(FakeEncoder), FakeEncoder(on_encode=lambda batch: None))
    copy = pickle.loads(pickle.dumps(encode))
    assert copy._encoder is None
    prepared = FakePreparer().prepare(np.full((60, 60, 3), 7, np.uint8))
    here, there = encode([prepared])[0], copy([prepared])[0]
    assert torch.equal(here.tensors[POOLER_OUTPUT], there.tensors[POOLER_OUTPUT])
    assert copy.encoder is copy.encoder  # loaded once


# ------------------------------------------------------------------------------------------------- errors as values


@pytest.fixture
def pool():
    pool = DecoderPool()
    yield pool
    pool.close()


def test_a_bad_file_is_a_value_of_read_or_decode(pool, tmp_path):
    add_bad(tmp_path, "bad.png")
    read, decode = Read(pool), Decode(pool)
    info = read(entry_of(tmp_path / "bad.png"))
    error = decode(entry_of(tmp_path / "bad.png"), info)
    assert isinstance(error, ItemError)
    assert error.kind == "content"
    assert error.__traceback__ is None
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.kind) == (str(error), error.kind)
    (tmp_path / "bad.png").unlink()
    assert isinstance(read(Entry(str(tmp_path), "bad.png", 5, "1", 1)), ItemNotFound)


def test_decode_reads_again_where_the_file_was_read_elsewhere_and_notices_a_change(pool, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PHOTOS["coins.png"].read_bytes())
    info = Read(pool)(entry_of(path))
    elsewhere = DecoderPool()
    try:
        assert Decode(elsewhere)(entry_of(path), info).width == 384
        path.write_bytes(PHOTOS["color.png"].read_bytes())
        error = Decode(DecoderPool())(entry_of(path), info)
        assert "changed while it was being read" in str(error)
    finally:
        elsewhere.close()


def test_a_shape_that_the_processor_refuses_is_a_value_of_prepare():
    assert "too slim" in str(Prepare(FakePreparer())(np.zeros((1, 2010, 3), np.uint8)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_value_beyond_the_storage_dtype_is_a_value_of_quantize(dtype):
    quantize = Quantize(fake_config(dtype), FakeEncoder(fake_config(dtype)).tensors)
    encoded = Encoded({POOLER_OUTPUT: torch.full((1, WIDTH), 1e5)}, (1, 2, 2), (("<|image_pad|>", 1),))
    result = quantize(encoded)
    assert (str(result) == "has values beyond the range of float16") is (dtype == "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_without_room_on_the_device_features_are_made_bytes_of_on_the_host(dtype, monkeypatch):
    quantize = Quantize(fake_config(dtype), FakeEncoder(fake_config(dtype)).tensors)
    values = torch.randn((5, WIDTH), generator=torch.Generator().manual_seed(0))
    encoded = Encoded({POOLER_OUTPUT: values}, (1, 2, 10), (("<|image_pad|>", 5),))

    def no_room(values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    result, expected = (quantize(encoded, *more).tensors[POOLER_OUTPUT].raw for more in ((no_room,), ()))
    assert np.array_equal(result, expected)
    monkeypatch.setattr(stages, "to_host", no_room)
    error = quantize(encoded, no_room)
    assert (str(error), error.kind) == ("its features do not fit into memory", "memory")


@pytest.mark.parametrize("limit", ["MAX_VALUE_BYTES", "MAX_ROW_BYTES"])
def test_more_features_than_a_row_has_are_a_value_of_quantize(monkeypatch, limit):
    spec = FakeEncoder().tensors[0]
    specs = (spec, *(replace(spec, name="deepstack_features", level=level) for level in range(2)))
    encoded = Encoded({one.key: torch.ones((2, WIDTH)) for one in specs}, (1, 2, 4), (("<|image_pad|>", 2),))
    quantize = Quantize(fake_config(), specs)
    all_of_one, all_of_it = 2 * WIDTH * 4, 3 * 2 * WIDTH * 4
    bound = all_of_one if limit == "MAX_VALUE_BYTES" else all_of_it
    monkeypatch.setattr(f"qvsplit.store.shard_writer.{limit}", bound + 1)
    assert len(quantize(encoded)) == 3
    monkeypatch.setattr(f"qvsplit.store.shard_writer.{limit}", bound)
    error = quantize(encoded)
    assert isinstance(error, ItemError)
    assert f"has {bound} bytes of " in str(error) and "try a smaller `max_pixels`" in str(error)


def test_more_inputs_than_a_row_has_are_a_value_of_quantize():
    quantize = Quantize(fake_config(), FakeEncoder().tensors)
    pooling = {"image_token_pooling": {"dtype": "int64", "shape": [3000, 4], "values": [12345] * 12_000}}
    encoded = Encoded({POOLER_OUTPUT: torch.ones((2, WIDTH))}, (1, 2, 4), (("<|image_pad|>", 2),), pooling)
    error = quantize(encoded)
    assert isinstance(error, ItemError) and "its image_token_pooling have 84," in str(error)


def test_a_bug_is_no_value():
    with pytest.raises(AttributeError):
        Prepare(FakePreparer())("no array")


# ---------------------------------------------------------------------------------------------- numbers, sharing


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_quantize_rounds_once(compute, stored):
    values = torch.randn(3, WIDTH).to(getattr(torch, compute))
    quantize = Quantize(fake_config(stored), FakeEncoder(fake_config(stored)).tensors)
    features = quantize(Encoded({POOLER_OUTPUT: values}, (1, 2, 6), (("<|image_pad|>", 3),)))
    expected = values.to(getattr(torch, stored))
    assert features.tensors[POOLER_OUTPUT].dtype == stored
    assert features.n_tokens == 3
    assert np.array_equal(
        features[POOLER_OUTPUT], expected.float().numpy() if stored != "float16" else expected.numpy()
    )


@pytest.mark.parametrize("width", [WIDTH])
def test_int8_is_each_token_over_its_own_scale(width):
    values = torch.tensor([[0.0] * width, [1.0] * width, [-254.0, 2.0] * (width // 2)])
    quantize = Quantize(fake_config("int8"), FakeEncoder(fake_config("int8")).tensors)
    stored = quantize(Encoded({POOLER_OUTPUT: values}, (1, 2, 6), (("<|image_pad|>", 3),))).tensors[POOLER_OUTPUT]
    assert stored.raw.shape == (3, width + 4)
    np.testing.assert_allclose(stored.numpy(), values.numpy(), atol=1e-6)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_no_stage_changes_what_it_is_given(checkpoint, kernels):
    """Workers share it: what is tried again must be what it was."""
    spec = EncoderSpec(open_checkpoint(checkpoint, "encoder"), "cpu", "float32", "float16", kernels=kernels)
    encoder = load_encoder(spec)
    image = np.random.default_rng(0).integers(0, 255, (84, 112, 3), np.uint8)
    pristine = image.copy()
    prepare, quantize = Prepare(encoder.preparer), Quantize(encoder.config, encoder.tensors)
    one, other = prepare(image), prepare(np.ascontiguousarray(image[::-1]))
    assert np.array_equal(image, pristine)
    before = [item.values["pixels"].clone() for item in (one, other)]
    encode = Encode(functools.partial(load_encoder, spec), encoder)
    first, second = encode([one, other]), encode([one, other])
    for item, pixels in zip((one, other), before, strict=True):
        assert torch.equal(item.values["pixels"], pixels)
    kept = [result.tensors[POOLER_OUTPUT].clone() for result in first]
    for result, again, values in zip(first, second, kept, strict=True):
        assert np.array_equal(quantize(result).tensors[POOLER_OUTPUT].raw, quantize(again).tensors[POOLER_OUTPUT].raw)
        assert torch.equal(result.tensors[POOLER_OUTPUT], values)


def test_slices_are_joined_under_the_config_of_clips():
    """With its containers, which may be others than those of images."""
    encoder = FakeEncoder()
    frames = [np.full((60, 80, 3), number, np.uint8) for number in (10, 20, 30)]
    slices = [
        Quantize(encoder.config, encoder.tensors)(encoder.encode([FakePreparer().prepare(one)])[0]) for one in frames
    ]
    config = replace(encoder.config, videos={"containers": {POOLER_OUTPUT: "tensor"}})
    for some in (slices, slices[:1]):
        joined = JoinSlices(config, encoder.tensors)(some)
        assert joined.config is config
        assert joined.containers == {POOLER_OUTPUT: "tensor"}
        assert joined.grid_thw == (len(some), *slices[0].grid_thw[1:])
        assert np.array_equal(joined[POOLER_OUTPUT], np.concatenate([one[POOLER_OUTPUT] for one in some]))
        assert joined.placeholder == slices[0].placeholder
