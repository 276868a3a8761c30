"""`qvsplit inspect`: what a store holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from qvsplit.store import layout
from qvsplit.store.opening import open_store
from tests.support import rows
from tests.support.fake_source import InThreadDecoders
from tests.support.terminal import on_terminal


def test_inspect(run_cli, small_store, checkpoint):
    code, out, _ = run_cli("inspect", small_store)
    assert code == 0
    assert "items       4 images ok (0 by the features of another), 0 failed, 0 deleted" in out
    assert str(checkpoint) in out
    description = json.loads(run_cli("inspect", small_store, "--json")[1])
    assert (description["images"], description["config"]["compute_dtype"], description["width"]) == (4, "float32", 128)
    assert description["tokens"] == sum(row.n_tokens for row in open_store(small_store))
    assert description["without_features"] == description["superseded"] == 0


def test_how_features_were_computed_and_images_resized(run_cli, tmp_path):
    on_device = rows.config(kernels="fused", processor={**rows.PROCESSOR, "prepared_on": "device"})
    for config, *said in ((rows.config(), "reference", "cpu"), (on_device, "fused", "device")):
        store = rows.write_store(tmp_path / said[0], [rows.item("a.png")], declared=rows.schema(config=config)).location
        lines = run_cli("inspect", store)[1].splitlines()
        assert f"kernels     {said[0]}, of images resized on the {said[1]}" in lines
        description = json.loads(run_cli("inspect", store, "--json")[1])
        assert [description["kernels"], description["prepared_on"]] == said


def test_what_failed_and_why(run_cli, postcards):
    _, out, _ = run_cli("inspect", postcards)
    assert "13 images ok (1 by the features of another), 1 failed, 0 deleted" in out
    assert "failed      torn.jpg is a JPEG file that is cut off or damaged" in out
    assert "run         20" in out
    assert "12 encoded, 1 copied, 1 failed in " in out
    description = json.loads(run_cli("inspect", postcards, "--json")[1])
    assert [failure["path"] for failure in description["failures"]] == ["torn.jpg"]


def test_advice_that_has_been_followed_is_not_given(run_cli, extract, some_photos, out, monkeypatch):
    """Where the reader is there by now that an image lacked, inspect does not say to install it."""
    (some_photos / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    monkeypatch.setattr("qvsplit.sources.images._known_formats", lambda: ("JPEG", "PNG"))
    monkeypatch.setattr("qvsplit.sources.images.optional_readers", lambda **_: ("PIL 1",))
    monkeypatch.setattr("qvsplit.pipeline.view.optional_readers", lambda **_: ("PIL 1",))
    extract(some_photos)
    assert "x.heic is a HEIF image, which needs pillow-heif: pip install" in run_cli("inspect", out)[1]
    monkeypatch.setattr("qvsplit.sources.images.optional_readers", lambda **_: ("PIL 1", "pillow_heif 2"))
    said = run_cli("inspect", out)[1]
    assert "x.heic failed for a reason that has changed since; the next `qvsplit extract` tries it again" in said
    assert "pip install" not in said


def test_videos_are_counted_with_their_clips_and_seconds(run_cli, tmp_path):
    parts = [
        rows.item("film.mp4", kind="video", part=part, start=50.0 * part, end=50.0 * part + 50, duration=150.0)
        for part in range(3)
    ]
    whole = rows.item("whole.mp4", kind="video", duration=30.0)
    rows.write_store(tmp_path, [rows.item("a.png"), *parts, whole, (rows.failed("torn.mp4", kind="video"), None)])
    code, out, _ = run_cli("inspect", tmp_path)
    assert code == 0
    first = "items       1 image and 4 clips of 2 videos (3 min of video) ok (0 by the features of another), 1 failed"
    assert out.startswith(first)
    description = json.loads(run_cli("inspect", tmp_path, "--json")[1])
    counts = {name: description[name] for name in ("images", "videos", "clips", "video_seconds", "failed")}
    assert counts == {"images": 1, "videos": 2, "clips": 4, "video_seconds": 180.0, "failed": 1}


def test_a_store_of_several_tensors(run_cli, tmp_path):
    rows.write_store(tmp_path, [rows.item("a.png", 6, levels=2)], declared=rows.schema(levels=2))
    out = run_cli("inspect", tmp_path)[1]
    tensors = ["pooler_output", "deepstack_features_0", "deepstack_features_1"]
    assert f"tokens      6, each 3 × {rows.WIDTH} values in bfloat16 ({', '.join(tensors)})\n" in out
    description = json.loads(run_cli("inspect", tmp_path, "--json")[1])
    assert (description["tensors"], description["raw_bytes"]) == (tensors, 6 * 3 * rows.WIDTH * 2)


def test_a_family_without_pixel_limits(run_cli, tmp_path):
    config = rows.config(family="llava", processor={"crop_size": 336})
    declared = replace(rows.schema(), config=config)
    row, features = rows.item("a.png", 6, grid_thw=None)
    rows.write_store(tmp_path, [(row, replace(features, config=config, grid_thw=None))], declared=declared)
    out = run_cli("inspect", tmp_path)[1]
    assert "pixels      as the model's processor resizes them\n" in out
    assert f"tokens      6, each {rows.WIDTH} values in bfloat16\n" in out


def test_a_single_shard(run_cli, small_store):
    (shard,) = small_store.glob("*.parquet")
    assert run_cli("inspect", shard)[0] == run_cli("inspect", "--embeds", shard)[0] == 0


def test_a_bar_counts_the_shards_where_many_have_to_be_read(tmp_path):
    storage = rows.write_store(tmp_path, *([rows.item(f"{number}.png")] for number in range(9)))
    words = ["inspect", str(tmp_path)]
    assert "shards read" in on_terminal(words, NO_COLOR="", TERM="xterm")
    assert (storage.folder / layout.CATALOGUE).exists()
    assert "shards read" not in on_terminal(words, NO_COLOR="", TERM="xterm")


def test_warnings_of_rows_are_counted_by_kind(run_cli, tmp_path):
    cut = "its last bytes are missing, and with them a part of the last {} rows of its pixels"
    frames = "only the first of 3 frames was looked at"
    said = {"a.jpg": cut.format(12), "b.jpg": f"{cut.format('1,200')}; {frames}", "c.gif": frames, "d.png": None}
    rows.write_store(tmp_path, [rows.item(name, warnings=text) for name, text in said.items()])
    kinds = {cut.format("N"): 2, "only the first of N frames was looked at": 2}
    assert json.loads(run_cli("inspect", tmp_path, "--json")[1])["warnings"] == kinds
    out = run_cli("inspect", tmp_path)[1]
    assert [line for line in out.splitlines() if line.startswith("warnings")] == [
        f"warnings    2 rows: {kind}" for kind in kinds
    ]


# ---------------------------------------------------------------------------------------------------------- models


def described(run_cli, *words):
    """What `inspect --json` says of a model."""
    code, out, _ = run_cli("inspect", *words, "--json")
    assert code == 0
    description = json.loads(out)
    assert description["type"] == "model"
    return description


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_of_a_model_it_says_what_is_stored_and_loaded(run_cli, name, family_checkpoint, tmp_path, monkeypatch):
    """Bytes as the loaded halves have them, tokens and bytes as an extraction stores them."""
    import torch

    from qvsplit import weights
    from qvsplit.checkpoints.opening import open_checkpoint
    from qvsplit.verify import describe

    folder = family_checkpoint(name)
    said = described(run_cli, folder)
    checkpoint = open_checkpoint(folder, "both")
    encoder = weights.load_encoder_weights(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    language = weights.load_language_model(checkpoint, dtype=torch.float32, kernels="reference")
    float32, bfloat16, stored = said["memory"]
    assert [row["dtype"] for row in said["memory"]] == ["float32", "bfloat16", "as stored"]
    assert float32["encoder"] == stored["encoder"] == 2 * bfloat16["encoder"] == encoder.encoder_bytes
    assert float32["language_model"] == sum(parameter.nbytes for parameter in language.parameters())
    assert said["encoder"]["bytes"] == encoder.bytes_read
    assert said["encoder"]["tensors"] == len(checkpoint.encoder_names)
    monkeypatch.setattr("qvsplit.pipeline.runner.DecoderPool", InThreadDecoders)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for image in said["images"]:
        Image.new("RGB", (image["width"], image["height"]), "grey").save(photographs / f"{image['megapixels']}.png")
    assert run_cli("extract", photographs, "--model", folder, "--out", tmp_path / "store", "--quiet")[0] == 0
    with open_store(tmp_path / "store") as store:
        tokens = {int(row.path.removesuffix(".png")): row.n_tokens for row in store}
        assert describe(store)["raw_bytes"] == sum(image["features"]["float32"] for image in said["images"])
    assert {image["megapixels"]: image["tokens"] for image in said["images"]} == tokens
    assert tokens.keys() == {1, 2, 12}


def test_a_model_fits_on_a_screen(run_cli):
    code, out, _ = run_cli("inspect", "demo")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert "vision encoder  1,305,024 parameters, 55 tensors, 2.61 MB of bfloat16" in lines
    assert "  bfloat16 *    2.61 MB   3.43 MB  1.20 GB  1.40 GB  302.61 MB  303.43 MB" in lines


def test_half_a_model_on_disk_is_said(run_cli, checkpoint, tmp_path):
    """Parameters and memory are known from the config, what lies in absent files is not."""
    folder = tmp_path / "half"
    shutil.copytree(checkpoint, folder)
    whole = described(run_cli, folder)
    for file in whole["language_model"]["files"]:
        if file not in whole["encoder"]["files"]:
            (folder / file).unlink()
    said = described(run_cli, folder)
    assert said["encoder"] == whole["encoder"]
    assert said["memory"][0] == whole["memory"][0]
    assert said["language_model"]["bytes"] is None
    assert said["language_model"]["tensors"] == whole["language_model"]["tensors"]
    assert said["language_model"]["absent_files"]
    assert "of unknown size" in run_cli("inspect", folder)[1]
    assert " files are not on this disk" in run_cli("inspect", folder)[1]
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert described(run_cli, folder)["memory"][0] == whole["memory"][0]
    assert run_cli("inspect", folder)[1].count("no weights on this disk") == 2


def test_tensors_that_are_not_loaded_are_listed(run_cli, family_checkpoint):
    said = described(run_cli, family_checkpoint("qwen2_5_omni"))
    assert {name: part["tensors"] for name, part in said["not_loaded"].items()} == {
        "audio_tower": 24, "talker": 1, "token2wav": 1,
    }  # fmt: skip
    assert "not loaded      audio_tower: 24 tensors, " in run_cli("inspect", family_checkpoint("qwen2_5_omni"))[1]


def test_a_quantised_language_model_is_as_it_is_stored(run_cli, checkpoint, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "quantised"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}
    layer = "model.layers.0.self_attn.q_proj"
    state[f"{layer}.qweight"] = state.pop(f"{layer}.weight").to(torch.int32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    said = described(run_cli, folder)
    assert said["quantised"] == "gptq"
    assert set(said["language_model"]["dtypes"]) == {"float32", "int32"}
    assert [row["language_model"] for row in said["memory"]] == [None, None, said["language_model"]["bytes"]]
    assert said["memory"][0]["encoder"] == said["encoder"]["bytes"]
    assert "quantised       by gptq" in run_cli("inspect", folder)[1]
    assert "  – not computed so, or not known\n" in run_cli("inspect", folder)[1]
    assert "not computed so" not in run_cli("inspect", checkpoint)[1]


def test_where_the_processor_is_not_there_tokens_are_not_known(run_cli, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*tokenizer*"):
        file.unlink()
    said = described(run_cli, folder)
    assert (said["images"], said["memory"][0]["encoder"] > 0) == ([], True)
    assert "tokens are not known: " in run_cli("inspect", folder)[1]


def test_what_an_argument_is(run_cli, small_store, checkpoint, tmp_path, monkeypatch):
    """A store where it was one before; a path with a slip in it never goes to the network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_store, tmp_path / "demo")
    assert json.loads(run_cli("inspect", "demo", "--json")[1])["type"] == "store"
    shutil.copy(checkpoint / "config.json", tmp_path / "demo")
    assert json.loads(run_cli("inspect", "demo", "--json")[1])["type"] == "store"
    code, _, said = run_cli("inspect", "--embeds", checkpoint)
    assert (code, f"is a model's folder, and no store: qvsplit inspect {checkpoint}" in said) == (2, True)
    code, _, said = run_cli("inspect", "demo/photos")
    assert code == 2
    assert "no store or shard at demo/photos" in said
    assert (
        "as demo is a folder here, it is not taken as a hub name: give that with a revision, demo/photos@main" in said
    )
    code, _, said = run_cli("inspect", "embeds/photos")
    assert code == 3
    assert "embeds/photos is no path here: taken as the name of a model on the hub" in said
    assert "no store or shard at embeds/photos, and as a hub name: " in said
    (tmp_path / "empty").mkdir()
    code, _, said = run_cli("inspect", "empty")
    assert (code, "nor is it a model's folder, as there is no config.json in it" in said) == (2, True)
    for slip in ("albun", "./albums/x", "album/*.parquet", "album/rows.parquet"):
        code, _, said = run_cli("inspect", slip)
        assert (code, "of a model give the folder with its config.json, or its hub name" in said) == (2, True)
    assert "of a model" not in run_cli("inspect")[2]


def test_a_file_of_a_model_and_an_adapter_are_named_as_what_they_are(run_cli, checkpoint, tmp_path):
    for file in (checkpoint / "config.json", next(checkpoint.glob("*.safetensors"))):
        code, _, said = run_cli("inspect", file)
        assert (code, f"{file} is a file of a model; give its folder, {checkpoint}" in said) == (2, True)
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, said = run_cli("inspect", tmp_path)
    assert (code, "is an adapter: give it to extract and ask as --adapter" in said) == (2, True)
