"""The Encoder door: what an image is on its way to the encoder, batches, memory, and how an encode is cancelled."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.extract import extract_files
from qvsplit.kernels import fused_encoder
from qvsplit.models import encoder as encoder_module
from qvsplit.models.encoder import Cancelled, EncoderSpec, TransformersEncoder, load_encoder, patch_budget
from qvsplit.models.preparing import Prepared
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime import devices
from qvsplit.sources.images import open_file
from qvsplit.store.features import POOLER_OUTPUT
from tests.support.checkpoints import make_tiny


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        encoder.encode(batch)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in events))
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
