"""`qvsplit split`: each half as a model of its own, for qvsplit and for transformers."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from qvsplit import splitting
from qvsplit.checkpoints import writing
from qvsplit.checkpoints.adapter import Adapter
from qvsplit.checkpoints.files import tensor_files
from qvsplit.checkpoints.fingerprint import encoder_fingerprint, noted_fingerprint
from qvsplit.checkpoints.model_class import class_of
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import UsageError
from qvsplit.splitting import split_checkpoint
from tests.support import quantised
from tests.support.every_model import further
from tests.support.families import ALL
from tests.support.hub_server import COMMIT, NAME, Hub, point_at

# one encoder module, several, a tensor of both halves, tensors of neither, names that only the checkpoint has
SPLIT = ("qwen3_vl", "gemma3", "llava_onevision", "qwen2_5_omni", "qianfan_ocr")
REFUSED = {"llama4", "idefics2", "ovis2", "granite4_vision", "hunyuan_vl", "gemma3n", "perception_lm", "fast_vlm"}


def tensors(folder):
    """Every tensor of a checkpoint's files: dtype, shape and bytes by name."""
    found = {}
    for file in {*tensor_files(folder).values()}:
        with safe_open(folder / file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                tensor = stream.get_tensor(name)
                found[name] = (tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize(
    "name", [name if name in SPLIT else pytest.param(name, marks=further) for name in ALL if name not in REFUSED]
)
def test_halves_hold_what_is_theirs_as_it_was(name, family_checkpoint, tmp_path):
    folder = family_checkpoint(name)
    whole, halves = open_checkpoint(folder, "both"), (tmp_path / "encoder", tmp_path / "language")
    split_checkpoint(folder, encoder=halves[0], language_model=halves[1])
    stored, written = tensors(folder), [tensors(half) for half in halves]
    assert written[0] == {tensor: stored[tensor] for tensor in whole.encoder_names}
    assert written[1] == {tensor: stored[tensor] for tensor in whole.language_names}
    loose = {tensor for tensor in stored if tensor.removeprefix("model.") in whole.family.loose_tensors}
    assert written[0].keys() & written[1].keys() == loose
    encoder, language = open_checkpoint(halves[0], "encoder"), open_checkpoint(halves[1], "language")
    known = encoder_fingerprint(whole)
    assert encoder_fingerprint(encoder) == noted_fingerprint(language) == known
    assert not encoder.has("language")
    assert not language.has("encoder")


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_transformers_loads_the_language_model(name, family_checkpoint, family_reference, tmp_path):
    """Into the full class: the encoder's weights are missing and random, and nothing of the language model is."""
    folder = family_checkpoint(name)
    checkpoint = open_checkpoint(folder, "both")
    split_checkpoint(folder, language_model=tmp_path / "language")
    model, info = class_of(checkpoint).from_pretrained(tmp_path / "language", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert info["missing_keys"]
    assert all(map(checkpoint.family.encoder_has, info["missing_keys"]))
    prompt = torch.tensor([[3, 5, 7, 9]])
    full = family_reference(name).model
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=prompt).logits, full(input_ids=prompt).logits)
        shown = dict(family_reference(name).inputs([Image.linear_gradient("L").convert("RGB")], "What is it?"))
        takes = inspect.signature(full.get_image_features).parameters
        features = full.get_image_features(**{key: shown[key] for key in shown.keys() & takes}, return_dict=True)
        given = {key: value for key, value in shown.items() if "pixel" not in key}
        logits = model(**given, mm_encoder_outputs={"image": features}).logits
        assert torch.equal(logits, full(**shown).logits)


def test_a_store_is_that_of_the_whole_and_the_halves_answer_alike(run_cli, checkpoint, some_photos, tmp_path):
    halves = [tmp_path / "encoder", tmp_path / "language"]
    code, said, _ = run_cli("split", checkpoint, "--encoder", halves[0], "--language-model", halves[1])
    assert code == 0
    assert f"vision encoder: {len(tensors(halves[0]))} tensors, " in said
    assert f" in {halves[1]}\n" in said
    store = tmp_path / "store"
    assert run_cli("extract", some_photos, "--out", store, "--model", checkpoint, "--quiet")[0] == 0
    (some_photos / "again.png").write_bytes((some_photos / "coins.png").read_bytes() + b"\0")
    assert run_cli("extract", some_photos, "--out", store, "--model", halves[0], "--quiet")[0] == 0  # the same config
    ask = ("ask", "What is it?", "--embeds", store, "--image", "coins.png", "--max-new-tokens", 8, "--model")
    assert run_cli(*ask, halves[1])[:2] == run_cli(*ask, checkpoint)[:2]
    code, _, said = run_cli(*ask, halves[0])
    assert (code, "holds no language model" in said) == (3, True)
    code, _, said = run_cli("verify", store, "--sample", 1, "--model", halves[1])
    assert f"holds no vision encoder; it is the language model of {checkpoint} alone: name that as --model" in said
    assert code == 3
    code, _, said = run_cli("extract", some_photos, "--out", tmp_path / "no", "--model", halves[1])
    assert f"of {checkpoint} alone: name that, or the folder of its vision encoder, as --model" in said
    assert code == 3
    assert f"half            the language model alone, of {checkpoint}\n" in run_cli("inspect", halves[1])[1]


def test_a_store_of_another_encoder_is_refused(run_cli, small_store, tmp_path):
    from tests.support.checkpoints import make_tiny

    make_tiny(tmp_path / "other", seed=1)
    run_cli("split", tmp_path / "other", "--language-model", tmp_path / "language")
    code, _, said = run_cli("ask", "What?", "--embeds", small_store, "--model", tmp_path / "language")
    assert (code, "another encoder" in said) == (4, True)


def test_what_is_left_out_is_said(run_cli, family_checkpoint, tmp_path):
    code, said, _ = run_cli("split", family_checkpoint("qwen2_5_omni"), "--language-model", tmp_path / "language")
    assert code == 0
    assert "left out, as neither half has it: audio_tower (24 tensors), talker (1 tensor), token2wav (1 tensor)" in said


def test_as_json(run_cli, checkpoint, tmp_path):
    code, said, _ = run_cli("split", checkpoint, "--encoder", tmp_path / "encoder", "--json")
    done = json.loads(said)
    size = sum(len(raw) for *_, raw in tensors(tmp_path / "encoder").values())
    assert (code, done["type"], done["language_model"], done["encoder"]["bytes"]) == (0, "split", None, size)


def test_what_cannot_be(run_cli, checkpoint, tmp_path):
    code, _, said = run_cli("split", checkpoint)
    assert (code, "give a new folder as --encoder, as --language-model, or one for each" in said) == (2, True)
    new = tmp_path / "new"
    for one, other in ((new, new), (new, new / "within"), (new / "within", new)):
        code, _, said = run_cli("split", checkpoint, "--encoder", one, "--language-model", other)
        assert (code, "one folder, or one within the other" in said) == (2, True)
    for words, argument in ((("", "--encoder", new), "MODEL"), ((checkpoint, "--encoder", ""), "--encoder")):
        code, _, said = run_cli("split", *words)
        assert (code, f"qvsplit: {argument}: give a" in said) == (2, True)
    (tmp_path / "there").mkdir()
    code, _, said = run_cli("split", checkpoint, "--encoder", tmp_path / "there")
    assert (code, "exists, and nothing is overwritten" in said) == (2, True)
    assert run_cli("split", tmp_path / "nowhere", "--encoder", new)[0] == 3
    assert not new.exists()


def test_half_a_model_is_split_into_what_it_has(run_cli, checkpoint, tmp_path):
    halves = [tmp_path / "encoder", tmp_path / "language"]
    split_checkpoint(checkpoint, encoder=halves[0], language_model=halves[1])
    assert run_cli("split", halves[0], "--encoder", tmp_path / "copy")[0] == 0
    assert run_cli("split", halves[1], "--language-model", tmp_path / "asks")[0] == 0
    known = encoder_fingerprint(open_checkpoint(checkpoint, "encoder"))
    assert noted_fingerprint(open_checkpoint(tmp_path / "asks", "language")) == known
    code, _, said = run_cli("split", halves[0], "--language-model", tmp_path / "no")
    assert code == 3
    assert (
        f"holds no language model; it is the vision encoder of {checkpoint} alone: name that, or the folder of its language model, as MODEL"
        in said
    )
    code, _, said = run_cli("split", halves[1], "--encoder", tmp_path / "no")
    assert (code, "holds no vision encoder" in said) == (3, True)
    assert not (tmp_path / "no").exists()
    (halves[1] / "qvsplit.json").unlink()
    code, said, _ = run_cli("split", halves[1], "--language-model", tmp_path / "bare")
    assert (code, "only with --unchecked-encoder" in said) == (0, True)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_cut_short_nothing_looks_whole_and_a_rerun_works(by, checkpoint, tmp_path):
    """Killed when the tensors are there and the rest is not."""
    target, script = tmp_path / "language", (
        "import sys, time; from qvsplit.checkpoints import writing; from qvsplit import cli\n"
        "real = writing.write_small_files\n"
        "def slow(*args):\n    print('begun', flush=True)\n    time.sleep(60)\n    real(*args)\n"
        "writing.write_small_files = slow\n"
        "sys.argv = ['qvsplit', 'split', sys.argv[1], '--language-model', sys.argv[2]]\ncli.main()"
    )  # fmt: skip
    run = subprocess.Popen([sys.executable, "-c", script, checkpoint, target], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    assert not target.exists()
    os.kill(run.pid, by)
    assert run.wait(30) == (130 if by == signal.SIGINT else -signal.SIGKILL)
    run.stdout.close()
    assert not target.exists()
    assert bool([*tmp_path.iterdir()]) == (by == signal.SIGKILL)  # hidden, and under another name
    split_checkpoint(checkpoint, language_model=target)
    assert open_checkpoint(target, "language").has("language")
    assert [*tmp_path.iterdir()] == [target]


def test_a_full_disk_is_said(run_cli, checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvsplit.checkpoints.writing.header_of", full)
    code, _, said = run_cli("split", checkpoint, "--encoder", tmp_path / "encoder")
    assert (code, "encoder: the disk is full; nothing of what was written is left" in said) == (7, True)
    assert not [*tmp_path.iterdir()]


def test_a_disk_that_is_full_at_the_second_half_leaves_neither(run_cli, checkpoint, tmp_path, monkeypatch):
    """So that the same command can be run again, as is said."""
    real, folders = writing.header_of, []

    def full(places):
        folders.append(places)
        if len(folders) == 2:
            raise OSError(28, "No space left on device")
        return real(places)

    halves = "--encoder", tmp_path / "encoder", "--language-model", tmp_path / "language"
    monkeypatch.setattr(writing, "header_of", full)
    code, _, said = run_cli("split", checkpoint, *halves)
    assert (code, f"{tmp_path / 'language'}: the disk is full; nothing of what was written is left" in said) == (
        7,
        True,
    )
    assert not [*tmp_path.iterdir()]
    assert run_cli("split", checkpoint, *halves)[0] == 0


def test_room_for_both_is_asked_for_before_anything_is_written(run_cli, checkpoint, tmp_path, monkeypatch):
    whole = open_checkpoint(checkpoint, "both")
    encoder, language = (
        sum(place.size for place in whole.places(names).values())
        for names in (whole.encoder_names, whole.language_names)
    )
    monkeypatch.setattr(writing, "write_safetensors", None)
    both = ("--encoder", tmp_path / "encoder", "--language-model", tmp_path / "language")
    for needed, halves in ((encoder, both[:2]), (encoder + language, both)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=needed - 1: SimpleNamespace(total=1 << 60, free=free))
        code, _, said = run_cli("split", checkpoint, *halves)
        assert (code, f"{tmp_path}: " in said, " are free; make room and run again" in said) == (7, True, True)
        assert not [*tmp_path.iterdir()]


def test_of_a_hub_name_both_halves_are_of_the_commit_that_was_found_first(checkpoint, tmp_path, monkeypatch):
    opened, real = [], open_checkpoint
    monkeypatch.setattr(
        splitting, "open_checkpoint", lambda name, half: opened.append((name, half)) or real(name, half)
    )
    with Hub(checkpoint) as hub:
        point_at(monkeypatch, hub.url, tmp_path / "cache")
        split_checkpoint(f"{NAME}@main", encoder=tmp_path / "encoder", language_model=tmp_path / "language")
    assert opened == [(f"{NAME}@main", "language"), (f"{NAME}@{COMMIT}", "encoder")]


def test_a_checkpoint_with_an_adapter_is_refused(checkpoint, tmp_path):
    """Its tensors would be written without it, and the encoder's fingerprint with it."""
    adapter = Adapter(tmp_path, "somebody/adapter", "1234", {"peft_type": "LORA"}, {})
    with pytest.raises(UsageError, match="has the adapter somebody/adapter@1234, and halves are written without one"):
        split_checkpoint(open_checkpoint(checkpoint, "both", adapter=adapter), encoder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_encoder_that_is_quantised_itself_is_no_model_for_extract(run_cli, checkpoint, tmp_path):
    folder = quantised.fp8(checkpoint, tmp_path / "quantised", also=("visual",))
    code, _, said = run_cli("split", folder, "--encoder", tmp_path / "encoder")
    assert (code, "its vision encoder itself is quantised" in said, "name that model as MODEL" in said) == (
        3,
        True,
        True,
    )
    assert run_cli("split", folder, "--language-model", tmp_path / "language")[0] == 0


def test_scales_and_zero_points_go_with_their_weights(checkpoint, tmp_path):
    """Names that quantisers add to a module's, in the half that the module is in."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "quantised"
    source.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            (source / path.name).write_bytes(path.read_bytes())
    state = {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}
    layer = "model.layers.0.self_attn.q_proj"
    del state[f"{layer}.weight"]
    added = [f"{layer}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx", "weight_scale", "input_scale")]
    state |= {name: torch.ones(4, dtype=torch.int32) for name in added}
    state["visual.blocks.0.attn.qkv.weight_scale"] = torch.ones(1)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    split_checkpoint(source, encoder=tmp_path / "encoder", language_model=tmp_path / "language")
    encoder, language = tensors(tmp_path / "encoder").keys(), tensors(tmp_path / "language").keys()
    assert set(added) < language
    assert "visual.blocks.0.attn.qkv.weight_scale" in encoder
    assert not encoder & language


def test_torch_is_not_needed(checkpoint, tmp_path):
    script = "import sys; from qvsplit.splitting import split_checkpoint as split\n"
    script += "split(sys.argv[1], encoder=sys.argv[2]); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, checkpoint, tmp_path / "encoder"], check=True, timeout=60)
