"""What one decoding step takes on a device, and what a captured or compiled one would take: parts of bench/gpu.py.

Steps are counted as the difference of two answers, a short and a long one: what comes before the first token drops out.
The captured step is an experiment with transformers' static cache, no part of qvsplit: one step of the language model
at one place, its kernels replayed as a CUDA graph, held against the same step run plainly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = (1, 20)
TOKENS = 256  # of the image
SHORT, COUNTED, LONG = 8, 16, 40  # new tokens; operations are counted over a few steps, as a profile is long to read
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def decode(told: argparse.Namespace) -> dict[str, Any]:
    """Time a step of qvsplit's and of transformers' `generate`; count the operations of each."""
    import torch

    torch.set_grad_enabled(False)
    result: dict[str, Any] = {"dtype": told.dtype, "rows": {}}
    ways = {"qvsplit": _qvsplit(told), "transformers": _transformers(told)}
    for rows in ROWS[:1] if told.small else ROWS:
        result["rows"][rows] = {name: _step(told, way, rows) for name, way in ways.items()}
    return result


def compiled(told: argparse.Namespace) -> dict[str, Any]:
    """Time a step of transformers' `generate` with its static cache, which it compiles by itself on CUDA."""
    import torch

    torch.set_grad_enabled(False)
    way = _transformers(told, cache_implementation="static")
    began = time.perf_counter()
    way(1, SHORT)
    return {"dtype": told.dtype, "first_seconds": time.perf_counter() - began, "rows": {1: {"static": _timed(way, 1)}}}


def captured(told: argparse.Namespace) -> dict[str, Any]:
    """Time a step of the language model whose kernels are replayed as a CUDA graph, and the same step run plainly."""
    import torch

    torch.set_grad_enabled(False)
    model = _model(told)
    result: dict[str, Any] = {"dtype": told.dtype, "rows": {}}
    for rows in ROWS[:1] if told.small else ROWS:
        result["rows"][rows] = _captured(told, model, rows)
    return result


# ----------------------------------------------------------------------------------------------------------- the ways


def _model(told: argparse.Namespace) -> Any:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(told.checkpoint, dtype=getattr(torch, told.dtype))
    return model.to(told.device).eval()


def _transformers(told: argparse.Namespace, **how: Any) -> Callable[[int, int], int]:
    """Give what answers in so many rows, each of so many new tokens: the full model on pixels."""
    import torch
    from transformers import AutoProcessor

    from bench.ask import GRIDS
    from qvsplit.sources.images import open_file
    from tests.support.photographs import photographs

    model, processor = _model(told), AutoProcessor.from_pretrained(told.checkpoint)
    tall, wide = GRIDS[TOKENS]
    image = open_file(photographs()[0]).resize((wide * 28, tall * 28))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def run(rows: int, new: int) -> int:
        inputs = processor(text=[text] * rows, images=[image] * rows, return_tensors="pt").to(told.device)
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **GREEDY, **how)
        return new

    return run


def _qvsplit(told: argparse.Namespace) -> Callable[[int, int], int]:
    """Give what answers in so many rows, each of at most so many new tokens: from stored features, the prefix kept."""
    import qvsplit
    from bench.ask import GRIDS, questions
    from qvsplit.ask import Session
    from qvsplit.sources.images import open_file
    from tests.support.photographs import photographs

    folder = Path(told.folder) / f"decode-{told.dtype}"
    folder.mkdir()
    tall, wide = GRIDS[TOKENS]
    open_file(photographs()[0]).resize((wide * 28, tall * 28)).save(folder / "image.png")
    options = qvsplit.ExtractOptions(model=str(told.checkpoint), device=told.device, dtype=told.dtype)
    qvsplit.extract_files([folder / "image.png"], out=folder / "store", options=options)
    store = qvsplit.open_store(folder / "store")
    asked = {
        new: qvsplit.AskOptions(device=told.device, dtype=told.dtype, max_new_tokens=new)
        for new in (SHORT, COUNTED, LONG)
    }
    engine = qvsplit.load_session(store, asked[LONG]).engine
    sessions = {new: Session(store, engine, options=options) for new, options in asked.items()}
    (row,) = store

    def run(rows: int, new: int) -> int:
        answers = list(sessions[new].answers(row, questions(rows)))
        return max(len(answer.tokens) for answer in answers)

    return run


# ---------------------------------------------------------------------------------------------------------- measuring


def _step(told: argparse.Namespace, run: Callable[[int, int], int], rows: int) -> dict[str, float]:
    return _timed(run, rows) | _counted(told, run, rows)


def _timed(run: Callable[[int, int], int], rows: int) -> dict[str, float]:
    """Give milliseconds a step, and the steps that this is the mean of. Answers are on the host when `run` ends."""
    run(rows, SHORT), run(rows, LONG)
    took: dict[int, list[float]] = {SHORT: [], LONG: []}
    steps = 0
    for _ in range(3):
        lengths = {}
        for new, seconds in took.items():
            began = time.perf_counter()
            lengths[new] = run(rows, new)
            seconds.append(time.perf_counter() - began)
        steps = lengths[LONG] - lengths[SHORT]
    if steps < 1:
        return {"steps": steps}  # the model ended its answers early: there is nothing to divide
    short, long = (statistics.median(seconds) for seconds in took.values())
    return {"ms": (long - short) / steps * 1e3, "steps": steps}


def _counted(told: argparse.Namespace, run: Callable[[int, int], int], rows: int) -> dict[str, float]:
    """Count operations and kernels a step, and milliseconds that the device computes in one."""
    import torch

    cuda = told.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    counts = []
    for new in (SHORT, COUNTED):
        with torch.profiler.profile(activities=activities) as seen:
            steps = run(rows, new)
        events = seen.events()
        kernels = [one for one in events if one.device_type != torch.autograd.DeviceType.CPU]
        ops = sum(one.cpu_parent is None and one.name.startswith("aten::") for one in events)
        counts.append((steps, ops, len(kernels), sum(one.time_range.elapsed_us() for one in kernels) / 1e3))
    (few, *first), (many, *second) = counts
    if many <= few:
        return {}
    ops, kernels, busy = ((b - a) / (many - few) for a, b in zip(first, second, strict=True))
    return {"ops": ops} | ({"kernels": kernels, "device_ms": busy} if cuda else {})


def _captured(told: argparse.Namespace, model: Any, rows: int) -> dict[str, Any]:
    import torch
    from transformers import StaticCache

    text, head, device = model.model.language_model, model.lm_head, torch.device(told.device)
    room = TOKENS + 512
    ids = torch.randint(1000, 2000, (rows, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    cache = StaticCache(config=text.config, max_cache_len=room)
    token, place = torch.full((rows, 1), 1000, device=device), torch.full((3, rows, 1), TOKENS, device=device)
    seen = (torch.arange(room, device=device) <= TOKENS).view(1, 1, 1, room).expand(rows, 1, 1, room)
    mask = {"full_attention": seen, "sliding_attention": seen}

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(TOKENS)

    def step() -> Any:
        out = text(input_ids=token, position_ids=place, attention_mask=mask, past_key_values=cache, use_cache=True)
        return head(out.last_hidden_state)

    with torch.inference_mode():
        text(input_ids=ids, past_key_values=cache, use_cache=True)
        rewind()
        truth = step().float().clone()
        plain = _each(step, rewind, device)
        if device.type != "cuda":
            return {"plain_ms": plain, "lacks": "a CUDA graph needs CUDA"}
        rewind()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores = step()
        rewind()
        graph.replay()
        off = float((scores.float() - truth).norm() / truth.norm())
        return {"plain_ms": plain, "graph_ms": _each(graph.replay, rewind, device), "off": off}


def _each(run: Callable[[], Any], rewind: Callable[[], None], device: Any, number: int = 30) -> float:
    """Give milliseconds a call, of many one behind the other."""
    import torch

    took = []
    for _ in range(4):
        rewind()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(number):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append((time.perf_counter() - began) / number * 1e3)
    return statistics.median(took[1:])


CHILDREN = {"decode": decode, "compiled": compiled, "captured": captured}
