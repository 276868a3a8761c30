"""vLLM's side of bench/ask.py, run in an environment that has vllm and not qvsplit: python vllm_peer.py JOB.json.

Precomputed features go in as `image_embeds` and `image_grid_thw`, behind one unexpanded pad. float32, because left
to itself vLLM computes a float32 checkpoint in bfloat16; the encoder is not loaded.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # else one core stays idle
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    """Every image, every number of questions, from an empty prefix cache."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=job["model"], dtype="float32", max_model_len=4096, max_num_seqs=128, block_size=32,
        enable_mm_features=True, limit_mm_per_prompt={"image": 1, "video": 0}, enforce_eager=True,
        enable_prefix_caching=True, seed=0,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(job["model"])
    embeds = load_file(job["embeds"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], detokenize=False)

    def request(name: str, question: str) -> Any:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        image = {"image_features": embeds[name], "image_grid_thw": torch.tensor([job["grids"][name]])}
        return {"prompt": text, "multi_modal_data": {"image": image}}

    told: dict[str, Any] = {}
    for name in embeds:
        llm.generate([request(name, "Ready?")], sampling, use_tqdm=False)
        told[name] = {}
        for number in job["counts"]:
            requests = [request(name, question) for question in job["questions"][:number]]
            seconds = []
            for _ in range(job["repeats"]):
                assert llm.reset_prefix_cache()
                began = time.perf_counter()
                out = llm.generate(requests, sampling, use_tqdm=False)
                seconds.append(time.perf_counter() - began)
            tokens = [list(one.outputs[0].token_ids) for one in out]
            told[name][number] = {"seconds": statistics.median(seconds), "tokens": tokens}
            print(f"vllm {name} {number}: {', '.join(f'{s:.2f}' for s in seconds)} s", flush=True)
    Path(job["out"]).write_text(json.dumps(told))


if __name__ == "__main__":  # the engine's processes import this file
    main()
