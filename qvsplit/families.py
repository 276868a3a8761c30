"""All that differs between model families, as data.

A family is one `model_type` of a checkpoint's config.json. Nothing here imports torch or transformers: classes
are named by module and attribute and looked up by whoever loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One field of a config file that decides an embedding, with its other names and what its absence means."""

    default: Any
    other_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model family.

    `vision_prefixes` are the key prefixes a tower's tensors may carry in a checkpoint, `language_renames` the
    regular expressions that bring the language half's keys to the names of transformers' whole model.
    """

    model_type: str
    modeling: str  # module of transformers that holds both classes
    vision_class: str
    whole_class: str
    vision_prefixes: tuple[str, ...]
    language_renames: Mapping[str, str]
    vision_settings: Mapping[str, Setting]
    processor_settings: Mapping[str, Setting]
    image_token: str
    max_aspect_ratio: float  # the processor refuses pictures that are longer than this many times their width
    vision_module: str = "visual"  # attribute of the whole model's `.model` that holds the tower
    default_max_pixels: int = 1280 * 28 * 28  # 1,280 tokens a picture; see docs/decisions.md


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

QWEN2_VL = Family(
    model_type="qwen2_vl",
    modeling="transformers.models.qwen2_vl.modeling_qwen2_vl",
    vision_class="Qwen2VisionTransformerPretrainedModel",
    whole_class="Qwen2VLForConditionalGeneration",
    vision_prefixes=("visual.", "model.visual."),
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
    max_aspect_ratio=200.0,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (QWEN2_VL,)}


def settings_of(config: Mapping[str, Any], wanted: Mapping[str, Setting]) -> dict[str, Any]:
    """The `wanted` fields of a config file, under today's names, with what their absence means filled in."""
    found: dict[str, Any] = {}
    for name, setting in wanted.items():
        present = [config[key] for key in (name, *setting.other_names) if config.get(key) is not None]
        found[name] = present[0] if present else setting.default
    return found
