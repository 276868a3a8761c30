"""Make quantised checkpoints on disk from a plain one, in the forms that the hub has. Each is loaded by its real library.

Only the linear layers of the language model are quantised, as published checkpoints of vision-language models do, unless
`also` names more. Where a form is plain tensors it is written here; the numbers are rounded to the nearest, without
calibration, which is no matter for a loader.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP8_MAX = 448.0


def is_quantised(name: str, tensor: torch.Tensor, also: tuple[str, ...] = ()) -> bool:
    """Say whether a tensor is the weight of a linear layer of the language model, or of a module in `also`."""
    language = ".layers." in name and name.endswith("_proj.weight") and "visual" not in name
    return language or (tensor.ndim == 2 and name.startswith(also or "-"))


def quantise(
    plain: Path, out: Path, form: Callable[[str, torch.Tensor], Tensors], settings: dict[str, Any], *,
    also: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Copy `plain` into the new folder `out`, each quantised tensor replaced by what `form` makes of it."""
    shutil.copytree(plain, out)
    index: dict[str, str] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors: Tensors = {}
        for name, tensor in load_file(file).items():
            tensors |= form(name, tensor) if is_quantised(name, tensor, also) else {name: tensor}
        save_file(tensors, file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
    if (out / "model.safetensors.index.json").is_file():
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    set_config(out, quantization_config=settings)
    return out


def set_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def fp8(
    plain: Path, out: Path, *, block: int = 128, skipped: tuple[str, ...] = ("model.visual",),
    also: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Block-wise FP8, as Qwen's own checkpoints are: `weight` and `weight_scale_inv`."""

    def form(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        high, wide = math.ceil(rows / block), math.ceil(columns / block)
        padded = torch.zeros(high * block, wide * block)
        padded[:rows, :columns] = weight.float()
        blocks = padded.view(high, block, wide, block)
        scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
        small = (blocks / scale[:, None, :, None]).view(high * block, -1)[:rows, :columns]
        return {name: small.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    settings = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head", *skipped],
    }  # fmt: skip
    return quantise(plain, out, form, settings, also=also)


def gptq(plain: Path, out: Path, *, group: int = 32, also: tuple[str, ...] = ()) -> Path:
    """4-bit GPTQ without reordering: `qweight`, `qzeros`, `scales`, `g_idx`, eight values an int32."""

    def form(name: str, weight: torch.Tensor) -> Tensors:
        levels, scale = _symmetric(weight, group)
        module = name.removesuffix(".weight")
        zeros = torch.full((scale.shape[1], weight.shape[0]), 7)  # stored less one
        return {
            f"{module}.qweight": _packed(levels.T.contiguous() + 8, along=0),
            f"{module}.qzeros": _packed(zeros, along=1),
            f"{module}.scales": scale.T.contiguous().half(),
            f"{module}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }

    settings = {
        "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True, "static_groups": False,
        "damp_percent": 0.1, "true_sequential": True, "checkpoint_format": "gptq",
        "modules_in_block_to_quantize": [
            ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.o_proj"],
            ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"],
        ],
    }  # fmt: skip
    return quantise(plain, out, form, settings, also=also)


def awq(plain: Path, out: Path, *, group: int = 32, also: tuple[str, ...] = ()) -> Path:
    """4-bit AWQ (gemm): `qweight`, `qzeros`, `scales`, eight values an int32 in its own order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def form(name: str, weight: torch.Tensor) -> Tensors:
        levels, scale = _symmetric(weight, group)
        module = name.removesuffix(".weight")
        zeros = torch.full((scale.shape[1], weight.shape[0]), 8)
        return {
            f"{module}.qweight": _packed(levels.T.contiguous() + 8, along=1, order=order),
            f"{module}.qzeros": _packed(zeros, along=1, order=order),
            f"{module}.scales": scale.T.contiguous().half(),
        }

    settings = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }  # fmt: skip
    return quantise(plain, out, form, settings, also=also)


def compressed(plain: Path, out: Path, scheme: str, *, also: tuple[str, ...] = ()) -> Path:
    """compressed-tensors: `FP8` (a scale a row, activations in FP8 as they come) or `W4A16` (packed, groups of 32)."""
    four = scheme == "W4A16"

    def form(name: str, weight: torch.Tensor) -> Tensors:
        module = name.removesuffix(".weight")
        if not four:
            scale = weight.float().abs().amax(1, keepdim=True) / FP8_MAX
            return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.to(weight.dtype)}
        levels, scale = _symmetric(weight, 32)
        return {
            f"{module}.weight_packed": _packed(levels + 8, along=1),
            f"{module}.weight_scale": scale.to(weight.dtype),
            f"{module}.weight_shape": torch.tensor(weight.shape),
        }

    weights: dict[str, Any] = {"dynamic": False, "symmetric": True}
    activations = None
    if four:
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    else:
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized" if four else "float-quantized",
        "quantization_status": "compressed", "ignore": ["re:.*visual.*", "lm_head"] if not also else ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        },
    }  # fmt: skip
    return quantise(plain, out, form, settings, also=also)


def by_transformers(plain: Path, out: Path, settings: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Have transformers quantise the full model while it loads, and save it, as the makers of such checkpoints do."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(plain, out)
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    model = AutoModelForImageTextToText.from_pretrained(plain, dtype=dtype, quantization_config=settings)
    model.save_pretrained(out)
    return out


def bitsandbytes(plain: Path, out: Path, *, bits: int, skipped: tuple[str, ...] = ("lm_head", "model.visual")) -> Path:
    """Write bitsandbytes' NF4 or LLM.int8()."""
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
    settings = BitsAndBytesConfig(
        **(four if bits == 4 else {"load_in_8bit": True}), llm_int8_skip_modules=list(skipped)
    )
    return by_transformers(plain, out, settings)


def _symmetric(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to -7 … 7 with one scale a group of columns. Gives int64 [rows, columns] and float32 [rows, groups]."""
    groups = weight.float().view(weight.shape[0], -1, group)
    scale = groups.abs().amax(2) / 7
    levels = (groups / scale[:, :, None]).round().clamp(-7, 7).long()
    return levels.view(weight.shape), scale


def _packed(values: torch.Tensor, *, along: int, order: list[int] | None = None) -> torch.Tensor:
    """Pack eight values of 0 … 15 into an int32, along rows (0) or columns (1)."""
    if along == 0:
        return _packed(values.T.contiguous(), along=1, order=order).T.contiguous()
    eights = values.view(values.shape[0], -1, 8)[:, :, order or list(range(8))]
    packed = (eights << (4 * torch.arange(8))).sum(2)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
