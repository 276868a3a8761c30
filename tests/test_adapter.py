"""`--adapter`: PEFT adapters on either half, held against transformers' full model with PEFT's own merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qvsplit.ask import AskOptions, load_language_model, load_session
from qvsplit.checkpoints.adapter import open_adapter
from qvsplit.checkpoints.fingerprint import encoder_fingerprint, language_fingerprint
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.encode import load_encoder
from qvsplit.errors import ConfigError, ModelError
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from qvsplit.verify import check_items, describe
from qvsplit.weights import load_encoder_weights
from qvsplit.weights import load_language_model as load_language_weights
from tests.support.adapters import WEIGHTS, change_config, change_tensors, full_model, make_adapter, merged_model
from tests.support.extracting import PHOTOS, by_path, extractor
from tests.support.full_model import FullModel, scores, upright_rgb
from tests.support.hub_server import COMMIT, NAME, Hub, point_at

LANGUAGE = {"target_modules": ["q_proj", "v_proj", "down_proj"]}  # of Qwen2-VL's language model alone
ENCODER = {"target_modules": ["qkv", "fc1"]}
BOTH = {"target_modules": [*LANGUAGE["target_modules"], *ENCODER["target_modules"]]}
QUESTION = "What is in the picture?"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter of the tiny checkpoint, made once. Read only."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}

    def get(name: str, **config) -> Path:
        if name not in made:
            made[name] = make_adapter(checkpoint, folder / name, **config)
        return made[name]

    return get


@pytest.fixture(scope="module")
def language(adapter):
    return adapter("language", **LANGUAGE)


@pytest.fixture(scope="module")
def both(adapter):
    return adapter("both", **BOTH)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    with Image.open(PHOTOS["chelsea.png"]) as photo:
        photo.resize((112, 84)).save(folder / "cat.png")
        photo.resize((84, 56)).save(folder / "small.png")
    return folder


def extracted(images, out, **options):
    extract_files([images], out=out, options=ExtractOptions(**options))
    return out


@pytest.fixture(scope="module")
def plain_store(checkpoint, images, tmp_path_factory):
    """Without an adapter. Read only."""
    return extracted(images, tmp_path_factory.mktemp("plain") / "embeds", model=str(checkpoint), kernels="reference")


@pytest.fixture(scope="module")
def tuned_store(checkpoint, both, images, tmp_path_factory):
    """With an adapter on both halves. Read only."""
    out = tmp_path_factory.mktemp("tuned") / "embeds"
    return extracted(images, out, model=str(checkpoint), kernels="reference", adapter=str(both))


def opened(checkpoint, adapter, half="both"):
    return open_checkpoint(checkpoint, half, adapter=open_adapter(adapter))


def answers(store, images, **options):
    session = load_session(store, AskOptions(max_new_tokens=NEW_TOKENS, **options))
    return {row.path: session.answer(row, QUESTION).tokens for row in session.store}


# ------------------------------------------------------------------------------------------------------------- merging

CASES = {
    "language": LANGUAGE,
    "encoder": ENCODER,
    "dora": BOTH | {"use_dora": True},
    "rslora": BOTH | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"blocks.1.attn.qkv": 3}},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "bias of its own": {"target_modules": ["q_proj", "qkv"], "lora_bias": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "merger"]},
    "convolution and embedding": {"target_modules": ["proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "some layers": {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1], "exclude_modules": ["visual.blocks.2.mlp.fc1"]},
    "all linear layers": {"target_modules": "all-linear"},
    "ia3": {"kind": "IA3Config", "target_modules": ["q_proj", "down_proj", "fc1"], "feedforward_modules": ["down_proj", "fc1"]},
    "loha": {"kind": "LoHaConfig", "target_modules": ["q_proj", "fc1"], "r": 2},
    "lokr": {"kind": "LoKrConfig", "target_modules": ["q_proj", "fc1"], "r": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_half_has_the_bits_of_the_full_model_merged_by_peft(case, checkpoint, adapter):
    made = adapter(case, **CASES[case])
    truth = dict(merged_model(checkpoint, made, torch.bfloat16).named_parameters())
    before = dict(full_model(checkpoint, torch.bfloat16).named_parameters())
    whole = opened(checkpoint, made)
    language = load_language_weights(whole, dtype=torch.bfloat16, kernels="reference")
    encoder = load_encoder_weights(whole, device=torch.device("cpu"), dtype=torch.bfloat16)
    mine = dict(language.named_parameters()) | dict(encoder.model.named_parameters())
    assert mine.keys() == truth.keys()
    assert [name for name in truth if not torch.equal(mine[name], truth[name])] == []
    changed = {name for name in truth if not torch.equal(before[name], truth[name])}
    of_encoder = {name for name in changed if "visual" in name}
    assert bool(of_encoder) == (encoder.fingerprint != encoder_fingerprint(open_checkpoint(checkpoint, "both")))
    assert encoder.fingerprint == encoder_fingerprint(whole)
    has_language = language_fingerprint(whole) != language_fingerprint(open_checkpoint(checkpoint, "both"))
    assert bool(changed - of_encoder) == has_language
    assert changed


def in_the_older_layout(adapter, folder, **fields):
    """Name tensors as transformers 4 did: `visual` beside `model`, which was the language model itself."""
    made = Path(shutil.copytree(adapter, folder))
    change_tensors(
        made,
        lambda tensors: {
            name.replace("model.model.language_model.", "model.model.").replace(
                "model.model.visual.", "model.visual."
            ): one
            for name, one in tensors.items()
        },
    )
    change_config(made, **fields)
    return made


@pytest.mark.parametrize(
    "targets", [BOTH["target_modules"], r"^(model\.layers|visual\.blocks)\..*(q_proj|v_proj|down_proj|qkv|fc1)$"]
)
def test_an_adapter_of_older_names_is_the_same_adapter(checkpoint, both, tmp_path, targets):
    """Also where its targets are a pattern of these names, which today's do not match."""
    older = in_the_older_layout(both, tmp_path / "older", target_modules=targets)
    mine = load_language_weights(opened(checkpoint, older), dtype=torch.float32, kernels="reference").state_dict()
    today = load_language_weights(opened(checkpoint, both), dtype=torch.float32, kernels="reference").state_dict()
    assert all(torch.equal(mine[name], today[name]) for name in today)
    assert encoder_fingerprint(opened(checkpoint, older)) == encoder_fingerprint(opened(checkpoint, both))


FAMILIES = {
    "llava": {"target_modules": ["q_proj", "linear_2"]},  # of both halves by the same name
    "qwen3_vl": {"target_modules": ["q_proj", "linear_fc1"]},
    "qwen3_5": {"target_modules": ["in_proj_qkv", "out_proj", "linear_fc2"], "use_dora": True},
    "qwen3_vl_moe": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_both_halves_of_other_families_have_the_bits_of_peft(family, family_checkpoint, tmp_path):
    folder = family_checkpoint(family)
    made = make_adapter(folder, tmp_path / "adapter", **FAMILIES[family])
    truth = dict(merged_model(folder, made, torch.bfloat16).named_parameters())
    before = dict(full_model(folder, torch.bfloat16).named_parameters())
    whole = opened(folder, made)
    language = load_language_weights(whole, dtype=torch.bfloat16, kernels="reference")
    encoder = load_encoder_weights(whole, device=torch.device("cpu"), dtype=torch.bfloat16)
    for half in (language, encoder.model):
        mine = dict(half.named_parameters())
        assert [name for name in mine if not torch.equal(mine[name], truth[name])] == []
        changed = [name for name in mine if not torch.equal(mine[name], before[name])]
        assert changed or (family == "qwen3_vl_moe" and half is encoder.model)


@pytest.mark.parametrize("reads", ["qvsplit", "transformers"])
@pytest.mark.parametrize("case", ["whole modules", "convolution and embedding"])
def test_what_was_tied_is_what_peft_makes_of_it(case, reads, tmp_path, monkeypatch):
    from tests.support.checkpoints import make_tiny

    if reads == "transformers":
        monkeypatch.setattr("qvsplit.weights.StreamedReading.model_class", lambda self, half: half)
    make_tiny(tmp_path / "tied", tied=True)
    made = make_adapter(tmp_path / "tied", tmp_path / "adapter", **CASES[case])
    truth = merged_model(tmp_path / "tied", made)
    inputs = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        expected = truth(input_ids=inputs).logits
        for kernels in ("fused", "reference"):
            mine = load_language_weights(opened(tmp_path / "tied", made), dtype=torch.float32, kernels=kernels)
            torch.testing.assert_close(mine(input_ids=inputs).logits, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- a store, and asking


def merged_reference(folder, adapter):
    """The full model on the pixels, with PEFT's merge."""
    reference = FullModel(folder)
    reference.model = merged_model(folder, adapter)
    return reference


def steps(reference, image, question=QUESTION):
    """The tokens of the full model's greedy answer, and the logits of each."""
    inputs = reference.inputs([image], question)
    with torch.inference_mode():
        out = reference.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits)[:, 0]


def test_an_adapter_on_the_language_model_leaves_the_store_as_it_is(checkpoint, language, plain_store, images):
    truth = merged_reference(checkpoint, language)
    session = load_session(plain_store, AskOptions(adapter=language, kernels="reference", max_new_tokens=NEW_TOKENS))
    assert session.encoder_check == "fingerprint"
    for row in session.store:
        expected, logits = steps(truth, upright_rgb(images / row.path))
        with scores(session.engine.language.model) as seen:
            assert session.answer(row, QUESTION).tokens == expected, row.path
        assert torch.equal(torch.stack(seen), logits), row.path
    without = answers(plain_store, images)
    assert (
        without
        != answers(plain_store, images, adapter=language)
        == {row.path: steps(truth, upright_rgb(images / row.path))[0] for row in session.store}
    )  # by the fused kernels


def test_an_adapter_on_both_halves_has_the_bits_of_the_full_model(checkpoint, both, tuned_store, images):
    truth = merged_reference(checkpoint, both)
    options = AskOptions(model=checkpoint, adapter=both, kernels="reference", max_new_tokens=NEW_TOKENS)
    session = load_session(tuned_store, options)
    assert session.notes() == []
    for row in session.store:
        expected, logits = steps(truth, upright_rgb(images / row.path))
        with scores(session.engine.language.model) as seen:
            assert session.answer(row, QUESTION).tokens == expected, row.path
        assert torch.equal(torch.stack(seen), logits), row.path
    checks = list(check_items(open_store(tuned_store), list(session.store), kernels="reference"))
    assert all(check.same_bits and check.same_tokens for check in checks)


def test_features_of_a_family_without_fused_kernels_have_the_bits_of_the_full_model(
    family_checkpoint, images, tmp_path
):
    """PEFT leaves weights frozen, and such an encoder's are not: its sums are to be rounded alike all the same."""
    folder = family_checkpoint("llava")
    made = make_adapter(folder, tmp_path / "adapter", target_modules=["q_proj", "linear_2"])
    before, truth = full_model(folder), merged_model(folder, made)
    processor = AutoProcessor.from_pretrained(folder)
    store = open_store(extracted(images, tmp_path / "embeds", model=str(folder), adapter=str(made)))
    assert store.config.kernels == "reference"
    for row in store:
        pixels = processor.image_processor(images=[upright_rgb(images / row.path)], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            plain, expected = (
                torch.cat([*model.get_image_features(pixels, return_dict=True).pooler_output])
                for model in (before, truth)
            )
        (given,) = store.features(row).torch().values()
        assert torch.equal(given, expected) and not torch.equal(given, plain)
    checks = list(check_items(store, list(store), kernels="reference"))
    assert all(check.same_bits and check.same_tokens for check in checks)


def test_asking_and_extracting_take_the_stores_own_adapter_with_its_own_model(both, tuned_store, images, tmp_path):
    session = load_session(tuned_store, loaded=False)
    assert session.model == f"{session.checkpoint.name} with adapter {both}"
    assert session.encoder_check == "fingerprint"
    store = Path(shutil.copytree(tuned_store, tmp_path / "embeds"))
    more = Path(shutil.copytree(images, tmp_path / "more"))
    with Image.open(PHOTOS["coffee.png"]) as photo:
        photo.resize((84, 84)).save(more / "coffee.png")
    extracted(more, store)
    found = open_store(store)
    assert found.provenance.adapter == str(both)
    assert {row.path for row in found} == {"cat.png", "small.png", "coffee.png"}
    assert describe(found)["adapter"] == str(both)


def test_the_fused_encoder_takes_merged_weights(checkpoint, both, tuned_store, images, tmp_path):
    fused = extracted(images, tmp_path / "fused", model=str(checkpoint), adapter=str(both))
    mine, reference = open_store(fused), open_store(tuned_store)
    assert mine.config.encoder == reference.config.encoder
    for row in mine:
        one, other = (store.features(row).torch()["pooler_output"] for store in (mine, reference))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    with load_encoder(checkpoint, adapter=both) as encoder:
        assert encoder.config.encoder == mine.config.encoder


def test_a_store_without_the_adapter_is_refused_where_that_changes_the_encoder(run_cli, both, plain_store):
    code, out, err = run_cli("ask", "-e", plain_store, QUESTION, "--adapter", both)
    assert (code, out) == (4, "")
    assert f"{both} changes the vision encoder, and the store was made without it" in err
    assert f"extract with --adapter {both} into another store" in err


def test_a_store_with_the_adapter_is_refused_without_it_or_with_another(
    run_cli, checkpoint, both, adapter, tuned_store
):
    code, _, err = run_cli("ask", "-e", tuned_store, QUESTION, "-m", checkpoint)
    assert (
        code == 4
        and f"made with the adapter {both}, which changes the vision encoder; ask with it: --adapter {both}" in err
    )
    other = adapter("encoder", **ENCODER)
    code, _, err = run_cli("ask", "-e", tuned_store, QUESTION, "--adapter", other)
    assert code == 4 and f"made with another one, {both}" in err
    code, _, err = run_cli("verify", tuned_store, "--sample", 1, "-m", checkpoint)
    assert code == 4 and f"made with the adapter {both}" in err


def test_extracting_into_a_store_of_another_adapter_is_refused(
    run_cli, checkpoint, both, adapter, images, plain_store, tuned_store
):
    encoder = adapter("encoder", **ENCODER)
    for store, options in (
        (plain_store, ["--adapter", both]), (tuned_store, ["--adapter", encoder]), (tuned_store, ["-m", checkpoint]),
    ):  # fmt: skip
        code, _, err = run_cli("extract", images, "-o", store, *options)
        assert code == 4 and "made by another encoder than that of" in err, err
    assert f"(with adapter {both})" in err


def test_an_adapter_for_questions_alone_changes_nothing_at_extract(checkpoint, language, images, plain_store, tmp_path):
    ran = extractor(str(checkpoint), tmp_path / "embeds")(images, adapter=str(language), kernels="reference")
    (note,) = ran.notes
    assert note == f"{language} changes nothing here: it has nothing for the vision encoder, and is for questions"
    assert by_path(tmp_path / "embeds") == by_path(plain_store)
    mine, theirs = open_store(tmp_path / "embeds"), open_store(plain_store)
    assert (mine.config, mine.provenance) == (theirs.config, theirs.provenance)


def test_rebuilding_keeps_the_stores_own_adapter_unless_a_model_is_named(
    checkpoint, both, tuned_store, plain_store, images, tmp_path
):
    store = Path(shutil.copytree(tuned_store, tmp_path / "embeds"))
    extracted(images, store, rebuild=True)
    assert open_store(store).provenance.adapter == str(both)
    extracted(images, store, rebuild=True, model=str(checkpoint))
    assert open_store(store).provenance.adapter is None
    assert open_store(store).config == open_store(plain_store).config


def test_answers_without_the_adapter_are_not_known_with_it(run_cli, language, plain_store, tmp_path):
    asked = ["ask", "-e", plain_store, QUESTION, "-o", tmp_path / "answers.jsonl"]
    _, _, err = run_cli(*asked)
    assert "0 answers known, 2 asked" in err
    _, _, err = run_cli(*asked, "--adapter", language)
    assert "0 answers known, 2 asked" in err
    _, _, err = run_cli(*asked, "--adapter", language)
    assert "2 answers known, 0 asked" in err
    named = {json.loads(line)["model"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()}
    assert {name.partition(" with ")[2] for name in named} == {"", f"adapter {language}"}


def test_files_at_hand_are_encoded_with_the_adapter(
    run_cli, checkpoint, both, language, images, tuned_store, plain_store, tmp_path, monkeypatch
):
    """Beside a store as well as without one; and one for questions alone says nothing of the encoder."""
    with Image.open(PHOTOS["coffee.png"]) as photo:
        photo.resize((84, 84)).save(tmp_path / "coffee.png")
    monkeypatch.chdir(tmp_path)
    beside = ["ask", "-e", tuned_store, "-i", "coffee.png", QUESTION, "--json"]
    alone = ["ask", "-i", "coffee.png", QUESTION, "--json", "-m", checkpoint, "--adapter", both]
    (_, one, _), (_, other, _) = run_cli(*beside), run_cli(*alone)
    assert json.loads(one)["answer"] == json.loads(other)["answer"] != ""
    for asked in (alone[:-1], ["ask", "-e", plain_store, *beside[3:], "--adapter"]):
        code, out, err = run_cli(*asked, language)
        assert code == 0 and json.loads(out)["encoder_check"] == "fingerprint" and "changes nothing" not in err


def test_features_at_hand_are_held_against_the_adapter(checkpoint, both, images):
    with load_encoder(checkpoint, adapter=both) as encoder:
        (features,) = encoder.encode([images / "cat.png"])
    tuned = load_language_model(checkpoint, options=AskOptions(adapter=both))
    assert tuned.answer(features, QUESTION).encoder_check == "fingerprint"
    with pytest.raises(ConfigError, match="made by another encoder"):
        load_language_model(checkpoint).answer(features, QUESTION)


# ------------------------------------------------------------------------------------------------------------ refusals


def without(name):
    return lambda tensors: {key: one for key, one in tensors.items() if name not in key}


def renamed(before, after):
    return lambda tensors: {key.replace(before, after): one for key, one in tensors.items()}


TENSORS = {
    "another number of layers": (renamed("layers.3.", "layers.9."), "the model has no model.language_model.layers.9.mlp.down_proj"),
    "a module lacks its tensors": (without("layers.2.self_attn.q_proj"), "it has no tensors for model.language_model.layers.2.self_attn.q_proj"),
    "a tensor is missing": (without("layers.2.self_attn.q_proj.lora_B"), "it lacks base_model.model.model.language_model.layers.2.self_attn.q_proj.lora_B.weight"),
    "a tensor has no place": (renamed("layers.2.mlp.down_proj.lora_B.weight", "layers.2.mlp.down_proj.lora_C.weight"), "PEFT has no place for"),
    "another width": (lambda tensors: {key: one[:, :64].clone() for key, one in tensors.items()}, "shape [4, 64] instead of [4, 256]"),
    "not PEFT's": (renamed("base_model.", "my_model."), "has tensors that PEFT does not save"),
    "none at all": (lambda tensors: {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_without_its_place_or_a_place_without_its_tensor_is_refused(case, checkpoint, language, tmp_path):
    made = Path(shutil.copytree(language, tmp_path / "adapter"))
    change, expected = TENSORS[case]
    change_tensors(made, change)
    with pytest.raises(ModelError) as raised:
        load_language_weights(opened(checkpoint, made), dtype=torch.float32)
    assert str(raised.value).startswith(str(made)) and expected in str(raised.value)


def test_an_adapter_of_another_model_is_refused_at_extract_though_it_has_nothing_for_the_encoder(
    checkpoint, language, images, tmp_path
):
    made = Path(shutil.copytree(language, tmp_path / "adapter"))
    change_tensors(made, renamed("layers.3.", "layers.9."))
    with pytest.raises(ModelError, match=r"does not fit .*the model has no model\.language_model\.layers\.9"):
        extracted(images, tmp_path / "embeds", model=str(checkpoint), adapter=str(made))


CONFIGS = {
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "adapter of the type PROMPT_TUNING, which qvsplit does not merge; it takes LORA, IA3"),
    "no type": ({"peft_type": None}, "adapter of the type None"),
    "switched by the prompt": ({"alora_invocation_tokens": [5]}, "an adapter with alora_invocation_tokens, which"),
    "of the future": ({"use_magic": True}, "an adapter with use_magic, which"),
    "imports a module": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "an adapter with megatron_config, which"),
    "other base weights": ({"init_lora_weights": "pissa"}, "began from 'pissa', which changes the model's own weights"),
    "a pattern for nothing": ({"alpha_pattern": {"layers.9.q_proj": 1}}, "its alpha_pattern names layers.9.q_proj"),
    "a rank of its own": ({"r": 8}, "has the shape [4, 256] instead of [8, 256]"),
    "no rank": ({"r": "four"}, "cannot be merged: "),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_config_says_and_is_not_merged_is_refused_by_its_name(case, checkpoint, language, tmp_path):
    made = Path(shutil.copytree(language, tmp_path / "adapter"))
    fields, expected = CONFIGS[case]
    change_config(made, **fields)
    with pytest.raises(ModelError) as raised:
        load_language_weights(opened(checkpoint, made), dtype=torch.float32)
    assert str(raised.value).startswith(str(made)) and expected in str(raised.value)
    assert "\n" not in str(raised.value)


def broken(made, what):
    if what == "no config":
        (made / "adapter_config.json").unlink()
    elif what == "no JSON":
        (made / "adapter_config.json").write_text("{")
    elif what == "pickled":
        (made / WEIGHTS).rename(made / "adapter_model.bin")
    elif what == "no weights":
        (made / WEIGHTS).unlink()
    elif what == "cut short":
        (made / WEIGHTS).write_bytes((made / WEIGHTS).read_bytes()[:-9])
    elif what == "eight bits":
        change_tensors(made, lambda tensors: {name: one.to(torch.int8) for name, one in tensors.items()})


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("no config", "has no adapter_config.json; is it a PEFT adapter?"),
        ("no JSON", "adapter_config.json cannot be read"),
        (
            "pickled",
            "has only pickled weights (adapter_model.bin), which can run code when loaded and are never opened",
        ),
        ("no weights", "has no adapter_model.safetensors"),
        ("cut short", "is damaged or cut short"),
        ("eight bits", "its tensors are stored as I8"),
    ],
)
def test_what_is_wrong_with_its_files_is_said_in_one_line_before_anything_is_loaded(
    run_cli, what, expected, language, plain_store, tmp_path
):
    made = Path(shutil.copytree(language, tmp_path / "adapter"))
    broken(made, what)
    code, out, err = run_cli("ask", "-e", plain_store, QUESTION, "--adapter", made)
    assert (code, out) == (3, "") and expected in err and str(made) in err
    assert len(err.splitlines()) == 1, err


def test_a_folder_that_is_not_there_is_said_in_one_line(run_cli, both, plain_store, tuned_store, tmp_path):
    code, _, err = run_cli("ask", "-e", plain_store, QUESTION, "--adapter", tmp_path / "none")
    assert code == 3 and "no adapter folder at" in err and len(err.splitlines()) == 1
    moved = both.rename(both.with_name("moved"))
    try:
        code, _, err = run_cli("ask", "-e", tuned_store, QUESTION)
        assert code == 3 and f"the store was made with the adapter {both}: no adapter folder at {both}" in err
        assert "if it has moved, name it as --adapter" in err
        assert run_cli("ask", "-e", tuned_store, QUESTION, "--adapter", moved)[0] == 0
    finally:
        moved.rename(both)


def test_two_adapters_are_refused(run_cli, language, plain_store):
    code, _, err = run_cli("ask", "-e", plain_store, QUESTION, "--adapter", language, "--adapter", language)
    assert code == 2 and "--adapter is given more than once" in err


def test_without_peft_a_line_says_what_to_install(run_cli, language, plain_store, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = run_cli("ask", "-e", plain_store, QUESTION, "--adapter", language)
    assert code == 3 and "--adapter needs peft; install it with: pip install 'qvsplit[adapters]'" in err


def test_a_quantised_language_model_is_refused_by_name(checkpoint, language, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="cannot be merged into .*which is quantised: give the model"):
        load_language_weights(opened(folder, language), dtype=None)


def test_from_a_hub_only_its_two_files_are_fetched_and_the_commit_is_kept(language, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(language, tmp_path / "adapter"))
    (folder / "optimizer.pt").write_bytes(b"large")
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with Hub(folder) as hub:
        point_at(monkeypatch, hub.url, tmp_path / "home")
        for name in (NAME, f"{NAME}@{COMMIT}"):
            found = open_adapter(name)
            assert found.label == f"{NAME}@{COMMIT}" and len(found.places) == len(open_adapter(language).places)
        assert set(hub.fetched) == {"adapter_config.json", WEIGHTS}
        with pytest.raises(ModelError, match="the hub has no adapter nobody/nothing .*`adapter=DIR`"):
            open_adapter("nobody/nothing")
        (folder / WEIGHTS).unlink()
        point_at(monkeypatch, hub.url, tmp_path / "another home")
        with pytest.raises(ModelError, match=rf"{NAME} has no {WEIGHTS} \(pickled weights are never opened\)"):
            open_adapter(NAME)
