"""Settings that decide features: which are named, what absence means, and that a checkpoint saved anew has the same.

Whoever quantises or fine-tunes a model saves it with transformers, which writes config and processor anew. Tiny models
of each family with named fields, in the hub's older layout, as its real files are.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qvsplit.answering.evidence import check_features
from qvsplit.checkpoints.families import FAMILIES
from qvsplit.checkpoints.fingerprint import encoder_fingerprint, fingerprint_of
from qvsplit.checkpoints.opening import open_checkpoint, read_settings
from qvsplit.errors import ConfigError
from qvsplit.models.preparing import load_processor, pixel_settings
from tests.support.families import ALL, make_checkpoint
from tests.support.rows import config as config_of_a_store

NAMED = [name for name, family in FAMILIES.items() if family.vision_settings is not None]
OMNI = [name for name in NAMED if "omni" in name]
# fields of the hub's vision configs: those of Qwen2.5-VL and of Qwen3-VL's successors, and what they do not have
OLDER = {
    "depth", "hidden_act", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size",
    "spatial_merge_size", "window_size", "fullatt_block_indexes", "temporal_patch_size", "embed_dim", "mlp_ratio",
    "num_position_embeddings", "deepstack_visual_indexes",
}  # fmt: skip
BESIDE = {
    "qwen2_5_vl": {"in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2},
    "qwen3_vl": {"in_channels": 3, "initializer_range": 0.02, "model_type": "qwen3_vl"},
    "qwen3_5": {"in_channels": 3, "initializer_range": 0.02, "model_type": "qwen3_5", "deepstack_visual_indexes": []},
}
MEANS = {
    14: {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    16: {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
# what the library's own machinery reads off a config, and which decides no feature of these encoders: how weights are
# drawn and trained, what is done behind a prompt, and layers that encoders of other families are asked for
OF_NO_FEATURE = {
    "_heterogeneity_spec", "auto_map", "gradient_checkpointing", "initializer_range", "output_router_logits",
    "quantization_config", "tie_word_embeddings", "use_cache", "vision_aspect_ratio", "vision_feature_layer",
    "vision_feature_select_strategy",
}  # fmt: skip


def in_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def vision_of(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("thinker_config", config)["vision_config"]


def to_hub_files(folder: Path, family: str) -> None:
    """Rewrite today's small files as the older ones that the hub has."""

    def older(config: dict[str, Any]) -> None:
        vision = vision_of(config)
        kept = {name: value for name, value in vision.items() if name in OLDER}
        vision.clear()
        vision.update(kept | BESIDE.get(family, {}))
        if family == "qwen2_5_vl":  # its language model's fields stand beside the sections
            text = config.pop("text_config")
            rope = text.pop("rope_parameters")
            text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "rope_theta": 1e4}
            text.pop("layer_types", None)
            config |= {name: value for name, value in text.items() if name not in config}
        config["torch_dtype"] = config.pop("dtype", "float32")
        config["transformers_version"] = "4.57.1"

    in_json(folder / "config.json", older)
    nested = json.loads((folder / "processor_config.json").read_text())
    names = ("patch_size", "temporal_patch_size", "merge_size")
    image = {name: nested["image_processor"][name] for name in names} | MEANS[nested["image_processor"]["patch_size"]]
    size, kind = nested["image_processor"]["size"], nested["processor_class"]
    if image["patch_size"] == 14:
        image |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        image |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": kind}
    else:
        image |= {"size": size, "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": kind}
        video = nested["video_processor"]
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video | {"processor_class": kind}))
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").unlink()


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    """Make a tiny model of a family in the hub's older layout, once. Read only."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "hub"
            make_checkpoint(family, made[family], dtype="bfloat16")
            to_hub_files(made[family], family)
        return made[family]

    return of


def save_anew(folder: Path, out: Path, family: str) -> Path:
    """Load a checkpoint with transformers and save all of it; of an Omni model config and processor alone."""
    if family in OMNI:
        shutil.copytree(folder, out)
        (out / "preprocessor_config.json").unlink()
        tf.AutoConfig.from_pretrained(folder).save_pretrained(out)
    else:
        tf.AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(out)
    tf.AutoProcessor.from_pretrained(folder).save_pretrained(out)
    return out


def print_of(folder: Path) -> str:
    return encoder_fingerprint(open_checkpoint(folder, "encoder"))


def raw(folder: Path) -> tuple[Any, Any]:
    settings = read_settings(str(folder))
    return dict(settings.vision_config), dict(settings.processor_config)


# --------------------------------------------------------------------------------------------------- saved anew


@pytest.mark.parametrize("family", NAMED)
def test_a_checkpoint_saved_anew_by_transformers_has_the_same_fingerprint_and_store(hub_model, tmp_path, family):
    first = hub_model(family)
    again = save_anew(first, tmp_path / "again", family)
    assert all(
        mine != theirs for mine, theirs in zip(raw(first), raw(again), strict=True)
    )  # all of it was written anew
    assert not (again / "preprocessor_config.json").exists()
    assert print_of(again) == print_of(first)

    def settings(folder: Path) -> dict[str, Any]:
        opened = open_checkpoint(folder, "encoder")
        return pixel_settings(load_processor(opened, min_pixels=None, max_pixels=None).image_processor, opened)

    assert settings(again) == settings(first)
    opened = open_checkpoint(again, "both")
    store = config_of_a_store(family=family, encoder=print_of(first), processor=settings(first))
    assert check_features(store, opened.width, opened) == "fingerprint"


@pytest.mark.parametrize("family", NAMED)
def test_each_field_that_is_named_makes_another_fingerprint(hub_model, tmp_path, family):
    folder = shutil.copytree(
        hub_model(family), tmp_path / "model", ignore=lambda _, names: [n for n in names if "safetensors" in n]
    )
    files = [folder / name for name in ("config.json", "preprocessor_config.json")]
    before = [path.read_text() for path in files]

    def print_without_tensors() -> str:
        return fingerprint_of(read_settings(str(folder)), {}, {})

    def changed(path: Path, **fields: Any) -> str:
        def change(content: dict[str, Any]) -> None:
            (vision_of(content) if path.name == "config.json" else content).update(fields)

        in_json(path, change)
        value = print_without_tensors()
        for one, text in zip(files, before, strict=True):
            one.write_text(text)
        return value

    special = {"rope_parameters": {"rope_theta": 5000.0}, "image_processor_type": "Glm4vImageProcessor"}
    prints = {"": print_without_tensors()}
    for path, wanted in zip(
        files, (FAMILIES[family].vision_settings, FAMILIES[family].processor_settings), strict=True
    ):
        for name in wanted:
            prints[name + path.name] = changed(path, **{name: special.get(name, 7)})
    prints["older theta"] = changed(files[0], rope_theta=4000.0)
    assert len(set(prints.values())) == len(prints)
    same = [
        changed(files[0], in_chans=1, tokens_per_second=50, dtype="float16", transformers_version="9"),
        changed(files[0], rope_parameters={"rope_type": "default", "rope_theta": 10000}),
        changed(files[1], processor_class="X", image_processor_type="Qwen2VLImageProcessor", max_pixels=10**6),
    ]
    assert set(same) == {prints[""]}


def test_a_store_from_before_fields_were_named_is_refused(hub_model):
    """Its processor is the file's content: what is missing there is not taken for equal."""
    opened = open_checkpoint(hub_model("qwen3_vl"), "both")
    file = {name: value for name, value in opened.processor_config.items() if name != "processor_class"}
    store = config_of_a_store(
        family="qwen3_vl", encoder=print_of(opened.folder), processor=file | {"min_pixels": 1, "max_pixels": 2}
    )
    with pytest.raises(ConfigError, match=r"does not fit .*processor.do_resize: None, not True") as caught:
        check_features(store, opened.width, opened, what="the store")
    assert caught.value.exit_code == 4
    fields = dict(opened.processor_settings) | {"image_processor_type": "Glm4vImageProcessor"}
    store = dataclasses.replace(store, processor=fields)
    with pytest.raises(ConfigError, match=r"processor.image_processor_type: Glm4vImageProcessor, not None"):
        check_features(store, opened.width, opened, what="the store")


# --------------------------------------------------------------------------------------------- what is named is all


@contextmanager
def reads_of(config_class: Any):
    """Collect what is read off configs of a class."""
    names: set[str] = set()
    own = config_class.__getattribute__

    def noting(config: Any, name: str) -> Any:
        if not name.startswith("__"):
            names.add(config_class.attribute_map.get(name, name))
        return own(config, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_class, "__getattribute__", noting)
        yield names


@pytest.mark.parametrize("family", NAMED)
def test_transformers_reads_no_other_field_to_make_features(family):
    """If this fails with a new transformers: see what the field does, and name it, or list it as of no feature."""
    tiny = ALL[family]
    config = tiny.config(tiny.tokenizer(tiny))
    config = getattr(config, f"{tiny.section}_config") if tiny.section else config
    vision = config.vision_config
    pixels = torch.zeros(4 * 6, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    with reads_of(type(vision)) as inner:
        model = tiny.cls()(config)
        with reads_of(type(config)) as outer, torch.no_grad():
            model.get_image_features(pixels, image_grid_thw=torch.tensor([[1, 4, 6]]))
    of_all = {*dir(tf.PreTrainedConfig), *vars(tf.PreTrainedConfig())}
    named = set(FAMILIES[family].vision_settings)
    assert inner - of_all - OF_NO_FEATURE - named == set()
    assert outer - of_all - OF_NO_FEATURE - {"vision_config"} == set()
    assert named <= inner


def test_the_image_processor_takes_no_other_setting():
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as LISTED

    own = tf.Qwen2VLImageProcessor  # which any of them has whose file names none
    assert {name: LISTED[name]["torchvision"] for name in NAMED if name in LISTED} == dict.fromkeys(
        set(NAMED) - {"qwen3_vl_moe"}, own.__name__
    )
    taken = {*inspect.signature(own._preprocess).parameters, *inspect.signature(own.process_image).parameters}
    of_a_call = {
        "self",
        "image",
        "images",
        "kwargs",
        "disable_grouping",
        "return_tensors",
        "device",
        "input_data_format",
    }
    limits = {"size"}  # in the extraction config as they are in force
    named = set(FAMILIES["qwen2_vl"].processor_settings)
    assert taken - of_a_call - limits == named - {"image_processor_type"}
    assert {FAMILIES[name].processor_settings == FAMILIES["qwen2_vl"].processor_settings for name in NAMED} == {True}


@pytest.mark.parametrize("family", NAMED)
def test_defaults_are_transformers_own(family):
    """What a config leaves out means here what it means there."""
    tiny = ALL[family]
    config = tiny.config(tiny.tokenizer(tiny))
    vision_class = type((getattr(config, f"{tiny.section}_config") if tiny.section else config).vision_config)
    for theirs, wanted in (
        (vision_class(), FAMILIES[family].vision_settings),
        (tf.Qwen2VLImageProcessor(), FAMILIES[family].processor_settings),
    ):
        given = json.loads(json.dumps(theirs.to_dict()))
        mine = {name: setting.default for name, setting in wanted.items() if setting.default is not None}
        assert {name: given[name] for name in mine} == mine
        assert not {name for name, setting in wanted.items() if setting.default is None and setting.read is None} & set(
            given
        )
