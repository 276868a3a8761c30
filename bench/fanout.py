"""Many questions behind one image of a recurrent model (Qwen3.5): together, or one at a time. In one run.

    python -m bench.fanout [--questions 20] [--tokens 16] [--rounds 3] [--hidden 1024] [--layers 8]

The model has random weights and the family's real processor: gated delta nets in three layers of four, full attention
in the fourth. All contenders answer greedily in float32 from the features of one photograph of about 1,000 tokens,
model loaded before, medians of the rounds:

    together   qvsplit: the image's keys, values and states computed once, all questions behind them as one batch
    alone      qvsplit: the same, a question at a time, the image's prefix kept
    whole      transformers' `generate` on the same features, a question at a time: what engines do that cannot share
               a prefix with recurrent layers

Answers are compared token by token. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import qvsplit
from bench.ask import questions
from qvsplit.answering.local_engine import LocalEngine
from qvsplit.ask import FeatureSession
from qvsplit.models.forward import encoder_outputs
from qvsplit.models.prompt import Placeholder
from tests.support.families import make_checkpoint
from tests.support.families.larger import larger
from tests.support.photographs import photographs

IMAGE_SIDE = 1024  # pixels: about 1,000 tokens of 32 × 32 pixels


def main() -> None:
    """Time the three, compare their answers, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("questions", 20), ("tokens", 16), ("rounds", 3), ("hidden", 1024), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        make_checkpoint(larger(told.hidden, told.layers), checkpoint)
        with qvsplit.load_encoder(checkpoint, max_pixels=IMAGE_SIDE**2) as encoder:
            (features,) = encoder.encode([_photograph()])
        options = qvsplit.AskOptions(max_new_tokens=told.tokens)
        session = qvsplit.load_language_model(checkpoint, options=options)
        asked = questions(told.questions)
        runs: dict[str, Callable[[], list[list[int]]]] = {
            "together": lambda: [answer.tokens for answer in _cold(session).answers(features, asked)],
            "alone": lambda: [_cold(session, at).answer(features, text).tokens for at, text in enumerate(asked)],
            "whole": lambda: [_whole(session, features, text, told.tokens) for text in asked],
        }
        seconds, answers = _timed(runs, told.rounds)
        parameters = (checkpoint / "model.safetensors").stat().st_size // 4
    result: dict[str, Any] = {
        "bench": "fanout", "machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "parameters": parameters, "image_tokens": features.n_tokens, "questions": told.questions,
        "new_tokens": told.tokens,
        "seconds": {name: round(statistics.median(each), 3) for name, each in seconds.items()},
        "same_answers": {
            name: sum(mine == theirs for mine, theirs in zip(answers[name], answers["whole"], strict=True))
            for name in runs
        },
    }  # fmt: skip
    together = result["seconds"]["together"]
    result["of_together"] = {name: round(value / together, 2) for name, value in result["seconds"].items()}
    print(f"{parameters / 1e6:.0f} M parameters, {features.n_tokens} image tokens, {told.questions} questions")
    for name, value in result["seconds"].items():
        same = result["same_answers"][name]
        print(f"{name:9} {value:8.2f} s   {result['of_together'][name]:6.2f} x together   {same} answers as whole")
    print(json.dumps(result))


def _photograph() -> Image.Image:
    path = next(path for path in photographs() if path.name == "coffee.png")
    return Image.open(path).convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE))


def _cold(session: FeatureSession, question: int = 0) -> FeatureSession:
    """Forget the image's prefix before the first question."""
    if question == 0:
        _engine(session).prefix_cache.clear()
    return session


def _engine(session: FeatureSession) -> LocalEngine:
    assert isinstance(session.engine, LocalEngine)
    return session.engine


def _whole(session: FeatureSession, features: qvsplit.Features, question: str, tokens: int) -> list[int]:
    """Answer by transformers' own generate, from the same features."""
    language = _engine(session).language
    one = Placeholder(features.placeholder, features.n_tokens, features.grid_thw)
    prompt = language.prompter.ask(question, [one])
    ids = torch.tensor([prompt.input_ids])
    with torch.inference_mode():
        out = language.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), image_grid_thw=torch.tensor([features.grid_thw]),
            mm_token_type_ids=torch.tensor([prompt.token_types["mm_token_type_ids"]]),
            mm_encoder_outputs=encoder_outputs([one], [features]),
            max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    return [int(token) for token in out[0, ids.shape[1] :]]


def _timed(
    runs: dict[str, Callable[[], list[list[int]]]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Sequence[list[int]]]]:
    """Run every contender once to warm up, and then in turn."""
    answers: dict[str, Sequence[list[int]]] = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, answers


if __name__ == "__main__":
    main()
