"""Many questions of one image: what does each further one cost? Side by side, on one machine, in one run.

    python -m bench.ask CHECKPOINT [--vllm PYTHON] [--questions 1,5,20,100] [--tokens 256,1250,2700] [--plot FILE.svg]
        [--device cuda] [--dtype bfloat16]

CHECKPOINT: `python -m tests.support.checkpoints DIR --shape 113m --layout hub`. All contenders answer greedily, in
float32 unless told otherwise, 16 new tokens a question, from the image to the last answer, models loaded and warmed
up before:

    whole    transformers' full model on the pixels, a question at a time: encoder, prefill, decode
    stored   stored features, but a prefill a question: transformers' language model, a question at a time
    vllm     vLLM with prefix caching on stored features, all questions as one batch, an empty cache before each run
    qvsplit  stored features read from the store, one prefill, all questions behind it; nothing warm

`whole` and `stored` take the same time for every question, so three are timed and the mean is multiplied. `vllm` and
`qvsplit` are the median of three whole runs. PYTHON is that of an environment with vllm (bench/vllm_peer.py runs in
it, before the others). Answers are compared token by token. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qvsplit
from bench.plot import lines
from qvsplit.sources.images import open_file

NEW_TOKENS = 16
TIMED_ALONE, REPEATS = 3, 3
GRIDS = {256: (16, 16), 1250: (25, 50), 2700: (50, 54)}  # tokens: rows and columns of them
SUBJECTS = ("person", "dog", "car", "tree", "house", "sign", "boat", "flower", "lamp", "table")
FORMS = (
    "Is there a {} in the image?", "How many of these do you see: {}?", "What colour is the {}?",
    "Where is the {}?", "Is the {} on the left or on the right?", "What is next to the {}?", "Is the {} in focus?",
    "Describe the {} in one sentence, please.", "Is the {} larger than half of the image?", "Is a {} in front?",
)  # fmt: skip


def questions(number: int) -> list[str]:
    """That many different questions."""
    return [form.format(subject) for form in FORMS for subject in SUBJECTS][:number]


def main() -> None:
    """Time every contender on every size and number of questions; print ratios and the cost of one more question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vllm")
    parser.add_argument("--questions", default="1,5,20,100")
    parser.add_argument("--tokens", default="256,1250,2700")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    told = parser.parse_args()
    counts, sizes = ([int(n) for n in text.split(",")] for text in (told.questions, told.tokens))
    with tempfile.TemporaryDirectory() as folder:
        store = _store(told, Path(folder), sizes)
        vllm = _vllm(told, store, Path(folder), counts) if told.vllm else {}
        results = [_case(told, store, row, counts, vllm) for row in store]
    _tell(results, counts)
    if told.plot:
        told.plot.write_text(_plot(results))
    print(json.dumps({
        "bench": "ask", "machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "device": told.device, "dtype": told.dtype, "threads": torch.get_num_threads(), "new_tokens": NEW_TOKENS,
        "results": results,
    }))  # fmt: skip


def _store(told: argparse.Namespace, folder: Path, sizes: list[int]) -> qvsplit.Store:
    """One photograph, cut to each size."""
    import skimage

    photo = open_file(Path(skimage.__file__).parent / "data" / "retina.jpg")
    (folder / "photos").mkdir()
    for size in sizes:
        rows, columns = GRIDS[size]
        photo.resize((columns * 28, rows * 28)).save(folder / "photos" / f"{size:05}.png")
    options = qvsplit.ExtractOptions(
        model=str(told.checkpoint), max_pixels=4000 * 28 * 28, device=told.device, dtype=told.dtype
    )
    qvsplit.extract_files([folder / "photos"], out=folder / "store", options=options)
    return qvsplit.open_store(folder / "store")


def _median(run: Callable[[], Any]) -> tuple[float, Any]:
    seconds, out = [], None
    for _ in range(REPEATS):
        began = time.perf_counter()
        out = run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), out


def _case(
    told: argparse.Namespace, store: qvsplit.Store, row: qvsplit.Row, counts: list[int], vllm: dict[str, Any]
) -> dict[str, Any]:
    """One image, all contenders: seconds by the number of questions."""
    whole_seconds, stored_seconds, reference = _one_by_one(told, store, row)
    options = qvsplit.AskOptions(max_new_tokens=NEW_TOKENS, prefix_cache_tokens=0, device=told.device, dtype=told.dtype)
    session = qvsplit.load_session(store, options)
    session.answers(row, questions(5))
    seconds: dict[str, dict[int, float]] = {
        "whole": {n: whole_seconds * n for n in counts}, "stored": {n: stored_seconds * n for n in counts},
        "qvsplit": {}, "vllm": {},
    }  # fmt: skip
    same = {"whole": 0, "vllm": 0}
    for number in counts:
        seconds["qvsplit"][number], answers = _median(functools.partial(session.answers, row, questions(number)))
        mine = [answer.tokens for answer in answers]
        if number == max(counts):
            same["whole"] = sum(a == b for a, b in zip(mine, reference, strict=False))
        if vllm:
            other = vllm[row.path][str(number)]
            seconds["vllm"][number] = other["seconds"]
            if number == max(counts):
                same["vllm"] = sum(a == b for a, b in zip(mine, other["tokens"], strict=True))
    if not vllm:
        del seconds["vllm"]
    suffix = answers[0].prompt_tokens - (row.n_tokens or 0)
    return {"tokens": row.n_tokens, "other_prompt_tokens": suffix, "seconds": seconds, "identical": same,
            "compared": {"whole": min(TIMED_ALONE, max(counts)), "vllm": max(counts) if vllm else 0}}  # fmt: skip


def _one_by_one(
    told: argparse.Namespace, store: qvsplit.Store, row: qvsplit.Row
) -> tuple[float, float, list[list[int]]]:
    """Seconds a question of `whole` and `stored`, and the full model's answers."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    processor = AutoProcessor.from_pretrained(told.checkpoint)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 4000 * 28 * 28}
    model = Qwen2VLForConditionalGeneration.from_pretrained(told.checkpoint, dtype=getattr(torch, told.dtype))
    model = model.to(told.device).eval()
    image = open_file(Path(row.root) / row.path)
    embeds = store.features(row).torch()["pooler_output"].to(told.device)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def inputs(question: str) -> Any:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return processor(text=[text], images=[image], return_tensors="pt").to(told.device)

    def answer(given: Any, **more: Any) -> list[int]:
        with torch.inference_mode():
            out = model.generate(**given, **more, max_new_tokens=NEW_TOKENS, **greedy)
        tokens: list[int] = out[0, given["input_ids"].shape[1] :].tolist()
        return tokens

    answer(inputs("Ready?"))
    whole, stored, answers = [], [], []
    for question in questions(TIMED_ALONE):
        began = time.perf_counter()
        answers.append(answer(inputs(question)))
        whole.append(time.perf_counter() - began)
        given = {name: value for name, value in inputs(question).items() if name != "pixel_values"}
        began = time.perf_counter()
        again = answer(given, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[embeds])})
        stored.append(time.perf_counter() - began)
        if (
            again != answers[-1] and told.dtype == "float32"
        ):  # in fewer bits the order of sums decides between neighbours
            raise SystemExit("stored features and pixels gave different answers: nothing to compare")
    return statistics.mean(whole), statistics.mean(stored), answers


def _vllm(told: argparse.Namespace, store: qvsplit.Store, folder: Path, counts: list[int]) -> dict[str, Any]:
    """Seconds and tokens by image and number of questions, from a process of its own."""
    from safetensors.numpy import save_file

    save_file({row.path: store.features(row)["pooler_output"] for row in store}, folder / "embeds.safetensors")
    job = {
        "model": str(told.checkpoint), "embeds": str(folder / "embeds.safetensors"), "counts": counts,
        "grids": {row.path: row.grid_thw for row in store}, "questions": questions(max(counts)),
        "new_tokens": NEW_TOKENS, "repeats": REPEATS, "out": str(folder / "vllm.json"),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    here = Path(__file__).parent
    subprocess.run([told.vllm, here / "vllm_peer.py", folder / "job.json"], check=True, stdout=sys.stderr)
    answers: dict[str, Any] = json.loads((folder / "vllm.json").read_text())
    return answers


def _tell(results: list[dict[str, Any]], counts: list[int]) -> None:
    for result in results:
        seconds = result["seconds"]
        print(f"\n{result['tokens']} tokens of image, {result['other_prompt_tokens']} of system and question")
        print(f"{'questions':>10}" + "".join(f"{name:>12}" for name in seconds) + "    qvsplit is")
        for number in counts:
            mine = seconds["qvsplit"][number]
            ratios = ", ".join(f"{seconds[name][number] / mine:.1f} x {name}" for name in seconds if name != "qvsplit")
            print(f"{number:>10}" + "".join(f"{seconds[name][number]:>10.2f} s" for name in seconds) + f"    {ratios}")
        for low, high in itertools.pairwise(counts):
            more = {name: (told[high] - told[low]) / (high - low) for name, told in seconds.items()}
            print(
                f"one more question, {low} to {high}: " + ", ".join(f"{n} {s * 1000:.0f} ms" for n, s in more.items())
            )
        print(f"identical answers: {result['identical']} of {result['compared']}")


def _plot(results: list[dict[str, Any]]) -> str:
    """Seconds a question by the number of questions, for the middle size."""
    result = results[len(results) // 2]
    series = {
        name: [(number, seconds / number) for number, seconds in told.items()]
        for name, told in result["seconds"].items()
    }
    return lines(
        series, title=f"Seconds a question, one image of {result['tokens']:,} tokens", x="questions", y="seconds"
    )


if __name__ == "__main__":
    main()
