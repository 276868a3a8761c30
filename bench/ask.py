"""Many questions of one image: what does each further one cost? Side by side, on one machine, in one run.

    python -m bench.ask CHECKPOINT [--vllm PYTHON] [--contenders whole,stored,vllm,qvsplit] [--before FOLDER]
        [--questions 1,5,20,100] [--tokens 256,1250,2700] [--new-tokens 16] [--repeats 3] [--alone 3]
        [--dtype float32] [--device cpu] [--plot FILE.svg]

CHECKPOINT: `python -m tests.support.checkpoints DIR --shape 113m --layout hub`, or `--shape 2b`; with recurrent layers
`python -m tests.support.families.larger DIR`. All answer greedily, in one dtype, from the image to the last answer,
models loaded and warmed up before. One contender after the other, each in a process of its own, so that no two models
are in memory together:

    whole       transformers' full model on the pixels, a question at a time: encoder, prefill, decode
    stored      the same on stored features: a prefill a question
    vllm        vLLM on stored features, all questions as one batch, prefix caching on, an empty cache before each run
    vllm_fine   the same with prefixes of recurrent layers matched every 32 tokens
    vllm_plain  the same without prefix caching: every question's whole prompt
    before      qvsplit as it is in FOLDER, a checkout of another commit
    qvsplit     stored features read from the store, one prefill, all questions behind it; nothing kept between runs

`whole` and `stored` take the same time for every question, so `--alone` are timed and the mean is multiplied. Of the
others the median of `--repeats` runs counts; before the first, each has answered five questions about the same image.
PYTHON is that of an environment with vllm, where bench/vllm_peer.py runs. What vLLM was fed and how it was set is
printed and in the JSON. Answers are compared token by token. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.plot import COLOURS, lines

GRIDS = {256: (16, 16), 1250: (25, 50), 2700: (50, 54)}  # tokens: rows and columns of them
WARM_UP = 5  # questions before the first timed run, everybody's
VLLM_BLOCK = 32  # tokens: the finest that its CPU backend prefers; its own default is 128
ENGINES: dict[str, dict[str, Any]] = {  # vLLM's own names of its settings, beside those in bench/vllm_peer.py
    "vllm": {},
    "vllm_fine": {"mamba_cache_mode": "align", "prefix_match_unit": 32},
    "vllm_plain": {"enable_prefix_caching": False},
}
ONE_BY_ONE = ("whole", "stored")
CONTENDERS = (*ONE_BY_ONE, *ENGINES, "before", "qvsplit")
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
    told = _told()
    with tempfile.TemporaryDirectory() as folder:
        job = _job(told, Path(folder))
        results = {name: _run(told, name, Path(folder)) for name in _processes(told)}
    cases = [_case(told, job, image, results) for image in job["images"]]
    for name, result in results.items():
        print(f"{name}: loaded in {result['loading']:.1f} s; {json.dumps(result['settings'])}")
    _tell(cases, job["counts"])
    if told.plot:
        told.plot.write_text(_plot(cases))
    print(json.dumps({
        "bench": "ask", "machine": machine(), "device": told.device, "dtype": told.dtype,
        "model": told.checkpoint.name, "new_tokens": told.new_tokens, "repeats": told.repeats, "fed": job["fed"],
        "contenders": {name: {"settings": one["settings"], "loading": one["loading"]} for name, one in results.items()},
        "results": cases,
    }))  # fmt: skip


def _told() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vllm")
    parser.add_argument("--contenders", help="of " + ", ".join(CONTENDERS))
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--questions", default="1,5,20,100")
    parser.add_argument("--tokens", default="256,1250,2700", help="of " + ", ".join(map(str, GRIDS)))
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", type=int, default=3, help="questions that whole and stored answer")
    parser.add_argument("--vllm-settings", type=json.loads, default={}, help="JSON: more of its engine's arguments")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", type=Path)
    told = parser.parse_args()
    here = dict.fromkeys(ENGINES, told.vllm) | {"before": told.before}
    can = [name for name in CONTENDERS if here.get(name, True)]
    usual = [name for name in can if name not in ("vllm_fine", "vllm_plain")]
    told.contenders = told.contenders.split(",") if told.contenders else usual
    if absent := [name for name in told.contenders if name not in can]:
        parser.error(f"no contender {', '.join(absent)} here; vLLM's need --vllm, `before` needs --before")
    return told


def _job(told: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Extract one photograph, cut to each size, and write down what every contender is to do."""
    from safetensors.torch import save_file

    import qvsplit

    store = qvsplit.open_store(_store(told, folder))
    counts = [int(number) for number in told.questions.split(",")]
    features = {row.path: store.features(row).torch() for row in store}
    if told.vllm and any(len(tensors) > 1 for tensors in features.values()):
        raise SystemExit("features of several levels: vLLM wants those joined, which nobody has tried here")
    embeds = {path: tensors["pooler_output"] for path, tensors in features.items()}
    save_file(embeds, folder / "embeds.safetensors")
    shapes = ", ".join(f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in embeds.values())
    job = {
        "model": str(told.checkpoint), "dtype": told.dtype, "device": told.device, "store": str(folder / "store"),
        "photos": str(folder / "photos"),
        "embeds": str(folder / "embeds.safetensors"), "images": {row.path: row.grid_thw for row in store},
        "tokens": {row.path: row.n_tokens for row in store}, "counts": counts, "questions": questions(max(counts)),
        "new_tokens": told.new_tokens, "warm_up": WARM_UP, "repeats": told.repeats, "alone": told.alone,
        "ways": [name for name in ONE_BY_ONE if name in told.contenders], "max_pixels": _max_pixels(told.checkpoint),
        "engines": {name: {"block_size": VLLM_BLOCK} | more | told.vllm_settings for name, more in ENGINES.items()},
        "fed": f"the store's features as image_embeds, {shapes}, with image_grid_thw; the prompt's text with one pad",
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    return job


def _side(checkpoint: Path) -> int:
    """Pixels of a token's side."""
    from transformers import AutoProcessor

    images = AutoProcessor.from_pretrained(checkpoint).image_processor
    side: int = images.patch_size * images.merge_size
    return side


def _max_pixels(checkpoint: Path) -> int:
    return 4000 * _side(checkpoint) ** 2


def _store(told: argparse.Namespace, folder: Path) -> Path:
    import skimage

    import qvsplit
    from qvsplit.sources.images import open_file

    photo = open_file(Path(skimage.__file__).parent / "data" / "retina.jpg")
    (folder / "photos").mkdir()
    side = _side(told.checkpoint)
    for size in map(int, told.tokens.split(",")):
        rows, columns = GRIDS[size]
        photo.resize((columns * side, rows * side)).save(folder / "photos" / f"{size:05}.png")
    options = qvsplit.ExtractOptions(
        model=str(told.checkpoint), max_pixels=_max_pixels(told.checkpoint), device=told.device, dtype=told.dtype
    )
    qvsplit.extract_files([folder / "photos"], out=folder / "store", options=options)
    return folder / "store"


def _processes(told: argparse.Namespace) -> list[str]:
    """Name the processes that the contenders need, in the order in which they run."""
    mine = [name for name in told.contenders if name not in ONE_BY_ONE]
    return [*(["transformers"] if len(mine) < len(told.contenders) else []), *mine]


def _run(told: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Run one contender's process."""
    here = Path(__file__).parent
    code = told.before.resolve() if name == "before" else here.parent
    if name in ENGINES:
        # its environment's programs come first: it calls them by name
        command = [str(told.vllm), str(here / "vllm_peer.py")]
        environment = os.environ | {"PATH": f"{told.vllm.absolute().parent}{os.pathsep}{os.environ['PATH']}"}
    else:
        command = [sys.executable, str(here / "ask_contender.py")]
        environment = os.environ | {"PYTHONPATH": str(code)}
    subprocess.run([*command, str(folder / "job.json"), name], check=True, stdout=sys.stderr, env=environment)
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


def _case(told: argparse.Namespace, job: dict[str, Any], image: str, results: dict[str, Any]) -> dict[str, Any]:
    """Put together one image: seconds by contender and number of questions, answers compared with qvsplit's."""
    counts = job["counts"]
    of = {name: result["images"][image] for name, result in results.items()}
    seconds: dict[str, dict[int, float]] = {}
    tokens: dict[str, list[list[int]]] = {}
    cached: dict[str, float] = {}
    for name in told.contenders:
        if name in ONE_BY_ONE:
            alone = of["transformers"][name]
            seconds[name] = {number: statistics.mean(alone["seconds"]) * number for number in counts}
            tokens[name] = alone["tokens"]
        else:
            seconds[name] = {number: statistics.median(of[name][str(number)]["seconds"]) for number in counts}
            tokens[name] = of[name][str(max(counts))]["tokens"]
            hits = of[name][str(max(counts))].get("cached")
            if hits is not None:
                cached[name] = statistics.mean(hits)
    mine = tokens.get("qvsplit", [])
    others = {name: theirs for name, theirs in tokens.items() if name != "qvsplit" and mine}
    if {"whole", "stored"} <= set(tokens):
        pairs = list(zip(tokens["whole"], tokens["stored"], strict=True))
        if parted := sum(a != b for a, b in pairs):
            print(f"{parted} of {len(pairs)} answers from the pixels and from the stored features are not the same")
    prompts = [
        of["transformers"][name]["prompt"] if name in ONE_BY_ONE else of[name][str(max(counts))]["prompt"]
        for name in told.contenders
    ]
    if any(a != b for one in prompts for a, b in zip(one, prompts[-1], strict=False)):
        raise SystemExit(f"prompts of different lengths, nothing to compare: {[one[:3] for one in prompts]}")
    return {
        "tokens": job["tokens"][image], "seconds": seconds,
        "encoding": results.get("qvsplit", {}).get("encoding", {}).get(image),
        "other_prompt_tokens": round(statistics.mean(prompts[-1])) - job["tokens"][image],
        "identical": {name: sum(a == b for a, b in zip(mine, theirs, strict=False)) for name, theirs in others.items()},
        "identical_first_tokens": {
            name: sum(a[:1] == b[:1] for a, b in zip(mine, theirs, strict=False)) for name, theirs in others.items()
        },
        "compared": {name: min(len(mine), len(theirs)) for name, theirs in others.items()},
        "of_each_prompt_cached": cached,
        "qvsplit_over": {
            name: {number: seconds["qvsplit"][number] / theirs[number] for number in counts}
            for name, theirs in seconds.items() if name != "qvsplit" and mine
        },
    }  # fmt: skip


def _tell(results: list[dict[str, Any]], counts: list[int]) -> None:
    for result in results:
        seconds = result["seconds"]
        print(f"\n{result['tokens']} tokens of image, {result['other_prompt_tokens']} of system and question")
        print(f"{'questions':>10}" + "".join(f"{name:>12}" for name in seconds) + "    qvsplit's time is")
        for number in counts:
            ratios = ", ".join(f"{each[number]:.2f} x {name}'s" for name, each in result["qvsplit_over"].items())
            print(f"{number:>10}" + "".join(f"{seconds[name][number]:>10.2f} s" for name in seconds) + f"    {ratios}")
        if result["encoding"] is not None:
            print(f"encoding the image, once, before its features are stored: {result['encoding']:.2f} s")
        for low, high in itertools.pairwise(counts):
            more = {name: (told[high] - told[low]) / (high - low) for name, told in seconds.items()}
            print(
                f"one more question, {low} to {high}: " + ", ".join(f"{n} {s * 1000:.0f} ms" for n, s in more.items())
            )
        print(f"identical answers: {result['identical']} of {result['compared']}, "
              f"first tokens: {result['identical_first_tokens']}")  # fmt: skip
        for name, each in result["of_each_prompt_cached"].items():
            print(f"{name}: {each:.0f} tokens of each prompt came from its prefix cache, at {max(counts)} questions")


def _plot(results: list[dict[str, Any]]) -> str:
    """Seconds a question by the number of questions, for the middle size."""
    result = results[len(results) // 2]
    series = {
        name: [(number, seconds / number) for number, seconds in told.items()]
        for name, told in result["seconds"].items()
        if name in COLOURS
    }
    return lines(
        series, title=f"Seconds a question, one image of {result['tokens']:,} tokens", x="questions", y="seconds"
    )


if __name__ == "__main__":
    main()
