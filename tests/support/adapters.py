"""PEFT adapters for tiny checkpoints, and the full model with one merged into it by PEFT alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def full_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def make_adapter(
    checkpoint: Path, out: Path, kind: str = "LoraConfig", *, strength: float = 0.1, **config: Any
) -> Path:
    """Write an adapter of PEFT's own making into the new folder `out`; none of its tensors leaves the model as it is."""
    import peft

    config = ({"r": 4, "lora_alpha": 8} if kind == "LoraConfig" else {}) | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(full_model(checkpoint), getattr(peft, kind)(**config))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * strength)
        model.save_pretrained(out)
    return out


def merged_model(checkpoint: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The truth: transformers' full model, and PEFT's own loading and merging."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(full_model(checkpoint, dtype), adapter).merge_and_unload().eval()


def change_config(adapter: Path, **fields: Any) -> None:
    """Change fields of an adapter's config."""
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write an adapter's tensors anew, as `change` gives them."""
    tensors = load_file(adapter / WEIGHTS)
    save_file(change(tensors), adapter / WEIGHTS, metadata={"format": "pt"})
