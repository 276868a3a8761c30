"""What is known of model families, as data.

A family is one `model_type` of a checkpoint's config.json. Any model that transformers can split works without being
listed here (checkpoints/tracing.py finds out what is said here of the others); to be listed buys that its halves are
known without a dry run, pixel limits, shared prefixes, and fast kernels. Adding one is a few lines, and a line in
tests/support/families/. Nothing here imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Prefix = Literal["causal", "blocks", "none"]

ROOTS = ("model.", "thinker.", "")  # what may stand before a module's name in a checkpoint


@dataclass(frozen=True)
class Setting:
    """One field of a config file that decides features.

    Attributes:
        default: What its absence means. None for a field that few files have: it is left out where a file has none.
        other_names: What else files call it.
        read: Gives its value from the whole section, where one field alone does not say it; None if nothing says it.
    """

    default: Any
    other_names: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], Any] | None = None


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: Its name in config.json.
        encoder_modules: The modules of the full model that only the encoder reads, below `.model`.
        loose_tensors: Tensors of the encoder that belong to no such module. The language model has them, too.
        encoder_names: Names of the encoder's tensors in one checkpoint, where only a dry run knows them.
        ignored: Modules that are of neither half: a talker, an audio encoder.
        stored_modules: What checkpoints call the encoder's modules, where that is otherwise.
        model_class: The full model's class in transformers, where that is not the one its `model_type` stands for.
        prefix: What of a prompt does not depend on what follows. "causal": everything; "blocks": everything, but an
            image's tokens see each other both ways, so that no image can be computed behind a prefix; "none": nothing,
            or nobody has tried.
        takes_bare_prompts: Whether its checkpoints have no chat template: a prompt is images, then text.
        default_max_pixels: The most pixels of an image where nobody says; see docs/decisions.md. None for a family
            whose processor has no such limit.
        max_aspect_ratio: The processor refuses images that are longer than this many times their width.
        fused_kernels: Whether kernels/fused_encoder.py has its encoder. Such a one takes patches: models/encoder.py has
            it as `PatchEncoder`.
        container: What holds the features of such an encoder in the model's own output, as the family's stores say it.
        vision_settings: The fields of `vision_config` that decide features. None: all of it, as the file has it.
        processor_settings: The fields of the image processor's config that decide features. None: likewise.
    """

    model_type: str
    encoder_modules: tuple[str, ...] = ("visual",)
    loose_tensors: tuple[str, ...] = ()
    encoder_names: frozenset[str] | None = None
    ignored: tuple[str, ...] = ()
    stored_modules: tuple[str, ...] = ()
    model_class: str | None = None
    prefix: Prefix = "none"
    takes_bare_prompts: bool = False
    default_max_pixels: int | None = None
    max_aspect_ratio: float | None = None
    fused_kernels: bool = False
    container: str = "tuple"
    vision_settings: Mapping[str, Setting] | None = field(default=None, repr=False)
    processor_settings: Mapping[str, Setting] | None = field(default=None, repr=False)

    def is_encoders(self, name: str) -> bool:
        """Say whether the tensor that a checkpoint calls `name` is the encoder's."""
        if self.encoder_names is not None:
            return name in self.encoder_names
        return self.encoder_has(name) or _is_in(name, self.stored_modules)

    def is_language_models(self, name: str) -> bool:
        """Say whether the tensor that a checkpoint calls `name` is the language model's."""
        if self.encoder_names is None:
            return self.language_model_has(name) and not _is_in(name, self.stored_modules)
        return name not in self.encoder_names or without_root(name) in self.loose_tensors

    @property
    def default_kernels(self) -> str:
        """The forward pass where nobody names one."""
        return "fused" if self.fused_kernels else "reference"

    def encoder_has(self, path: str) -> bool:
        """Say whether the encoder has this module or tensor of the full model."""
        return _is_in(path, self.encoder_modules) or without_root(path) in self.loose_tensors

    def language_model_has(self, path: str) -> bool:
        """Say whether the language model has this module or tensor of the full model."""
        return not _is_in(path, (*self.encoder_modules, *self.ignored))

    def bare_name(self, name: str) -> str:
        """Strip what checkpoints of one encoder may differ in from the name of one of its tensors."""
        bare = without_root(name)
        return bare.removeprefix(f"{self.encoder_modules[0]}.") if len(self.encoder_modules) == 1 else bare


def _is_in(path: str, modules: tuple[str, ...]) -> bool:
    return f"{without_root(path)}.".startswith(tuple(f"{module}." for module in modules))


def without_root(name: str) -> str:
    """Strip what may stand before a module's name in a checkpoint."""
    return name.removeprefix(next(root for root in ROOTS if name.startswith(root)))


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_AXIAL_ROPE = {"rope_theta": 10000.0, "rope_type": "axial"}
_PATCH_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")  # the second is an older name of the first


def _axial_rope(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Give what transformers makes of whatever a vision config says of positions: files of each year say it anew."""
    given = vision.get("rope_scaling") or vision.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", vision.get("rope_theta", _AXIAL_ROPE["rope_theta"]))
    return {"rope_theta": theta, "rope_type": _AXIAL_ROPE["rope_type"] if kind == "default" else kind}


def _other_processor(config: Mapping[str, Any]) -> str | None:
    """Give the image processor that a file names, if it is none of those that the Qwen-VL line has."""
    extractor = str(config.get("feature_extractor_type") or "").replace("FeatureExtractor", "ImageProcessor")
    name = str(config.get("image_processor_type") or extractor).removesuffix("Fast")
    return name if name and name not in _PATCH_PROCESSORS else None


def _patches(depth: int, patch: int) -> dict[str, Setting]:
    """Name what every vision encoder of the Qwen-VL line reads off its config."""
    return {
        "depth": Setting(depth, ("num_hidden_layers",)),
        "num_heads": Setting(16, ("num_attention_heads",)),
        "head_dim": Setting(None),
        "is_causal": Setting(None),
        "in_channels": Setting(3),
        "patch_size": Setting(patch),
        "spatial_merge_size": Setting(2),
        "temporal_patch_size": Setting(2),
        "rope_parameters": Setting(_AXIAL_ROPE, read=_axial_rope),
        # the hub's `in_chans` and `spatial_patch_size` are read by nobody: transformers ignores them, so do we;
        # `tokens_per_second` is the language model's, which has its positions from it
    }


# of Qwen2-VL
VISION_SETTINGS: Mapping[str, Setting] = _patches(32, 14) | {
    "embed_dim": Setting(1280),
    "hidden_size": Setting(3584),
    "hidden_act": Setting("quick_gelu"),
    "mlp_ratio": Setting(4),
}
# of Qwen2.5-VL, whose attention has windows
_VISION_SETTINGS_2_5: Mapping[str, Setting] = _patches(32, 14) | {
    "hidden_size": Setting(3584),
    "hidden_act": Setting("silu"),
    "intermediate_size": Setting(3420),
    "out_hidden_size": Setting(3584),
    "window_size": Setting(112),
    "fullatt_block_indexes": Setting([7, 15, 23, 31]),
}
# of Qwen3.5, and of Qwen3-VL, which gives the features of some layers as well
_VISION_SETTINGS_3_5: dict[str, Setting] = _patches(27, 16) | {
    "hidden_size": Setting(1152),
    "hidden_act": Setting("gelu_pytorch_tanh"),
    "intermediate_size": Setting(4304),
    "out_hidden_size": Setting(3584),
    "num_position_embeddings": Setting(2304),
}
_VISION_SETTINGS_3: Mapping[str, Setting] = _VISION_SETTINGS_3_5 | {"deepstack_visual_indexes": Setting([8, 16, 24])}
# the whole line has one image processor
PROCESSOR_SETTINGS: Mapping[str, Setting] = {
    "do_resize": Setting(True),
    "resample": Setting(3),  # PIL's number for bicubic
    "do_rescale": Setting(True),
    "rescale_factor": Setting(1 / 255),
    "do_normalize": Setting(True),
    "image_mean": Setting(list(_CLIP_MEAN)),
    "image_std": Setting(list(_CLIP_STD)),
    "do_convert_rgb": Setting(True),
    "patch_size": Setting(14),
    "temporal_patch_size": Setting(2),
    "merge_size": Setting(2),
    "image_processor_type": Setting(None, read=_other_processor),
}

QWEN2_VL = Family(
    "qwen2_vl",
    prefix="causal",
    default_max_pixels=1280 * 28 * 28,  # 1,280 tokens an image
    max_aspect_ratio=200.0,
    fused_kernels=True,
    container="list",
    vision_settings=VISION_SETTINGS,
    processor_settings=PROCESSOR_SETTINGS,
)


def _qwen(model_type: str, vision: Mapping[str, Setting], **more: Any) -> Family:
    """Give a later family of the Qwen-VL line: 2 × 2 patches a token."""
    patch = int(vision["patch_size"].default)
    return Family(
        model_type, prefix="causal", default_max_pixels=1280 * (2 * patch) ** 2, max_aspect_ratio=200.0,
        fused_kernels=True, vision_settings=vision, processor_settings=PROCESSOR_SETTINGS, **more,
    )  # fmt: skip


def _projected(model_type: str, prefix: Prefix = "causal", **more: Any) -> Family:
    """Give a family of a vision tower and a projector, as LLaVA has it."""
    return Family(model_type, ("vision_tower", "multi_modal_projector"), prefix=prefix, **more)


_LISTED = (
    QWEN2_VL,
    _qwen("qwen2_5_vl", _VISION_SETTINGS_2_5),
    _qwen("qwen3_vl", _VISION_SETTINGS_3),
    _qwen("qwen3_vl_moe", _VISION_SETTINGS_3),
    _qwen("qwen3_5", _VISION_SETTINGS_3_5),
    _qwen("qwen3_5_moe", _VISION_SETTINGS_3_5),
    _qwen("qwen4_exp", _VISION_SETTINGS_3_5),
    _qwen(
        "qwen2_5_omni", _VISION_SETTINGS_2_5, model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        ignored=("talker", "token2wav", "audio_tower"),
    ),
    _qwen(
        "qwen3_omni_moe", _VISION_SETTINGS_3, model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        ignored=("talker", "code2wav", "audio_tower"),
    ),
    Family("glm4v", prefix="causal", max_aspect_ratio=200.0),
    _projected("gemma3", "blocks"),
    _projected("paligemma", "none", takes_bare_prompts=True),  # image and question see each other both ways
    _projected("llava"),
    _projected("llava_onevision", loose_tensors=("image_newline",)),
    _projected("internvl"),
    _projected("mistral3"),
    _projected("lfm2_vl"),
    Family("idefics3", ("vision_model", "connector"), prefix="causal"),
    Family("smolvlm", ("vision_model", "connector"), prefix="causal"),
    Family("minicpmv4_6", ("vision_tower", "merger"), prefix="causal"),
    _projected("llava_next", loose_tensors=("image_newline",)),
    _projected("vipllava"),
    _projected("aya_vision"),
    _projected("cohere2_vision"),
    _projected("aria"),
    _projected("molmo2", "none", stored_modules=("vision_backbone",)),
    _projected("qianfan_ocr", stored_modules=("vision_model", "mlp1")),
    _projected("perception_lm", "none"),
    _projected("fast_vlm", "none"),
    _projected("lfm3_vl", max_aspect_ratio=200.0),
    Family(
        "step3p7", ("vision_model", "multi_modal_projector"), prefix="causal",
        stored_modules=("vision_model", "vit_large_projector"),
    ),
    Family("glm4v_moe", prefix="causal", max_aspect_ratio=200.0),
    Family("glm46v", prefix="causal", max_aspect_ratio=200.0),
    Family("glm_ocr", prefix="causal", max_aspect_ratio=200.0),
    Family("exaone4_5", prefix="causal", max_aspect_ratio=200.0),
    Family(
        "paddleocr_vl", ("visual", "projector"), prefix="causal", stored_modules=("visual", "mlp_AR"),
        max_aspect_ratio=200.0,
    ),
    Family("video_llama_3", ("vision_model", "projector"), prefix="causal", max_aspect_ratio=200.0),
    Family(
        "ernie4_5_vl_moe", ("vision_tower", "resampler_model"), max_aspect_ratio=200.0,
        stored_modules=("vision_model", "resampler_model"),
    ),
    Family("kimi_k25", ("vision_tower", "mm_projector"), prefix="causal"),
    Family("lighton_ocr", ("vision_encoder", "vision_projection"), prefix="causal"),
    Family("minicpmv4_7", ("vision_tower", "merger")),
    Family("minicpm_ocr", ("vision_tower", "merger"), prefix="causal"),
    Family("gemma4", ("vision_tower", "embed_vision"), ignored=("audio_tower", "embed_audio")),
    Family(  # the language model embeds its own text with a part of `embed_vision`
        "gemma3n", ("vision_tower", "embed_vision.soft_embedding_norm"),
        loose_tensors=("embed_vision.embedding_projection.weight",), ignored=("audio_tower",),
    ),
    Family("deepseek_vl", ("vision_model", "aligner"), prefix="causal"),
    Family(
        "deepseek_vl_hybrid",
        ("high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj", "vision_model", "aligner"),
        loose_tensors=("high_res_vision_alpha",), prefix="causal",
    ),
    Family(
        "janus", ("vision_model", "aligner"), prefix="causal",
        ignored=("vqmodel", "generation_embeddings", "generation_aligner", "generation_head"),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _LISTED}


def settings_of(config: Mapping[str, Any], wanted: Mapping[str, Setting]) -> dict[str, Any]:
    """Pick the `wanted` fields of a config file, under today's names, with what their absence means filled in."""
    found = {name: _value(config, name, setting) for name, setting in wanted.items()}
    return {name: value for name, value in found.items() if value is not None}


def _value(config: Mapping[str, Any], name: str, setting: Setting) -> Any:
    if setting.read is not None:
        return setting.read(config)
    present = [config[key] for key in (name, *setting.other_names) if config.get(key) is not None]
    return present[0] if present else setting.default
