"""Quantised checkpoints: their encoder where it is kept plain, their language model as transformers has it, or refused.

Each form is a real small checkpoint, see tests/support/quantised.py. Answers are held against transformers' full model
of the same checkpoint; forms whose package this machine lacks are passed over.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvsplit import verify, weights
from qvsplit.answering.loading import expected_dtype
from qvsplit.ask import AskOptions, load_session
from qvsplit.checkpoints.fingerprint import encoder_fingerprint, language_fingerprint
from qvsplit.checkpoints.hf import load_config
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.quantised import check_one_dtype, convert_plain, quantiser
from qvsplit.checkpoints.quantised import set_quantisation as set_for_transformers
from qvsplit.errors import ConfigError, ModelError, WeightsError
from qvsplit.extract import extract_files
from qvsplit.inspecting import describe_model
from qvsplit.output.model_text import model_lines
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from tests.support import quantised
from tests.support.checkpoints import edit, make_tiny
from tests.support.full_model import QUESTIONS, FullModel, upright_rgb

CPU = torch.device("cpu")
ENCODER = ("model.visual.",)
FORMS = {
    "fp8": quantised.fp8,
    "gptq": quantised.gptq,
    "awq": quantised.awq,
    "compressed FP8": lambda plain, out, **more: quantised.compressed(plain, out, "FP8", **more),
    "compressed W4A16": lambda plain, out, **more: quantised.compressed(plain, out, "W4A16", **more),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The model that the quantised ones are made from, in bfloat16 as those of the hub are."""
    folder = tmp_path_factory.mktemp("quantised") / "plain"
    make_tiny(folder, dtype="bfloat16", prefix="nested", files=2)
    return folder


@pytest.fixture(scope="module")
def made(plain):
    """Make a checkpoint of a form, once. Read only."""
    known: dict[str, Path] = {}

    def of(form: str) -> Path:
        if form not in known:
            known[form] = FORMS[form](plain, plain.parent / form.replace(" ", "-"))
        return known[form]

    return of


@pytest.fixture(scope="module")
def stores(plain, tmp_path_factory):
    """Stores of one photo, by the plain model's encoder, in a dtype."""
    from skimage import data, io

    photos = tmp_path_factory.mktemp("photos")
    io.imsave(photos / "astronaut.png", data.astronaut()[100:260, 100:300])
    known = {}

    def of(dtype: str):
        if dtype not in known:
            out = plain.parent / f"store-{dtype}"
            extract_files([photos], out=out, options=ExtractOptions(model=str(plain), dtype=dtype, kernels="reference"))
            known[dtype] = open_store(out)
        return known[dtype], photos

    return of


def load_encoder(folder: Path):
    return weights.load_encoder_weights(open_checkpoint(folder, "encoder"), device=CPU, dtype=torch.bfloat16)


def load_language(folder: Path, **more):
    return weights.load_language_model(open_checkpoint(folder, "language"), **{"dtype": None, **more})


def set_quantisation(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantised.set_config(folder, quantization_config=config["quantization_config"] | fields)


# ------------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_that_is_kept_plain_is_that_of_the_model_it_was_made_from(plain, made, form):
    """No package of the form is needed for it."""
    mine, theirs = load_encoder(made(form)), load_encoder(plain)
    assert mine.fingerprint == theirs.fingerprint == encoder_fingerprint(open_checkpoint(made(form), "encoder"))
    assert {type(one) for one in mine.module.modules()} == {type(one) for one in theirs.module.modules()}
    for (name, tensor), (_, expected) in zip(
        mine.module.named_parameters(), theirs.module.named_parameters(), strict=True
    ):
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_that_is_quantised_itself_is_refused(plain, tmp_path, form):
    folder = FORMS[form](plain, tmp_path / "whole", also=ENCODER)
    for call in (load_encoder, lambda folder: open_checkpoint(folder, "both").stored_dtype("encoder")):
        with pytest.raises(ModelError, match="its vision encoder itself is quantised .model.visual") as caught:
            call(folder)
        assert "\n" not in str(caught.value)


def test_scales_beside_plain_weights_of_the_encoder_are_refused(made, tmp_path):
    own = Path(shutil.copytree(made("fp8"), tmp_path / "own"))
    name = "model.visual.blocks.0.attn.qkv.weight"
    edit(own, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(2, 1)} if name in tensors else {}))
    with pytest.raises(WeightsError, match="unexpected: model.visual.blocks.0.attn.qkv.weight_scale_inv"):
        load_encoder(own)


def test_a_store_is_the_quantised_checkpoints_and_the_plain_ones(plain, made, stores, tmp_path):
    store, photos = stores("float32")
    extract_files([photos], out=tmp_path / "out", options=ExtractOptions(model=str(made("fp8")), kernels="reference"))
    raws = [one.features("astronaut.png").tensors["pooler_output"].raw for one in (open_store(tmp_path / "out"), store)]
    assert raws[0].tobytes() == raws[1].tobytes()
    for folder, other in ((made("fp8"), store), (plain, open_store(tmp_path / "out"))):
        assert load_session(other, AskOptions(model=str(folder))).encoder_check == "fingerprint"


def test_an_encoder_that_was_cast_is_another_one_and_it_is_said_how(made, stores, tmp_path):
    """As AWQ checkpoints of the hub are, all of them in float16."""
    own = Path(shutil.copytree(made("awq"), tmp_path / "own"))

    def change(tensors):
        tensors.update({name: one.half() for name, one in tensors.items() if "visual" in name})

    edit(own, change)
    store, _ = stores("float32")
    with pytest.raises(
        ConfigError, match="another encoder .* it is quantised, with an encoder in float16: .* cast"
    ) as caught:
        load_session(store, AskOptions(model=str(own)))
    assert caught.value.exit_code == 4


# ------------------------------------------------------------------------------------------------------------ answers


def check_answers(folder: Path, full: FullModel, stores, dtype: str, *, asked: str | None, kernels: str) -> None:
    store, photos = stores(dtype)
    options = AskOptions(model=str(folder), max_new_tokens=12, dtype=asked, kernels=kernels)
    session = load_session(store, options)
    (row,) = store
    image = upright_rgb(photos / row.path)
    for question in QUESTIONS[:3]:
        assert session.answer(row, question).tokens == full.answer([image], question)


@pytest.fixture(scope="module")
def multiplied(made):
    """FP8 weights times their scales, block by block, in a plain checkpoint: written here and not by transformers."""
    folder = Path(shutil.copytree(made("fp8"), made("fp8").parent / "multiplied"))
    tensors = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scale = tensors[name.removesuffix("_scale_inv")], tensors.pop(name)
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name.removesuffix("_scale_inv")] = weight.float() * wide
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file({name: one.float() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    quantised.set_config(folder, quantization_config=None)
    return FullModel(folder)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_fp8_is_dequantised_on_a_cpu_and_answers_in_float32(made, multiplied, stores, kernels):
    check_answers(made("fp8"), multiplied, stores, "float32", asked=None, kernels=kernels)
    checkpoint = open_checkpoint(made("fp8"), "both")
    assert expected_dtype(checkpoint, AskOptions(kernels=kernels)) == "quantised by fp8, dequantised to float32"


def test_fp8_is_dequantised_on_a_cpu_that_has_a_gpu_beside_it(made):
    """transformers does that by itself only where there is none."""
    checkpoint = open_checkpoint(made("fp8"), "language")
    for device_type, wanted in (("cpu", True), ("cuda", None)):
        config = load_config(checkpoint)
        set_for_transformers(config, checkpoint, device_type=device_type)
        assert config.quantization_config.get("dequantize") is wanted


def test_fp8_beside_plain_weights_in_float32_answers_in_what_is_asked_for(made, tmp_path):
    own = Path(shutil.copytree(made("fp8"), tmp_path / "own"))
    edit(own, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if t.dtype == torch.bfloat16}))
    mine, theirs = (load_language(folder, dtype=torch.bfloat16, kernels="reference") for folder in (own, made("fp8")))
    for (name, tensor), expected in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected), name


def test_what_a_class_keeps_wide_is_no_reason_to_refuse(own):
    model = torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2), "up": torch.nn.Linear(2, 2)})
    model._keep_in_fp32_modules_strict = {"gate.weight"}
    convert_plain(model, torch.bfloat16)
    assert [one.dtype for one in model.parameters()] == [torch.float32, *[torch.bfloat16] * 3]
    check_one_dtype(open_checkpoint(own, "language"), model, torch.bfloat16)


def test_fp8_answers_in_bfloat16_as_transformers_does_by_itself(made, stores):
    full = FullModel(made("fp8"), dtype="auto")
    check_answers(made("fp8"), full, stores, "bfloat16", asked="bfloat16", kernels="reference")


@pytest.mark.parametrize("form", ["compressed FP8", "compressed W4A16", "gptq", "awq"])
def test_answers_are_those_of_the_full_quantised_model(made, stores, form, tmp_path):
    pytest.importorskip("gptqmodel" if form in ("gptq", "awq") else "compressed_tensors")
    folder = made(form)
    if form == "awq":  # whose list of what stays plain has a name that transformers no longer knows
        folder = Path(shutil.copytree(folder, tmp_path / "awq"))
        set_quantisation(folder, modules_to_not_convert=["model.visual"])
    full = FullModel(folder, dtype="auto")
    check_answers(made(form), full, stores, "bfloat16", asked=None, kernels="reference")
    assert load_language(made(form)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_answers_of_bitsandbytes_are_those_of_the_full_model(plain, stores, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = quantised.bitsandbytes(plain, tmp_path / "bnb", bits=bits)
    assert load_encoder(folder).fingerprint == load_encoder(plain).fingerprint
    full = FullModel(folder, dtype="auto")
    check_answers(folder, full, stores, "bfloat16", asked=None, kernels="reference")
    with pytest.raises(ModelError, match="quantised by bitsandbytes, of which parts stay in bfloat16"):
        load_language(folder, dtype=torch.float32)


def test_packed_weights_are_unpacked_where_only_parts_of_the_model_are_called(made, multiplied, stores):
    """compressed-tensors leaves that to the first call of the whole model."""
    pytest.importorskip("compressed_tensors")
    store, _ = stores("float32")
    (row,) = store
    answers = [
        load_session(store, AskOptions(model=str(made("compressed W4A16")), dtype="float32", kernels=kernels))
        .answer(row, QUESTIONS[0])
        .tokens
        for kernels in ("fused", "reference")
    ]
    assert answers[0] == answers[1]


def test_what_is_quantised_is_said_of_an_answer(made):
    checkpoint = open_checkpoint(made("gptq"), "both")
    assert expected_dtype(checkpoint, AskOptions()) == "quantised by gptq"
    assert expected_dtype(checkpoint, AskOptions(dtype="float32")) == "quantised by gptq, the rest in float32"


def test_scales_are_in_the_language_models_fingerprint(made, tmp_path):
    own = Path(shutil.copytree(made("fp8"), tmp_path / "own"))
    before = language_fingerprint(open_checkpoint(own, "language"))
    edit(own, lambda tensors: tensors.update({n: t * 2 for n, t in tensors.items() if n.endswith("_scale_inv")}))
    assert language_fingerprint(open_checkpoint(own, "language")) != before


# ------------------------------------------------------------------------------------------------------------ inspect


@pytest.mark.parametrize("form", FORMS)
def test_the_memory_that_inspect_says_is_that_of_the_loaded_weights(made, form):
    """Scales that stay beside decompressed weights are 3 % at the most; FP8 in blocks has none on a CPU."""
    if form in ("gptq", "awq", "compressed FP8", "compressed W4A16"):
        pytest.importorskip("gptqmodel" if form in ("gptq", "awq") else "compressed_tensors")
    said = {row["dtype"]: row["language_model"] for row in describe_model(made(form))["memory"]}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("as stored", None)):
        if form in ("gptq", "awq") and dtype is not None:
            assert said[name] is None
        elif (form, dtype) != ("fp8", None):  # that row is a GPU's
            model = load_language(made(form), dtype=dtype, kernels="reference")
            held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            assert held == pytest.approx(said[name], rel=0.03)


def test_inspect_says_what_is_refused(plain, own, tmp_path):
    encoder = describe_model(quantised.fp8(plain, tmp_path / "whole", also=ENCODER))
    assert "its vision encoder itself is quantised" in encoder["encoder"]["refused"]
    assert {(row["encoder"], row["extract"], row["extract_on_gpu"]) for row in encoder["memory"]} == {(None,) * 3}
    said = "refused by `extract`: its vision encoder itself is quantised ("
    assert any(line.strip().startswith(said) for line in model_lines(encoder))
    set_quantisation(own, quant_method="exl2")
    language = describe_model(own)
    assert "exl2, which transformers does not load" in language["language_model"]["refused"]
    assert {(row["language_model"], row["ask"], row["ask_on_gpu"]) for row in language["memory"]} == {(None,) * 3}
    assert language["encoder"]["refused"] is encoder["language_model"]["refused"] is None


# ------------------------------------------------------------------------------------------------------------- verify


def test_verify_holds_a_store_against_the_full_quantised_model(made, stores):
    store, _ = stores("float32")
    (check,) = verify.check_items(store, list(store), model=str(made("fp8")))
    assert (check.same_bits, check.same_tokens) == (True, True)


def test_the_full_model_keeps_its_encoder_plain_whatever_name_its_modules_had(made):
    """Checkpoints of the hub say `visual`, of a module that transformers now calls `model.visual`."""
    own = open_checkpoint(made("fp8"), "both")
    own.config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "visual"]
    model = weights.load_full_model(own, device=CPU, dtype=torch.float32)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    pytest.importorskip("gptqmodel")
    weights.load_full_model(open_checkpoint(made("awq"), "both"), device=CPU, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A copy of the FP8 checkpoint that a test may break."""
    return Path(shutil.copytree(made("fp8"), tmp_path / "own"))


def test_settings_inside_those_of_the_text_are_read(own, multiplied):
    config = json.loads((own / "config.json").read_text())
    text = config["text_config"] | {"quantization_config": config["quantization_config"]}
    quantised.set_config(own, quantization_config=None, text_config=text)
    language = load_language(own, dtype=torch.float32, kernels="reference")
    for name, tensor in language.named_parameters():
        assert torch.equal(tensor, multiplied.model.get_parameter(name)), name
    load_encoder(own)


@pytest.mark.parametrize(
    ("settings", "file", "said"),
    [
        ({}, None, "has no quantization_config, nothing that says how"),
        ({"compression_config": {}}, None, "no quantization_config, only compression_config"),
        ({}, "hf_quant_config.json", "no quantization_config, only hf_quant_config.json"),
    ],
)
def test_numbers_without_a_quantiser_are_refused(own, settings, file, said):
    quantised.set_config(own, quantization_config=None, **settings)
    if file is not None:
        (own / file).write_text("{}")
    for load in (load_language, lambda own: load_language(own, dtype=torch.float32)):
        with pytest.raises(ModelError, match=f"quantised .*F8_E4M3.*{said}"):
            load(own)
    with pytest.raises(ModelError, match=said):
        weights.load_full_model(open_checkpoint(own, "both"), device=CPU, dtype=torch.float32)


def test_settings_in_those_of_the_encoder_are_none_of_the_language_models(own):
    config = json.loads((own / "config.json").read_text())
    vision = config["vision_config"] | {"quantization_config": config["quantization_config"]}
    quantised.set_config(own, quantization_config=None, vision_config=vision)
    load_encoder(own)  # which is plain, whatever they say
    with pytest.raises(ModelError, match="no quantization_config"):
        load_language(own)


def test_packed_numbers_without_a_quantiser_are_left_over(made, tmp_path):
    own = Path(shutil.copytree(made("gptq"), tmp_path / "packed"))
    quantised.set_config(own, quantization_config=None)
    with pytest.raises(WeightsError, match="missing: .*_proj.weight.*unexpected: .*g_idx"):
        load_language(own)


@pytest.mark.parametrize("method", ["modelopt", "exl2", None])
def test_a_method_that_transformers_does_not_know_is_named(own, method):
    """transformers would say so in its log and load the numbers as they are."""
    set_quantisation(own, quant_method=method)
    with pytest.raises(ModelError, match=str(method or "quant_method")):
        load_language(own)


def test_fp8_without_its_scale_is_refused(own):
    """transformers would take it as it is."""
    lost = "model.language_model.layers.1.mlp.up_proj.weight"
    edit(own, lambda tensors: tensors.pop(f"{lost}_scale_inv", None))
    with pytest.raises(ModelError, match=f"has {lost} as F8_E4M3 without its scale"):
        load_language(own)


@pytest.mark.parametrize("foreign", ["weight_scale", "input_scale"])
def test_scales_of_other_programs_are_named(own, foreign):
    """vLLM's, and those of activations: the files are whole, and another download brings nothing."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            scale = tensors.pop(name) if foreign == "weight_scale" else torch.tensor(1.0)
            tensors[f"{name.removesuffix('weight_scale_inv')}{foreign}"] = scale

    edit(own, change)
    with pytest.raises(ModelError, match=f"by fp8 with scales by the name {foreign}, which are not read; name a"):
        load_language(own)


def test_fp8_whose_last_block_is_cut_is_refused(plain, tmp_path):
    """transformers would make all blocks of one size: 128 rows are three of 48, and the last is cut."""
    folder = quantised.fp8(plain, tmp_path / "cut", block=48)
    with pytest.raises(ModelError, match=r"blocks of \[48, 48\], the last of them cut"):
        load_language(folder)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("aqlm", "aqlm"), ("auto-round", "auto-round"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes"),
        ("gptq", "optimum gptqmodel"), ("hqq", "hqq"), ("quanto", "optimum-quanto"), ("torchao", "torchao"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_what_installs_it(own, method, package):
    set_quantisation(own, quant_method=method)
    opened = open_checkpoint(own, "language")
    said = f"quantised by {method}, which needs a package .*; pip install {package}"
    with pytest.raises(ModelError, match=said), quantiser(opened):
        raise ImportError("No package metadata was found")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("method", ["fbgemm_fp8", "nvfp4", "fp_quant"])
def test_a_form_that_needs_a_gpu_says_so(own, method):
    set_quantisation(own, quant_method=method)
    with pytest.raises(ModelError, match=f"quantised by {method}, which cannot be computed here .*; ask where there"):
        load_language(own)


def test_a_dtype_that_parts_do_not_take_is_refused(own):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2).bfloat16()})
    opened = open_checkpoint(own, "language")
    with pytest.raises(ModelError, match="parts stay in bfloat16 whatever `dtype` says"):
        check_one_dtype(opened, model, torch.float32)


def test_what_a_quantiser_prints_is_no_answer(own, capsys):
    """gptqmodel prints on the standard output."""
    with quantiser(open_checkpoint(own, "language")):
        print("INFO")
    assert capsys.readouterr().out == ""
