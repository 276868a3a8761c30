"""The Encoder door: what an image is on its way to the encoder, batches, memory, and how an encode is cancelled."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError
from qvsplit.extract import extract_files
from qvsplit.kernels import fused_encoder
from qvsplit.models import encoder as encoder_module
from qvsplit.models.clips import ClipPreparer
from qvsplit.models.encoder import (
    Cancelled,
    EncoderSpec,
    TransformersEncoder,
    load_encoder,
    patch_budget,
    slice_budget,
)
from qvsplit.models.preparing import Prepared
from qvsplit.models.sampling import Clip
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime import devices
from qvsplit.sources.images import open_file
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.features import POOLER_OUTPUT
from tests.support.checkpoints import make_tiny
from tests.support.own_encoders import load_own_encoder, peak_bytes


def load(checkpoint, *, dtype: str = "float32", kernels: str = "fused") -> TransformersEncoder:
    return load_encoder(EncoderSpec(open_checkpoint(checkpoint, "encoder"), "cpu", dtype, kernels=kernels))


def prepared(encoder: TransformersEncoder, image) -> Prepared:
    return encoder.preparer.prepare(np.array(image))


@pytest.fixture(scope="module")
def encoder(checkpoint) -> TransformersEncoder:
    return load(checkpoint)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_cancelling_ends_an_encode_in_another_thread(checkpoint, photos, kernels):
    encoder = load(checkpoint, kernels=kernels)
    image = prepared(encoder, open_file(photos / "coffee.png"))
    assert len(encoder.encode([image])) == 1
    encoder.cancel()
    raised = []

    def run():
        with pytest.raises(Cancelled):
            encoder.encode([image])
        raised.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised


def test_images_wait_as_bytes(encoder, photos):
    image = open_file(photos / "coffee.png")
    one = prepared(encoder, image)
    assert one.values["pixels"].dtype == torch.uint8
    assert one.values["pixels"].shape == (one.patches, 3 * 14 * 14)
    theirs = encoder.preparer.processor.image_processor(images=[image], return_tensors="pt")
    assert torch.equal(encoder.pixel_values(one), theirs["pixel_values"])
    assert one.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    assert one.placeholder == (("<|image_pad|>", one.n_tokens),)


def test_what_prepares_an_image_can_be_sent_elsewhere(encoder, photos):
    """And so can what it makes, and what loads the encoder there."""
    copy = pickle.loads(pickle.dumps(encoder.preparer))
    image = np.array(open_file(photos / "coffee.png"))
    one = pickle.loads(pickle.dumps(copy.prepare(image)))
    assert torch.equal(one.values["pixels"], encoder.preparer.prepare(image).values["pixels"])
    assert pickle.loads(pickle.dumps(encoder.spec)) == encoder.spec


def test_images_come_back_in_the_order_in_which_they_went(encoder, photos, monkeypatch):
    """Whatever order the encoder takes them in: it sorts them, so that those of one size share a call."""
    names = ("motorcycle_left.png", "chelsea.png", "motorcycle_right.png", "coins.png", "rocket.jpg", "chelsea.png")
    batch = [prepared(encoder, open_file(photos / name)) for name in names]
    alone = [encoder.encode([one])[0].tensors[POOLER_OUTPUT] for one in batch]
    runs = []
    real = fused_encoder._runs_of_one_size
    monkeypatch.setattr(fused_encoder, "_runs_of_one_size", lambda *args: runs.append(real(*args)) or runs[-1])
    for got, expected in zip(encoder.encode(batch), alone, strict=True):
        torch.testing.assert_close(got.tensors[POOLER_OUTPUT], expected, rtol=1e-4, atol=1e-5)
    assert sorted(number for _, number in runs[0]) == [1, 1, 2, 2]
    assert not torch.allclose(alone[0], alone[2], rtol=1e-2, atol=1e-2)  # one size, two images


@pytest.mark.parametrize("off", ["do_normalize", "do_rescale"])
def test_a_processor_that_leaves_a_step_out_is_obeyed(tmp_path, checkpoint, photos, off):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"][off] = False
    path.write_text(json.dumps(config))
    encoder = load(tmp_path / "model")
    image = open_file(photos / "coffee.png")
    expected = encoder.preparer.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.pixel_values(prepared(encoder, image)).float(), expected.float())


def test_the_patch_budget_reads_free_memory(encoder):
    most = encoder_module.PATCH_BUDGET_CPU
    assert patch_budget(encoder, None) == patch_budget(encoder, 1 << 40) == most
    assert patch_budget(encoder, 1000 * encoder.bytes_per_patch) == 500
    assert patch_budget(encoder, 0) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_a_forward_pass_takes_no_more_memory_than_is_reckoned(checkpoint, photos, dtype, kernels):
    """Nor does it take so little that the reckoning would waste the machine. oneDNN's own memory is not seen."""
    encoder = load(checkpoint, dtype=dtype, kernels=kernels)
    batch = [prepared(encoder, open_file(photos / name)) for name in ("coffee.png", "chelsea.png")]
    encoder.encode(batch)
    peak = peak_bytes(lambda: encoder.encode(batch))
    reckoned = encoder.bytes_per_patch * sum(one.patches for one in batch)
    assert 0.3 * reckoned < peak < 1.1 * reckoned


@pytest.mark.parametrize(("flags", "stored", "noted"), [
    ("fpu avx512f avx512_bf16", "bfloat16", True), ("fpu amx_bf16", "bfloat16", True),
    ("fpu avx512f", "bfloat16", False), ("fpu avx512_bf16", "float32", False),
])  # fmt: skip
def test_a_cpu_with_bfloat16_units_is_noted(tmp_path, some_photos, monkeypatch, flags, stored, noted):
    """Once, for a new store whose dtype nobody chose: another dtype is another config, and is not chosen silently."""
    monkeypatch.setattr(encoder_module, "LARGE_ENCODER_BYTES", 1000)
    make_tiny(tmp_path / "model", dtype=stored)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    real = devices.Path
    monkeypatch.setattr(devices, "Path", lambda name: tmp_path / "cpuinfo" if name == "/proc/cpuinfo" else real(name))
    for out, dtype, expected in (("a", None, noted), ("a", None, False), ("b", "float32", False)):
        heard = []
        options = ExtractOptions(model=str(tmp_path / "model"), dtype=dtype)
        callbacks = ExtractCallbacks(on_note=heard.append)
        extract_files([some_photos], out=tmp_path / out, options=options, callbacks=callbacks)
        assert any("`dtype=bfloat16`" in line for line in heard) is expected
        shutil.copyfile(some_photos / "coffee.png", some_photos / f"{len(list(some_photos.iterdir()))}.png")


# --------------------------------------------------------------------------------------------------------- videos


def a_clip(frames: int = 6) -> tuple[Clip, VideoInfo, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 70, 90, 3), dtype=np.uint8)
    info = VideoInfo(frames, 2.0, frames / 2, 90, 70, 0, "h264", "mov", 0, None)
    return Clip(0, None, None, frames, 2.0, tuple(range(frames))), info, pixels


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_clips_are_normalised_as_their_own_processor_does_it(tmp_path, checkpoint, kernels):
    """Which may do it otherwise than that of images; beside images in one batch, too."""
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    config["video_processor"] |= {"image_mean": [0.1, 0.3, 0.2], "image_std": [0.5, 0.2, 0.3]}
    path.write_text(json.dumps(config))
    encoder, module = (
        load(tmp_path / "model", kernels=kernels),
        load(tmp_path / "model", kernels="reference").weights.module,
    )
    clips = encoder.load_clips()
    clip, info, frames = a_clip()
    (whole,) = clips.preparer.prepare(clip, info, iter(frames), 10**6)
    image = prepared(encoder, frames[0])
    first, one, last = encoder.encode([image, whole, image])
    (alone,) = encoder.encode([image])
    assert (first.kind, one.kind, last.kind) == ("image", "video", "image")
    own = clips.preparer.video_processor(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = module(own["pixel_values_videos"], grid_thw=own["video_grid_thw"]).pooler_output
    close = {"rtol": 1e-4, "atol": 1e-5} if kernels == "fused" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one.tensors[POOLER_OUTPUT], expected, **close)
    for other in (first, last):
        torch.testing.assert_close(other.tensors[POOLER_OUTPUT], alone.tensors[POOLER_OUTPUT], rtol=1e-4, atol=1e-5)


def test_slices_of_clips_have_a_budget_of_their_own_on_a_cpu(encoder):
    assert slice_budget(encoder, 5_120) == encoder_module.SLICE_BUDGET_CPU
    assert slice_budget(encoder, 100) == 100


def test_an_encoder_of_any_family_whose_processor_is_another_models_is_refused_in_a_line(family_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family_checkpoint("llava"), folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    size = config["image_processor"]["crop_size"]
    config["image_processor"]["crop_size"] = {side: 2 * pixels for side, pixels in size.items()}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"^{folder} cannot encode images: Input image size"):
        load(folder, kernels="reference")


@pytest.fixture(scope="module")
def with_levels(family_checkpoint) -> TransformersEncoder:
    return load_own_encoder(family_checkpoint("qwen3_vl"))


def test_what_a_store_says_of_its_videos(with_levels):
    clips = with_levels.load_clips()
    videos = clips.config.videos
    assert videos["in_slices"] is clips.preparer.in_slices is True
    assert videos["containers"] == {spec.key: spec.container for spec in with_levels.tensors}
    assert len(videos["containers"]) == 3
    assert videos["patches_a_token"] == 4
    assert with_levels.config.videos is None


def test_a_clip_goes_through_whole_where_its_slices_would_have_other_features(with_levels, monkeypatch):
    real = TransformersEncoder._features

    def features(self, item):
        """As of an encoder in which frames attend to those of another time."""
        found = real(self, item)
        if item.kind == "video":
            found[-1] = replace(found[-1], rows=found[-1].rows + found[-1].rows.mean() * item.grid_thw[0])
        return found

    monkeypatch.setattr(TransformersEncoder, "_features", features)
    clips = with_levels.load_clips()
    assert clips.config.videos["in_slices"] is clips.preparer.in_slices is False


@pytest.mark.parametrize(("place", "said"), [(0, "that can be stored beside its images"), (2, "frames that are alike")])
def test_a_model_that_gives_another_number_of_tokens_takes_no_videos(with_levels, monkeypatch, place, said):
    """Than its processor puts into the prompt: of any clip, or where frames are alike."""
    real = ClipPreparer.trial

    def trial(self):
        tried = list(real(self))
        tried[place] = replace(tried[place], n_tokens=tried[place].n_tokens + 1)
        return tuple(tried)

    monkeypatch.setattr(ClipPreparer, "trial", trial)
    with pytest.raises(ModelError, match=said):
        with_levels.load_clips()
