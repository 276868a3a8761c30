"""Print what models take: parameters and bytes of each half, memory, tokens and stored bytes of a photograph.

    python tools/model_sizes.py             # the two tables of docs/hardware.md
    python tools/model_sizes.py --sources   # where each model's numbers are from

Nothing is downloaded and no weight exists: parameters and memory are those of qvsplit/checkpoints/sizes.py, from the
numbers of a checkpoint's config.json. Those were read in public copies of the files; a model of which none was found is
not here. `qvsplit inspect MODEL` says the same of a checkpoint at hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import FAMILIES
from qvsplit.checkpoints.sizes import ASKING, ENCODING, LIBRARIES, ON_GPU, Loaded, count
from qvsplit.runtime.dtypes import STORED_SHARE, token_bytes

PHOTO = (3000, 4000)  # height and width in pixels
GB = 1e9

_HUB = "https://huggingface.co/{}/blob/main/config.json"
_XTUNER = "InternLM/xtuner at b934f46, xtuner/v1/model/"
_TRANSFORMERS = "the defaults of transformers' {}, which are that checkpoint's"


@dataclass(frozen=True)
class Model:
    """One checkpoint: the numbers of its config.json that decide sizes, and where they were read.

    Attributes:
        name: For the tables.
        model_type: Of config.json.
        text: Fields of the language model's config.
        vision: Fields of the vision encoder's; what is not named is transformers' default.
        source: Where they were read.
        tokens: Tokens of `PHOTO`, by the family's own rule.
        top: Fields of config.json beside both.
    """

    name: str
    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    source: str
    tokens: Callable[[], int]
    top: Mapping[str, Any]

    def checkpoint(self, folder: Path) -> Checkpoint:
        """Give a checkpoint in `folder` that has a config.json and no tensor."""
        config = {"model_type": self.model_type, "text_config": self.text, "vision_config": self.vision, **self.top}
        (folder / "config.json").write_text(json.dumps(config))
        return Checkpoint(folder, self.name, None, config, {}, FAMILIES[self.model_type])


@dataclass(frozen=True)
class Sizes:
    """Parameters of each half, and what an image gives.

    Attributes:
        halves: Parameters, memory and values in the KV cache.
        tokens: Of `PHOTO`.
        width: Values a token.
        tensors: Tensors a token.
    """

    halves: Loaded
    tokens: int
    width: int
    tensors: int

    def raw(self, dtype: str) -> int:
        """Give the bytes of `PHOTO`'s features before compression."""
        return self.tokens * self.tensors * token_bytes(dtype, self.width)


def sizes_of(model: Model) -> Sizes:
    """Count the parameters of both halves, as `extract` and `ask` divide them."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = model.checkpoint(Path(folder))
        counted = count(checkpoint)
        width, tensors = checkpoint.width, checkpoint.tensors_a_token
    assert width is not None
    return Sizes(counted, model.tokens(), width, tensors)


# ---------------------------------------------------------------------------------------------- tokens of a photograph


def _qwen_tokens(patch: int) -> int:
    """Count under the default cap of 1,280 tokens an image."""
    from transformers import Qwen2VLImageProcessor

    cap = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 1280 * (2 * patch) ** 2}
    return int(Qwen2VLImageProcessor(patch_size=patch, size=cap).get_number_of_image_patches(*PHOTO, {})) // 4


def _glm_tokens() -> int:
    from transformers import Glm4vImageProcessor

    return int(Glm4vImageProcessor().get_number_of_image_patches(*PHOTO, {})) // 4


def _internvl_tokens() -> int:
    from transformers import GotOcr2ImageProcessor

    cut = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    return 256 * int(GotOcr2ImageProcessor().get_number_of_image_patches(*PHOTO, cut))


def _smolvlm_tokens(longest: int, tile: int, tile_tokens: int) -> int:
    from transformers import SmolVLMImageProcessor

    cut = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    return tile_tokens * int(SmolVLMImageProcessor().get_number_of_image_patches(*PHOTO, cut)[0])


def _pixtral_tokens(longest: int, cell: int) -> int:
    import numpy as np
    from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

    photo = np.broadcast_to(np.uint8(0), (*PHOTO, 3))
    tall, wide = get_resize_output_image_size(photo, size=(longest, longest), patch_size=(cell, cell))
    return int(tall // cell) * int(wide // cell)


# --------------------------------------------------------------------------------------------------------------- models


def _text(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, **more,
    }  # fmt: skip


def _qwen2(size: str, text: dict[str, Any], source: str, *, tied: bool = False) -> Model:
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "patch_size": 14}
    tokens = functools.partial(_qwen_tokens, 14)
    return Model(f"Qwen2-VL {size}", "qwen2_vl", text, vision, source, tokens, {"tie_word_embeddings": tied})


def _qwen25(size: str, text: dict[str, Any], source: str, *, tied: bool = False) -> Model:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": text["hidden_size"]}
    tokens = functools.partial(_qwen_tokens, 14)
    return Model(f"Qwen2.5-VL {size}", "qwen2_5_vl", text, vision, source, tokens, {"tie_word_embeddings": tied})


_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}


def _qwen3(
    name: str, kind: str, text: dict[str, Any], source: str, *, small: bool = False, tied: bool = False
) -> Model:
    levels = [5, 11, 17] if small else [8, 16, 24]
    vision = (_SMALL if small else _LARGE) | {"out_hidden_size": text["hidden_size"]}
    if kind.startswith("qwen3_vl"):
        vision["deepstack_visual_indexes"] = levels
        text = text | {"head_dim": 128}
    return Model(name, kind, text, vision, source, functools.partial(_qwen_tokens, 16), {"tie_word_embeddings": tied})


def _delta(keys: int, values: int) -> dict[str, Any]:
    """Fields of Qwen3.5's recurrent layers."""
    return {
        "linear_num_key_heads": keys, "linear_num_value_heads": values, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "head_dim": 256,
    }  # fmt: skip


def _gemma(size: str, text: dict[str, Any]) -> Model:
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    source = "huggingface/transformers at 0d7e95d, src/transformers/models/gemma3/convert_gemma3_weights.py"
    top = {"mm_tokens_per_image": 256, "tie_word_embeddings": True}
    return Model(f"Gemma 3 {size}", "gemma3", text | {"vocab_size": 262_208}, vision, source, lambda: 256, top)


def _internvl(name: str, text: dict[str, Any], source: str, *, tied: bool = False) -> Model:
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
    }  # fmt: skip
    return Model(name, "internvl", text, vision, source, _internvl_tokens, {"tie_word_embeddings": tied})


_QWEN3_8B = _text(4096, 12288, 36, 32, 8, 151936)
MODELS: tuple[Model, ...] = (
    _qwen2("2B", _text(1536, 8960, 28, 12, 2, 151936), _HUB.format("erax-ai/EraX-VL-2B-V1.5"), tied=True),
    _qwen2("7B", _text(3584, 18944, 28, 28, 4, 152064), _HUB.format("tsystems/colqwen2-7b-v1.0-merged")),
    _qwen2("72B", _text(8192, 29568, 80, 64, 8, 152064), _HUB.format("OPEA/Qwen2-VL-72B-Instruct-int4-sym-inc")),
    _qwen25("3B", _text(2048, 11008, 36, 16, 2, 151936), _HUB.format("dahwinsingularity/vllm2"), tied=True),
    _qwen25("7B", _text(3584, 18944, 28, 28, 4, 152064), _HUB.format("Qwen/Qwen2.5-VL-7B-Instruct")),
    _qwen3("Qwen3-VL 4B", "qwen3_vl", _text(2560, 9728, 36, 32, 8, 151936),
           "https://huggingface.co/TechCarbasa/MyModels/commit/400bbbf998ac875feb9b2182d409b81aa3601ac8",
           small=True, tied=True),
    _qwen3("Qwen3-VL 8B", "qwen3_vl", _QWEN3_8B, _HUB.format("Steinate/Cortex")),
    _qwen3("Qwen3-VL 32B", "qwen3_vl", _text(5120, 25600, 64, 64, 8, 151936), _HUB.format("quanliang/F1")),
    _qwen3("Qwen3-VL 30B-A3B", "qwen3_vl_moe",
           _text(2048, 6144, 48, 32, 4, 151936, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
           _XTUNER + "moe/qwen3.py and compose/qwen3_vl/qwen3_vl_config.py"),
    _qwen3("Qwen3-VL 235B-A22B", "qwen3_vl_moe",
           _text(4096, 12288, 94, 64, 4, 151936, moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8),
           _XTUNER + "moe/qwen3.py and compose/qwen3_vl/qwen3_vl_config.py"),
    _qwen3("Qwen3.5 4B", "qwen3_5", _text(2560, 9216, 32, 16, 4, 248320, **_delta(16, 32)),
           _XTUNER + "dense/qwen3_5_text.py and compose/qwen3_5/qwen3_5_config.py", small=True, tied=True),
    _qwen3("Qwen3.5 9B", "qwen3_5", _text(4096, 12288, 32, 16, 4, 248320, **_delta(16, 32)),
           _HUB.format("khtsly/Mini-Coder")),
    _qwen3("Qwen3.8 27B", "qwen3_5", _text(5120, 17408, 64, 24, 4, 248320, **_delta(16, 48)),
           "xtuner's Qwen3_5_VLDense27BConfig, which a later version than that above checks against the hub's file"),
    _qwen3("Qwen3.5, Qwen3.6 35B-A3B", "qwen3_5_moe",
           _text(2048, 0, 40, 16, 2, 248320, moe_intermediate_size=512, shared_expert_intermediate_size=512,
                 num_experts=256, num_experts_per_tok=8, **_delta(16, 32)),
           _XTUNER + "moe/qwen3_5_text.py and compose/qwen3_5/qwen3_5_config.py"),
    _gemma("4B", _text(2560, 10240, 34, 8, 4, 262144, head_dim=256)),
    _gemma("12B", _text(3840, 15360, 48, 16, 8, 262144, head_dim=256)),
    _gemma("27B", _text(5376, 21504, 62, 32, 16, 262144, head_dim=128)),
    Model("Mistral Small 3.1 24B", "mistral3",
          _text(5120, 32768, 40, 32, 8, 131072, head_dim=128, model_type="mistral"),
          {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
           "image_size": 1540, "patch_size": 14, "head_dim": 64, "model_type": "pixtral"},
          _HUB.format("mistralai/Mistral-Small-3.1-24B-Instruct-2503"), functools.partial(_pixtral_tokens, 1540, 28),
          {"spatial_merge_size": 2, "tie_word_embeddings": False, "vision_feature_layer": -1}),
    Model("GLM-4.1V 9B", "glm4v",  # half of each head is rotated, which the class's own defaults leave out
          _text(4096, 13696, 40, 32, 2, 151552,
                rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}),
          {},
          _TRANSFORMERS.format("Glm4vConfig"), _glm_tokens, {}),
    _internvl("InternVL3 1B", _text(896, 4864, 24, 14, 2, 151674, model_type="qwen2"),
              _HUB.format("hf-internal-testing/tiny-processor-internvl") + ", its text_config"),
    _internvl("InternVL3.5 8B", _QWEN3_8B | {"model_type": "qwen3", "head_dim": 128},
              _XTUNER + "dense/qwen3.py and compose/internvl/internvl_config.py"),
    Model("LLaVA 1.5 7B", "llava", _text(4096, 11008, 32, 32, 32, 32064, model_type="llama"),
          {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
           "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768},
          _HUB.format("mohitsha/llava-1.5-7b-hf"), lambda: 576, {"tie_word_embeddings": False}),
    Model("SmolVLM2 500M", "smolvlm", _text(960, 2560, 32, 15, 5, 49280, head_dim=64, model_type="llama"),
          {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
           "image_size": 512, "patch_size": 16},
          "a test's fixture in public code, offline_vlm_cache.py, that repeats the hub's config.json",
          functools.partial(_smolvlm_tokens, 2048, 512, 64), {"scale_factor": 4, "tie_word_embeddings": False}),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tables


def _amount(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _gb(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def memory_table(found: Mapping[str, Sizes]) -> str:
    """Give the table of parameters and memory."""
    lines = [
        "| model | encoder | in bf16 · fp32, GB | language model | in bf16 · fp32, GB | `extract`, CPU, fp32"
        " | GPU, bf16 | `ask`, CPU, fp32 | CPU, bf16 | GPU, bf16 | KV, kB a token |",
        "|--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, sizes in found.items():
        one = sizes.halves
        halves = [f"{_amount(n)} | {_gb(n * 2 / GB)} · {_gb(n * 4 / GB)}" for n in (one.encoder, one.language)]
        asking = [LIBRARIES + one.language * n + one.embedding_beside(n, 2) + ASKING for n in (4, 2)]
        memory = (LIBRARIES + one.encoder * 4 + ENCODING, one.encoder * 2 + ON_GPU, *asking, one.language * 2 + ON_GPU)
        lines.append(f"| {name} | {halves[0]} | {halves[1]} | {' | '.join(_gb(value / GB) for value in memory)}"
                     f" | {(one.cached or 0) * 2 / 1e3:,.0f} |")  # fmt: skip
    return "\n".join(lines)


def disk_table(found: Mapping[str, Sizes]) -> str:
    """Give the table of tokens and stored bytes."""
    lines = [
        "| model | tokens of a 12-megapixel photograph | tensors × values a token | MB in float32 · bfloat16"
        " | 1,000 such, stored: float32 · bfloat16 · int8 |",
        "|--|--:|--:|--:|--:|",
    ]
    for name, one in found.items():
        four, two = one.raw("float32"), one.raw("bfloat16")
        shares = [one.raw(dtype) * STORED_SHARE[dtype] for dtype in ("float32", "bfloat16", "int8")]
        thousand = " · ".join(_gb(1000 * size / GB) for size in shares)
        lines.append(f"| {name} | {one.tokens:,} | {one.tensors} × {one.width:,} | {four / 1e6:.1f} · {two / 1e6:.1f}"
                     f" | {thousand} GB |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or the sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", action="store_true")
    if parser.parse_args().sources:
        print("\n".join(f"- {model.name}: {model.source}" for model in MODELS))
        return
    found = {model.name: sizes_of(model) for model in MODELS}
    print(memory_table(found), disk_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
