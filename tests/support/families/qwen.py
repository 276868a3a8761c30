"""The Qwen-VL line, the Omni models and GLM-4.1V.

Templates do what the hub's do: Qwen2's have a system message of their own, Qwen3-VL's take text as it is, Qwen3.5's trim
a whole message and begin the answer with a think mark, GLM's begin with two control tokens. All Qwen3 and GLM templates
close an empty think block where `enable_thinking` is false.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.support.checkpoints import CONTROL, TEMPLATE
from tests.support.families.building import TinyFamily

HIDDEN = 64
START, STOP, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK = ("<tool_call>", "</tool_call>", "<think>", "</think>")
AUDIO_2 = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>")
AUDIO_3 = ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")

# ------------------------------------------------------------------------------------------------------- templates

PARTS = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'audio' or 'audio' in part -%}{{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
NO_THINKING = "{%- if enable_thinking is defined and enable_thinking is false -%}"
TEMPLATE_3 = PARTS + (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    + NO_THINKING
    + "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}\n"
)
TEMPLATE_3_5 = PARTS + (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and not loop.first -%}"
    "{{- raise_exception('System message must be at the beginning.') -}}{%- endif -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + render(message.content) | trim + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    + NO_THINKING
    + "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- else -%}{{- '<think>\\n' -}}{%- endif -%}{%- endif -%}\n"
)
TEMPLATE_2_OMNI = (
    TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_bos|><|IMAGE|><|vision_eos|>")
    .replace("<|vision_start|><|video_pad|><|vision_end|>", "<|vision_bos|><|VIDEO|><|vision_eos|>")
    .replace("{%- elif 'text' in part -%}", "{%- elif part.type == 'audio' -%}{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}\n{%- elif 'text' in part -%}")
)  # fmt: skip
TEMPLATE_GLM = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'video' or 'video' in part -%}{{- '<|begin_of_video|><|video|><|end_of_video|>' -}}
{%- elif part.type == 'image' or 'image' in part -%}{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'user' and enable_thinking is defined and enable_thinking is false -%}{{- '/nothink' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think></think>\\n' -}}{%- endif -%}
{%- endif -%}
"""

# --------------------------------------------------------------------------------------------------------- configs

MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MROPE_3: dict[str, Any] = MROPE | {"mrope_interleaved": True}
# widths of experts such that no matrix is square: a transposed one would not be noticed
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "head_dim": 16, "full_attention_interval": 4,
    "rope_parameters": MROPE_3 | {"mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5},
}  # fmt: skip
HYPER = {"hc_count": 2, "hc_lowrank": 8}  # hyper-connections
NGRAM = {
    "ple_layer_ids": [2], "ple_embed_dim": 32, "ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
VISION_2 = {
    "depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
}  # fmt: skip
VISION_2_5 = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
    "out_hidden_size": HIDDEN, "window_size": 56, "fullatt_block_indexes": [1],
}  # fmt: skip
VISION_3 = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
    "out_hidden_size": HIDDEN, "num_position_embeddings": 64,
}  # fmt: skip
DEEPSTACK = {"deepstack_visual_indexes": [0, 2]}
AUDIO = {
    "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16,
    "output_dim": HIDDEN,
}  # fmt: skip


def text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The language model's part of a config: four layers of width 64."""
    dense = {} if "num_experts" in more else {"intermediate_size": 96}
    return {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    } | dense | more  # fmt: skip


def tokens(tokenizer: Any) -> dict[str, int]:
    """The control tokens that a Qwen-VL config names."""
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}  # fmt: skip
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def vl(config_class: str, text_settings: dict[str, Any], vision: dict[str, Any]) -> Callable[[Any], Any]:
    """A maker of a Qwen-VL config."""

    def make(tokenizer: Any) -> Any:
        parts = {"text_config": text(tokenizer, **text_settings), "vision_config": dict(vision)}
        return getattr(tf, config_class)(**parts, **tokens(tokenizer), tie_word_embeddings=False)

    return make


def qwen2_5_omni_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    thinker = {
        "text_config": text(tokenizer, rope_parameters=MROPE), "vision_config": VISION_2_5, "audio_config": AUDIO,
        "audio_token_index": number("<|AUDIO|>"), "image_token_index": number("<|IMAGE|>"),
        "video_token_index": number("<|VIDEO|>"), "audio_start_token_id": number("<|audio_bos|>"),
        "audio_end_token_id": number("<|audio_eos|>"), "vision_start_token_id": number("<|vision_bos|>"),
        "vision_end_token_id": number("<|vision_eos|>"),
    }  # fmt: skip
    return tf.Qwen2_5OmniConfig(thinker_config=thinker)


def qwen3_omni_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    thinker = {
        "text_config": text(tokenizer, head_dim=16, rope_parameters=MROPE_3, **MOE),
        "vision_config": VISION_3 | DEEPSTACK, "audio_config": AUDIO | {"downsample_hidden_size": 8},
        "audio_token_id": number("<|audio_pad|>"), "audio_start_token_id": number("<|audio_start|>"),
        "audio_end_token_id": number("<|audio_end|>"), **tokens(tokenizer),
    }  # fmt: skip
    return tf.Qwen3OmniMoeConfig(thinker_config=thinker)


def glm4v_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    rope = MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 2,
        "image_size": 112, "patch_size": 14,
    }  # fmt: skip
    return tf.Glm4vConfig(
        text_config=text(tokenizer, head_dim=16, rope_parameters=rope), vision_config=vision, tie_word_embeddings=False,
        image_token_id=number("<|image|>"), video_token_id=number("<|video|>"),
        image_start_token_id=number("<|begin_of_image|>"), image_end_token_id=number("<|end_of_image|>"),
        video_start_token_id=number("<|begin_of_video|>"), video_end_token_id=number("<|end_of_video|>"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ processors


def processor(processor_class: Any, *, patch: int, video: Any = Qwen2VLVideoProcessor) -> Callable[[Any], Any]:
    """A maker of a Qwen-VL processor whose images have 4 to 60 tokens."""

    def make(tokenizer: Any) -> Any:
        images = tf.Qwen2VLImageProcessor(patch_size=patch, size=limits(patch))
        return processor_class(images, tokenizer, small_videos(video, patch))

    return make


def omni_processor(processor_class: Any, *, patch: int) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        images = tf.Qwen2VLImageProcessor(patch_size=patch, size=limits(patch))
        audio = tf.WhisperFeatureExtractor(feature_size=AUDIO["num_mel_bins"])
        return processor_class(images, small_videos(Qwen2VLVideoProcessor, patch), audio, tokenizer)

    return make


def small_videos(video_class: Any, patch: int) -> Any:
    """A video processor whose frames have 4 to 60 tokens; Qwen3-VL's counts the pixels of all frames."""
    frames = 64 if video_class is Qwen3VLVideoProcessor else 1
    least, most = limits(patch).values()
    return video_class(patch_size=patch, size={"shortest_edge": least, "longest_edge": frames * most})


def glm4v_processor(tokenizer: Any) -> Any:
    # its pixels are those of two frames
    sizes = {name: 2 * pixels for name, pixels in limits(14).items()}
    return tf.Glm4vProcessor(tf.Glm4vImageProcessor(size=sizes), tokenizer, tf.Glm4vVideoProcessor())


def limits(patch: int) -> dict[str, int]:
    """The least and the most pixels of an image, for patches merged by two and two."""
    return {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 60 * (2 * patch) ** 2}


# ------------------------------------------------------------------------------------------------- the hub's tensors


def fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts in one tensor a layer, as Qwen3.5's checkpoints have them; transformers saves them one by one."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    layers = {name.split(".experts.")[0] for name in tensors if ".mlp.experts." in name}
    for layer in sorted(layers):
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        gate, up, down = (
            torch.stack([tensors[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.experts.down_proj": down}
    return fused


def transpose_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts with rows and columns exchanged, as Qwen3-VL-MoE's have them; transformers saves them as it keeps them."""
    return {k: t.transpose(1, 2).contiguous() if ".mlp.experts." in k else t for k, t in tensors.items()}


def mtp_tensors() -> dict[str, torch.Tensor]:
    """Some of the head that predicts several tokens at once: in the hub's files, and never loaded."""
    return {"mtp.fc.weight": torch.ones(HIDDEN, 2 * HIDDEN), "mtp.norm.weight": torch.ones(HIDDEN)}


def speech_tensors(vocoder: str) -> Callable[[], dict[str, torch.Tensor]]:
    """Some of what makes speech of the thinker's text: in the hub's files, and not the thinker's."""
    return lambda: {"talker.model.norm.weight": torch.ones(HIDDEN), f"{vocoder}.conv.bias": torch.ones(HIDDEN)}


# -------------------------------------------------------------------------------------------------------- families


def qwen(
    model_type: str, model_class: str, config: Callable[[Any], Any], make_processor: Callable[[Any], Any],
    template: str, **more: Any,
) -> TinyFamily:  # fmt: skip
    more = {"control_tokens": tuple(CONTROL), "eos": (STOP, END), "pad": END} | more
    return TinyFamily(model_type, model_class, config, make_processor, template, **more)


QWEN_3 = processor(tf.Qwen3VLProcessor, patch=16, video=Qwen3VLVideoProcessor)

QWEN: list[TinyFamily] = [
    qwen(
        "qwen2_vl", "Qwen2VLForConditionalGeneration",
        vl("Qwen2VLConfig", {"rope_parameters": MROPE}, VISION_2),
        processor(tf.Qwen2VLProcessor, patch=14), TEMPLATE,
    ),
    qwen(
        "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration",
        vl("Qwen2_5_VLConfig", {"rope_parameters": MROPE}, VISION_2_5 | {"tokens_per_second": 2}),
        processor(tf.Qwen2_5_VLProcessor, patch=14), TEMPLATE, plain_tokens=THINK[:2],
    ),
    qwen(
        "qwen3_vl", "Qwen3VLForConditionalGeneration",
        vl("Qwen3VLConfig", {"head_dim": 16, "rope_parameters": MROPE_3}, VISION_3 | DEEPSTACK),
        QWEN_3, TEMPLATE_3, plain_tokens=THINK,
    ),
    qwen(
        "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration",
        vl("Qwen3VLMoeConfig", {"head_dim": 16, "rope_parameters": MROPE_3, "intermediate_size": 96, **MOE},
           VISION_3 | DEEPSTACK),
        QWEN_3, TEMPLATE_3, plain_tokens=THINK, to_hub=transpose_experts,
    ),
    qwen(
        "qwen3_5", "Qwen3_5ForConditionalGeneration", vl("Qwen3_5Config", LINEAR, VISION_3),
        QWEN_3, TEMPLATE_3_5, plain_tokens=THINK, other_tensors=mtp_tensors,
    ),
    qwen(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration",
        vl("Qwen3_5MoeConfig", {**LINEAR, **MOE, "shared_expert_intermediate_size": 32}, VISION_3),
        QWEN_3, TEMPLATE_3_5, plain_tokens=THINK, to_hub=fuse_experts, other_tensors=mtp_tensors,
    ),
    qwen(
        "qwen4_exp", "Qwen4ExpForConditionalGeneration",
        vl("Qwen4ExpConfig", {**LINEAR, **MOE, "shared_expert_intermediate_size": 32, **HYPER, **NGRAM, **INDEXER},
           VISION_3),
        QWEN_3, TEMPLATE_3_5, plain_tokens=THINK, to_hub=fuse_experts, other_tensors=mtp_tensors,
    ),
    qwen(
        "qwen2_5_omni", "Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5_omni_config,
        omni_processor(tf.Qwen2_5OmniProcessor, patch=14), TEMPLATE_2_OMNI,
        control_tokens=(END, START, STOP, *AUDIO_2), plain_tokens=THINK[:2],
        named_tokens={
            "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
            "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
        },
        section="thinker", architecture="Qwen2_5OmniForConditionalGeneration",
        other_tensors=speech_tensors("token2wav"),
    ),
    qwen(
        "qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration", qwen3_omni_config,
        omni_processor(tf.Qwen3OmniMoeProcessor, patch=16), TEMPLATE_3,
        control_tokens=(*CONTROL, *AUDIO_3), plain_tokens=THINK,
        named_tokens={
            "image_token": "<|image_pad|>", "audio_token": "<|audio_pad|>", "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
        },
        section="thinker", architecture="Qwen3OmniMoeForConditionalGeneration",
        other_tensors=speech_tensors("code2wav"),
    ),
    TinyFamily(
        "glm4v", "Glm4vForConditionalGeneration", glm4v_config, glm4v_processor, TEMPLATE_GLM,
        control_tokens=(
            END, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>",
            "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
        ),
        plain_tokens=("<think>", "</think>"), eos=(END, "<|user|>", "<|observation|>"), pad=END,
    ),
]  # fmt: skip
