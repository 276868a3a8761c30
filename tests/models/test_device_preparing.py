"""Images prepared on the encoder's device: torchvision's rule there, the same patches and prompts, nearly the same pixels."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ConfigError, ItemError, UsageError
from qvsplit.extract import extract_files
from qvsplit.models.device_preparing import resized, size_of
from qvsplit.models.encoder import EncoderSpec, load_encoder
from qvsplit.models.preparing import normalising_later
from qvsplit.pipeline import encoding, runner
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.sources.images import open_file
from qvsplit.store.opening import open_store
from tests.support.extracting import add, contents

NAMES = ("chelsea.png", "coffee.png", "tall.png", "rocket.jpg")


def load(checkpoint, prepare_on, *, kernels="fused", device="cpu"):
    return load_encoder(
        EncoderSpec(open_checkpoint(checkpoint, "encoder"), device, "float32", kernels=kernels, prepare_on=prepare_on)
    )


@pytest.fixture(scope="module")
def images(photos):
    return [np.array(open_file(photos / name)) for name in NAMES]


def in_float32(image: torch.Tensor, size, mode) -> torch.Tensor:
    """torchvision's rule where it has no kernel for bytes: as on CUDA."""
    values = functional.resize(image.permute(2, 0, 1).float(), list(size), interpolation=mode, antialias=True)
    return values.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)


@pytest.mark.parametrize("size", [(140, 196), (448, 28), (900, 1204)])
@pytest.mark.parametrize(("number", "mode"), [(2, "bilinear"), (3, "bicubic")])
def test_it_resizes_as_torchvision_does_where_it_has_no_kernel_for_bytes(images, size, number, mode):
    from torchvision.transforms import InterpolationMode

    image = torch.from_numpy(images[0])
    got = resized(image, size, number)
    assert got.dtype == torch.uint8
    assert torch.equal(got, in_float32(image, size, InterpolationMode(mode)))
    on_cpu = functional.resize(
        image.permute(2, 0, 1), list(size), interpolation=InterpolationMode(mode), antialias=True
    )
    assert (got.permute(2, 0, 1).int() - on_cpu.int()).abs().max() <= 1


def test_an_image_of_the_right_size_stays_what_it_is(images):
    image = torch.from_numpy(images[0])
    assert resized(image, tuple(image.shape[:2]), 3) is image


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [(140, 196), (448, 28), (900, 1204)])
def test_on_cuda_it_resizes_as_torchvision_does_there(images, size):
    image = torch.from_numpy(images[0]).cuda()
    theirs = functional.resize(image.permute(2, 0, 1), list(size), interpolation="bicubic", antialias=True)
    assert torch.equal(resized(image, size, 3), theirs.permute(1, 2, 0))
    assert (resized(image, size, 3).cpu().int() - resized(image.cpu(), size, 3).int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_patches_and_prompt_are_known_without_a_pixel_and_pixels_are_nearly_the_same(name, family_checkpoint, images):
    there, here = (load(family_checkpoint(name), place, kernels="reference") for place in ("device", "cpu"))
    preparer = pickle.loads(pickle.dumps(there.preparer))
    some_differ = False
    for image in images:
        outline, whole = preparer.prepare(image), here.preparer.prepare(image)
        assert (outline.grid_thw, outline.patches, outline.n_tokens, outline.placeholder) == (
            whole.grid_thw, whole.patches, whole.n_tokens, whole.placeholder
        )  # fmt: skip
        assert (outline.decoded_bytes, whole.decoded_bytes) == (image.nbytes, 0)
        patches = preparer.patches(outline.values["decoded"], outline.grid_thw)
        difference = (patches.int() - whole.values["pixels"].int()).abs()
        assert patches.dtype == torch.uint8
        assert int(difference.max()) <= 20  # at hard edges: bytes are clamped between rows and columns, too
        assert float((difference > 0).float().mean()) < 0.25
        assert float((difference > 1).float().mean()) < 0.001
        some_differ |= bool(difference.any())
    assert some_differ
    with pytest.raises(ItemError, match="slimmer than 1:200"):
        preparer.prepare(np.zeros((1, 300, 3), np.uint8))


def test_only_the_image_processor_works_on_the_device_with_the_whole_processors_bits(checkpoint, images, monkeypatch):
    preparer = load(checkpoint, "device").preparer
    own = preparer.processor.image_processor
    image = torch.from_numpy(images[0])
    grid = preparer.prepare(images[0]).grid_thw
    there = resized(image, size_of(grid, own), own.resample)
    whole, _ = preparer._processed(there, do_resize=False, **normalising_later(own))
    monkeypatch.setattr(type(preparer), "_processed", None)
    assert torch.equal(preparer.patches(image, grid), preparer.first_slices(whole["pixel_values"]))


def test_a_slim_image_is_resized_once(checkpoint, tmp_path, run_cli, extract_with_model):
    """The processor's own limits hold for it only nearly, so that it would resize what it has resized."""
    limits = {"prepare_on": "device", "max_pixels": 28 * 28 * 100}
    preparer = load_encoder(EncoderSpec(open_checkpoint(checkpoint, "encoder"), "cpu", "float32", **limits)).preparer
    image = np.random.default_rng(0).integers(0, 256, (40, 6000, 3), np.uint8)
    outline = preparer.prepare(image)
    assert 14 * 14 * outline.patches > limits["max_pixels"]
    assert len(preparer.patches(outline.values["decoded"], outline.grid_thw)) == outline.patches
    Image.fromarray(image).save(tmp_path / "slim.png")
    assert extract_with_model(tmp_path / "slim.png", out=tmp_path / "embeds", **limits).encoded == 1
    code, printed, said = run_cli("verify", tmp_path / "embeds", "--sample", 1)
    assert (code, printed.count("same tokens")) == (0, 1), said


@pytest.mark.parametrize(("name", "kernels"), [
    ("qwen2_vl", "fused"), ("qwen2_vl", "reference"), ("qwen2_5_vl", "reference"), ("qwen3_vl", "reference"),
])  # fmt: skip
def test_features_are_nearly_those_of_images_prepared_on_the_cpu(family_checkpoint, images, name, kernels):
    there, here = (load(family_checkpoint(name), place, kernels=kernels) for place in ("device", "cpu"))
    mine, theirs = (one.encode([one.preparer.prepare(image) for image in images]) for one in (there, here))
    for one, other in zip(mine, theirs, strict=True):
        for key, b in other.tensors.items():
            assert 0 < float((one.tensors[key] - b).norm() / b.norm()) < 0.03
        assert (one.grid_thw, one.placeholder) == (other.grid_thw, other.placeholder)


def test_a_store_is_continued_as_it_was_begun_and_not_otherwise(extract_with_model, some_photos, tmp_path, run_cli):
    for place in ("device", "cpu"):
        extract_with_model(some_photos, out=tmp_path / place, prepare_on=place, patch_budget=1)
    config = open_store(tmp_path / "device").config
    assert (config.processor["prepared_on"], config.prepared_on) == ("device", "device")
    assert "prepared_on" not in open_store(tmp_path / "cpu").config.processor
    assert contents(tmp_path / "device") != contents(tmp_path / "cpu")
    add(some_photos, "more.png")
    for place, other in (("device", "cpu"), ("cpu", "device")):
        with pytest.raises(ConfigError, match=f"`prepare_on` {other} instead of {place}"):
            extract_with_model(some_photos, out=tmp_path / place, prepare_on=other)
        assert extract_with_model(some_photos, out=tmp_path / place, patch_budget=1).encoded == 1
        assert open_store(tmp_path / place).config.prepared_on == place
    extract_with_model(some_photos, out=tmp_path / "again", prepare_on="device", patch_budget=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "device")
    code, printed, said = run_cli("verify", tmp_path / "device", "--sample", 2)
    assert code == 0, said
    assert printed.count("same tokens") == 2
    extract_with_model(some_photos, out=tmp_path / "device", rebuild=True, prepare_on="cpu", patch_budget=1)
    assert contents(tmp_path / "device") == contents(tmp_path / "cpu")


def test_decoded_images_fill_no_batch_beyond_a_number_of_bytes(extract_with_model, some_photos, tmp_path, monkeypatch):
    seen = []
    real = encoding.DeviceWorker.submit
    monkeypatch.setattr(
        encoding.DeviceWorker, "submit", lambda self, batch: seen.append(len(batch.pieces)) or real(self, batch)
    )
    for number in range(4):
        add(some_photos, f"{number}.png", shift=number)
    many = {"prepare_on": "device", "patch_budget": 10**6}
    one = extract_with_model(some_photos, out=tmp_path / "together", **many)
    assert seen == [one.encoded]
    seen.clear()
    monkeypatch.setattr(encoding, "DECODED_BYTES", 1)
    extract_with_model(some_photos, out=tmp_path / "alone", **many)
    assert seen == [1] * one.encoded


def test_decoded_images_that_wait_for_the_encoder_still_count(extract_with_model, some_photos, monkeypatch):
    """Against the pixels that may be in memory: they are the largest thing there is."""
    held = []
    real = runner.LocalRunner._take

    def take(self, item, made):
        if item.prepared is not None:
            held.append(item.pixels)
        return real(self, item, made)

    monkeypatch.setattr(runner.LocalRunner, "_take", take)
    for number in range(30):
        add(some_photos, f"{number}.png", shift=number)
    extract_with_model(some_photos, prepare_on="device", workers=1, patch_budget=1)
    assert held
    assert all(held)


def test_a_family_without_such_patches_is_refused(family_checkpoint, some_photos, tmp_path):
    options = ExtractOptions(model=str(family_checkpoint("glm4v")), prepare_on="device")
    with pytest.raises(
        UsageError, match="`prepare_on` device is for models .* not for this glm4v; use `prepare_on=cpu`"
    ):
        extract_files([some_photos], out=tmp_path / "embeds", options=options)
    assert not (tmp_path / "embeds" / "embeds-00001.parquet").exists()


def test_a_filter_that_torch_does_not_have_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["resample"] = 1  # Lanczos
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="`prepare_on` device"):
        load(tmp_path / "model", "device")
