"""One contender of bench/ask.py in a process of its own: python ask_contender.py JOB.json NAME.

NAME is `transformers` (for `whole` and `stored`), `qvsplit`, or `before` (qvsplit too, of the checkout that PYTHONPATH
names). Writes NAME.json beside the job: seconds, tokens, settings.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Load, warm up, time every image and number of questions."""
    path, name = Path(sys.argv[1]), sys.argv[2]
    job = json.loads(path.read_text())
    torch.set_grad_enabled(False)
    result = (_transformers if name == "transformers" else _qvsplit)(job, name)
    result["settings"] |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": job["dtype"],
                           "device": job["device"]}  # fmt: skip
    path.with_name(f"{name}.json").write_text(json.dumps(result))


def _timed(run: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    seconds, out = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        out = run()
        seconds.append(time.perf_counter() - began)
    return seconds, out


def _qvsplit(job: dict[str, Any], name: str) -> dict[str, Any]:
    """All questions of an image in one call, its features read from the store, no prefix kept between calls."""
    import qvsplit

    store = qvsplit.open_store(job["store"])
    options = qvsplit.AskOptions(
        max_new_tokens=job["new_tokens"], prefix_cache_tokens=0, device=job["device"], dtype=job["dtype"]
    )
    began = time.perf_counter()
    session = qvsplit.load_session(store, options)
    loading = time.perf_counter() - began
    told: dict[str, Any] = {}
    for row in store:
        told[row.path] = {}
        session.answers(row, job["questions"][: job["warm_up"]])
        for number in job["counts"]:
            asked = job["questions"][:number]
            seconds, answers = _timed(functools.partial(session.answers, row, asked), job["repeats"])
            told[row.path][number] = {
                "seconds": seconds, "tokens": [answer.tokens for answer in answers],
                "prompt": [answer.prompt_tokens for answer in answers],
            }  # fmt: skip
            print(f"{name} {row.path} {number}: {', '.join(f'{each:.2f}' for each in seconds)} s", flush=True)
    settings = {"code": str(Path(qvsplit.__file__).parent), "prefix_cache_tokens": 0}
    return {"settings": settings, "loading": loading, "images": told} | (
        {"encoding": _encoding(job)} if name == "qvsplit" else {}
    )


def _encoding(job: dict[str, Any]) -> dict[str, float]:
    """Seconds from each file to its features, the encoder loaded and warm: what extraction costs, once an image."""
    import qvsplit

    told = {}
    with qvsplit.load_encoder(
        job["model"], max_pixels=job["max_pixels"], device=job["device"], dtype=job["dtype"]
    ) as encoder:
        for path in job["images"]:
            photo = Path(job["photos"]) / path
            encoder.encode([photo])
            seconds, _ = _timed(functools.partial(encoder.encode, [photo]), job["repeats"])
            told[path] = statistics.median(seconds)
    return told


def _transformers(job: dict[str, Any], name: str) -> dict[str, Any]:
    """The full model, a question at a time: on pixels, and on stored features; the second gets no pixels."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    import qvsplit

    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(job["model"])
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": job["max_pixels"]}
    began = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    model = model.to(job["device"]).eval()
    loading = time.perf_counter() - began
    store = qvsplit.open_store(job["store"])
    told: dict[str, Any] = {}
    for row in store:
        image = _Image(job, processor, model, row, store.features(row).torch()["pooler_output"])
        told[row.path] = {}
        for way in job["ways"]:
            run = image.whole if way == "whole" else image.stored
            run(job["questions"][0])
            each = [_timed(functools.partial(run, text), 1) for text in job["questions"][: job["alone"]]]
            seconds = [one for timed, _ in each for one in timed]
            told[row.path][way] = {
                "seconds": seconds, "tokens": [tokens for _, tokens in each],
                "prompt": [image.prompt_tokens(text) for text in job["questions"][: job["alone"]]],
            }  # fmt: skip
            print(f"{way} {row.path}: {', '.join(f'{one:.2f}' for one in seconds)} s each", flush=True)
    return {"settings": {"alone": job["alone"]}, "loading": loading, "images": told}


class _Image:
    """One image and the full model."""

    def __init__(self, job: dict[str, Any], processor: Any, model: Any, row: Any, embeds: torch.Tensor) -> None:
        from qvsplit.sources.images import open_file

        self._job, self._processor, self._model = job, processor, model
        self._image = open_file(Path(row.root) / row.path)
        self._embeds = embeds.to(job["device"])

    def whole(self, question: str) -> list[int]:
        """Answer from the pixels."""
        return self._answer(self._inputs(question))

    def stored(self, question: str) -> list[int]:
        """Answer from the stored features."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        given = {name: value for name, value in self._inputs(question).items() if name != "pixel_values"}
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=[self._embeds])}
        return self._answer(given, mm_encoder_outputs=outputs)

    def prompt_tokens(self, question: str) -> int:
        """Count the tokens of a prompt."""
        count: int = self._inputs(question)["input_ids"].shape[1]
        return count

    def _inputs(self, question: str) -> Any:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self._processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return self._processor(text=[text], images=[self._image], return_tensors="pt").to(self._job["device"])

    def _answer(self, given: Any, **more: Any) -> list[int]:
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = self._model.generate(**given, **more, max_new_tokens=self._job["new_tokens"], **greedy)
        tokens: list[int] = out[0, given["input_ids"].shape[1] :].tolist()
        return tokens


if __name__ == "__main__":
    main()
