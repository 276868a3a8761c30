"""Make a random Qwen2-VL checkpoint on disk: real classes, real file names, no download.

    python -m tests.support.checkpoints OUT [--shape tiny|113m|2b] [--layout today|hub] [--prefix hub|nested] …

`tiny` has about a million parameters, for tests. `113m` has 113 million, 88 of them the language model's, for measuring
speed: it never ends an answer by itself, so that every answer has the same length. `2b` has the true Qwen2-VL-2B shape
(2.2 G parameters, 4.4 GB in bfloat16, two files as on the hub) for measuring memory and bytes; its encoder's numbers
are as random as the rest. `--layout hub` writes the older files that the hub's checkpoints have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.utils import logging

from qvsplit.checkpoints.tensors import TensorPlace
from qvsplit.checkpoints.writing import fill_checkpoint, new_folder

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE = "<|image_pad|>"
CONTROL = [
    END, START, STOP, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE, "<|video_pad|>",
]  # fmt: skip
# Does what Qwen2-VL's does: a default system message, images as one pad between vision marks, text as it is.
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CORPUS = (
    "What is in the picture? Is it day or night? How many people are there, and what colour is the house? "
    "Describe the picture in one sentence. A cat sleeps on a chair; rockets, coins, flowers and old cameras. "
) * 8


def make_tokenizer(corpus: Iterable[str] = (CORPUS,), vocab_size: int = 400) -> Any:
    """A byte-level BPE tokenizer trained on `corpus`, a few sentences by default, with Qwen2-VL's control tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=STOP, pad_token=END, additional_special_tokens=CONTROL, chat_template=TEMPLATE
    )


def tiny_config(tokenizer: Any, *, tied: bool = False) -> Any:
    """Three vision blocks of width 64, four language layers of width 128."""
    return make_config(
        tokenizer,
        text={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision={"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 128},
        tied=tied,
    )  # fmt: skip


def small_config(tokenizer: Any) -> Any:
    """Six vision blocks of width 512, ten language layers of width 768."""
    return make_config(
        tokenizer,
        text={
            "vocab_size": len(tokenizer), "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision={"depth": 6, "embed_dim": 512, "num_heads": 8, "hidden_size": 768},
        tied=False,
    )  # fmt: skip


def qwen2_vl_2b_config(tokenizer: Any, *, vision_depth: int = 32, layers: int = 28) -> Any:
    """The shape of Qwen2-VL-2B, or one of its width that is shallower."""
    return make_config(
        tokenizer,
        text={
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": layers,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision={"depth": vision_depth, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
        tied=True,
    )  # fmt: skip


def make_config(tokenizer: Any, *, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    """Qwen2-VL's config with the tokenizer's numbers; `text` and `vision` give the shapes of the two halves."""
    number = tokenizer.convert_tokens_to_ids
    ends = {"bos_token_id": number(END), "eos_token_id": number(STOP), "pad_token_id": number(END)}
    return Qwen2VLConfig(
        text_config=text | ends,
        vision_config=vision | {"mlp_ratio": 4, "patch_size": 14},
        image_token_id=number(IMAGE),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def make_tiny(
    out: Path, *, layout: str = "today", prefix: str = "hub", files: int = 5, tied: bool = False,
    dtype: str = "float32", seed: int = 0,
) -> None:  # fmt: skip
    """A complete tiny checkpoint in the new folder `out`. `files` 1 writes model.safetensors, more an index."""
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    config = tiny_config(tokenizer, tied=tied)
    # wider than the default, so that answers depend on the image
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.15
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(out, max_shard_size="100GB")
    rewrite(out, files=files, prefix=prefix)
    _save_small_files(out, tokenizer, layout)


def make_small(out: Path, *, layout: str = "hub") -> None:
    """A checkpoint of 113 M parameters in float32, in one file, whose answers go on until they are cut."""
    logging.disable_progress_bar()
    licence = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    tokenizer = make_tokenizer([CORPUS, licence], vocab_size=2000)
    config = small_config(tokenizer)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.06
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for token in CONTROL:
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 0
    model.config.dtype = "float32"
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(out, max_shard_size="100GB")
    rewrite(out, files=1)
    _save_small_files(out, tokenizer, layout)


def make_2b(out: Path, *, layout: str = "hub", vision_depth: int = 32, layers: int = 28) -> None:
    """A checkpoint of the true 2B shape in bfloat16, written tensor by tensor into two files as on the hub.

    With fewer vision blocks or language layers it is for quick measurements.
    """
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    config = qwen2_vl_2b_config(tokenizer, vision_depth=vision_depth, layers=layers)
    config.dtype, config.architectures = "bfloat16", ["Qwen2VLForConditionalGeneration"]
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    out.mkdir(parents=True)
    torch.manual_seed(0)
    shapes = {hub_name(name): tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    # the hub's first file holds the encoder and all but the last layers, 3.99 GB of 4.42
    late = ("model.norm.", *(f"model.layers.{layer}." for layer in range(max(layers - 5, 0), layers)))
    parts = {1: [n for n in shapes if not n.startswith(late)], 2: [n for n in shapes if n.startswith(late)]}
    weight_map: dict[str, str] = {}
    for part, names in parts.items():
        file_name = f"model-{part:05d}-of-00002.safetensors"
        save_file({n: _random(n, shapes[n]) for n in names}, out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model.config.save_pretrained(out)
    generation_config(tokenizer).save_pretrained(out)
    _save_small_files(out, tokenizer, layout)


def hub_name(name: str) -> str:
    """A tensor's name in today's module tree as the hub's checkpoints have it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def generation_config(tokenizer: Any) -> Any:
    """Sampling by default, as the hub's checkpoints have it, but hot: what samples by mistake gives other tokens."""
    return GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(STOP), tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.convert_tokens_to_ids(END), do_sample=True, temperature=2.0, top_k=50, top_p=1.0,
    )  # fmt: skip


def _save_small_files(out: Path, tokenizer: Any, layout: str) -> None:
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(max_pixels=12845056), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    )
    processor.save_pretrained(out)
    if layout == "hub":
        to_hub_layout(out)


def to_hub_layout(out: Path) -> None:
    """Rewrite today's small files as the hub's older ones: flat config, preprocessor_config, chat_template.json."""
    nested = json.loads((out / "config.json").read_text())
    flat = nested.pop("text_config")
    vision = nested.pop("vision_config")
    rope = flat.pop("rope_parameters")
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    flat |= {"torch_dtype": nested.pop("dtype")}
    flat.pop("layer_types", None)
    vision = {key: vision[key] for key in ("depth", "embed_dim", "mlp_ratio", "num_heads", "hidden_size", "patch_size",
                                           "spatial_merge_size", "temporal_patch_size")}  # fmt: skip
    vision |= {"model_type": "qwen2_vl", "in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    (out / "config.json").write_text(json.dumps(flat | nested | {"vision_config": vision}, indent=2))
    image = json.loads((out / "processor_config.json").read_text())["image_processor"]
    older = {key: image[key] for key in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")}
    older |= {"min_pixels": image["size"]["shortest_edge"], "max_pixels": image["size"]["longest_edge"]}
    older |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (out / "preprocessor_config.json").write_text(json.dumps(older, indent=2))
    (out / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (out / name).unlink()


def rewrite(folder: Path, *, files: int, prefix: str = "hub") -> None:
    """Write the tensors of `folder` anew, cut into `files` files, under the prefixes that `prefix` names.

    `hub` is `visual.` and `model.`, `nested` is `model.visual.` and `model.language_model.`, `mixed` is
    `model.visual.` and `model.`.
    """
    tensors = {_named(name, prefix): tensor for name, tensor in _tensors(folder)}
    save_tensors(folder, tensors, files)


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    """Write the tensors of `folder` anew, cut into `files` files; 1 is model.safetensors, more have an index."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for part in range(files):
        file_name = f"model-{part + 1:05d}-of-{files:05d}.safetensors"
        mine = names[part * len(names) // files : (part + 1) * len(names) // files]
        save_file({name: tensors[name] for name in mine}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_checkpoint(folder: Path, places: Mapping[str, TensorPlace], **about: Any) -> None:
    """Write a checkpoint that holds some tensors of another as the new `folder`, as `split` and the cache do it."""
    with new_folder(folder) as unfinished:
        fill_checkpoint(unfinished, places, **about)


def files_of(folder: Path) -> list[Path]:
    """The safetensors files in `folder`, sorted."""
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to every file's tensors, keeping the index true to what the files then hold."""
    weight_map: dict[str, str] = {}
    for file in files_of(folder):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def scale_language_model(tensors: dict[str, torch.Tensor]) -> None:
    """A change for `edit`: every number of the language model, and none of the encoder."""
    for name in tensors:
        if not name.startswith("visual."):
            tensors[name] = tensors[name] * 1.25


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dict
                yield name, stream.get_tensor(name)


def _named(name: str, prefix: str) -> str:
    bare = hub_name(name)
    if prefix in {"nested", "mixed"} and bare.startswith("visual."):
        return "model." + bare
    if prefix == "nested" and bare.startswith("model."):
        return bare.replace("model.", "model.language_model.", 1)
    return bare


def main() -> None:
    """Parse, make, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=["tiny", "113m", "2b"], default="tiny")
    parser.add_argument("--vision-depth", type=int, default=32, help="blocks of the 2b's encoder, for quick runs")
    parser.add_argument("--layers", type=int, default=28, help="of the 2b's language model")
    parser.add_argument("--layout", choices=["today", "hub"], default="today")
    parser.add_argument("--prefix", choices=["hub", "nested", "mixed"], default="hub")
    parser.add_argument("--files", type=int, default=5)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; give a new folder")
    if options.shape == "2b":
        make_2b(options.out, layout=options.layout, vision_depth=options.vision_depth, layers=options.layers)
    elif options.shape == "113m":
        make_small(options.out, layout=options.layout)
    else:
        make_tiny(
            options.out, layout=options.layout, prefix=options.prefix, files=options.files, tied=options.tied, dtype=options.dtype
        )  # fmt: skip
    print(f"{options.out}: {sum(f.stat().st_size for f in options.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
