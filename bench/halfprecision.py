"""Which answers are not the full model's, in which dtype, and what is it that makes them so?

    python -m bench.halfprecision CHECKPOINT [--dtypes bfloat16,float16] [--photos 3] [--new-tokens 16] [--threads 2]

Photographs × 3 questions, greedy, on a CPU; one image a forward pass, one question at a time. The full model of
transformers on the pixels is compared, in the same dtype, with the language model alone on stored features: as `ask
--kernels reference` has it; so with each difference of the fast mode switched on alone; and as `ask` has it by default.
Compared are the tokens, and to the bit the scores of the first step, of which the largest difference is also given in
units in the last place of the best score (ulp). Of every answer that differs, the gap between the full model's two
best scores at the first other token, in ulp, says how near a tie it was. With --float32 the full model and `ask` are
also held against the full model in float32, with the same weights: which of the two is nearer to what they say? Last
line: one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qvsplit
from bench.machine import machine
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models.asking import PrefixedQuestion, Way
from qvsplit.models.copied_prefix import CopiedPrefix
from qvsplit.models.decoding import Decoding
from qvsplit.models.language import LanguageModel
from qvsplit.models.prompt import Placeholder, Prompter
from qvsplit.models.shared_prefix import SharedPrefix
from qvsplit.models.whole_prompt import WholePrompt
from qvsplit.sources.images import open_file
from qvsplit.weights import load_full_model, load_language_model
from tests.support.photographs import photographs

QUESTIONS = ("What is in the image?", "Is it day or night?", "Describe the image in one sentence.")
WAYS: dict[str, type[WholePrompt] | type[CopiedPrefix] | type[SharedPrefix]] = {
    "whole": WholePrompt, "copied": CopiedPrefix, "shared": SharedPrefix,
}  # fmt: skip
# name → kernels of the features, kernels of the modules, whether weights are frozen, way of answering
VARIANTS: dict[str, tuple[str, str, bool, str]] = {
    "ask --kernels reference": ("reference", "reference", False, "whole"),
    "fused encoder's features alone": ("fused", "reference", False, "whole"),
    "frozen weights alone": ("reference", "reference", True, "whole"),
    "prefix computed apart alone": ("reference", "reference", False, "copied"),
    "prefix apart and attended to as shared": ("reference", "reference", False, "shared"),
    "fused layers alone": ("reference", "fused", True, "whole"),
    "ask, reference features": ("reference", "fused", True, "shared"),
    "ask": ("fused", "fused", True, "shared"),
}


@dataclass
class Found:
    """What a way of answering gave: of each photograph and question the tokens, and scores of its steps."""

    tokens: list[list[int]] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)  # each [steps, vocabulary]


def main() -> None:
    """Ask all, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    checkpoint = open_checkpoint(told.checkpoint, "both")
    results = {}
    for dtype in told.dtypes.split(","):
        float32 = told.float32 and dtype != "float32"
        results[dtype] = _compare(checkpoint, dtype, photographs()[: told.photos], told.new_tokens, float32=float32)
    print(json.dumps({
        "bench": "halfprecision", "checkpoint": checkpoint.name, "commit": _commit(), "threads": told.threads,
        "torch": torch.__version__, **machine(), "dtypes": results,
    }))  # fmt: skip


def _compare(
    checkpoint: Checkpoint, dtype: str, paths: Sequence[Path], new_tokens: int, *, float32: bool
) -> dict[str, Any]:
    prompter = Prompter(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            kernels: _extracted(checkpoint, dtype, kernels, paths, Path(folder) / kernels)
            for kernels in ("reference", "fused")
        }
        truth, features = _full(
            checkpoint, prompter, stores["reference"].config.processor, dtype, paths, new_tokens
        )  # fmt: skip
        told: dict[str, Any] = {"features": {}, "answers": {}}
        for kernels, store in stores.items():
            differences = [
                _of_largest(store.features(store[path.name]).flat_torch()["pooler_output"], theirs)
                for path, theirs in zip(paths, features, strict=True)
            ]
            told["features"][kernels] = {
                "same_bits": sum(one == 0 for one in differences), "of": len(paths),
                "largest_difference_over_largest_value": max(differences),
            }  # fmt: skip
            print(f"{dtype:9} features {kernels:9} {told['features'][kernels]}", flush=True)
        for modules in ("reference", "fused"):
            model = load_language_model(checkpoint, dtype=getattr(torch, dtype), kernels=modules)
            attention = model.config.get_text_config()._attn_implementation
            for name, (of_features, kernels, frozen, way) in VARIANTS.items():
                if kernels == modules:
                    model.set_attn_implementation({"text_config": attention})
                    model.requires_grad_(not frozen)
                    language = _language(model, prompter, checkpoint, way)
                    last = _answers(language, stores[of_features], paths, new_tokens)
                    told["answers"][name] = _differences(last, truth, dtype)
                    print(f"{dtype:9} {name:40} {_line(told['answers'][name])}", flush=True)
            del model, language
            gc.collect()
        if float32:
            limits = stores["reference"].config.processor
            wide, _ = _full(checkpoint, prompter, limits, "float32", paths, new_tokens)
            for name, found in (("the full model", truth), ("ask", last)):
                told["answers"][f"{name}, against float32"] = _differences(found, wide, dtype)
                print(f"{dtype:9} {name + ', against float32':40} {_line(told['answers'][name + ', against float32'])}")
    return told


def _extracted(checkpoint: Checkpoint, dtype: str, kernels: str, paths: Sequence[Path], out: Path) -> Any:
    options = qvsplit.ExtractOptions(
        model=checkpoint.name, device="cpu", dtype=dtype, kernels=kernels, patch_budget=1, workers=1
    )  # fmt: skip
    summary = qvsplit.extract_files(list(paths), out=out, options=options)
    if summary.encoded != len(paths):
        raise SystemExit(f"{summary.failed} photographs failed")
    return qvsplit.open_store(out)


def _full(
    checkpoint: Checkpoint,
    prompter: Prompter,
    limits: Mapping[str, Any],
    dtype: str,
    paths: Sequence[Path],
    new_tokens: int,
) -> tuple[Found, list[torch.Tensor]]:
    """Give the full model's answers on the pixels, and its features."""
    model = load_full_model(checkpoint, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    processor, found, features = prompter.processor, Found(), []
    processor.image_processor.size = {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}
    for path in paths:
        image = open_file(path)
        for number, question in enumerate(QUESTIONS):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            with torch.inference_mode():
                if number == 0:
                    given = inputs["pixel_values"], inputs["image_grid_thw"]
                    features.append(torch.cat(list(model.get_image_features(*given, return_dict=True).pooler_output)))
                out = model.generate(
                    **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            found.tokens.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
            found.scores.append(torch.cat(out.logits))
    return found, features


def _language(model: Any, prompter: Prompter, checkpoint: Checkpoint, way: str) -> LanguageModel:
    """Give the language model with another way of answering than it would choose."""
    language = LanguageModel(model, prompter, checkpoint.family.prefix, "reference")
    forward = language._forward
    stops = lambda: sorted(language.stops)  # noqa: E731
    if way == "whole":
        return language
    chosen: Way = WAYS[way](forward, stops, can_extend=False)  # type: ignore[call-arg]
    language._way = chosen
    return language


def _answers(language: LanguageModel, store: Any, paths: Sequence[Path], new_tokens: int) -> Found:
    found = Found()
    for path in paths:
        row = store[path.name]
        for question in QUESTIONS:
            prompt = language.prompter.ask(question, [Placeholder.from_row(row)])
            prefix = language.prefill(prompt, [store.features(row)])
            with _scores(language.model) as seen:
                (answer,) = language.generate(
                    [PrefixedQuestion.of(prompt, prefix)], Decoding(max_new_tokens=new_tokens)
                )  # fmt: skip
            found.tokens.append(list(answer.tokens))
            found.scores.append(torch.stack(seen))
    return found


@contextmanager
def _scores(model: Any) -> Iterator[list[torch.Tensor]]:
    """Hear the scores of each next token, [vocabulary], in float32."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(out.reshape(-1, out.shape[-1])[-1].float())
    )
    try:
        yield seen
    finally:
        hook.remove()


def _differences(found: Found, truth: Found, dtype: str) -> dict[str, Any]:
    """Count what is the full model's, and say of the rest how near a tie it was."""
    firsts, steps, apart, gaps = 0, 0, [], []
    for mine, expected, scores, theirs in zip(found.tokens, truth.tokens, found.scores, truth.scores, strict=True):
        firsts += torch.equal(scores[0], theirs[0])
        apart.append(float((scores[0] - theirs[0]).abs().max()) / _unit(theirs[0], dtype))
        if mine == expected:
            steps += torch.equal(scores, theirs)
            continue
        place = next(n for n, (a, b) in enumerate(zip([*mine, -1], [*expected, -1], strict=False)) if a != b)
        best = theirs[place].topk(2).values
        gaps.append(round(float(best[0] - best[1]) / _unit(theirs[place], dtype), 2))
    return {
        "same_tokens": len(truth.tokens) - len(gaps), "of": len(truth.tokens), "first_step_same_bits": firsts,
        "every_step_same_bits": steps, "first_step_largest_difference_ulp": round(max(apart), 2), "gaps_ulp": gaps,
    }  # fmt: skip


def _unit(scores: torch.Tensor, dtype: str) -> float:
    """Give the unit in the last place of the best of some scores."""
    return float(torch.finfo(getattr(torch, dtype)).eps) * 2.0 ** math.floor(math.log2(float(scores.max().abs())))


def _of_largest(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def _line(one: dict[str, Any]) -> str:
    return (
        f"{one['same_tokens']} of {one['of']} answers; first step {one['first_step_same_bits']} to the bit, else up to "
        f"{one['first_step_largest_difference_ulp']} ulp off; gaps where answers part {one['gaps_ulp']} ulp"
    )


def _commit() -> str:
    """Name the commit, with a + where files are changed."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return said.stdout.strip()


if __name__ == "__main__":
    main()
