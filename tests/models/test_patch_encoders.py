"""Encoders of patches, one of each kind: what is stored, many images in one forward pass, memory, cancelling, clips."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.encoder import _flops
from qvsplit.answering.options import AskOptions
from qvsplit.ask import load_session
from qvsplit.checkpoints import opening
from qvsplit.checkpoints.families import FAMILIES as LISTED
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ConfigError, ItemError, ModelError
from qvsplit.models.encoder import Cancelled, EncoderSpec, PatchEncoder, load_encoder
from qvsplit.models.encoder_shape import shape_of
from qvsplit.sources.images import open_file
from qvsplit.store.features import POOLER_OUTPUT
from qvsplit.store.opening import open_store
from tests.models.test_encoder import a_clip
from tests.support.columns import NEW_TOKENS, SWITCHES
from tests.support.extracting import add, contents, extractor
from tests.support.families.building import make_checkpoint
from tests.support.families.qwen import HIDDEN, MROPE, QWEN, VISION_2, VISION_2_5, VISION_3, vl
from tests.support.own_encoders import load_own_encoder, peak_bytes
from tests.support.photographs import photographs

EVERY = [name for name, family in LISTED.items() if family.fused_kernels]
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]  # of widths, windows, levels
SIZES = ((300, 200), (90, 260), (64, 64), (300, 200), (35, 500))
KERNELS = ["fused", "reference"]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Photographs of unequal sizes; two are of one size."""
    opened = [Image.open(path).convert("RGB") for path in photographs()[: len(SIZES)]]
    return [np.array(image.resize(size)) for image, size in zip(opened, SIZES, strict=True)]


@pytest.fixture(scope="module")
def load(family_checkpoint):
    def load(name: str, kernels: str, dtype: str = "float32") -> PatchEncoder:
        return load_encoder(
            EncoderSpec(open_checkpoint(family_checkpoint(name), "encoder"), "cpu", dtype, kernels=kernels)
        )

    return load


def off(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


# ----------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("name", EVERY[1:])
def test_what_is_stored_is_laid_out_as_the_models_own_output(name, load, family_checkpoint, images):
    """A store that was made so before there were other kernels goes on, in the same bits."""
    own, mine = load_own_encoder(family_checkpoint(name)), load(name, "reference")
    assert isinstance(mine, PatchEncoder)
    assert (mine.config, mine.tensors) == (own.config, own.tensors)
    assert mine.load_clips().config == own.load_clips().config
    clip, info, frames = a_clip()
    for encode in (
        lambda encoder: encoder.encode([encoder.preparer.prepare(images[0])]),
        lambda encoder: encoder.encode(list(encoder.load_clips().preparer.prepare(clip, info, iter(frames), 1))),
    ):
        for one, other in zip(encode(mine), encode(own), strict=True):
            assert [*one.tensors] == [*other.tensors] == [spec.key for spec in mine.tensors]
            assert all(torch.equal(rows, other.tensors[key]) for key, rows in one.tensors.items())
            assert one.shapes == other.shapes == {}
            assert (one.grid_thw, one.placeholder, one.inputs) == (other.grid_thw, other.placeholder, other.inputs)


@pytest.mark.parametrize("name", KINDS)
def test_kernels_are_all_in_which_the_config_differs(name, load):
    fused, reference = load(name, "fused"), load(name, "reference")
    assert fused.tensors == reference.tensors
    assert fused.config == replace(reference.config, kernels="fused")
    assert fused.load_clips().config == replace(reference.load_clips().config, kernels="fused")


@pytest.mark.parametrize("name", EVERY)
def test_pixels_are_the_processors_own_to_the_bit(name, load, images):
    encoder = load(name, "reference")
    for image in images:
        one = encoder.preparer.prepare(image)
        theirs = encoder.preparer.processor.image_processor(images=[Image.fromarray(image)], return_tensors="pt")
        assert one.values["pixels"].dtype == torch.uint8
        assert torch.equal(encoder.pixel_values(one), theirs["pixel_values"])
        assert one.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
        assert one.patches == 4 * one.n_tokens == len(theirs["pixel_values"])


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_empty_batch_gives_nothing(kernels, load):
    assert load("qwen3_vl", kernels).encode([]) == []


@pytest.mark.parametrize("name", EVERY)
def test_images_of_one_forward_pass_have_the_references_features_within_rounding(name, load, images):
    """Of every level, in the order in which they came."""
    fused, reference = load(name, "fused"), load(name, "reference")
    batch = [fused.preparer.prepare(image) for image in images]
    passes = []
    real = fused._fused
    fused._fused = lambda *given, **options: passes.append(len(given[1])) or real(*given, **options)
    together, alone = fused.encode(batch), reference.encode(batch)
    assert passes == [len(batch)]
    for prepared, mine, theirs in zip(batch, together, alone, strict=True):
        assert [*mine.tensors] == [*theirs.tensors]
        for key, rows in mine.tensors.items():
            assert rows.shape == (prepared.n_tokens, HIDDEN)
            assert off(rows, theirs.tensors[key]) < 1e-5
    a, b = (one.tensors[POOLER_OUTPUT] for one in (alone[0], alone[3]))
    assert off(a, b) > 0.01  # one size, two images


@pytest.mark.parametrize("name", KINDS)
def test_clips_go_beside_images_in_one_batch(name, load, images):
    fused, reference = load(name, "fused"), load(name, "reference")
    clips, (clip, info, frames) = fused.load_clips(), a_clip()
    assert clips.preparer.in_slices
    (whole,) = clips.preparer.prepare(clip, info, iter(frames), 10**6)
    slices = list(clips.preparer.prepare(clip, info, iter(frames), 1))
    image = fused.preparer.prepare(images[1])
    _, mine, _, *parts = fused.encode([image, whole, image, *slices])
    (theirs,) = reference.encode([whole])
    assert mine.kind == "video"
    for key, rows in theirs.tensors.items():
        assert off(mine.tensors[key], rows) < 1e-5
        assert off(torch.cat([part.tensors[key] for part in parts]), rows) < 1e-5


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("kernels", KERNELS)
def test_an_image_with_a_value_that_is_not_finite_in_any_level_fails_alone(kernels, place, load, images, monkeypatch):
    encoder = load("qwen3_vl", kernels)
    batch = [encoder.preparer.prepare(image) for image in images[:3]]
    key = encoder.tensors[place].key
    real = encoder._forward

    def spoiled(items):
        given = real(items)
        for item, tensors in zip(items, given, strict=True):
            if item is batch[1]:
                tensors[key] = tensors[key].clone().index_fill_(0, torch.tensor([2]), float("inf"))
        return given

    monkeypatch.setattr(encoder, "_forward", spoiled)
    first, failed, last = encoder.encode(batch)
    assert (first.grid_thw, last.grid_thw) == (batch[0].grid_thw, batch[2].grid_thw)
    assert isinstance(failed, ItemError)
    assert str(failed) == "the encoder gave values that are not finite in float32"


def test_a_batch_that_does_not_fit_is_halved(load, images, monkeypatch):
    encoder = load("qwen3_vl", "fused")
    batch = [encoder.preparer.prepare(image) for image in images]
    expected, sizes = encoder.encode(batch), []
    real, limit = encoder._forward, max(one.patches for one in batch) - 1

    def forward(items):
        sizes.append(len(items))
        if sum(one.patches for one in items) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(items)

    monkeypatch.setattr(encoder, "_forward", forward)
    got = encoder.encode(batch)
    assert sizes[:3] == [5, 2, 1]
    for item, one, other in zip(batch, got, expected, strict=True):
        if item.patches > limit:
            assert isinstance(one, ItemError) and one.kind == "memory"
        else:
            for key, rows in other.tensors.items():
                assert off(one.tensors[key], rows) < 1e-5
    assert 0 < sum(isinstance(one, ItemError) for one in got) < len(batch)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", KINDS[1:])
def test_it_can_be_cancelled_between_layers(name, kernels, load, images):
    encoder = load(name, kernels)
    batch, seen = [encoder.preparer.prepare(images[0])], []
    real = encoder._cancelled.is_set

    class AtTheThird:
        """Is set when asked the third time: before the second layer."""

        def is_set(self) -> bool:
            seen.append(1)
            return len(seen) >= 3 or real()

    check = encoder._check_cancelled
    assert check.args == (encoder._cancelled,)
    encoder.encode(batch)
    encoder._cancelled.is_set = AtTheThird().is_set
    with pytest.raises(Cancelled):
        encoder.encode(batch)
    assert len(seen) == 3


# ----------------------------------------------------------------------------------------------------------- memory

WIDE = {"num_heads": 4, "depth": 2}
WIDER = {
    "qwen2_vl": ("Qwen2VLConfig", VISION_2 | WIDE | {"embed_dim": 320, "mlp_ratio": 4, "depth": 1}),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig", VISION_2_5 | WIDE | {"hidden_size": 320, "intermediate_size": 856, "window_size": 112},
    ),
    "qwen3_vl": ("Qwen3VLConfig", VISION_3 | WIDE | {"hidden_size": 320, "intermediate_size": 1196, "deepstack_visual_indexes": [0, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", WIDER)
def test_a_forward_pass_takes_no_more_memory_than_is_reckoned(name, kernels, tmp_path, images):
    """Of widths in the true shapes' proportions. oneDNN's own memory is not seen."""
    config, vision = WIDER[name]
    (tiny,) = (one for one in QWEN if one.model_type == name)
    text = {"rope_parameters": MROPE} if name != "qwen3_vl" else {"head_dim": 16, "rope_parameters": MROPE}
    make_checkpoint(replace(tiny, config=vl(config, text, vision)), tmp_path / "model")
    encoder = load_encoder(
        EncoderSpec(open_checkpoint(tmp_path / "model", "encoder"), "cpu", "float32", kernels=kernels)
    )
    batch = [encoder.preparer.prepare(np.array(Image.fromarray(image).resize((900, 700)))) for image in images[:2]]
    batch = batch if kernels == "fused" else batch[:1]
    encoder.encode(batch)
    peak = peak_bytes(lambda: encoder.encode(batch))
    reckoned = encoder.bytes_per_patch * sum(one.patches for one in batch)
    assert 0.5 * reckoned < peak < 1.1 * reckoned


@pytest.mark.parametrize("name", EVERY)
def test_the_shape_is_that_of_the_module(name, load):
    encoder = load(name, "reference")
    shape, module = encoder.shape, encoder.weights.module
    assert (shape.channels, shape.temporal, shape.merge) == (3, 2, 2)
    assert shape.patch == encoder.preparer.processor.image_processor.patch_size
    assert (shape.width, shape.out) == (32, HIDDEN)
    first = next(one for one in module.blocks[0].mlp.modules() if isinstance(one, torch.nn.Linear))
    assert shape.mlp == first.out_features
    assert shape.gated == name.startswith("qwen2_5")
    assert shape.levels == (2 if name.startswith(("qwen3_vl", "qwen3_omni")) else 0)
    assert shape == shape_of(encoder.spec.checkpoint.vision_settings, encoder.spec.checkpoint.folder)
    assert shape.flops(12 * 20) == _flops(module, [(1, 12, 20)])  # windows of 4 x 4 patches, none cut off


# ------------------------------------------------------------------------------------------- files that do not fit

WRONG = {
    "patches of another size": ("qwen2_vl", "image_processor", "patch_size", 16, "patch_size 14, and its Qwen2VLImageProcessor"),
    "of other frames": ("qwen2_5_vl", "image_processor", "temporal_patch_size", 4, "temporal_patch_size 2, and its Qwen2VLImage"),
    "tokens of more": ("qwen3_vl", "image_processor", "merge_size", 1, "spatial_merge_size 2, and its Qwen2VLImageProcessor merge_size 1"),
    "no windows": ("qwen2_5_vl", "vision_config", "window_size", 0, "window_size 0, smaller than a token of 28 pixels"),
    "small windows": ("qwen2_5_vl", "vision_config", "window_size", 27, "window_size 27, smaller"),
    "levels of no layer": ("qwen3_vl", "vision_config", "deepstack_visual_indexes", [0, 9], "3 layers, of which deepstack_visual_indexes [0, 9]"),
    "a level twice": ("qwen3_vl", "vision_config", "deepstack_visual_indexes", [1, 1], "must name each once"),
    "a level from the end": ("qwen3_vl", "vision_config", "deepstack_visual_indexes", [-1], "must name each once"),
    "heads": ("qwen3_5", "vision_config", "num_heads", 5, "5 heads, which do not divide its width of 32"),
    "grey": ("qwen2_vl", "vision_config", "in_channels", 1, "in_channels 1, and images have 3"),
    "nothing": ("qwen2_5_vl", "vision_config", "patch_size", 0, "patch_size 0, which must be a whole number"),
    "two sizes": ("qwen2_5_vl", "vision_config", "patch_size", [14, 14], "patch_size [14, 14], which must be"),
}  # fmt: skip


def changed(folder, out, section, field, value):
    """Give a copy of a checkpoint, a field of whose config or processor is another."""
    shutil.copytree(folder, out)
    path = out / ("config.json" if section == "vision_config" else "processor_config.json")
    config = json.loads(path.read_text())
    config[section][field] = value
    path.write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("case", WRONG)
def test_an_encoder_that_does_not_fit_its_files_is_refused_in_a_line(case, family_checkpoint, tmp_path):
    name, section, field, value, said = WRONG[case]
    folder = changed(family_checkpoint(name), tmp_path / "model", section, field, value)
    with pytest.raises(ModelError) as raised:
        load_encoder(EncoderSpec(open_checkpoint(folder, "encoder"), "cpu", "float32"))
    assert str(raised.value).startswith(f"{folder}: its vision encoder has ")
    assert said in str(raised.value)


def test_a_video_processor_that_does_not_fit_leaves_images_as_they_are(family_checkpoint, load, tmp_path, images):
    made = changed(family_checkpoint("qwen3_vl"), tmp_path / "model", "video_processor", "patch_size", 8)
    encoder = load_encoder(EncoderSpec(open_checkpoint(made, "encoder"), "cpu", "float32"))
    (one,), (other,) = (
        each.encode([each.preparer.prepare(images[1])]) for each in (encoder, load("qwen3_vl", "fused"))
    )
    assert torch.equal(one.tensors[POOLER_OUTPUT], other.tensors[POOLER_OUTPUT])
    with pytest.raises(ModelError, match="patch_size 16, and its Qwen3VLVideoProcessor patch_size 8"):
        encoder.load_clips()


# ------------------------------------------------------------------------------------------------------------ stores


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_store_from_before_there_were_fused_kernels_goes_on_without_them(
    name, family_checkpoint, some_photos, tmp_path
):
    extract, model = extractor(str(family_checkpoint(name)), tmp_path / "store"), LISTED[name]
    with pytest.MonkeyPatch.context() as patch:  # as it was: any family's encoder
        patch.setattr(opening, "FAMILIES", {**LISTED, name: replace(model, fused_kernels=False)})
        assert extract(some_photos).encoded == 4
    add(some_photos, "more.png")
    assert extract(some_photos).encoded == 1
    assert open_store(tmp_path / "store").config.kernels == "reference"
    extractor(str(family_checkpoint(name)), tmp_path / "again")(some_photos, kernels="reference")
    assert contents(tmp_path / "store") == contents(tmp_path / "again")
    with pytest.raises(ConfigError, match="`kernels` fused instead of reference"):
        extract(some_photos, kernels="fused")
    extract(some_photos, rebuild=True, kernels="fused")
    assert open_store(tmp_path / "store").config.kernels == "fused"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_answers_from_fused_features_are_the_full_models(
    name, family_checkpoint, family_reference, some_photos, tmp_path
):
    extractor(str(family_checkpoint(name)), tmp_path / "store")(some_photos)
    session = load_session(tmp_path / "store", AskOptions(max_new_tokens=NEW_TOKENS))
    assert session.store.config.kernels == "fused"
    for row in session.store:
        expected = family_reference(name).answer(
            [open_file(some_photos / row.path)], "What is shown?", new_tokens=NEW_TOKENS, **SWITCHES
        )
        assert session.answer(row, "What is shown?").tokens == expected
