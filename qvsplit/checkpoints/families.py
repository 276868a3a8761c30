"""What differs between model families, as data.

A family is one `model_type` of a checkpoint's config.json. Nothing here imports torch or transformers: classes are
named by module and attribute, and looked up by whoever loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One field of a config file that decides features, with its other names and what its absence means."""

    default: Any
    other_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: Its name in config.json.
        modeling: The module of transformers that holds both classes.
        full_class: The full model's class.
        encoder_class: The encoder's class.
        encoder_module: The attribute of the full model's `.model` that holds the encoder.
        encoder_prefixes: Key prefixes that an encoder's tensors may carry in a checkpoint.
        language_renames: Regular expressions that bring the language model's keys to the names of the full model.
        vision_settings: The fields of `vision_config` that decide features.
        processor_settings: The fields of the image processor's config that decide features.
        image_token: What stands for one token of an image in a prompt.
        placeholder_tokens: The control tokens that a stored placeholder may contain.
        max_aspect_ratio: The processor refuses images that are longer than this many times their width.
        default_max_pixels: The most pixels of an image where nobody says; see docs/decisions.md.
    """

    model_type: str
    modeling: str
    full_class: str
    encoder_class: str
    encoder_module: str
    encoder_prefixes: tuple[str, ...]
    language_renames: Mapping[str, str]
    vision_settings: Mapping[str, Setting]
    processor_settings: Mapping[str, Setting]
    image_token: str
    placeholder_tokens: tuple[str, ...]
    max_aspect_ratio: float
    default_max_pixels: int

    def without_encoder_prefix(self, name: str) -> str:
        """Strip from the name of an encoder's tensor the longest of `encoder_prefixes` that it carries."""
        prefix = next(p for p in sorted(self.encoder_prefixes, key=len, reverse=True) if name.startswith(p))
        return name.removeprefix(prefix)


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

QWEN2_VL = Family(
    model_type="qwen2_vl",
    modeling="transformers.models.qwen2_vl.modeling_qwen2_vl",
    full_class="Qwen2VLForConditionalGeneration",
    encoder_class="Qwen2VisionTransformerPretrainedModel",
    encoder_module="visual",
    encoder_prefixes=("visual.", "model.visual."),
    # transformers chooses its renames by class name, which a subclass does not share: hence spelled out here.
    language_renames={r"^visual\.": "model.visual.", r"^model\.(?!language_model\.|visual\.)": "model.language_model."},
    vision_settings={
        "depth": Setting(32, ("num_hidden_layers",)),
        "embed_dim": Setting(1280),
        "hidden_size": Setting(3584),
        "hidden_act": Setting("quick_gelu"),
        "mlp_ratio": Setting(4),
        "num_heads": Setting(16, ("num_attention_heads",)),
        "in_channels": Setting(3),
        "patch_size": Setting(14),
        "spatial_merge_size": Setting(2),
        "temporal_patch_size": Setting(2),
        "rope_parameters": Setting({"rope_theta": 10000.0, "rope_type": "axial"}),
        # the hub's `in_chans` and `spatial_patch_size` are read by nobody: transformers ignores them, so do we
    },
    processor_settings={
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
    },
    image_token="<|image_pad|>",
    placeholder_tokens=("<|image_pad|>",),
    max_aspect_ratio=200.0,
    default_max_pixels=1280 * 28 * 28,  # 1,280 tokens an image
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (QWEN2_VL,)}


def settings_of(config: Mapping[str, Any], wanted: Mapping[str, Setting]) -> dict[str, Any]:
    """Pick the `wanted` fields of a config file, under today's names, with what their absence means filled in."""
    found: dict[str, Any] = {}
    for name, setting in wanted.items():
        present = [config[key] for key in (name, *setting.other_names) if config.get(key) is not None]
        found[name] = present[0] if present else setting.default
    return found
