"""Are the halves' answers the full model's, on this device, in this dtype? And what does each take of memory?

    python -m bench.exact CHECKPOINT [--device cuda] [--dtype bfloat16] [--photos 12] [--new-tokens 16]

Every photograph × 5 questions, greedy: first from a store (`extract`, then `ask`), then from the full model of
transformers on the pixels, one image at a time. In bfloat16 two logits may be equal to the bit, and the order of
additions then decides; every answer that differs is shown, with the gap between the full model's two best logits
where the two part, and counted as a tie only where that gap is zero. Photographs are encoded one a batch, as the
reference is. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import qvsplit
from qvsplit.sources.images import open_file
from tests.support.photographs import photographs

QUESTIONS = (
    "What is in the image?",
    "Is it day or night?",
    "How many people are there?",
    "Describe the image in one sentence.",
    "What colour is most of it?",
)


def main() -> None:
    """Ask both, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=16)
    told = parser.parse_args()
    paths = photographs()[: told.photos]
    memory: dict[str, int] = {}
    split = _split_answers(told, paths, memory)
    differing, ties = _compare(told, paths, split, memory)
    total = len(split)
    print(f"{total - len(differing)} of {total} answers identical; {len(differing)} differ, {ties} of them exact ties")
    for stage, peak in memory.items():
        print(f"peak GPU memory of {stage:8} {peak / 1e9:.2f} GB")
    name = torch.cuda.get_device_name() if told.device.startswith("cuda") else platform.machine()
    print(json.dumps({"bench": "exact", "device": name, "cores": os.cpu_count(), "dtype": told.dtype, "answers": total,
                      "identical": total - len(differing), "ties": ties, "differing": differing,
                      "peak_gpu_bytes": memory, "torch": torch.__version__}))  # fmt: skip


def _split_answers(
    told: argparse.Namespace, paths: list[Path], memory: dict[str, int]
) -> dict[tuple[str, str], list[int]]:
    options = qvsplit.ExtractOptions(
        model=str(told.checkpoint), device=told.device, dtype=told.dtype, patch_budget=1
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        summary = qvsplit.extract_files(list(paths), out=out, options=options)
        if summary.encoded != len(paths):
            raise SystemExit(f"{summary.failed} photographs failed")
        _note_peak("extract", told, memory)
        asked = qvsplit.AskOptions(device=told.device, dtype=told.dtype, max_new_tokens=told.new_tokens)
        session = qvsplit.load_session(qvsplit.open_store(out), asked)
        answers = {
            (row.path, question): session.answer(row, question).tokens
            for row in session.store
            for question in QUESTIONS
        }
        _note_peak("ask", told, memory)
    return answers


def _compare(
    told: argparse.Namespace, paths: list[Path], split: dict[tuple[str, str], list[int]], memory: dict[str, int]
) -> tuple[list[dict[str, Any]], int]:
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(told.checkpoint)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 1280 * 28 * 28}
    model = Qwen2VLForConditionalGeneration.from_pretrained(told.checkpoint, dtype=getattr(torch, told.dtype))
    model = model.to(told.device).eval()
    differing, ties = [], 0
    for path in paths:
        image = open_file(path)
        for question in QUESTIONS:
            expected, gaps = _reference(model, processor, image, question, told)
            got = split[path.name, question]
            if got != expected:
                place = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0)
                ties += gaps[place] == 0
                differing.append({"photo": path.name, "question": question, "place": place, "gap": gaps[place]})
                print(f"DIFFERENT {path.name} {question!r} at token {place}, gap {gaps[place]:.3g}", flush=True)
    _note_peak("whole", told, memory)
    return differing, ties


def _reference(
    model: Any, processor: Any, image: Any, question: str, told: argparse.Namespace
) -> tuple[list[int], list[float]]:
    """The full model's tokens, and at each the gap between its two best logits."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt").to(told.device)
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=told.new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    best = [logits[0].float().topk(2).values for logits in out.logits]
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), [float(a - b) for a, b in best]


def _note_peak(stage: str, told: argparse.Namespace, memory: dict[str, int]) -> None:
    if told.device.startswith("cuda"):
        memory[stage] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
