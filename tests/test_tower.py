"""The fused forward pass, held against transformers' own tower, and what a picture is on its way to it."""

from __future__ import annotations

import itertools
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from make_checkpoint import make_tiny
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from qvsplit import devices, packing, tower, vision
from qvsplit.checkpoint import open_checkpoint
from qvsplit.extract import Settings, Watcher, extract_pictures
from qvsplit.images import open_file
from qvsplit.tower import FusedTower

CPU = torch.device("cpu")
GRIDS = {
    "one": [(1, 6, 10)],
    "two of a size": [(1, 4, 4), (1, 4, 4)],
    "a size between others": [(1, 4, 6), (1, 8, 2), (1, 8, 2), (1, 4, 6), (1, 2, 2)],
    "equally many patches, other shapes": [(1, 4, 6), (1, 6, 4)],
    "a video": [(3, 4, 4), (1, 4, 4)],
}


def module(act: str = "quick_gelu", dtype: torch.dtype = torch.float32):
    config = Qwen2VisionTransformerPretrainedModel.config_class(
        depth=3, embed_dim=64, num_heads=2, hidden_size=48, mlp_ratio=4, hidden_act=act
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    made = Qwen2VisionTransformerPretrainedModel._from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.15)
    return made.to(dtype).eval().requires_grad_(False)


def pixels(grids, seed=1) -> torch.Tensor:
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 3 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def both(values: torch.Tensor) -> torch.Tensor:
    """The processor's layout, spelled out: channels, two temporal slices, pixels."""
    return torch.stack([values.view(len(values), 3, -1)] * 2, dim=2).flatten(1)


def reference(made, values, grids) -> torch.Tensor:
    with torch.inference_mode():
        return made(both(values).to(made.dtype), grid_thw=torch.tensor(grids)).pooler_output


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("name", GRIDS)
def test_it_gives_what_transformers_gives(monkeypatch, name, rows, packed):
    monkeypatch.setattr(tower, "ROWS_CPU", rows)
    if not packed:
        monkeypatch.setattr(tower, "can_pack", lambda dtype: False)
    elif not packing.can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    expected = reference(module(), pixels(GRIDS[name]), GRIDS[name])
    fused = FusedTower(module())
    assert fused.packed is packed
    got = fused(pixels(GRIDS[name]), GRIDS[name])
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_other_activations_stay_what_they_are(act):
    grids = GRIDS["one"]
    torch.testing.assert_close(
        FusedTower(module(act))(pixels(grids), grids),
        reference(module(act), pixels(grids), grids),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_transformers_is(dtype):
    """In few bits both round: held against float32, on the same rounded weights, as both are."""
    grids = GRIDS["a size between others"]
    exact = module(dtype=dtype).float()
    truth = reference(exact, pixels(grids).to(dtype).float(), grids)
    theirs = reference(module(dtype=dtype), pixels(grids), grids).float()
    mine = FusedTower(module(dtype=dtype))(pixels(grids).to(dtype), grids).float()
    assert float((mine - truth).norm()) < 1.5 * float((theirs - truth).norm())


def test_plain_weights_are_not_kept_beside_packed_ones():
    made = module()
    FusedTower(made)
    assert all(block.mlp.fc1 is None and block.attn.qkv is None for block in made.blocks)


def test_it_ends_between_layers_when_told_to():
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise vision.Cancelled

    with pytest.raises(vision.Cancelled):
        FusedTower(module(), check=check)(pixels([(1, 2, 2)]), [(1, 2, 2)])
    assert len(calls) == 2


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_cancelling_ends_an_encode_in_another_thread(checkpoint, photos, kernels):
    halves = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=torch.float32, kernels=kernels)
    patches = halves.prepare(open_file(photos / "coffee.png"))
    assert len(halves.encode([patches])) == 1
    halves.cancel()
    raised = []

    def run():
        with pytest.raises(vision.Cancelled):
            halves.encode([patches])
        raised.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised


def test_pictures_wait_as_bytes(checkpoint, photos):
    halves = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=torch.float32)
    image = open_file(photos / "coffee.png")
    patches = halves.prepare(image)
    assert patches.pixels.dtype == torch.uint8
    assert patches.pixels.shape == (patches.count, 3 * 14 * 14)
    assert torch.equal(patches.pixels, halves.prepare(np.array(image)).pixels)
    assert torch.equal(
        halves.pixel_values(patches), halves.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    )


def test_pictures_come_back_in_the_order_in_which_they_went(checkpoint, photos, monkeypatch):
    """Whatever order the tower takes them in: it sorts them, so that those of one size share a call."""
    halves = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=torch.float32)
    names = ("motorcycle_left.png", "chelsea.png", "motorcycle_right.png", "coins.png", "rocket.jpg", "chelsea.png")
    batch = [halves.prepare(open_file(photos / name)) for name in names]
    alone = [halves.encode([patches])[0] for patches in batch]
    runs = []
    real = tower._of_one_size
    monkeypatch.setattr(tower, "_of_one_size", lambda *told: runs.append(real(*told)) or runs[-1])
    for got, expected in zip(halves.encode(batch), alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert sorted(number for _, number in runs[0]) == [1, 1, 2, 2]
    assert not torch.allclose(alone[0], alone[2], rtol=1e-2, atol=1e-2)  # one size, two pictures


@pytest.mark.parametrize("off", ["do_normalize", "do_rescale"])
def test_a_processor_that_leaves_a_step_out_is_obeyed(tmp_path, checkpoint, photos, off):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"][off] = False
    path.write_text(json.dumps(config))
    halves = vision.load(open_checkpoint(tmp_path / "model", "vision"), device=CPU, dtype=torch.float32)
    image = open_file(photos / "coffee.png")
    expected = halves.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(halves.pixel_values(halves.prepare(image)).float(), expected.float())


def test_the_patch_budget_reads_free_memory(checkpoint, monkeypatch, tmp_path):
    halves = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=torch.float32)
    assert vision.patch_budget(halves, None) == vision.patch_budget(halves, 1 << 40) == vision.PATCH_BUDGET_CPU
    tight = vision.patch_budget(halves, 1000 * halves.bytes_per_patch)
    assert tight == 500
    assert vision.patch_budget(halves, 0) == 1
    limit, current = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("5000000\n")
    current.write_text("2000000\n")
    real = devices.Path
    inside = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": current}
    monkeypatch.setattr(devices, "Path", lambda name: inside.get(name, real(name)))
    assert devices.free_memory(CPU) == 3_000_000
    limit.write_text("max\n")
    assert (devices.free_memory(CPU) or 0) > 3_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_a_forward_pass_takes_no_more_memory_than_is_reckoned(checkpoint, photos, dtype, kernels):
    """Nor does it take so little that the reckoning would waste the machine. oneDNN's own memory is not seen."""
    halves = vision.load(open_checkpoint(checkpoint, "vision"), device=CPU, dtype=dtype, kernels=kernels)
    batch = [halves.prepare(open_file(photos / name)) for name in ("coffee.png", "chelsea.png")]
    halves.encode(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        halves.encode(batch)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    reckoned = halves.bytes_per_patch * sum(patches.count for patches in batch)
    assert 0.3 * reckoned < peak < 1.1 * reckoned


def test_devices_are_of_one_kind():
    assert [str(one) for one in devices.choose_devices("cpu, cpu")] == ["cpu", "cpu"]
    with pytest.raises(devices.UsageError, match="no such device"):
        devices.choose_devices("cpu,,")


@pytest.mark.parametrize(("flags", "stored", "told"), [
    ("fpu avx512f avx512_bf16", "bfloat16", True), ("fpu amx_bf16", "bfloat16", True),
    ("fpu avx512f", "bfloat16", False), ("fpu avx512_bf16", "float32", False),
])  # fmt: skip
def test_a_cpu_with_bfloat16_units_is_told_of(tmp_path, some_photos, monkeypatch, flags, stored, told):
    """Once, for a new album whose dtype nobody chose: another dtype is another recipe, and is not chosen silently."""
    monkeypatch.setattr(vision, "LARGE_TOWER_BYTES", 1000)
    make_tiny(tmp_path / "model", dtype=stored)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    real = devices.Path
    monkeypatch.setattr(devices, "Path", lambda name: tmp_path / "cpuinfo" if name == "/proc/cpuinfo" else real(name))
    for out, dtype, expected in (("a", None, told), ("a", None, False), ("b", "float32", False)):
        heard = []
        settings = Settings(model=str(tmp_path / "model"), dtype=dtype)
        extract_pictures([some_photos], out=tmp_path / out, settings=settings, watcher=Watcher(on_note=heard.append))
        assert any("--dtype bfloat16" in line for line in heard) is expected
        shutil.copyfile(some_photos / "coffee.png", some_photos / f"{len(list(some_photos.iterdir()))}.png")
