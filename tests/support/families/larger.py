"""A checkpoint with recurrent layers that is large enough to measure speed with: Qwen3.5's layers, random weights.

    python -m tests.support.families.larger OUT [--hidden 1024] [--layers 8]

The default has the widths of the family's 0.8B (gated delta nets with 16 heads of 128 in three layers of four, full
attention with 8 heads of 256 on 2 key heads in the fourth) and a third of its layers, 165 M parameters. It never ends an
answer by itself, so that every answer has the same length.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from tests.support.checkpoints import CONTROL
from tests.support.families.building import TinyFamily, make_checkpoint
from tests.support.families.qwen import LINEAR, MROPE_3, QWEN, VISION_3, vl


def larger(hidden: int = 1024, layers: int = 8) -> TinyFamily:
    """Qwen3.5's tiny checkpoint with a larger language model."""
    text = LINEAR | {
        "hidden_size": hidden, "intermediate_size": hidden * 7 // 2, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 512), "head_dim": 256,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": hidden // 64,
        "linear_num_value_heads": hidden // 64,
        "rope_parameters": {**MROPE_3, "rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
    }  # fmt: skip
    tiny = next(family for family in QWEN if family.model_type == "qwen3_5")
    ends = tiny.tokenizer(tiny).convert_tokens_to_ids(CONTROL)

    def never_ending(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = tensors["lm_head.weight"].clone()
        output[ends] = 0
        return tensors | {"lm_head.weight": output}

    config = vl("Qwen3_5Config", text, VISION_3 | {"out_hidden_size": hidden})
    return dataclasses.replace(tiny, config=config, other_tensors=dict, to_hub=never_ending)


def main() -> None:
    """Parse, make, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    told = parser.parse_args()
    make_checkpoint(larger(told.hidden, told.layers), told.out)
    print(f"{told.out}: {sum(file.stat().st_size for file in told.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
