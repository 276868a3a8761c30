"""Everything that waits for a GPU, in one run: what holds there, how fast it is, and how much memory it takes.

    bash bench/gpu.sh [--seconds 450] [--parts rates,exact,…] [--out FOLDER]
    python -m bench.gpu --device cpu --small     # the same with tiny shapes, to see that it runs

Each part is a process of its own, forked from one that has imported everything and touched no device. What it lacks,
or why it failed, is said in its line, and the others go on:

    rates      the card's own matrix-product rates by dtype, copies to and from it, and what is installed
    make       the checkpoints (demo, tiny, the true 2B shape with random weights), photographs of 0.3 to 12 megapixels
    tests      those tests that need a CUDA device
    exact      halves against the full model of transformers, by checkpoint and dtype: pixels and features of
               the encoder bit for bit, answers token for token (alone, as a batch, and with the kernels `reference`
               of the language model), log-probabilities of choices
    encoder    patches a second and the share of the card's own rate: transformers' encoder with each attention that is
               there, and qvsplit's `fused` with a call a size, with one for unequal sizes, and as it chooses itself
    shapes     the encoders of the whole Qwen-VL line at their true shapes, random weights: `fused` beside transformers
               (bench/encoder.py)
    extract    from JPEG files to a shard (bench/extract.py): rates, stages, and how long the encoder waited; without
               pinned memory and a stream for copies, and with images resized on the device
    ask        1 to 100 questions about one image (bench/ask.py), and the most GPU memory that this took
    decode     what a decoding step takes, its operations and kernels; captured as a CUDA graph; compiled
    memory     peak GPU memory of the encoder and of the full model for a photograph's features (bench/light.py)
    families   a tiny checkpoint of every family, split, on the device: answers of the full model there, and how far
               `fused` features are from the `reference`
    suite      the whole suite, where the device is what commands take by default

Parts that are timed run alone, the others several at a time. A part that would not end in time is stopped. FOLDER gets
gpu.json and each part's own output.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bench import gpu_decoding
from bench.encoder_shapes import SHAPES

QUESTIONS = (
    "What is in the image?",
    "Is it day or night?",
    "How many people are there?",
    "Describe the image in one sentence.",
    "What colour is most of it?",
)
CHOICES = ("yes", "no", "Yes.", "perhaps")
PARTS = (
    "rates", "make", "encoder", "shapes", "exact", "tests", "memory", "families", "extract", "ask", "decode", "suite",
)  # fmt: skip
TOGETHER = 6  # processes at a time of those that are not timed; two CPU cores each
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "pyarrow", "PIL", "av",
    "qwen_vl_utils", "llguidance", "skimage", "sklearn", "flash_attn", "kernels", "vllm", "pytest",
)  # fmt: skip
SHM, SHM_NEEDS = Path("/dev/shm"), 24 << 30


@dataclass(frozen=True)
class Part:
    """One process: its name, the module and arguments that `python -m` would take, and the seconds it may take.

    Parts of one `group` are not timed: they run at the same time.
    """

    name: str
    words: list[str]
    seconds: float = 60
    group: str | None = None


def main() -> None:
    """Run the parts in turn, or the one part that a child is."""
    told = _arguments()
    if told.child:
        print(json.dumps(CHILDREN[told.child](told)))
        return
    began = time.perf_counter()
    told.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # what looks for a device must not touch it before a fork
    }  # fmt: skip
    _import_everything()
    print(f"[{time.perf_counter() - began:5.0f} s] imported", flush=True)
    with _work_folder() as folder:
        os.environ["QVSPLIT_CACHE"] = f"{folder}/cache"
        results: dict[str, Any] = {}
        for parts in _turns(_parts(told, folder)):
            # where the device cannot be used behind a fork, every further part begins from nothing
            forked = "lacks" not in results.get("rates", {})
            with closing(_run(parts, told.out, end=began + told.seconds, forked=forked)) as ran:
                for part, result in ran:
                    results[part.name] = result
                    (told.out / "gpu.json").write_text(json.dumps(results, indent=1))
                    print(f"[{time.perf_counter() - began:5.0f} s] {part.name}: {_line(result)}", flush=True)
    print(_table(results))
    print(json.dumps({"bench": "gpu", "seconds": round(time.perf_counter() - began), "results": _short(results)}))


def _import_everything() -> None:
    """Import what every part needs: on a fresh machine that takes a quarter of a minute, once."""
    import accelerate  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration  # noqa: F401
    from transformers.models.qwen2_vl import image_processing_qwen2_vl, video_processing_qwen2_vl  # noqa: F401

    from qvsplit import ask, cli, extract  # noqa: F401
    from qvsplit.kernels import fused_encoder  # noqa: F401


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, a few photographs")
    parser.add_argument("--seconds", type=float, default=450, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--images", type=int, help="photographs for `extract`")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    for name in ("--child", "--checkpoint", "--dtype", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    told = parser.parse_args()
    told.images = told.images or (4 if told.small else 192)
    return told


def _work_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is room, so that no disk is measured."""
    roomy = SHM.is_dir() and shutil.disk_usage(SHM).free > SHM_NEEDS
    return tempfile.TemporaryDirectory(dir=SHM if roomy else None, prefix="qvsplit-gpu-")


def _parts(told: argparse.Namespace, folder: str) -> Iterator[Part]:
    """Give all parts that were asked for, in the order of what one would miss most."""
    big, wanted = Path(folder) / "big", told.parts.split(",")
    small = ["--small"] if told.small else []
    own = ["bench.gpu", "--device", told.device, "--images", str(told.images), *small, "--child"]
    place = ["--device", told.device, "--dtype"]

    def child(name: str, checkpoint: str = "big", dtype: str = "float32") -> list[str]:
        return [*own, name, "--checkpoint", str(Path(folder) / checkpoint), "--dtype", dtype, "--folder", folder]

    pytest = ["pytest", "-p", "no:cacheprovider", "-ra", "--tb=short"]
    cuda = ["tests/test_exactness.py", "tests/kernels", "tests/models/test_copies.py",
            "tests/models/test_device_preparing.py", "tests/pipeline/test_devices.py"]  # fmt: skip
    extractions: tuple[tuple[str, str, str, list[str]], ...] = (
        ("limit", "bfloat16", "photos", []), ("qvsplit", "bfloat16", "photos", []),
        ("qvsplit", "bfloat16", "photos", ["--without-copies"]),
        ("qvsplit", "bfloat16", "photos", ["--prepare-on", "device"]), ("plain", "bfloat16", "photos", []),
        ("qvsplit", "float32", "few", []),
    )  # fmt: skip
    every = {
        "rates": [Part("rates", child("rates"))],
        "make": [Part("make", child("make"), 120)],
        "encoder": [Part(f"encoder {dtype}", child("encoder", dtype=dtype)) for dtype in ("float32", "bfloat16")],
        "shapes": [
            Part(f"shape {name} {dtype}",
                 ["bench.encoder", name, *small, "--depth", "1" if told.small else "0", "--only", "fused",
                  "--rounds", "3", *place, dtype])
            for name in SHAPES if name != "Qwen2-VL" for dtype in ("bfloat16", "float32")
        ],
        "memory": [
            Part(f"memory {name} {dtype}",
                 ["bench.light", str(big), "--contender", name, "--image", "retina.jpg", *place, dtype], 60, "correct")
            for dtype in ("bfloat16", "float32") for name in ("whole", "qvsplit")
        ],
        "exact": [
            Part(f"exact {checkpoint} {dtype}", child("exact", checkpoint, dtype), 120, "correct")
            for checkpoint, dtypes in (
                ("big", ("float32", "bfloat16")), ("demo", ("float32", "bfloat16", "float16")),
                ("tiny", ("float32", "bfloat16")),
            )
            for dtype in dtypes
        ],
        "tests": [Part("tests", [*pytest, "-k", "cuda", *cuda], 120, "correct")],
        "families": [Part("families", child("families"), 120, "correct")],
        "extract": [
            Part(" ".join(["extract", name, dtype, *more]).replace("--", ""),
                 ["bench.extract", str(big), "--child", name, "--photos", f"{folder}/{photos}", "--out",
                  f"{folder}/out-{name}-{dtype}{''.join(more)}", *place, dtype, *more])
            for name, dtype, photos, more in extractions
        ],
        "ask": [Part(f"ask {dtype}", child("ask", dtype=dtype), 90) for dtype in ("bfloat16", "float32")],
        "decode": [
            Part("decode bfloat16", child("decode", dtype="bfloat16"), 90),
            Part("decode captured bfloat16", child("captured", dtype="bfloat16"), 40),
            Part("decode compiled bfloat16", child("compiled", dtype="bfloat16"), 90),
        ],
        "suite": [Part("suite", [*pytest, "-n", str(max(2, (os.cpu_count() or 2) - 2)), "tests"], 240)],
    }  # fmt: skip
    return (part for name in PARTS if name in wanted for part in every[name])


def _turns(parts: Iterator[Part]) -> list[list[Part]]:
    """Give the parts that run at the same time, in their order."""
    turns: list[list[Part]] = []
    for part in parts:
        if part.group is not None and turns and turns[-1][0].group == part.group:
            turns[-1].append(part)
        else:
            turns.append([part])
    return turns


def _run(
    parts: list[Part], out: Path, *, end: float, forked: bool
) -> Generator[tuple[Part, dict[str, Any]], None, None]:
    """Run parts to their end or their time's, some at once; give each one's result as it is known."""
    waiting = list(parts)
    running: list[_Running] = []
    together = max(1, min(TOGETHER, (os.cpu_count() or 2) // 2))
    try:
        while waiting or running:
            while waiting and len(running) < together:
                part = waiting.pop(0)
                if end - time.perf_counter() < 5:
                    yield part, {"lacks": "time"}
                else:
                    running.append(_Running(part, out, end, forked=forked))
            for one in list(running):
                if (result := one.result()) is not None:
                    running.remove(one)
                    yield one.part, result
            time.sleep(0.02)
    finally:  # interrupted: no terminal's Ctrl-C reaches them
        for one in running:
            one.stop()


class _Running:
    """One part's process."""

    def __init__(self, part: Part, out: Path, end: float, *, forked: bool) -> None:
        self.part = part
        self._log = out / f"{part.name.replace(' ', '-')}.log"
        self._began = time.perf_counter()
        self._end = min(end, self._began + part.seconds)
        self._log.write_text("")  # it may be stopped before it says anything, where an earlier run did
        sys.stdout.flush()
        self._child = os.fork()
        if not self._child:
            _be(part, self._log, forked=forked)
        with suppress(PermissionError, ProcessLookupError):  # it may have done so itself, and be another program by now
            os.setpgid(self._child, self._child)

    def result(self) -> dict[str, Any] | None:
        """Give the last line of its stdout, or say why there is none; None while it runs and may."""
        done, status = os.waitpid(self._child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        if not done:
            if time.perf_counter() < self._end:
                return None
            self.stop()
        result = _result(self._log.read_text(errors="replace"), code)
        return result | {"part_seconds": round(time.perf_counter() - self._began, 1)}

    def stop(self) -> None:
        """Kill it and the processes that it started, and wait for its end."""
        with suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)
        with suppress(ChildProcessError):  # it had ended, and been waited for
            os.waitpid(self._child, 0)


def _be(part: Part, log: Path, *, forked: bool) -> NoReturn:
    """Be the part's process, from the fork to the end."""
    code = 1
    try:
        os.setpgid(0, 0)  # here, too: whichever process comes first, it can be killed with all that it starts
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        if not forked:
            os.execv(sys.executable, [sys.executable, "-m", *part.words])
        sys.argv = part.words
        runpy.run_module(part.words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _result(text: str, code: int | None) -> dict[str, Any]:
    """Give what a part said last; with `lacks` where it is not all, and why. `code` is None if it was stopped."""
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if last.startswith("{"):
        try:
            given: dict[str, Any] = json.loads(last)
        except ValueError:
            return {"lacks": f"{_ended(code)}, and its last line is cut off: {last[-100:]}", "code": code}
        return given if code == 0 else given | {"lacks": _ended(code), "code": code}
    if counted := re.findall(r"(\d+) (passed|failed|error|skipped)", last):
        failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)))
        counts = {name: int(number) for number, name in counted} | {"which": failed}
        return counts if code in (0, 1) else counts | {"lacks": _ended(code), "code": code}  # 1: some failed
    return {"lacks": "time" if code is None else last[-300:] or _ended(code), "code": code}


def _ended(code: int | None) -> str:
    return "time" if code is None else f"exit code {code}"


# --------------------------------------------------------------------------------------------------- what is measured


def _make(told: argparse.Namespace) -> dict[str, Any]:
    """Write checkpoints and photographs; the big one's random numbers come from the device."""
    import torch

    from bench.extract import make_photographs
    from qvsplit.checkpoints.opening import DEMO_FOLDER
    from qvsplit.demo import POSTCARDS
    from tests.support.checkpoints import make_2b, make_tiny

    folder = Path(told.folder)
    shutil.copytree(DEMO_FOLDER, folder / "demo")
    shutil.copytree(POSTCARDS, folder / "postcards")
    make_tiny(folder / "tiny")
    began = time.perf_counter()
    with torch.device(told.device):  # random numbers of that many parameters take a CPU a minute
        if told.small:
            make_2b(folder / "big", vision_depth=2, layers=2)
        else:
            make_2b(folder / "big")
    weights = time.perf_counter() - began
    make_photographs(folder / "some", min(told.images, 16), 12_000_000)
    for name, number in (("photos", told.images), ("few", max(4, told.images // 8))):
        _gather(folder / "some", folder / name, number)
    bytes_of = sum(file.stat().st_size for file in (folder / "photos").iterdir())
    return {"weights_seconds": round(weights, 1), "photos": told.images, "photo_megabytes": bytes_of / 1e6,
            "folder": str(folder)}  # fmt: skip


def _gather(some: Path, target: Path, number: int) -> None:
    """Copy that many photographs; no two may be alike, so each gets a mark of its own behind its end."""
    target.mkdir()
    every = sorted(some.iterdir())
    for index in range(number):
        source = every[index % len(every)]
        (target / f"{index:05}.jpg").write_bytes(source.read_bytes() + b"%d" % index)


def _rates(told: argparse.Namespace) -> dict[str, Any]:
    """Say what the machine is, and what the device itself can do."""
    from importlib.util import find_spec

    import torch

    from bench.machine import machine

    device = torch.device(told.device)
    side = 512 if told.small else 8192
    result: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "device": _name(device)}
    result["packages"] = {name: _version(name) for name in PACKAGES}
    result["varlen"] = find_spec("torch.nn.attention.varlen") is not None
    for dtype in ("bfloat16", "float16", "float32"):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        result[f"matmul_{dtype}_tflops"] = 2 * side**3 / _seconds(partial(torch.mm, a, b), device) / 1e12
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        result |= {"memory_gb": total / 1e9, "free_gb": free / 1e9}
        host = torch.empty(1 << 28, dtype=torch.uint8)
        there = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        pinned = host.pin_memory()
        ways = {
            "to": (there, host),
            "to pinned": (there, pinned),
            "from": (host, there),
            "from pinned": (pinned, there),
        }
        result["copies_gb_s"] = {
            name: (1 << 28) / _seconds(partial(target.copy_, source), device) / 1e9
            for name, (target, source) in ways.items()
        }
    return result


def _exact(told: argparse.Namespace) -> dict[str, Any]:
    """Hold the halves of one checkpoint against the full model, in one dtype, on the device."""
    import torch

    import qvsplit
    from qvsplit.sources.images import open_file

    device, dtype = torch.device(told.device), getattr(torch, told.dtype)
    checkpoint, folder = Path(told.checkpoint), Path(told.folder)
    paths, questions = _asked(told, checkpoint)
    images = {path.name: open_file(path) for path in paths}
    whole = _Whole(checkpoint, device, dtype)
    result = _same_features(told, checkpoint, list(images.values()), whole)
    split = {}
    for kernels in ("reference", "fused"):
        out = folder / f"store-{checkpoint.name}-{told.dtype}-{kernels}"
        options = qvsplit.ExtractOptions(
            model=str(checkpoint), device=told.device, dtype=told.dtype, patch_budget=1, kernels=kernels
        )
        summary = qvsplit.extract_files(list(paths), out=out, options=options)
        if summary.failed:
            raise SystemExit(f"{summary.failed} photographs failed")
        asked = qvsplit.AskOptions(device=told.device, dtype=told.dtype, max_new_tokens=16)
        session = qvsplit.load_session(qvsplit.open_store(out), asked)
        rows = list(session.store)
        split[kernels] = {(row.path, one): list(session.answer(row, one).tokens) for row in rows for one in questions}
        split[f"{kernels}, as a batch"] = {
            (row.path, one): list(answer.tokens)
            for row in rows
            for one, answer in zip(questions, session.answers(row, questions), strict=True)
        }
        if kernels == "reference":
            split["reference kernels to the end"] = _by_reference(told, session.store, questions)
            result["choices_off"] = max(_choices_off(session, row, images[row.path], whole) for row in rows[:3])
            again = {(row.path, one): list(session.answer(row, one).tokens) for row in rows[:2] for one in questions}
            result["answers_repeat"] = all(split[kernels][key] == tokens for key, tokens in again.items())
    truth = {(name, one): whole.answer(image, one) for name, image in images.items() for one in questions}
    for way, answers in split.items():
        result[way] = _held(answers, truth, dtype)
    result |= {"answers": len(truth), "device": _name(device), "dtype": told.dtype, "checkpoint": checkpoint.name}
    return result | {"different_answers": len({tuple(tokens) for tokens, _ in truth.values()})}


def _by_reference(told: argparse.Namespace, store: Any, questions: tuple[str, ...]) -> dict[tuple[str, str], list[int]]:
    """Answer with transformers' own modules, one question at a time from its whole prompt."""
    import qvsplit

    options = qvsplit.AskOptions(device=told.device, dtype=told.dtype, max_new_tokens=16, kernels="reference")
    session = qvsplit.load_session(store, options)
    return {(row.path, one): list(session.answer(row, one).tokens) for row in store for one in questions}


def _ask(told: argparse.Namespace) -> dict[str, Any]:
    """Run bench/ask.py's contenders one after the other in this process, each with the most memory that it took."""
    import gc

    import torch

    from bench import ask, ask_contender

    folder = Path(told.folder) / f"ask-{told.dtype}"
    folder.mkdir()
    sizes, counts = ("256", "1,5") if told.small else ("256,1250", "1,5,20,100")
    asked = argparse.Namespace(
        checkpoint=Path(told.checkpoint), device=told.device, dtype=told.dtype, tokens=sizes, questions=counts,
        contenders=["whole", "stored", "qvsplit"], new_tokens=16, repeats=3, alone=2, vllm=None, vllm_settings={},
        before=None,
    )  # fmt: skip
    torch.set_grad_enabled(False)
    job = json.loads(json.dumps(ask._job(asked, folder)))
    results, peaks = {}, {}
    for name, run in (("transformers", ask_contender._transformers), ("qvsplit", ask_contender._qvsplit)):
        gc.collect()
        _reset_peak(torch.device(told.device))
        results[name] = json.loads(json.dumps(run(job, name)))
        peaks[name] = _peak(torch.device(told.device))
    cases = [ask._case(asked, job, image, results) for image in job["images"]]
    return {"dtype": told.dtype, "new_tokens": 16, "peak_gb": peaks, "results": cases,
            "loading": {name: one["loading"] for name, one in results.items()}}  # fmt: skip


def _asked(told: argparse.Namespace, checkpoint: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Give images and questions: the demo's own for the demo's checkpoint."""
    from tests.support.photographs import photographs

    if checkpoint.name != "demo":
        number = 3 if checkpoint.name == "big" else 6
        return (photographs()[1:2], QUESTIONS[:2]) if told.small else (photographs()[:number], QUESTIONS)
    from qvsplit.demo import truths

    asked, right = truths()
    names = sorted(right)[: 2 if told.small else 8]
    return [Path(told.folder) / "postcards" / name for name in names], tuple(asked)


class _Whole:
    """The full model of transformers on the device."""

    def __init__(self, checkpoint: Path, device: Any, dtype: Any) -> None:
        from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

        self.device = device
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        if checkpoint.name != "demo":  # which has limits of its own
            self.processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 1280 * 28 * 28}
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).to(device).eval()

    def inputs(self, image: Any, question: str) -> Any:
        """Give all that `generate` takes, on the device."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[text], images=[image], return_tensors="pt").to(self.device)

    def answer(self, image: Any, question: str) -> tuple[list[int], list[float]]:
        """Give greedy tokens, and at each the gap between the two best logits."""
        import torch

        inputs = self.inputs(image, question)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=16, do_sample=False, temperature=None, top_p=None,
                                      top_k=None, return_dict_in_generate=True, output_logits=True)  # fmt: skip
        best = [logits[0].float().topk(2).values for logits in out.logits]
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), [float(a - b) for a, b in best]

    def features(self, pixels: Any, grid: Any) -> list[Any]:
        """Give the pooled output of the encoder inside, an image each."""
        import torch

        with torch.inference_mode():
            return list(self.model.get_image_features(pixels, grid, return_dict=True).pooler_output)

    def choice(self, image: Any, question: str, tokens: list[int], stops: list[int]) -> float:
        """Give the log-probability of an answer of these tokens and any end behind it."""
        import torch

        inputs = self.inputs(image, question)
        row = torch.tensor([tokens], device=self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], row], 1)
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                more = torch.ones_like(row) if name == "attention_mask" else torch.zeros_like(row)
                inputs[name] = torch.cat([inputs[name], more], 1)
        with torch.inference_mode():
            logs = torch.log_softmax(self.model(**inputs).logits[0, -len(tokens) - 1 :].float(), -1)
        each = [float(logs[place, token]) for place, token in enumerate(tokens)]
        total: float = sum(each) + float(torch.logsumexp(logs[-1, stops], 0))
        return total


def _same_features(told: argparse.Namespace, checkpoint: Path, images: list[Any], whole: _Whole) -> dict[str, Any]:
    """Compare pixels and features with the full model's: images one by one, and three as a batch."""
    import numpy as np
    import torch

    from qvsplit.checkpoints.opening import open_checkpoint
    from qvsplit.models.encoder import EncoderSpec, load_encoder

    counts = {"pixels": 0, "reference": 0, "reference, repeated": 0}
    off: dict[str, float] = {"pixels": 0.0, "reference": 0.0, "fused": 0.0, "fused, a batch": 0.0}
    for kernels in ("reference", "fused"):
        spec = EncoderSpec(open_checkpoint(checkpoint, "encoder"), told.device, told.dtype, kernels=kernels)
        encoder: Any = load_encoder(spec)
        patches, truths = [], []
        for image in images:
            given = whole.processor.image_processor(images=[image], return_tensors="pt").to(whole.device)
            one = encoder.preparer.prepare(np.array(image))
            truth = whole.features(given["pixel_values"], given["image_grid_thw"])[0]
            values = encoder._all_slices(encoder.preparer.normalised(one.values["pixels"].to(whole.device)))
            mine, again = (encoder.encode([one])[0].tensors["pooler_output"] for _ in range(2))
            off["pixels"] = max(off["pixels"], float((values - given["pixel_values"]).abs().max()))
            off[kernels] = max(off[kernels], _off(mine, truth))
            counts["pixels"] += kernels == "fused" and torch.equal(values, given["pixel_values"])
            counts["reference"] += kernels == "reference" and torch.equal(mine, truth)
            counts["reference, repeated"] += kernels == "reference" and torch.equal(mine, again)
            patches.append(one)
            truths.append(truth)
        together = encoder.encode(patches[:3])
        if kernels == "reference":  # an image a forward pass, so that a batch has the bits of its images
            counts["reference, a batch of 3"] = sum(
                torch.equal(a.tensors["pooler_output"], b) for a, b in zip(together, truths[:3], strict=True)
            )
        else:
            off["fused, a batch"] = max(
                _off(a.tensors["pooler_output"], b) for a, b in zip(together, truths[:3], strict=True)
            )
        del encoder
    return {"images": len(images), "identical": counts, "off": off}


def _off(mine: Any, truth: Any) -> float:
    """Give the distance of two tensors over the norm of the second."""
    return float((mine.float() - truth.float()).norm() / truth.float().norm())


def _choices_off(session: Any, row: Any, image: Any, whole: _Whole) -> float:
    """Give the largest difference of a choice's log-probability from the full model's."""
    from qvsplit.answering.engine import FeatureRef, Request
    from qvsplit.models.prompt import question_messages

    question = QUESTIONS[1]
    request = Request("one", tuple(question_messages(question, ("image",), None)), (FeatureRef(row.sha256),),
                      choices=CHOICES)  # fmt: skip
    (scored,) = session.engine.answer([request])
    if scored.error:
        raise scored.error
    language = session.engine.language
    off: float = max(
        abs(scored.logprobs[text]
            - whole.choice(image, question, language.prompter.text_tokens(text), sorted(language.stops)))
        for text in CHOICES
    )  # fmt: skip
    return off


def _held(answers: dict[Any, list[int]], truth: dict[Any, tuple[list[int], list[float]]], dtype: Any) -> dict[str, Any]:
    """Count identical answers; of the others say how near the two best logits were where they part, in units."""
    import torch

    gaps = []
    for key, (expected, gap) in truth.items():
        if answers[key] != expected:
            place = next(
                i for i, (a, b) in enumerate(zip([*answers[key], -1], [*expected, -2], strict=False)) if a != b
            )
            gaps.append(gap[min(place, len(gap) - 1)])
    unit = float(torch.finfo(dtype).eps)
    ties = sum(gap == 0 for gap in gaps)
    return {"identical": len(truth) - len(gaps), "largest_gap": max(gaps, default=0.0), "ties": ties, "unit": unit}


def _encoder(told: argparse.Namespace) -> dict[str, Any]:
    """Time forward passes of the encoder alone: patches a second, and the share of the device's own rate."""
    import torch

    from bench.extract import _rates as product_rates
    from bench.extract import encoder_flops
    from qvsplit.checkpoints.opening import open_checkpoint
    from qvsplit.kernels.fused_encoder import fuse
    from qvsplit.weights import load_encoder_weights

    device, dtype = torch.device(told.device), getattr(torch, told.dtype)

    def load() -> Any:
        return load_encoder_weights(
            open_checkpoint(Path(told.checkpoint), "encoder"), device=device, dtype=dtype
        ).module

    vision = load().config
    width = vision.embed_dim
    rows = 512 if told.small else 16384
    shapes = ((rows, width, 4 * width), (rows, 4 * width, width), (rows, width, 3 * width))
    rate = max(product_rates(*shape, device, dtype)[0] for shape in shapes)
    result: dict[str, Any] = {
        "device": _name(device),
        "dtype": told.dtype,
        "product_tflops": rate / 1e12,
        "batches": {},
    }
    batches: dict[str, list[tuple[int, int, int]]] = {
        "one of 4,900": [(1, 70, 70)],
        "five of 4,900": [(1, 70, 70)] * 5,
        "24 of 1,024": [(1, 32, 32)] * 24,
        "ten of ten sizes": [(1, 34 + 2 * n, 70 - 2 * n) for n in range(10)],
        "64 of 64 small sizes": [(1, 12 + 2 * (n % 8), 12 + 4 * (n // 8)) for n in range(64)],
    }
    if told.small:
        batches = {"one of 64": [(1, 8, 8)], "three sizes": [(1, 8, 8), (1, 4, 8), (1, 12, 4)]}
    if dtype == torch.float32:  # which takes a GPU fifteen times as long
        batches = {name: grids for name, grids in batches.items() if name != "five of 4,900" and "sizes" not in name}
    forwards: dict[str, Any] = dict(_forwards(load, fuse, device, dtype))
    for name, grids in batches.items():
        flops = sum(encoder_flops(h * w, width=width, depth=vision.depth, out=vision.hidden_size) for _, h, w in grids)
        patches = sum(h * w for _, h, w in grids)
        pixels = torch.randn(patches, 588, device=device).to(dtype)
        truth: Any = None
        lines: dict[str, dict[str, Any]] = {}
        for way, forward in forwards.items():
            if isinstance(forward, str):
                lines[way] = {"lacks": forward}
                continue
            try:
                given = forward(pixels, grids)
                truth = given if truth is None else truth
                _reset_peak(device)
                seconds = _seconds(partial(forward, pixels, grids), device, rounds=6)
                lines[way] = {"patches_s": patches / seconds, "share": flops / seconds / rate, "ms": seconds * 1e3,
                              "off": _off(given, truth), "peak_gb": _peak(device)}  # fmt: skip
            except (RuntimeError, ImportError, ValueError, TypeError) as error:
                lines[way] = {"lacks": _first_line(error)}
        result["batches"][name] = {"patches": patches, "gflop": flops / 1e9, "ways": lines}
    grids = next(iter(batches.values()))
    pixels = torch.randn(sum(h * w for _, h, w in grids), 588, device=device).to(dtype)
    result["where"] = _where(partial(forwards["qvsplit fused, as it chooses"], pixels, grids), device)
    return result


def _where(run: Callable[[], Any], device: Any, number: int = 10) -> dict[str, float]:
    """Give the kernels that take most of the device's time, each with its share of it."""
    import torch

    cuda = device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as seen:
        run()
        if cuda:
            torch.cuda.synchronize()
    took = {
        one.key[:60]: float(one.self_device_time_total if cuda else one.self_cpu_time_total)
        for one in seen.key_averages()
    }
    most = sorted(took, key=lambda name: -took[name])[:number]
    return {name: took[name] / max(sum(took.values()), 1e-9) for name in most}


def _forwards(
    load: Callable[[], Any], fused: Callable[[Any], Any], device: Any, dtype: Any
) -> Iterator[tuple[str, Callable[[Any, Any], Any] | str]]:
    """Give every forward pass of the encoder, or what it lacks; the first, transformers' own, is the reference."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from qvsplit.kernels.fused_encoder import all_slices
    from qvsplit.kernels.varlen_attention import find_varlen

    module = load()

    def whole(attention: str, pixels: Any, grids: Any) -> Any:
        module.config._attn_implementation = attention
        with torch.inference_mode():
            grid = torch.tensor(grids, device=device)
            return module(all_slices(pixels, 3, 2), grid_thw=grid).pooler_output

    yield "transformers sdpa", partial(whole, "sdpa")
    if device.type == "cuda" and dtype != torch.float32:
        ALL_ATTENTION_FUNCTIONS.register("flash_torch_varlen", _varlen)
        yield "transformers varlen of torch", partial(whole, "flash_torch_varlen")
        yield "transformers flash_attention_2", partial(whole, "flash_attention_2")
    mine = fused(load())

    def by(attention: str, pixels: Any, grids: Any) -> Any:
        mine.attention = attention
        return mine(pixels, grids)[0]

    yield "qvsplit fused, a call a size", partial(by, "sdpa")
    found = find_varlen(device, dtype, heads=mine.heads, head_dim=module.config.embed_dim // mine.heads)
    lacks = "; ".join(f"{name}: {why}" for name, why in found.lacks.items())
    yield f"qvsplit fused, one call ({found.name})", partial(by, "varlen") if found.function else lacks
    yield "qvsplit fused, as it chooses", partial(by, "auto")


def _varlen(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **more: Any) -> tuple[Any, None]:
    """Compute attention within each image in one call, as torch ships it; in and out as transformers' functions."""
    from torch.nn.attention.varlen import varlen_attn

    del attention_mask
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))  # [tokens, heads, head_dim]
    ends, longest = more["cu_seq_lens_q"].int(), int(more["max_length_q"])
    return varlen_attn(q, k, v, ends, ends, longest, longest).unsqueeze(0), None


def _families(told: argparse.Namespace) -> dict[str, Any]:
    """Split a tiny checkpoint of every family on the device, and hold answers against the full model there."""
    import torch

    import qvsplit
    from qvsplit.sources.images import open_file
    from tests.support.families import FAMILIES, make_checkpoint
    from tests.support.families.reference import Reference
    from tests.support.photographs import photographs

    image = open_file(photographs()[1]).resize((300, 200))
    same, differing, failed = [], {}, {}
    off: dict[str, float] = {}
    for name in list(FAMILIES)[: 2 if told.small else None]:
        folder = Path(told.folder) / "families" / name
        try:
            make_checkpoint(name, folder)
            reference = Reference(folder)
            reference.model.to(told.device)
            with qvsplit.load_encoder(str(folder), device=told.device, dtype="float32") as encoder:
                features = encoder.encode([image])
            if features[0].config.kernels == "fused":
                with qvsplit.load_encoder(
                    str(folder), device=told.device, dtype="float32", kernels="reference"
                ) as encoder:
                    truth = encoder.encode([image])[0].torch()
                off[name] = max(_off(rows, truth[key]) for key, rows in features[0].torch().items())
            options = qvsplit.AskOptions(device=told.device, dtype="float32", max_new_tokens=12)
            language = qvsplit.load_language_model(str(folder), options=options)
            mine = [list(language.answer(features, one).tokens) for one in QUESTIONS[:2]]
            for number, question in enumerate(QUESTIONS[:2]):
                inputs = reference.inputs([image], question).to(told.device)
                with torch.inference_mode():
                    out = reference.model.generate(**inputs, max_new_tokens=12, do_sample=False)
                expected = out[0, inputs["input_ids"].shape[1] :].tolist()
                if mine[number] != expected:
                    differing[f"{name} {number}"] = [mine[number], expected]
                else:
                    same.append(name)
        except Exception as error:  # one family's failure is its line
            failed[name] = f"{type(error).__name__}: {_first_line(error)}"
    return {"identical": len(same), "of": 2 * len(FAMILIES), "families_failed": len(failed),
            "fused_off": max(off.values(), default=0.0), "off": off, "differing": differing,
            "failed": failed}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- helpers


def _seconds(run: Callable[[], Any], device: Any, rounds: int = 10) -> float:
    """Give the median time of a call, warm; device work counted to its end."""
    import torch

    took: list[float] = []
    while len(took) < rounds + 2 and (len(took) < 4 or sum(took) < 2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


def _name(device: Any) -> str:
    import platform

    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else platform.machine()


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: Any) -> float:
    import torch

    return float(torch.cuda.max_memory_allocated() / 1e9) if device.type == "cuda" else 0.0


def _version(name: str) -> str | None:
    from importlib import import_module

    try:
        return str(getattr(import_module(name), "__version__", "there"))
    except Exception as error:  # a package that is there and broken is a finding, too
        return None if isinstance(error, ModuleNotFoundError) else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --------------------------------------------------------------------------------------------------------------- words


def _line(result: dict[str, Any]) -> str:
    """Say a part's result in one line."""
    if "lacks" in result:
        return f"LACKS {result['lacks']} ({result.get('part_seconds', 0)} s)"
    told = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    return ", ".join(f"{key} {_number(value)}" for key, value in told.items())[:400]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(results: dict[str, Any]) -> str:
    """Lay out what was measured, a section a part."""
    lines = [""]
    for name, result in results.items():
        if "lacks" in result:
            lines.append(f"{name:28} lacks {result['lacks'][:120]}")
        elif name.startswith("exact"):
            ways = ("reference", "reference, as a batch", "fused", "fused, as a batch", "reference kernels to the end")
            counted = ", ".join(f"{result[way]['identical']}" for way in ways)
            same, off = result["identical"], result["off"]
            lines.append(
                f"{name:28} features {same['reference']} of {result['images']} to the bit, fused off "
                f"{off['fused']:.1e}; "
                f"answers {counted} of {result['answers']}; choices off {result['choices_off']:.1e}"
            )
        elif name.startswith("encoder"):
            lines.append(f"{name:28} the card's own product {result['product_tflops']:.0f} TFLOP/s")
            where = ", ".join(f"{name} {share:.2f}" for name, share in result["where"].items())
            lines.append(f"  fused spends its time on: {where}")
            for batch, told in result["batches"].items():
                for way, one in told["ways"].items():
                    words = one.get("lacks") or (f"{one['patches_s']:10,.0f} patches/s {one['share']:6.2f} of it, off "
                                                 f"{one['off']:.1e}, {one['peak_gb']:.2f} GB")  # fmt: skip
                    lines.append(f"  {batch:18} {way:30} {words}")
        elif name.startswith("shape"):
            each = ", ".join(f"{batch} {one['fused']['of_reference']:.2f} (off {one['fused']['off']:.1e})"
                             for batch, one in result["results"].items())  # fmt: skip
            lines.append(f"{name:28} fused over transformers' own: {each}")
        elif name.startswith("extract"):
            stages = {stage: round(seconds, 2) for stage, seconds in result.get("stages", {}).items()}
            lines.append(f"{name:28} {result['images'] / result['seconds']:.1f} images/s, "
                         f"{result['patches'] / result['seconds']:,.0f} patches/s, start-up {result['startup']:.1f} s "
                         f"{stages or ''}")  # fmt: skip
        elif name.startswith("ask"):
            peaks = ", ".join(f"{way} {peak:.2f} GB" for way, peak in result["peak_gb"].items())
            lines.append(f"{name:28} peak GPU memory: {peaks}")
            for case in result["results"]:
                for way, seconds in case["seconds"].items():
                    each = ", ".join(f"{number}: {took:.2f} s" for number, took in seconds.items())
                    lines.append(f"{name:14} {case['tokens']:6} tokens {way:10} {each}")
                lines.append(f"{'':14} identical {case['identical']} of {case['compared']}")
        elif name.startswith("decode"):
            for rows, ways in result["rows"].items():
                each = "; ".join(
                    f"{way} {', '.join(f'{key} {_number(value)}' for key, value in one.items())}"
                    if isinstance(one, dict) else f"{way} {_number(one)}" for way, one in ways.items()
                )  # fmt: skip
                lines.append(f"{name:28} {rows} rows: {each}")
        elif name.startswith("memory"):
            lines.append(f"{name:28} GPU {result.get('gpu_peak_bytes', 0) / 1e9:6.2f} GB, "
                         f"host {result['peak_bytes'] / 1e9:6.2f} GB")  # fmt: skip
        else:
            lines.append(f"{name:28} {_line(result)}")
    return "\n".join(lines)


def _short(value: Any) -> Any:
    """Round every number to four digits, so that the last line stays one that can be read."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


CHILDREN = {
    "rates": _rates, "make": _make, "exact": _exact, "encoder": _encoder, "families": _families, "ask": _ask,
    **gpu_decoding.CHILDREN,
}  # fmt: skip

if __name__ == "__main__":
    main()
