"""Extractions where the model is the point: memory, dtypes, forward passes, several devices. On the tiny checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qvsplit.errors import ConfigError, ModelError, UsageError
from qvsplit.models import encoder as models
from qvsplit.models.copies import Copies
from qvsplit.models.encoder import PatchEncoder
from qvsplit.pipeline.devices import StoreDeclares, load_devices, load_prepare
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import Summary
from qvsplit.store.config import Provenance
from qvsplit.store.features import POOLER_OUTPUT
from qvsplit.store.opening import open_store
from tests.support.extracting import PHOTOS, add, by_path, contents
from tests.support.fake_encoder import fake_config
from tests.support.lazy_copies import LazyPort


class OutOfMemory:
    """Stands in for the forward pass: runs out of memory above `limit` patches."""

    def __init__(self, real, limit):
        self.real, self.limit, self.batches = real, limit, []

    def __call__(self, encoder, batch):
        self.batches.append(len(batch))
        if sum(one.patches for one in batch) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.real(encoder, batch)


def test_out_of_memory_halves_the_batch_and_in_the_end_fails_one_image(
    extract_with_model, some_photos, monkeypatch, out
):
    forward = OutOfMemory(PatchEncoder._forward, 1000)
    monkeypatch.setattr(PatchEncoder, "_forward", lambda encoder, batch: forward(encoder, batch))
    ran = extract_with_model(some_photos, patch_budget=100_000)
    rows = {row.path: row for row in open_store(out).rows}
    failed = {name for name, row in rows.items() if row.status == "failed"}
    sizes = {path.name: Image.open(path).size for path in some_photos.iterdir()}
    assert failed == {name for name, (w, h) in sizes.items() if round(w / 28) * round(h / 28) * 4 > 1000}
    assert 0 < len(failed) < 4
    assert all("needs more memory" in rows[name].error for name in failed)
    assert {rows[name].error_kind for name in failed} == {"memory"}
    assert ran.encoded == 4 - len(failed)
    assert forward.batches[:2] == [4, 2]
    # another device may have more, and so may another machine
    assert extract_with_model(some_photos).to_read == 0
    forward.limit = 100_000
    assert extract_with_model(some_photos, device="cpu").encoded == len(failed)


def test_memory_of_a_failed_forward_is_free_before_its_halves_run(extract_with_model, some_photos, monkeypatch):
    """Else an image that fits alone would not fit beside what is left of the batch that did not."""
    alive: list[weakref.ref] = []
    held_over: list[int] = []
    real = PatchEncoder._forward

    class Activations:
        pass

    def forward(self, batch):
        held = Activations()
        held_over.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(held))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(PatchEncoder, "_forward", forward)
    assert extract_with_model(some_photos, patch_budget=100_000).encoded == 4
    assert len(held_over) == 7
    assert set(held_over) == {0}


def test_rows_that_are_not_finite_are_never_written(extract_with_model, some_photos, monkeypatch, out):
    real = PatchEncoder._forward

    def spoiled(self, batch):
        every = [{key: rows.clone() for key, rows in one.items()} for one in real(self, batch)]
        every[0][POOLER_OUTPUT][3, 5] = float("nan")
        return every

    monkeypatch.setattr(PatchEncoder, "_forward", spoiled)
    assert extract_with_model(some_photos, patch_budget=100_000).failed == 1
    failed = [row for row in open_store(out).rows if row.status == "failed"]
    assert [row.error for row in failed] == ["the encoder gave values that are not finite in float32"]


def test_values_beyond_the_storage_dtype_are_never_written(extract_with_model, some_photos, monkeypatch, out):
    real = PatchEncoder._forward

    def larger(self, batch):
        return [{key: rows * 1e6 for key, rows in one.items()} for one in real(self, batch)]

    monkeypatch.setattr(PatchEncoder, "_forward", larger)
    assert extract_with_model(some_photos, storage_dtype="float16").failed == 4
    assert {row.error for row in open_store(out).rows} == {"has values beyond the range of float16"}


def test_two_device_workers_make_the_store_that_one_makes(extract_with_model, tmp_path):
    """Row for row, in the same order: whatever worker a batch went to, and whichever was done first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("camera.png", "coins.png", "color.png", "page.png", "chelsea.png"):
        shutil.copyfile(PHOTOS[name], folder / name)
    shutil.copyfile(PHOTOS["coins.png"], folder / "zz copy.png")
    (folder / "bad.png").write_text("no image")
    one = extract_with_model(folder, out=tmp_path / "one", device="cpu", patch_budget=1, workers=1)
    two = extract_with_model(folder, out=tmp_path / "two", device="cpu,cpu", patch_budget=1, workers=7)
    assert (two.encoded, two.copied, two.failed) == (one.encoded, one.copied, one.failed) == (5, 1, 1)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    orders = [
        [row.path for shard in open_store(tmp_path / name).shards for row in shard.rows if row.has_features]
        for name in ("one", "two")
    ]
    assert orders[0] == orders[1]


def test_another_batching_differs_by_float_rounding_only(extract_with_model, some_photos, tmp_path):
    extract_with_model(some_photos, patch_budget=1, out=tmp_path / "one by one")
    extract_with_model(some_photos, patch_budget=10**6, out=tmp_path / "together")
    one, other = open_store(tmp_path / "one by one"), open_store(tmp_path / "together")
    for row in one:
        np.testing.assert_allclose(
            one.features(row)["pooler_output"],
            other.features(other.current(*row.key))["pooler_output"],
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_store_keeps_its_forward_pass(extract_with_model, some_photos, tmp_path, out):
    """The extraction config names it: what was made by transformers' own goes on so, to the bit."""
    extract_with_model(some_photos, kernels="reference", patch_budget=1)
    assert open_store(out).config.kernels == "reference"
    add(some_photos, "more.png")
    extract_with_model(some_photos)
    extract_with_model(some_photos, out=tmp_path / "again", kernels="reference", patch_budget=1)
    assert contents(out) == contents(tmp_path / "again")
    with pytest.raises(ConfigError, match="`kernels` fused instead of reference"):
        extract_with_model(some_photos, kernels="fused")
    with pytest.raises(UsageError, match="`kernels` quick: choose one of fused, reference"):
        extract_with_model(some_photos, kernels="quick")
    extract_with_model(some_photos, rebuild=True, kernels="fused")
    assert open_store(out).config.kernels == "fused"


def test_int8_is_near_what_was_computed_and_goes_on_as_int8(extract_with_model, some_photos, tmp_path, run_cli):
    extract_with_model(some_photos, out=tmp_path / "exact")
    extract_with_model(some_photos, out=tmp_path / "small", storage_dtype="int8")
    add(some_photos, "more.png")
    for name in ("exact", "small"):
        assert extract_with_model(some_photos, out=tmp_path / name).encoded == 1
    exact, small = (open_store(tmp_path / name) for name in ("exact", "small"))
    assert (small.config.storage_dtype, small.config.compute_dtype) == ("int8", "float32")
    for row in exact:
        one = exact.features(row)["pooler_output"]
        stored = small.features(small.current(*row.key)).tensors["pooler_output"]
        scale = np.abs(one).max(axis=1, keepdims=True) / 127
        assert (np.abs(one - stored.numpy()) <= scale * 0.501).all()
        assert torch.equal(stored.torch(), torch.from_numpy(stored.numpy()))
    before = by_path(tmp_path / "small")
    assert run_cli("compact", tmp_path / "small")[0] == 0
    assert by_path(tmp_path / "small") == before


def test_verify_takes_int8_for_what_it_is(extract_with_model, tmp_path, out, run_cli):
    for number in range(2):
        add(tmp_path / "photos", f"{number}.png", shift=100 * number)
    extract_with_model(tmp_path / "photos", model="demo", storage_dtype="int8")
    code, printed, said = run_cli("verify", out, "--sample", 2)
    assert code == 0, said
    assert printed.count("of the largest value, same tokens") == 2


# ------------------------------------------------------------------------------------------------ loading devices


def loaded(checkpoint, own=StoreDeclares("embeds", None, None, None), **options):  # noqa: B008
    notes, summary = [], Summary()
    devices = load_devices(ExtractOptions(model=str(checkpoint), **options), own, summary, notes.append)
    return devices, summary, notes


def test_one_encoder_a_device_and_one_worker_each_time_it_is_named(checkpoint):
    one, summary, notes = loaded(checkpoint, device="cpu,cpu", patch_budget=300)
    first, second = one.devices.workers
    assert first.encode.encoder is second.encode.encoder is one.devices.encoder
    assert one.devices.patch_budget == summary.patch_budget == 300
    assert summary.model == str(checkpoint)
    assert notes == []
    assert one.schema.config == one.devices.encoder.config


def test_the_patch_budget_of_several_workers_shares_the_memory(checkpoint, monkeypatch):
    from qvsplit.pipeline import devices as module

    bytes_per_patch = loaded(checkpoint)[0].devices.encoder.bytes_per_patch
    monkeypatch.setattr(module.devices, "free_memory", lambda device: 2000 * bytes_per_patch)
    assert loaded(checkpoint)[1].patch_budget == 1000
    assert loaded(checkpoint, device="cpu,cpu")[1].patch_budget == 500


def test_another_config_is_refused_and_says_in_what_it_differs(checkpoint):
    own = StoreDeclares("embeds", fake_config(), None, Provenance("fake", None, "cpu", {}))
    with pytest.raises(ConfigError, match=r"^embeds was made under another extraction config \(encoder: ffffffffffff…"):
        loaded(checkpoint, own)


def test_other_library_versions_are_noted(checkpoint):
    one, *_ = loaded(checkpoint)
    before = one.schema.provenance[0]
    versions = dict(before.versions) | {"torch": "1.0", "python": "3.0", "qvsplit": "0.0.1"}
    own = StoreDeclares("embeds", one.schema.config, one.schema.tensors,
                        Provenance(before.model, None, "cpu", versions))  # fmt: skip
    (note,) = loaded(checkpoint, own)[2]
    assert "made with other library versions (torch 1.0 → " in note
    assert "python" not in note


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError):
        loaded(tmp_path / "nowhere")


def test_a_store_that_could_not_be_read_is_not_begun(extract_with_model, some_photos, monkeypatch, out):
    """Settings of a processor go into the extraction config as its file has them."""
    real = models.pixel_settings
    monkeypatch.setattr(models, "pixel_settings", lambda *given: real(*given) | {"merge_size": [2, 2]})
    with pytest.raises(ModelError, match="the settings of its image processor are none that a store can hold"):
        extract_with_model(some_photos)
    assert not out.exists()


# --------------------------------------------------------------------- what prepares images without an encoder beside it


def declares(checkpoint, **options) -> StoreDeclares:
    """What a store made by this checkpoint declares."""
    schema = loaded(checkpoint, device="cpu", **options)[0].schema
    return StoreDeclares("embeds", schema.config, schema.tensors, schema.provenance[0])


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 3136, "max_pixels": 100_352}])
def test_what_prepares_images_alone_does_it_as_beside_an_encoder(checkpoint, limits):
    own = declares(checkpoint, **limits)
    image = np.array(Image.open(PHOTOS["rocket.jpg"]).convert("RGB"))
    alone = load_prepare(ExtractOptions(device="cpu"), own)(image)
    beside = loaded(checkpoint, own)[0].devices.prepare(image)
    assert alone.values.keys() == beside.values.keys()
    assert all(torch.equal(alone.values[name], beside.values[name]) for name in alone.values)
    assert dataclasses.replace(alone, values={}) == dataclasses.replace(beside, values={})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]), ("image_std", [0.3, 0.3, 0.3]), ("resample", 2), ("rescale_factor", 0.5),
        ("do_convert_rgb", False),
    ],
)  # fmt: skip
def test_a_node_whose_processor_has_other_settings_prepares_nothing(checkpoint, tmp_path, name, value):
    """Under the path, or the name, that the store's model has elsewhere: other pixels, and nobody would hear of it."""
    own = declares(checkpoint)
    with_setting(checkpoint, tmp_path / "model", name, value)
    with pytest.raises(ConfigError, match=rf"^embeds was made under another extraction config \(.*{name}") as caught:
        load_prepare(ExtractOptions(model=str(tmp_path / "model"), device="cpu"), own)
    assert caught.value.exit_code == 4


def test_other_limits_of_pixels_in_the_file_are_those_of_the_store(checkpoint, tmp_path):
    """They are given with each image, as the store has them."""
    own = declares(checkpoint)
    size = {"shortest_edge": 50_176, "longest_edge": 100_352}
    with_setting(checkpoint, tmp_path / "model", "size", size)
    image = np.array(Image.open(PHOTOS["rocket.jpg"]).convert("RGB"))
    prepare = load_prepare(ExtractOptions(model=str(tmp_path / "model"), device="cpu"), own)
    assert prepare(image).n_tokens == load_prepare(ExtractOptions(device="cpu"), own)(image).n_tokens


def test_a_store_that_declares_nothing_yet_takes_any_processor(checkpoint):
    nothing = StoreDeclares("embeds", None, None, None)
    assert load_prepare(ExtractOptions(model=str(checkpoint), device="cpu"), nothing) is not None


def with_setting(checkpoint: Path, folder: Path, name: str, value: object) -> None:
    """Copy a checkpoint; its image processor has another setting."""
    shutil.copytree(checkpoint, folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    assert settings["image_processor"].get(name) != value
    settings["image_processor"][name] = value
    path.write_text(json.dumps(settings))


# ------------------------------------------------------------------------------------ copies beside the encoder's work


def test_an_extraction_through_copies_beside_the_encoder_has_the_same_bits(
    extract_with_model, some_photos, tmp_path, monkeypatch
):
    from qvsplit.pipeline import devices as module

    add(some_photos, "more.png")
    ports = []

    def lazy(device):
        ports.append(LazyPort())
        return Copies(ports[-1])

    for storage in ("float32", "int8"):
        one = extract_with_model(some_photos, out=tmp_path / f"plain {storage}", patch_budget=1, storage_dtype=storage)
        with monkeypatch.context() as patch:
            patch.setattr(module, "copies_to", lazy)
            two = extract_with_model(
                some_photos, out=tmp_path / f"sent {storage}", device="cpu,cpu", patch_budget=1, storage_dtype=storage
            )
        assert one.encoded == two.encoded > 2
        assert contents(tmp_path / f"sent {storage}") == contents(tmp_path / f"plain {storage}")
        assert {"forward", "copy"} <= two.stages.keys()
    assert len(ports) == 4
    for port in ports:
        assert any(line.startswith("copy ") for line in port.heard)
        assert port.heard.count("use") == 2  # the thread that computes, and the one that receives


def test_what_the_device_has_no_room_for_is_left_to_the_encoder(extract_with_model, some_photos, tmp_path, monkeypatch):
    from qvsplit.pipeline import devices as module

    extract_with_model(some_photos, out=tmp_path / "plain")
    monkeypatch.setattr(module, "copies_to", lambda device: Copies(LazyPort(room=10)))
    extract_with_model(some_photos, out=tmp_path / "sent")
    assert contents(tmp_path / "sent") == contents(tmp_path / "plain")


def test_an_encoder_that_breaks_ends_an_extraction_through_copies_too(
    extract_with_model, some_photos, monkeypatch, tmp_path
):
    from qvsplit.pipeline import devices as module

    monkeypatch.setattr(module, "copies_to", lambda device: Copies(LazyPort()))
    monkeypatch.setattr(PatchEncoder, "_forward", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract_with_model(some_photos)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_fill_one_store_with_the_bits_of_one(extract_with_model, some_photos, tmp_path):
    for number in range(6):
        add(some_photos, f"{number}.png", shift=10 * number)
    for name, device in (("one", "cuda:0"), ("other", "cuda:1"), ("both", "cuda:0,cuda:1")):
        extract_with_model(some_photos, out=tmp_path / name, device=device, patch_budget=1)
    assert contents(tmp_path / "both") == contents(tmp_path / "other") == contents(tmp_path / "one")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_copies_change_no_bit(extract_with_model, some_photos, tmp_path, monkeypatch):
    from qvsplit.pipeline import devices as module

    for number in range(6):
        add(some_photos, f"{number}.png", shift=10 * number)
    extract_with_model(some_photos, out=tmp_path / "sent", device="cuda", patch_budget=1)
    monkeypatch.setattr(module, "copies_to", lambda device: None)
    extract_with_model(some_photos, out=tmp_path / "plain", device="cuda", patch_budget=1)
    assert contents(tmp_path / "sent") == contents(tmp_path / "plain")
