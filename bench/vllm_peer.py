"""vLLM's side of bench/ask.py, run in an environment that has vllm and not qvsplit: python vllm_peer.py JOB.json NAME.

Precomputed features go in as `image_embeds` and `image_grid_thw`, behind one unexpanded pad; the encoder is not loaded
where vLLM can leave it out. The dtype is said, because left to itself vLLM computes a float32 checkpoint in bfloat16.
Writes NAME.json beside the job: seconds, tokens, how much of each prompt came from the prefix cache, and settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")  # GiB
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # else one core stays idle
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    """Every image, every number of questions, from an empty prefix cache."""
    import torch
    import vllm
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    path, name = Path(sys.argv[1]), sys.argv[2]
    job = json.loads(path.read_text())
    arguments: dict[str, Any] = {
        "model": job["model"], "dtype": job["dtype"], "max_model_len": 4096, "max_num_seqs": 128,
        "enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 1, "video": 0}, "enforce_eager": True,
        "enable_prefix_caching": True, "seed": 0,
    } | job["engines"][name]  # fmt: skip
    began = time.perf_counter()
    llm = vllm.LLM(**arguments)
    loading = time.perf_counter() - began
    processor = AutoProcessor.from_pretrained(job["model"])
    embeds = load_file(job["embeds"])
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["new_tokens"], detokenize=False)

    def requests(image: str, number: int) -> list[Any]:
        features = {"image_embeds": embeds[image], "image_grid_thw": torch.tensor([job["images"][image]])}
        return [
            {"prompt": _text(processor, question), "multi_modal_data": {"image": features}}
            for question in job["questions"][:number]
        ]

    told: dict[str, Any] = {}
    for image in job["images"]:
        told[image] = {}
        _answers(llm, requests(image, job["warm_up"]), sampling)
        for number in job["counts"]:
            seconds, out = [], []
            for _ in range(job["repeats"]):
                assert llm.reset_prefix_cache()
                began = time.perf_counter()
                out = _answers(llm, requests(image, number), sampling)
                seconds.append(time.perf_counter() - began)
            told[image][number] = {
                "seconds": seconds, "tokens": [list(one.outputs[0].token_ids) for one in out],
                "cached": [one.num_cached_tokens for one in out], "prompt": [len(one.prompt_token_ids) for one in out],
            }  # fmt: skip
            print(f"{name} {image} {number}: {', '.join(f'{each:.2f}' for each in seconds)} s", flush=True)
    result = {"settings": _settings(llm, arguments), "loading": loading, "images": told}
    path.with_name(f"{name}.json").write_text(json.dumps(result))


def _text(processor: Any, question: str) -> str:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text: str = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )  # fmt: skip
    return text


def _answers(llm: Any, requests: list[Any], sampling: Any) -> list[Any]:
    out: list[Any] = llm.generate(requests, sampling, use_tqdm=False)
    return out


def _settings(llm: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Give what was asked for, and what vLLM made of it."""
    import torch
    import vllm

    config = llm.llm_engine.vllm_config
    made = {
        f"{part}.{name}": getattr(getattr(config, part), name, None)
        for part, names in {
            "cache_config": ("block_size", "mamba_block_size", "mamba_cache_mode", "prefix_match_unit",
                             "hash_block_size", "cache_hit_alignment_tokens", "enable_prefix_caching"),
            "scheduler_config": ("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill"),
        }.items()
        for name in names
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name.startswith("VLLM_CPU")}
    return {
        "vllm": vllm.__version__, "torch": torch.__version__, "asked": arguments, "made": made,
        "environment": environment,
    }  # fmt: skip


if __name__ == "__main__":  # the engine's processes import this file
    main()
