"""Further families, less used: what the split has to hold for beyond those of `others` and `qwen`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers as tf
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.support.families.building import TinyFamily
from tests.support.families.others import (
    GEMMA3,
    INTERNVL,
    LINE_BREAKS,
    MINICPM,
    MISTRAL3,
    PINPOINTS,
    SIGLIP,
    gemma_tokenizer,
    internvl_config,
    llama_tokenizer,
    mistral3_config,
    nested_vision_model,
    text_config,
)
from tests.support.families.others import minicpm_config as minicpm
from tests.support.families.qwen import MROPE, TEMPLATE_GLM, limits, small_videos

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HEADLESS = SIGLIP | {"vision_use_head": False}
CLIP = SIGLIP | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 32}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 28, "width": 28}


def chat(
    turn: str, image: str, end: str, answer: str, *, first: str = "", default_system: str = "", trim: bool = False,
    video: str = "",
) -> str:  # fmt: skip
    """A template of the usual form: `turn` may use `message.role`; items stand where they stand in the content."""
    text = "part.text | trim" if trim else "part.text"
    return (
        first
        + (
            "{%- if messages[0].role != 'system' -%}" + default_system + "{%- endif -%}" if default_system else ""
        )
        + "{%- for message in messages -%}{{- " + turn + " -}}"
        + "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        + "{%- for part in message.content -%}"
        + "{%- if part.type == 'image' -%}{{- " + image + " -}}"
        + ("{%- elif part.type == 'video' -%}{{- " + video + " -}}" if video else "")
        + "{%- elif part.type == 'text' -%}{{- " + text + " -}}{%- endif -%}"
        + "{%- endfor -%}{%- endif -%}{{- " + end + " -}}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{- " + answer + " -}}{%- endif -%}\n"
    )  # fmt: skip


def images_first(turn: str, end: str, answer: str) -> str:
    """A template of LLaVA's kind: all images of a message before its text; content must be a list."""
    return (
        "{%- for message in messages -%}{{- " + turn + " -}}"
        "{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{- '<image>\\n' -}}{%- endfor -%}"
        "{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{- part.text -}}{%- endfor -%}"
        "{{- " + end + " -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- " + answer + " -}}{%- endif -%}\n"
    )  # fmt: skip


def chatml(image: str, *, system: str = "", first: str = "", video: str = "") -> str:
    """Qwen's turn marks."""
    return chat(
        r"'<|im_start|>' + message.role + '\n'", image, r"'<|im_end|>\n'", r"'<|im_start|>assistant\n'", first=first, video=video,
        default_system="{{- '<|im_start|>system\\n" + system + "<|im_end|>\\n' -}}" if system else "",
    )  # fmt: skip


def renamed(beginnings: dict[str, str]) -> Any:
    """Put right what transformers writes under names that the hub does not have."""

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {name: name for name in tensors}
        for old, new in beginnings.items():
            names |= {name: new + name.removeprefix(old) for name in tensors if name.startswith(old)}
        return {names[name]: tensor for name, tensor in tensors.items()}

    return rename


# ------------------------------------------------------------------------------------------------ LLaVA's descendants


def llava_next_config(tokenizer: Any) -> Any:
    return tf.LlavaNextConfig(
        text_config=text_config(tokenizer, "mistral"), vision_config=CLIP, image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def llava_next_processor(tokenizer: Any) -> Any:
    images = tf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return tf.LlavaNextProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def vipllava_config(tokenizer: Any) -> Any:
    return tf.VipLlavaConfig(
        text_config=text_config(tokenizer, "llama"), vision_config=CLIP, vision_feature_layer=[-2, 1],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip


def vipllava_processor(tokenizer: Any) -> Any:
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE)
    return tf.LlavaProcessor(
        images, tokenizer, patch_size=7, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )


LLAMA_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
LLAVA_NEXT = TinyFamily(
    "llava_next", "LlavaNextForConditionalGeneration", llava_next_config, llava_next_processor,
    images_first("'[INST] ' if message.role == 'user' else ''", "' [/INST]' if message.role == 'user' else '</s>'", "''"),
    LLAMA_TOKENS, ("</s>",), "<pad>", "<s>", adds_bos=True, tokenizer=llama_tokenizer, to_hub=nested_vision_model,
    notes="Tiles, loose tensor image_newline; an image is prepared alike whatever stands beside it.",
)  # fmt: skip
VIPLLAVA = TinyFamily(
    "vipllava", "VipLlavaForConditionalGeneration", vipllava_config, vipllava_processor,
    images_first("'###' + message.role.title() + ': '", "''", "'###Assistant:'"),
    LLAMA_TOKENS, ("</s>",), "<pad>", "<s>", adds_bos=True, tokenizer=llama_tokenizer, to_hub=nested_vision_model,
    notes="Several layers of CLIP side by side.",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- GLM


def glm_config(config_class: Any, **more: Any) -> Any:
    def make(tokenizer: Any) -> Any:
        number = tokenizer.convert_tokens_to_ids
        rope = MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
        text = text_config(tokenizer, "", rope_parameters=rope, **more)
        del text["model_type"]
        vision = {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
            "image_size": 112, "patch_size": 14,
        }  # fmt: skip
        return config_class(
            text_config=text, vision_config=vision, tie_word_embeddings=False,
            image_token_id=number("<|image|>"), video_token_id=number("<|video|>"),
            image_start_token_id=number("<|begin_of_image|>"), image_end_token_id=number("<|end_of_image|>"),
            video_start_token_id=number("<|begin_of_video|>"), video_end_token_id=number("<|end_of_video|>"),
        )  # fmt: skip

    return make


def glm4v_processor(tokenizer: Any) -> Any:
    sizes = {name: 2 * pixels for name, pixels in limits(14).items()}
    return tf.Glm4vProcessor(tf.Glm4vImageProcessor(size=sizes), tokenizer, tf.Glm4vVideoProcessor())


def glm46v_processor(tokenizer: Any) -> Any:
    sizes = {name: 2 * pixels for name, pixels in limits(14).items()}
    return tf.Glm46VProcessor(tf.Glm46VImageProcessor(size=sizes), tokenizer, tf.Glm46VVideoProcessor())


def glm(model_type: str, model_class: str, config: Any, processor: Any, notes: str = "") -> TinyFamily:
    return TinyFamily(
        model_type, model_class, config, processor, TEMPLATE_GLM,
        control_tokens=(
            END, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>",
            "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
        ),
        plain_tokens=("<think>", "</think>"), eos=(END, "<|user|>", "<|observation|>"), pad=END, notes=notes,
    )  # fmt: skip


GLM4V_MOE = glm(
    "glm4v_moe", "Glm4vMoeForConditionalGeneration",
    glm_config(tf.Glm4vMoeConfig, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2), glm4v_processor,
)  # fmt: skip
GLM46V = glm("glm46v", "Glm46VForConditionalGeneration", glm_config(tf.Glm46VConfig), glm46v_processor)
GLM_OCR = glm("glm_ocr", "GlmOcrForConditionalGeneration", glm_config(tf.GlmOcrConfig), glm46v_processor)


# --------------------------------------------------------------------------------------------------------- gemma 4


def gemma4_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer, "gemma4_text", num_hidden_layers=6, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3, global_head_dim=32, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(tokenizer), final_logit_softcapping=30.0,
        use_bidirectional_attention="vision",
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "patch_size": 7, "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }  # fmt: skip
    return tf.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=number("<|image|>"),
        boi_token_id=number("<|image>"), eoi_token_id=number("<image|>"), video_token_id=number("<|video|>"),
    )  # fmt: skip


def gemma4_processor(tokenizer: Any) -> Any:
    sizes = {"patch_size": 7, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    return tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(**sizes), tokenizer, tf.Gemma4VideoProcessor(**sizes)
    )


GEMMA4 = TinyFamily(
    "gemma4", "Gemma4ForConditionalGeneration", gemma4_config, gemma4_processor,
    chat(r"'<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n'", r"'\n\n<|image|>\n\n'",
         r"'<turn|>\n'", r"'<|turn>model\n'", first="{{- bos_token -}}", trim=True, video=r"'\n\n<|video|>\n\n'"),
    ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>", "<|audio>",
     "<audio|>", "<|audio|>", "<|video|>"),
    ("<eos>", "<turn|>"), "<pad>", "<bos>", adds_bos=True, plain_tokens=LINE_BREAKS, tokenizer=gemma_tokenizer,
    named_tokens={"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
                  "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>"},
    scales={"embed_tokens": 0.1},
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- llama 4


def llama4_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer, "llama4_text", num_hidden_layers=4, intermediate_size=48, intermediate_size_mlp=96,
        num_local_experts=4, interleave_moe_layer_step=2, attention_chunk_size=64,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vision_output_dim": 64, "image_size": 28, "patch_size": 7, "projector_input_dim": 64,
        "projector_output_dim": 64,
    }  # fmt: skip
    return tf.Llama4Config(
        text_config=text, vision_config=vision, image_token_index=number("<|patch|>"),
        boi_token_index=number("<|image_start|>"), eoi_token_index=number("<|image_end|>"),
    )  # fmt: skip


def llama4_processor(tokenizer: Any) -> Any:
    images = tf.Llama4ImageProcessor(size=SQUARE, max_patches=4)
    return tf.Llama4Processor(images, tokenizer, patch_size=7, pixel_shuffle_ratio=0.5)


LLAMA4 = TinyFamily(
    "llama4", "Llama4ForConditionalGeneration", llama4_config, llama4_processor,
    chat(r"'<|header_start|>' + message.role + '<|header_end|>\n\n'", "'<|image|>'", "'<|eot|>'",
         r"'<|header_start|>assistant<|header_end|>\n\n'", first="{{- bos_token -}}", trim=True),
    ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|image_start|>",
     "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|finetune_right_pad|>"),
    ("<|eot|>", "<|end_of_text|>"), "<|finetune_right_pad|>", "<|begin_of_text|>", adds_bos=True,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- Cohere

COHERE_TOKENS = (
    "<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>",
    "<image>",
)  # fmt: skip
COHERE_TEMPLATE = chat(
    "'<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>', "
    "'assistant': '<|CHATBOT_TOKEN|>'}[message.role]",
    "'<image>'", "'<|END_OF_TURN_TOKEN|>'", "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'", first="{{- bos_token -}}",
)  # fmt: skip


def cohere_text(tokenizer: Any) -> dict[str, Any]:
    return text_config(tokenizer, "cohere2", num_hidden_layers=4, sliding_window=16, logit_scale=0.25)


def aya_config(tokenizer: Any) -> Any:
    return tf.AyaVisionConfig(
        text_config=cohere_text(tokenizer), vision_config=HEADLESS,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )  # fmt: skip


def aya_processor(tokenizer: Any) -> Any:
    images = tf.GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4, crop_to_patches=True, **HALF)
    return tf.AyaVisionProcessor(images, tokenizer, patch_size=7, img_size=28, downsample_factor=2)


def cohere2_config(tokenizer: Any) -> Any:
    return tf.Cohere2VisionConfig(
        text_config=cohere_text(tokenizer), vision_config=HEADLESS, alignment_intermediate_size=64,
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )  # fmt: skip


def cohere2_processor(tokenizer: Any) -> Any:
    images = tf.Cohere2VisionImageProcessor(size=SQUARE, min_patches=1, max_patches=4, patch_size=2, **HALF)
    return tf.Cohere2VisionProcessor(images, tokenizer)


AYA_VISION = TinyFamily(
    "aya_vision", "AyaVisionForConditionalGeneration", aya_config, aya_processor, COHERE_TEMPLATE, COHERE_TOKENS,
    ("<|END_OF_TURN_TOKEN|>",), "<PAD>", "<BOS_TOKEN>", adds_bos=True, plain_tokens=("TILE", "TILE_GLOBAL"),
    to_hub=nested_vision_model, scales={"embed_tokens": 0.5},
)  # fmt: skip
COHERE2_VISION = TinyFamily(
    "cohere2_vision", "Cohere2VisionForConditionalGeneration", cohere2_config, cohere2_processor,
    COHERE_TEMPLATE.replace("<image>", "<|IMG_PATCH|>"), COHERE_TOKENS, ("<|END_OF_TURN_TOKEN|>",), "<PAD>",
    "<BOS_TOKEN>", adds_bos=True, to_hub=nested_vision_model,
    named_tokens={"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
                  "img_line_break_token": "<|IMG_LINE_BREAK|>"},
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- idefics2, aria


def idefics2_config(tokenizer: Any) -> Any:
    vision = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    perceiver = {
        "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2,
        "resampler_head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    return tf.Idefics2Config(
        text_config=text_config(tokenizer, "mistral"), vision_config=vision, perceiver_config=perceiver,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def idefics2_processor(tokenizer: Any) -> Any:
    images = tf.Idefics2ImageProcessor(size={"shortest_edge": 14, "longest_edge": 28}, do_image_splitting=True)
    return tf.Idefics2Processor(images, tokenizer, image_seq_len=4)


IDEFICS2 = TinyFamily(
    "idefics2", "Idefics2ForConditionalGeneration", idefics2_config, idefics2_processor,
    "{%- for message in messages -%}{{- message.role.capitalize() -}}"
    "{%- if message.content[0].type == 'image' -%}{{- ':' -}}{%- else -%}{{- ': ' -}}{%- endif -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type == 'image' -%}{{- '<image>' -}}{%- endif -%}{%- endfor -%}{{- '<end_of_utterance>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}",
    ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<pad>"),
    ("<end_of_utterance>", "</s>"), "<pad>", "<s>", adds_bos=True, tokenizer=llama_tokenizer,
    notes="The processor does not go through _process_images; marks of neighbouring images are merged.",
)  # fmt: skip


def aria_config(tokenizer: Any) -> Any:
    text = text_config(tokenizer, "aria_text", moe_num_experts=4, intermediate_size=24)
    # the processor makes every image 980 pixels wide and high, whatever its image processor says
    vision = SIGLIP | {"model_type": "idefics3_vision", "hidden_size": 8, "image_size": 980, "patch_size": 140}
    return tf.AriaConfig(
        text_config=text, vision_config=vision, projector_patch_to_query_dict={49: 8}, image_token_index=tokenizer.convert_tokens_to_ids("<|img|>"),
    )  # fmt: skip


def aria_processor(tokenizer: Any) -> Any:
    return tf.AriaProcessor(tf.AriaImageProcessor(), tokenizer, size_conversion={980: 8})


ARIA = TinyFamily(
    "aria", "AriaForConditionalGeneration", aria_config, aria_processor,
    chatml("'<fim_prefix><|img|><fim_suffix>'"), ("<unk>", "<s>", "</s>", START, STOP, "<|img|>", "<fim_prefix>", "<fim_suffix>"),
    (STOP,), "<unk>", "<s>", named_tokens={"image_token": "<|img|>"}, tokenizer=llama_tokenizer, adds_bos=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------- video_llama_3, ovis2, lighton_ocr


def video_llama_config(tokenizer: Any) -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
    }  # fmt: skip
    number = tokenizer.convert_tokens_to_ids
    return tf.VideoLlama3Config(
        text_config=text_config(tokenizer, "qwen2"), vision_config=vision, image_token_id=number("<image>"),
        video_token_id=number("<video>"),
    )  # fmt: skip


def video_llama_processor(tokenizer: Any) -> Any:
    images = tf.VideoLlama3ImageProcessor(size={"shortest_edge": 4 * 14**2, "longest_edge": 40 * 14**2})
    return tf.VideoLlama3Processor(images, tokenizer, tf.VideoLlama3VideoProcessor(size=limits(14)))


VIDEO_LLAMA_3 = TinyFamily(
    "video_llama_3", "VideoLlama3ForConditionalGeneration", video_llama_config, video_llama_processor,
    chatml(r"'<image>\n'", system="You are a helpful assistant.", video=r"'<video>\n'"),
    (END, START, STOP, "<image>", "<video>"), (STOP,), END,
    named_tokens={"image_token": "<image>", "video_token": "<video>"},
)  # fmt: skip


def ovis2_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7, "vocab_size": 64, "hidden_stride": 2,
    }  # fmt: skip
    return tf.Ovis2Config(
        text_config=text_config(tokenizer, "qwen2", tie_word_embeddings=False), vision_config=vision,
        image_token_id=number("<IMG_ATOM>"), hidden_size=64, vocab_size=len(tokenizer), tie_word_embeddings=False,
        visual_indicator_token_ids=[number(f"<IMG_{part}>") for part in ("START", "GRID", "COL", "ROW", "END")],
    )  # fmt: skip


def ovis2_processor(tokenizer: Any) -> Any:
    images = tf.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
    return tf.Ovis2Processor(images, tokenizer, image_seq_length=4)


OVIS2 = TinyFamily(
    "ovis2", "Ovis2ForConditionalGeneration", ovis2_config, ovis2_processor,
    chatml(r"'<image>\n'", system="You are a helpful assistant."),
    (END, START, STOP, "<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    (STOP,), END,
)  # fmt: skip


def lighton_config(tokenizer: Any) -> Any:
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 84, "patch_size": 7,
    }  # fmt: skip
    return tf.LightOnOcrConfig(
        text_config=text_config(tokenizer, "qwen3"), vision_config=vision, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )  # fmt: skip


def lighton_processor(tokenizer: Any) -> Any:
    images = tf.PixtralImageProcessor(size={"longest_edge": 84}, patch_size=14)
    return tf.LightOnOcrProcessor(images, tokenizer, patch_size=7, spatial_merge_size=2)


LIGHTON_OCR = TinyFamily(
    "lighton_ocr", "LightOnOcrForConditionalGeneration", lighton_config, lighton_processor, chatml("'<|image_pad|>'"),
    (END, START, STOP, "<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"), (STOP,), END,
    named_tokens={"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
)  # fmt: skip


# ------------------------------------------------------------------------------------------ paddleocr_vl, deepseek_vl


def paddle_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = text_config(tokenizer, "paddleocr_vl_text", rope_parameters=rope, tie_word_embeddings=False)
    vision = {
        "model_type": "paddleocr_vl_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    return tf.PaddleOCRVLConfig(
        text_config=text, vision_config=vision, image_token_id=number("<|IMAGE_PLACEHOLDER|>"),
        vision_start_token_id=number("<|IMAGE_START|>"), vision_end_token_id=number("<|IMAGE_END|>"),
        video_token_id=number("<|video_pad|>"), tie_word_embeddings=False,
    )  # fmt: skip


def paddle_processor(tokenizer: Any) -> Any:
    return tf.PaddleOCRVLProcessor(tf.PaddleOCRVLImageProcessor(size=limits(14)), tokenizer)


PADDLEOCR_VL = TinyFamily(
    "paddleocr_vl", "PaddleOCRVLForConditionalGeneration", paddle_config, paddle_processor,
    chat("'User: ' if message.role == 'user' else ''", "'<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>'",
         r"'\n' if message.role == 'user' else '</s>'", r"'Assistant:\n'", first="{{- '<|begin_of_sentence|>' -}}"),
    ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>",
     "<|video_pad|>"),
    ("</s>",), "<unk>", "<s>", named_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"}, tokenizer=llama_tokenizer,
)  # fmt: skip

DEEPSEEK_TEMPLATE = chat(
    "message.role.title() + ': ' if message.role != 'system' else ''", r"'<image_placeholder>'", r"'\n\n'", "'Assistant:'",
    default_system=r"{{- 'You are a helpful language and vision assistant.\n\n' -}}",
)  # fmt: skip
DEEPSEEK_TOKENS = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>", "<image_placeholder>")


def deepseek_config(tokenizer: Any) -> Any:
    return tf.DeepseekVLConfig(
        text_config=text_config(tokenizer, "llama"), vision_config=HEADLESS, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip


def deepseek_processor(tokenizer: Any) -> Any:
    images = tf.DeepseekVLImageProcessor(size=SQUARE, **HALF)
    return tf.DeepseekVLProcessor(images, tokenizer, num_image_tokens=16)


def hybrid_config(tokenizer: Any) -> Any:
    sam = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
        "patch_size": 7, "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 4,
    }  # fmt: skip
    return tf.DeepseekVLHybridConfig(
        text_config=text_config(tokenizer, "llama"), vision_config=HEADLESS, high_res_vision_config=sam,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"), tie_word_embeddings=False,
    )  # fmt: skip


def hybrid_processor(tokenizer: Any) -> Any:
    images = tf.DeepseekVLHybridImageProcessor(size=SQUARE, high_res_size={"height": 112, "width": 112}, **HALF)
    return tf.DeepseekVLHybridProcessor(images, tokenizer, num_image_tokens=16)


DEEPSEEK_VL = TinyFamily(
    "deepseek_vl", "DeepseekVLForConditionalGeneration", deepseek_config, deepseek_processor, DEEPSEEK_TEMPLATE,
    DEEPSEEK_TOKENS, ("<|end_of_sentence|>",), "<|pad|>", "<|begin_of_sentence|>", adds_bos=True,
    named_tokens={"image_token": "<image_placeholder>"},
)  # fmt: skip
DEEPSEEK_VL_HYBRID = TinyFamily(
    "deepseek_vl_hybrid", "DeepseekVLHybridForConditionalGeneration", hybrid_config, hybrid_processor, DEEPSEEK_TEMPLATE,
    DEEPSEEK_TOKENS, ("<|end_of_sentence|>",), "<|pad|>", "<|begin_of_sentence|>", adds_bos=True,
    named_tokens={"image_token": "<image_placeholder>"},
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- MiniCPM


def minicpm_config(config_class: Any, **marks: str) -> Any:
    def make(tokenizer: Any) -> Any:
        number = tokenizer.convert_tokens_to_ids
        given = minicpm(tokenizer).to_dict()
        text = {
            key: value for key, value in given["text_config"].items() if key not in ("dtype", "transformers_version")
        }
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 7, "insert_layer_id": 1,
        }  # fmt: skip
        return config_class(
            text_config=text, vision_config=vision, insert_layer_id=1, tie_word_embeddings=False,
            image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
            **{name: number(token) for name, token in marks.items()},
        )  # fmt: skip

    return make


def minicpmv4_7_processor(tokenizer: Any) -> Any:
    sizes = {"max_slice_nums": 4, "scale_resolution": 56, "patch_size": 7}
    return tf.MiniCPMV4_7Processor(
        tf.MiniCPMV4_6ImageProcessor(**sizes), tf.MiniCPMV4_6VideoProcessor(**sizes), tokenizer
    )


def minicpm_ocr_processor(tokenizer: Any) -> Any:
    sizes = {"max_slice_nums": 4, "scale_resolution": 28, "patch_size": 7}
    return tf.MiniCPMOcrProcessor(tf.MiniCPMOcrImageProcessor(**sizes), tf.MiniCPMOcrVideoProcessor(**sizes), tokenizer)


MINICPMV4_7 = dataclasses.replace(
    MINICPM, model_type="minicpmv4_7", model_class="MiniCPMV4_7ForConditionalGeneration",
    config=minicpm_config(
        tf.MiniCPMV4_7Config, image_start_id="<image>", image_end_id="</image>", slice_start_id="<slice>",
        slice_end_id="</slice>", newline_id="Ċ",
    ),
    processor=minicpmv4_7_processor,
)  # fmt: skip
MINICPM_OCR = dataclasses.replace(
    MINICPM, model_type="minicpm_ocr", model_class="MiniCPMOcrForConditionalGeneration",
    config=minicpm_config(tf.MiniCPMOcrConfig), processor=minicpm_ocr_processor,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- lfm3_vl, exaone4_5

QWEN_VISION = chatml(
    "'<|vision_start|><|image_pad|><|vision_end|>'", video="'<|vision_start|><|video_pad|><|vision_end|>'"
)
QWEN_TOKENS = (END, START, STOP, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def lfm3_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer, "lfm3", num_hidden_layers=4, sliding_window=16, conv_L_cache=3,
        layer_types=["conv", "full_attention", "conv", "sliding_attention"],
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "patch_size": 14,
    }  # fmt: skip
    return tf.Lfm3VlConfig(
        text_config=text, vision_config=vision, projector_hidden_size=32, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"), vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip


def lfm3_processor(tokenizer: Any) -> Any:
    images = tf.Qwen2VLImageProcessor(patch_size=14, size=limits(14))
    return tf.Lfm3VlProcessor(images, tokenizer, small_videos(Qwen3VLVideoProcessor, 14))


def exaone_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_key_value_heads": 1,
        "patch_size": 14, "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = text_config(tokenizer, "exaone4", num_hidden_layers=4, sliding_window=16, sliding_window_pattern=4)
    return tf.Exaone4_5_Config(
        text_config=text, vision_config=vision, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
    )  # fmt: skip


def exaone_processor(tokenizer: Any) -> Any:
    images = tf.Qwen2VLImageProcessor(patch_size=14, size=limits(14))
    return tf.Exaone4_5_Processor(images, tokenizer, small_videos(Qwen2VLVideoProcessor, 14))


LFM3_VL = TinyFamily(
    "lfm3_vl", "Lfm3VlForConditionalGeneration", lfm3_config, lfm3_processor, QWEN_VISION, QWEN_TOKENS, (STOP,), END,
    scales={"embed_tokens": 0.3},
)  # fmt: skip
EXAONE4_5 = TinyFamily(
    "exaone4_5", "Exaone4_5_ForConditionalGeneration", exaone_config, exaone_processor, QWEN_VISION, QWEN_TOKENS,
    (STOP,), END,
)  # fmt: skip


# ------------------------------------------------------------------------------------- granite4_vision, hunyuan_vl, ernie


def granite_config(tokenizer: Any) -> Any:
    text = text_config(tokenizer, "granite4_vision_text", num_hidden_layers=8, attention_multiplier=0.25)
    vision = HEADLESS | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    return tf.Granite4VisionConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=PINPOINTS, downsample_rate="1/2",
        qformer_config={"num_hidden_layers": 1, "intermediate_size": 96, "cross_attention_frequency": 1,
                        "max_position_embeddings": 64, "use_qformer_text_input": False, "vocab_size": 8},
        vision_feature_select_strategy="full", deepstack_layer_map=[[-3, 0], [-1, 1]], spatial_target_layers=[2, 3, 4, 5],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def granite_processor(tokenizer: Any) -> Any:
    images = tf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return tf.Granite4VisionProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="full", downsample_rate="1/2"
    )


GRANITE4_VISION = TinyFamily(
    "granite4_vision", "Granite4VisionForConditionalGeneration", granite_config, granite_processor,
    chat("'<|start_of_role|>' + message.role + '<|end_of_role|>'", r"'<image>\n'", r"'<|end_of_text|>\n'",
         "'<|start_of_role|>assistant<|end_of_role|>'"),
    ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>", "<image>"), ("<|end_of_text|>",), "<|pad|>",
    notes="Features for several layers of the language model (deepstack_features), tiles, loose tensor image_newline.",
)  # fmt: skip


def hunyuan_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "out_hidden_size": 64, "patch_size": 14, "max_image_size": 224, "text_hidden_size": 64,
    }  # fmt: skip
    return tf.HunYuanVLConfig(
        text_config=text_config(tokenizer, "hunyuan_vl_text", rope_parameters=rope, eod_token_id=tokenizer.eos_token_id),
        vision_config=vision, image_token_id=number("<|image_pad|>"), im_start_id=number("<|vision_start|>"),
        im_end_id=number("<|vision_end|>"), im_newline_id=number("<|video_pad|>"),
    )  # fmt: skip


def hunyuan_processor(tokenizer: Any) -> Any:
    images = tf.HunYuanVLImageProcessor(patch_size=14, size=limits(14))
    return tf.HunYuanVLProcessor(images, tokenizer)


HUNYUAN_VL = TinyFamily(
    "hunyuan_vl", "HunYuanVLForConditionalGeneration", hunyuan_config, hunyuan_processor, QWEN_VISION,
    (*QWEN_TOKENS, "<|startoftext|>"), (STOP,), END, "<|startoftext|>",
    named_tokens={"image_token": "<|image_pad|>", "image_start_token": "<|vision_start|>",
                  "image_end_token": "<|vision_end|>"},
    scales={"embed_tokens": 0.5},
)  # fmt: skip


def ernie_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    text = text_config(
        tokenizer, "", rope_parameters=rope, moe_intermediate_size=[24, 16], moe_k=2, moe_num_experts=4,
        mlp_layer_types=["dense", "sparse", "sparse"], tie_word_embeddings=False,
    )  # fmt: skip
    del text["model_type"]
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    return tf.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_start_token_id=number("<|IMAGE_START|>"), image_end_token_id=number("<|IMAGE_END|>"),
        image_token_id=number("<|IMAGE_PLACEHOLDER|>"), video_start_token_id=number("<|VIDEO_START|>"),
        video_end_token_id=number("<|VIDEO_END|>"), video_token_id=number("<|VIDEO_PLACEHOLDER|>"),
    )  # fmt: skip


def ernie_processor(tokenizer: Any) -> Any:
    images = tf.Ernie4_5_VLMoeImageProcessor(size=limits(14))
    videos = tf.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False, size=limits(14))  # drawing needs a font file
    return tf.Ernie4_5_VLMoeProcessor(images, tokenizer, videos)


ERNIE4_5_VL_MOE = TinyFamily(
    "ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", ernie_config, ernie_processor,
    chat("'User: ' if message.role == 'user' else ''",
         "'Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>'", r"'\n'", "'Assistant: '",
         first="{{- '<|begin_of_sentence|>' -}}",
         video="'Video 1:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>'"),
    ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>",
     "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
    ("</s>",), "<unk>", "<s>", tokenizer=llama_tokenizer,
    named_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
                  "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
                  "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"},
    to_hub=renamed({"model.vision_model.": "vision_model."}),
    notes="The language model also takes moe_mm_token_type_ids: experts differ for images.",
)  # fmt: skip


# ------------------------------------------------------------------------------------- kimi_k25, molmo2, qianfan, step3p7


def kimi_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer, "deepseek_v3", num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    del text["head_dim"]
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "pos_emb_height": 16, "pos_emb_width": 16,
    }  # fmt: skip
    return tf.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=32, tie_word_embeddings=False,
        image_token_id=number("<|media_pad|>"), video_token_id=number("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=number("<|media_begin|>"), vision_end_token_id=number("<|media_end|>"),
    )  # fmt: skip


def kimi_processor(tokenizer: Any) -> Any:
    images = tf.Kimi_K25ImageProcessor(size={"max_height": 112, "max_width": 112}, max_patches=200)
    return tf.Kimi_K25Processor(images, tokenizer, tf.Kimi_K25VideoProcessor())


KIMI_K25 = TinyFamily(
    "kimi_k25", "Kimi_K25ForConditionalGeneration", kimi_config, kimi_processor,
    chat("'<|im_' + message.role + '|>' + message.role + '<|im_middle|>'",
         "'<|media_begin|>image<|media_content|><|media_pad|><|media_end|>'", "'<|im_end|>'",
         "'<|im_assistant|>assistant<|im_middle|>'", video="'<|kimi_k25_video_placeholder|>'"),
    ("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
     "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>", "<|kimi_k25_video_placeholder|>"),
    ("<|im_end|>", "[EOS]"), "[PAD]",
    to_hub=renamed({"language_model.model.blocks.": "language_model.model.layers.", "model.mm_projector.": "mm_projector."}),
)  # fmt: skip


def molmo_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    text = text_config(tokenizer, "", additional_vocab_size=8, tie_word_embeddings=False)
    del text["model_type"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return tf.Molmo2Config(
        text_config=text,
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": [28, 28],
                       "patch_size": 7} | heads,
        adapter_config={"vision_feature_layer": [1, 0], "hidden_size": 32, "intermediate_size": 48,
                        "text_hidden_size": 64} | heads,
        image_start_token_id=number("<im_start>"), low_res_image_start_token_id=number("<low_res_im_start>"),
        image_end_token_id=number("<im_end>"), image_patch_id=number("<im_patch>"),
        frame_start_token_id=number("<frame_start>"), frame_end_token_id=number("<frame_end>"),
    )  # fmt: skip


def molmo_processor(tokenizer: Any) -> Any:
    images = tf.Molmo2ImageProcessor(size=SQUARE, patch_size=7, max_crops=4, overlap_margins=[1, 1])
    return tf.Molmo2Processor(images, tf.Molmo2VideoProcessor(size=SQUARE, patch_size=7), tokenizer)


MOLMO2 = TinyFamily(
    "molmo2", "Molmo2ForConditionalGeneration", molmo_config, molmo_processor,
    chatml("'<|image|>'", video="'<|video|>'"),
    (END, START, STOP, "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<im_low>",
     "<frame_start>", "<frame_end>", "<|image|>", "<|video|>"),
    (STOP,), END, named_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
)  # fmt: skip


def qianfan_config(tokenizer: Any) -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [28, 28], "patch_size": [7, 7],
    }  # fmt: skip
    return tf.QianfanOCRConfig(
        text_config=text_config(tokenizer, "qwen3"), vision_config=vision, image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip


def qianfan_processor(tokenizer: Any) -> Any:
    images = tf.GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4, crop_to_patches=True, **HALF)
    return tf.QianfanOCRProcessor(images, tokenizer, image_seq_length=4)


QIANFAN_OCR = TinyFamily(
    "qianfan_ocr", "QianfanOCRForConditionalGeneration", qianfan_config, qianfan_processor, chatml(r"'<image>\n'"),
    (END, START, STOP, "<img>", "</img>", "<IMG_CONTEXT>", "<image>"), (STOP,), END,
    named_tokens={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
    to_hub=renamed({"language_model.model.encoder.layers.": "language_model.model.layers."}),
    notes="The chat template writes <image>, which is not the token that the features take the place of.",
)  # fmt: skip


def step_config(tokenizer: Any) -> Any:
    text = text_config(
        tokenizer, "", moe_intermediate_size=24, n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2,
        share_expert_dim=24, mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=16,
    )  # fmt: skip
    del text["model_type"]
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 7,
        "mlp_ratio": 2.0, "max_position_embeddings": 64,
    }  # fmt: skip
    return tf.Step3p7Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<im_patch>")
    )  # fmt: skip


def step_processor(tokenizer: Any) -> Any:
    images = tf.Step3p7ImageProcessor(
        size={"height": 56, "width": 56}, patch_size=28, max_image_size=84, vision_patch_size=7
    )
    return tf.Step3p7Processor(images, tokenizer)


STEP3P7 = TinyFamily(
    "step3p7", "Step3p7ForConditionalGeneration", step_config, step_processor, chatml("'<im_patch>'"),
    (END, START, STOP, "<im_start>", "<im_end>", "<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>"),
    (STOP,), END,
)  # fmt: skip


# --------------------------------------------------------------------------------------- encoders that timm implements


def gemma3n_config(tokenizer: Any) -> Any:
    """MobileNet V5 has no small form; another one of timm's stands for it. The soft tokens' numbers are the last ones."""
    number = tokenizer.convert_tokens_to_ids
    first = number("<start_of_image>")
    text = text_config(
        tokenizer, "gemma3n_text", num_hidden_layers=6, sliding_window=16, num_kv_shared_layers=2, laurel_rank=8,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=first,
        layer_types=["sliding_attention", "full_attention"] * 3, activation_sparsity_pattern=[0.0] * 6,
    )  # fmt: skip
    vision = {
        "architecture": "test_efficientnet_ln", "hidden_size": 256, "vocab_size": 4, "vocab_offset": first,
    }  # fmt: skip
    audio = {
        "vocab_size": 4, "vocab_offset": first + 4, "hidden_size": 16, "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 4], "input_feat_size": 32,
    }  # fmt: skip
    return tf.Gemma3nConfig(
        text_config=text, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=16,
        boi_token_id=number("<start_of_image>"), eoi_token_id=number("<end_of_image>"),
        image_token_id=number("<image_soft_token>"), boa_token_id=number("<start_of_audio>"),
        eoa_token_id=number("<end_of_audio>"), audio_token_id=number("<audio_soft_token>"),
    )  # fmt: skip


def gemma3n_processor(tokenizer: Any) -> Any:
    images = tf.SiglipImageProcessor(size={"height": 128, "width": 128}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    return tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(feature_size=32), images, tokenizer, image_seq_length=16, audio_seq_length=4
    )


GEMMA3N = TinyFamily(
    "gemma3n", "Gemma3nForConditionalGeneration", gemma3n_config, gemma3n_processor,
    GEMMA3.template.replace("<start_of_image>", "<image_soft_token>"),
    ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
     "<image_soft_token>", "<vision_3>", "<start_of_audio>", "<end_of_audio>", "<audio_soft_token>", "<audio_3>"),
    ("<eos>", "<end_of_turn>"), "<pad>", "<bos>", adds_bos=True, tokenizer=gemma_tokenizer,
    named_tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                  "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"},
    scales={"embed_tokens": 0.1},
)  # fmt: skip


def perception_config(tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    vision = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": False, "num_classes": 0,
        "global_pool": "", "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32],
                                          "patch_size": 8, "global_pool": "", "use_post_transformer_norm": False,
                                          "init_values": 0.1, "ref_feat_shape": [4, 4]},
    }  # fmt: skip
    return tf.PerceptionLMConfig(
        text_config=text_config(tokenizer, "llama"), vision_config=vision, projector_pooling_ratio=2,
        image_token_id=number("<|image|>"), video_token_id=number("<|video|>"), tie_word_embeddings=False,
    )  # fmt: skip


def perception_processor(tokenizer: Any) -> Any:
    images = tf.PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4, size={"height": 32, "width": 32})
    videos = tf.PerceptionLMVideoProcessor(size={"height": 32, "width": 32})
    return tf.PerceptionLMProcessor(videos, images, tokenizer, patch_size=8, pooling_ratio=2)


PERCEPTION_LM = TinyFamily(
    "perception_lm", "PerceptionLMForConditionalGeneration", perception_config, perception_processor,
    chat(r"'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'", "'<|image|>'", "'<|eot_id|>'",
         r"'<|start_header_id|>assistant<|end_header_id|>\n\n'", first="{{- bos_token -}}"),
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>",
     "<|video|>"),
    ("<|eot_id|>", "<|end_of_text|>"), "<|end_of_text|>", "<|begin_of_text|>", adds_bos=True,
    named_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
)  # fmt: skip


def fast_config(tokenizer: Any) -> Any:
    vision = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 64,
        "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 8, 16, 32, 32],},
    }  # fmt: skip
    return tf.FastVlmConfig(
        text_config=text_config(tokenizer, "qwen2"), vision_config=vision, image_seq_length=16,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def fast_processor(tokenizer: Any) -> Any:
    size = {"height": 256, "width": 256}
    images = tf.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=size)
    return tf.LlavaProcessor(images, tokenizer, patch_size=64, vision_feature_select_strategy="full")


FAST_VLM = TinyFamily(
    "fast_vlm", "FastVlmForConditionalGeneration", fast_config, fast_processor,
    chatml(r"'<image>\n'", system="You are a helpful assistant."), (END, START, STOP, "<image>"), (STOP,), END,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- janus


def janus_config(tokenizer: Any) -> Any:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
        "mlp_ratio": 2.0, "projection_dim": 64, "num_image_tokens": 16,
    }  # fmt: skip
    vq = {
        "embed_dim": 4, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64,
    }  # fmt: skip
    return tf.JanusConfig(
        text_config=text_config(tokenizer, "llama"), vision_config=vision, vq_config=vq, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip


def janus_processor(tokenizer: Any) -> Any:
    images = tf.JanusImageProcessor(size=SQUARE, **HALF)
    return tf.JanusProcessor(images, tokenizer, num_image_tokens=16)


JANUS = TinyFamily(
    "janus", "JanusForConditionalGeneration", janus_config, janus_processor,
    chat("'<|' + message.role.title() + '|>: '", r"'<image_placeholder>\n'", r"'\n\n'", "'<|Assistant|>:'"),
    (*DEEPSEEK_TOKENS, "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"), ("<|end_of_sentence|>",),
    "<|pad|>", "<|begin_of_sentence|>", adds_bos=True,
    named_tokens={"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    notes="An image tokenizer and generator lies in the checkpoint beside the encoder.",
)  # fmt: skip


# ------------------------------------------------- families of `others` with other language models, as the hub has them


def internvl_gpt_oss_config(tokenizer: Any) -> Any:
    """InternVL 3.5 with gpt-oss: every attention head has a sink, every other layer a window."""
    config = internvl_config(tokenizer)
    text = text_config(tokenizer, "gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    del text["model_type"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config.text_config = tf.GptOssConfig(**text, rope_parameters=rope)
    return config


def ministral_config(tokenizer: Any) -> Any:
    """Mistral 3 with Ministral 3: queries grow with their position."""
    config = mistral3_config(tokenizer)
    text = text_config(tokenizer, "ministral3")
    del text["model_type"]
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    config.text_config = tf.Ministral3Config(**text, rope_parameters=rope)
    return config


def llava_pixtral_config(tokenizer: Any) -> Any:
    """Pixtral 12B as the hub has it in LLaVA's classes: features of an image of any shape, Mistral."""
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 84, "patch_size": 14,
    }  # fmt: skip
    return tf.LlavaConfig(
        text_config=text_config(tokenizer, "mistral", sliding_window=None), vision_config=vision,
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_seq_length=1,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip


def llava_pixtral_processor(tokenizer: Any) -> Any:
    images = tf.PixtralImageProcessor(size={"longest_edge": 84}, patch_size=14)
    return tf.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=1)


VARIANTS = {
    "internvl_gpt_oss": dataclasses.replace(INTERNVL, config=internvl_gpt_oss_config),
    "mistral3_ministral3": dataclasses.replace(MISTRAL3, config=ministral_config),
    "llava_pixtral": dataclasses.replace(
        MISTRAL3, model_type="llava", model_class="LlavaForConditionalGeneration", config=llava_pixtral_config,
        processor=llava_pixtral_processor,
    ),
}  # fmt: skip

MORE: dict[str, TinyFamily] = {
    family.model_type: family
    for family in (
        LLAVA_NEXT, VIPLLAVA, GLM4V_MOE, GLM46V, GLM_OCR, GEMMA4, LLAMA4, AYA_VISION, COHERE2_VISION, IDEFICS2, ARIA,
        VIDEO_LLAMA_3, OVIS2, LIGHTON_OCR, PADDLEOCR_VL, DEEPSEEK_VL, DEEPSEEK_VL_HYBRID,
        MINICPMV4_7, MINICPM_OCR, LFM3_VL, EXAONE4_5, GRANITE4_VISION, HUNYUAN_VL, ERNIE4_5_VL_MOE, KIMI_K25, MOLMO2,
        QIANFAN_OCR, STEP3P7, GEMMA3N, PERCEPTION_LM, FAST_VLM, JANUS,
    )
} | VARIANTS  # fmt: skip
