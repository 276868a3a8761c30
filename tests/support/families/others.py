"""Families that are no Qwen-VL: other encoders, other projectors, other prompts, tiles, and tokenizers of two more kinds.

Sizes are such that a photograph of 200 x 300 pixels becomes some 16 to 60 tokens, in several tiles where a family tiles.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.checkpoints import CORPUS
from tests.support.families.building import TinyFamily, with_family_tokens

SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
}  # fmt: skip


def text_config(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """A text decoder of width 64 with three layers, and the tokenizer's numbers."""
    return {
        "model_type": model_type, "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 8192, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    } | more  # fmt: skip


def nested_vision_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The hub's names for CLIP and SigLIP, which transformers reads and no longer writes."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------- tokenizers made by SentencePiece


def gemma_tokenizer(family: TinyFamily) -> Any:
    """Blanks become `▁`, nothing is put in front, runs of line breaks are added tokens that are not special."""
    bpe = _pieces(("<pad>", "<eos>", "<bos>", "<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_family_tokens(bpe, family, unk_token="<unk>")


def llama_tokenizer(family: TinyFamily) -> Any:
    """Blanks become `▁`, and one is put in front of the very first piece, and of no other."""
    bpe = _pieces(("<unk>", "<s>", "</s>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return with_family_tokens(bpe, family, unk_token="<unk>")


def _pieces(first: tuple[str, ...]) -> Tokenizer:
    """A BPE over characters that falls back to bytes; `first` have the first numbers, the bytes follow."""
    trained = Tokenizer(models.BPE())
    words = [f"▁{word}" for word in CORPUS.split()]
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    trained.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=180, initial_alphabet=letters, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {piece: number for number, piece in enumerate([*first, *(f"<0x{n:02X}>" for n in range(256)), *learnt])}
    merges = [tuple(merge) for merge in model["merges"]]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


# ------------------------------------------------------------------------------------------------------ gemma3, paligemma

LINE_BREAKS = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
GEMMA3_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def gemma3_config(tokenizer: Any) -> Any:
    """Six layers, the sixth with full attention, the others with a window narrower than a prompt."""
    number = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer, "gemma3_text", num_hidden_layers=6, sliding_window=16, query_pre_attn_scalar=16
    )  # fmt: skip
    return transformers.Gemma3Config(
        text_config=text, vision_config=SIGLIP | {"image_size": 56, "vision_use_head": False}, mm_tokens_per_image=16,
        boi_token_index=number("<start_of_image>"), eoi_token_index=number("<end_of_image>"),
        image_token_index=number("<image_soft_token>"), eos_token_id=[1, number("<end_of_turn>")],
    )  # fmt: skip


def gemma3_processor(tokenizer: Any) -> Any:
    """Images are squeezed into a square; each becomes 16 tokens."""
    image_processor = transformers.Gemma3ImageProcessor(
        size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=16)


GEMMA3 = TinyFamily(
    model_type="gemma3",
    model_class="Gemma3ForConditionalGeneration",
    config=gemma3_config,
    processor=gemma3_processor,
    template=GEMMA3_TEMPLATE,
    control_tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
                    "<end_of_image>", "<image_soft_token>"),
    plain_tokens=(*LINE_BREAKS, "▁▁", "▁▁▁"),
    named_tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    tokenizer=gemma_tokenizer,
    scales={"embed_tokens": 0.1},
    to_hub=nested_vision_model,
    bos="<bos>",
    adds_bos=True,
    eos=("<eos>", "<end_of_turn>"),
    pad="<pad>",
    notes="Images attend to themselves in both directions (token_type_ids); tied embeddings; a system message goes into "
    "the first user turn; users' text is trimmed.",
)  # fmt: skip

# The hub's checkpoints have no chat template: the processor itself puts <bos> behind the last image and a line break
# behind the text. This one writes what its callers write by hand.
PALIGEMMA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{- '<image>' -}}{%- endif -%}{%- endfor -%}
{%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{- item['text'] -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def paligemma_config(tokenizer: Any) -> Any:
    """The first PaliGemma, whose text decoder is Gemma's."""
    # the processor adds 1,152 tokens for places and segments by itself
    text = text_config(tokenizer, "gemma", vocab_size=len(tokenizer) + 1152)
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=SIGLIP | {"vision_use_head": False, "projection_dim": 64}, projection_dim=64,
        hidden_size=64, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), bos_token_id=2, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip


def paligemma2_config(tokenizer: Any) -> Any:
    """The second, whose text decoder is Gemma 2's: sliding windows and capped attention scores and logits."""
    config = paligemma_config(tokenizer)
    config.text_config = transformers.Gemma2Config(
        **text_config(
            tokenizer, "gemma2", vocab_size=len(tokenizer) + 1152, num_hidden_layers=4, sliding_window=16,
            query_pre_attn_scalar=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        )
    )  # fmt: skip
    return config


def paligemma_processor(tokenizer: Any) -> Any:
    """Images are squeezed into a square; each becomes 16 tokens."""
    image_processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 16
    return transformers.PaliGemmaProcessor(image_processor, tokenizer)


PALIGEMMA = TinyFamily(
    model_type="paligemma",
    model_class="PaliGemmaForConditionalGeneration",
    config=paligemma_config,
    processor=paligemma_processor,
    template=PALIGEMMA_TEMPLATE,
    control_tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
    plain_tokens=(*LINE_BREAKS, "▁▁", "▁▁▁"),
    named_tokens={"image_token": "<image>"},
    tokenizer=gemma_tokenizer,
    scales={"embed_tokens": 0.1},
    to_hub=nested_vision_model,
    bos="<bos>",
    adds_bos=True,
    eos=("<eos>",),
    pad="<pad>",
    notes="The whole prompt attends in both directions; positions begin at one; no chat template on the hub; the "
    "processor puts <bos> behind the images and a line break behind the text.",
)
PALIGEMMA2 = dataclasses.replace(PALIGEMMA, config=paligemma2_config)


# ------------------------------------------------------------------------------------------------ llava, llava_onevision

LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{- message['role'].upper() + ': ' -}}{%- endif -%}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
{{- content['text'] + ' ' -}}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def llava_config(tokenizer: Any) -> Any:
    """CLIP, of which the last layer but one is read, without its first token; Llama."""
    return transformers.LlavaConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=SIGLIP | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip


def llava_processor(tokenizer: Any) -> Any:
    """Images are cut to their middle; each becomes 16 tokens."""
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=7, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


LLAVA = TinyFamily(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    config=llava_config,
    processor=llava_processor,
    template=LLAVA_TEMPLATE,
    control_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    tokenizer=llama_tokenizer,
    to_hub=nested_vision_model,
    bos="<s>",
    adds_bos=True,
    eos=("</s>",),
    pad="<pad>",
    notes="Only the tokenizer writes BOS, and a blank at the beginning; images come before all text of a message; "
    "content that is a plain string is left out by the template.",
)

LLAVA_ONEVISION_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}{{- '<image>' -}}{%- endfor -%}
{%- for content in message['content'] | selectattr('type', 'equalto', 'video') -%}{{- '<video>' -}}{%- endfor -%}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
{{- '\\n' + content['text'] -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
PINPOINTS = [[28, 28], [28, 56], [28, 84], [56, 28], [56, 56], [84, 28]]


def llava_onevision_config(tokenizer: Any) -> Any:
    """SigLIP in up to five tiles, a learnt row end, Qwen2."""
    number = tokenizer.convert_tokens_to_ids
    return transformers.LlavaOnevisionConfig(
        text_config=text_config(tokenizer, "qwen2"), vision_config=SIGLIP | {"vision_use_head": False},
        image_token_index=number("<image>"), video_token_index=number("<video>"), image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip


def llava_onevision_processor(tokenizer: Any) -> Any:
    """An image alone is cut into tiles; of several in one prompt each is one tile."""
    size = {"height": 28, "width": 28}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS, **normal), tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size, **normal), num_image_tokens=16,
        vision_feature_select_strategy="full"
    )  # fmt: skip


LLAVA_ONEVISION = TinyFamily(
    model_type="llava_onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    config=llava_onevision_config,
    processor=llava_onevision_processor,
    template=LLAVA_ONEVISION_TEMPLATE,
    control_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    to_hub=nested_vision_model,
    eos=("<|im_end|>",),
    pad="<|endoftext|>",
    notes="Loose tensor image_newline; an image among others is prepared, and told to the encoder, otherwise than alone; "
    "content that is a plain string is left out by the template.",
)


# -------------------------------------------------------------------------------------------------------------- internvl

INTERNVL_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}
{%- elif content['type'] == 'video' -%}{{- '<video>\\n' -}}
{%- elif content['type'] == 'text' -%}{{- content['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def internvl_config(tokenizer: Any, text: str = "qwen2") -> Any:
    """InternViT, four patches to a token, Qwen2 or Qwen3."""
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [28, 28], "patch_size": [7, 7], "attention_bias": True,
    }  # fmt: skip
    return transformers.InternVLConfig(
        text_config=text_config(tokenizer, text), vision_config=vision, image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tie_word_embeddings=False,
    )  # fmt: skip


def internvl_processor(tokenizer: Any) -> Any:
    """Up to four tiles and the whole, four tokens each."""
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, min_patches=1, max_patches=4, crop_to_patches=True,
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer, transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}), image_seq_length=4
    )  # fmt: skip


INTERNVL = TinyFamily(
    model_type="internvl",
    model_class="InternVLForConditionalGeneration",
    config=internvl_config,
    processor=internvl_processor,
    template=INTERNVL_TEMPLATE,
    control_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    named_tokens={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                  "video_token": "<video>"},
    eos=("<|im_end|>",),
    pad="<|endoftext|>",
    notes="pooler_output has a row a tile, not an image; pixel_values have no axis of images.",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- idefics3, smolvlm

TILE_MARKS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
IDEFICS3_TEMPLATE = """\
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
{{- message['role'].capitalize() -}}
{%- if message['content'][0]['type'] == 'image' -%}{{- ':' -}}{%- else -%}{{- ': ' -}}{%- endif -%}
{%- for line in message['content'] -%}
{%- if line['type'] == 'text' -%}{{- line['text'] -}}
{%- elif line['type'] == 'image' -%}{{- '<image>' -}}
{%- elif line['type'] == 'video' -%}{{- '<video>' -}}
{%- endif -%}
{%- endfor -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
SMOLVLM_TEMPLATE = IDEFICS3_TEMPLATE.replace("<|begin_of_text|>", "<|im_start|>")
TILES_OF_28 = {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}}


def idefics3_config(tokenizer: Any) -> Any:
    """A SigLIP of its own, four patches to a token, Llama."""
    return _idefics3_like(transformers.Idefics3Config, tokenizer)


def smolvlm_config(tokenizer: Any) -> Any:
    """As Idefics3's."""
    return _idefics3_like(transformers.SmolVLMConfig, tokenizer)


def _idefics3_like(config_class: Any, tokenizer: Any) -> Any:
    vision = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    return config_class(
        text_config=text_config(tokenizer, "llama"), vision_config=vision, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def idefics3_processor(tokenizer: Any) -> Any:
    """Up to nine tiles and the whole, four tokens each, with marks of row and column."""
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(**TILES_OF_28), tokenizer, image_seq_len=4
    )  # fmt: skip


def smolvlm_processor(tokenizer: Any) -> Any:
    """As Idefics3's; it needs the package num2words, for videos."""
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**TILES_OF_28), tokenizer,
        transformers.SmolVLMVideoProcessor(**TILES_OF_28), image_seq_len=4
    )  # fmt: skip


IDEFICS3 = TinyFamily(
    model_type="idefics3",
    model_class="Idefics3ForConditionalGeneration",
    config=idefics3_config,
    processor=idefics3_processor,
    template=IDEFICS3_TEMPLATE,
    control_tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<fake_token_around_image>", "<image>",
                    "<end_of_utterance>"),
    plain_tokens=(*TILE_MARKS, "<global-img>"),
    bos="<|begin_of_text|>",
    adds_bos=True,
    eos=("<end_of_utterance>", "<|end_of_text|>"),
    pad="<|end_of_text|>",
    notes="Template and tokenizer both write BOS: only one may; marks of tiles are added tokens that are not special; "
    "types of tokens need the length of each placeholder.",
)  # fmt: skip
SMOLVLM = TinyFamily(
    model_type="smolvlm",
    model_class="SmolVLMForConditionalGeneration",
    config=smolvlm_config,
    processor=smolvlm_processor,
    template=SMOLVLM_TEMPLATE,
    control_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<video>",
                    "<end_of_utterance>", *TILE_MARKS, "<global-img>"),
    named_tokens={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                  "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
    bos="<|im_start|>",
    eos=("<end_of_utterance>", "<|im_end|>"),
    pad="<|im_end|>",
    notes="The processor cannot be made without the package num2words.",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- mistral3

MISTRAL3_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set system_message = messages[0]['content'] -%}
    {%- else -%}
        {%- set system_message = messages[0]['content'][0]['text'] -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = 'You are a tiny model. The current year is ' + strftime_now('%Y') + '.' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' -}}
{%- for message in loop_messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST]' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for block in message['content'] -%}
                {%- if block['type'] == 'text' -%}{{- block['text'] -}}
                {%- elif block['type'] in ['image', 'image_url'] -%}{{- '[IMG]' -}}
                {%- else -%}{{- raise_exception('Only text and image blocks are supported in message content!') -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- if message['content'] is string -%}
            {{- message['content'] + eos_token -}}
        {%- else -%}
            {{- message['content'][0]['text'] + eos_token -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('Only user, system and assistant roles are supported!') -}}
    {%- endif -%}
{%- endfor -%}
"""


def mistral3_config(tokenizer: Any) -> Any:
    """Pixtral's encoder, four patches to a token, Mistral."""
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 84, "patch_size": 7,
    }  # fmt: skip
    return transformers.Mistral3Config(
        text_config=text_config(tokenizer, "mistral", sliding_window=None), vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), tie_word_embeddings=False,
    )  # fmt: skip


def mistral3_processor(tokenizer: Any) -> Any:
    """The aspect ratio is kept, the longer side is at most 84 pixels; rows end in a token of their own."""
    image_processor = transformers.PixtralImageProcessor(size={"longest_edge": 84}, patch_size=7)
    return transformers.PixtralProcessor(image_processor, tokenizer, patch_size=7, spatial_merge_size=2)


MISTRAL3 = TinyFamily(
    model_type="mistral3",
    model_class="Mistral3ForConditionalGeneration",
    config=mistral3_config,
    processor=mistral3_processor,
    template=MISTRAL3_TEMPLATE,
    control_tokens=("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
                    "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    bos="<s>",
    adds_bos=True,
    eos=("</s>",),
    pad="<pad>",
    notes="Template and tokenizer both write BOS: only one may; the default system message holds a date; images of one "
    "call are padded to a common size.",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- minicpmv4_6

MINICPM_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] | trim -}}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{%- set parts.text = parts.text + '<|image_pad|>\\n' -%}
{%- elif item['type'] == 'video' -%}{%- set parts.text = parts.text + '<|video_pad|>\\n' -%}
{%- elif item['type'] == 'text' -%}{%- set parts.text = parts.text + item['text'] -%}
{%- endif -%}
{%- endfor -%}
{{- parts.text | trim -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
"""


def minicpm_config(tokenizer: Any) -> Any:
    """A SigLIP that merges patches half-way, Qwen3.5: three recurrent layers and one with attention."""
    number = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer, "qwen3_5_text", num_hidden_layers=4, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 7, "insert_layer_id": 1,
    }  # fmt: skip
    return transformers.MiniCPMV4_6Config(
        text_config=text, vision_config=vision, insert_layer_id=1, image_size=56,
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
    )  # fmt: skip


def minicpm_processor(tokenizer: Any) -> Any:
    """The whole and up to four slices, about four tokens each, with the image's number in front."""
    sizes = {"max_slice_nums": 4, "scale_resolution": 56, "patch_size": 7}
    return transformers.MiniCPMV4_6Processor(
        transformers.MiniCPMV4_6ImageProcessor(**sizes), transformers.MiniCPMV4_6VideoProcessor(**sizes), tokenizer
    )  # fmt: skip


MINICPM = TinyFamily(
    model_type="minicpmv4_6",
    model_class="MiniCPMV4_6ForConditionalGeneration",
    config=minicpm_config,
    processor=minicpm_processor,
    template=MINICPM_TEMPLATE,
    control_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<image>",
                    "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"),
    plain_tokens=("<think>", "</think>"),
    named_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
                  "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
                  "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
    eos=("<|im_end|>", "<|endoftext|>"),
    pad="<|endoftext|>",
    notes="The prompt's text for an image begins with its number among the prompt's images; recurrent layers; "
    "pooler_output has an entry a slice.",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- lfm2_vl

LFM2_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{- '<image>' -}}
{%- elif item['type'] == 'text' -%}{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def lfm2_config(tokenizer: Any) -> Any:
    """SigLIP 2 for any shape, four patches to a token, LFM2: two convolutional layers and one with attention."""
    vision = {
        "model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_patches": 16, "patch_size": 7, "vision_use_head": False,
    }  # fmt: skip
    text = text_config(
        tokenizer, "lfm2", layer_types=["conv", "full_attention", "conv"], block_ff_dim=96, block_multiple_of=8
    )
    return transformers.Lfm2VlConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32, downsample_factor=2,
    )  # fmt: skip


def lfm2_processor(tokenizer: Any) -> Any:
    """Up to four tiles of four tokens, and the whole with at most 16."""
    image_processor = transformers.Lfm2VlImageProcessor(
        encoder_patch_size=7, tile_size=28, min_tiles=2, max_tiles=4, min_image_tokens=4, max_image_tokens=16,
        size={"height": 28, "width": 28},
    )  # fmt: skip
    return transformers.Lfm2VlProcessor(image_processor, tokenizer)


LFM2 = TinyFamily(
    model_type="lfm2_vl",
    model_class="Lfm2VlForConditionalGeneration",
    config=lfm2_config,
    processor=lfm2_processor,
    template=LFM2_TEMPLATE,
    control_tokens=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>",
                    "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>",
                    *(f"<|img_row_{row}_col_{col}|>" for row in range(1, 11) for col in range(1, 11))),
    to_hub=nested_vision_model,
    bos="<|startoftext|>",
    adds_bos=True,
    eos=("<|im_end|>",),
    pad="<|pad|>",
    notes="Template and tokenizer both write BOS: only one may; convolutional layers; pooler_output has an entry a tile.",
)  # fmt: skip

OTHERS: dict[str, TinyFamily] = {
    family.model_type: family
    for family in (
        GEMMA3, PALIGEMMA, LLAVA, LLAVA_ONEVISION, INTERNVL, IDEFICS3, SMOLVLM, MISTRAL3, MINICPM, LFM2
    )
} | {"paligemma2": PALIGEMMA2}  # fmt: skip
