"""How light are `extract` and `ask`? Peak memory and bytes read from disk, side by side, one process a contender.

    python -m bench.light CHECKPOINT [--dtype float32] [--device cpu]

CHECKPOINT is one of the true shape: `python -m tests.support.checkpoints DIR --shape 2b`. Contenders, each given the
same photograph:

    whole        transformers' `from_pretrained` of the full model, then `get_image_features`
    usual        the usual script, as passed on in QwenLM/Qwen3-VL#287: `load_file` on the files (there on the first
                 alone), keys that hold `visual.` stripped of it, `strict=False`; in bfloat16, as Tencent's KsanaLLM
                 and NativeRes-LLaVA have it
    qvsplit      `qvsplit extract`
    qvsplit cap  the same on a photograph of 1,225 tokens, near the default cap of 1,280
    whole asks   the full model answers a question about that one, 4 new tokens
    qvsplit asks `qvsplit ask`: 20 questions about it from the store, 4 new tokens each

The checkpoint's pages are dropped from the page cache before each, so that bytes read are bytes from the disk
(`read_bytes` of /proc/self/io; none of it where the file system does not tell). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import machine

SMALL, LARGE = "chelsea.png", "retina.jpg"


def main() -> None:
    """Run every contender in turn and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="float32", help="of whole and qvsplit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.contender:
        image = told.image if told.image.exists() else _photograph(str(told.image))
        CONTENDERS[told.contender](told.checkpoint, image, told.dtype, told.device)
        print(json.dumps(_usage(told.device)))
        return
    results = {}
    for name, contender, image in (
        ("whole", "whole", SMALL),
        ("usual", "usual", SMALL),
        ("qvsplit", "qvsplit", SMALL),
        ("qvsplit cap", "qvsplit", LARGE),
        ("whole asks", "whole_asks", LARGE),
    ):
        results[name] = _measure(told, contender, _photograph(image))
        print(f"{name:12} {_line(results[name])}", flush=True)
    with tempfile.TemporaryDirectory() as store:
        words = ["extract", str(_photograph(LARGE)), "--model", str(told.checkpoint), "--out", store]
        subprocess.run([sys.executable, "-m", "qvsplit", *words, "--device", told.device, "--dtype", told.dtype],
                       check=True)  # fmt: skip
        results["qvsplit asks"] = _measure(told, "qvsplit_asks", Path(store))
    print(f"{'qvsplit asks':12} {_line(results['qvsplit asks'])}", flush=True)
    _report(results, told)


def _report(results: dict[str, dict[str, float]], told: argparse.Namespace) -> None:
    encoder = _encoder_bytes(told.checkpoint, told.dtype)
    stored = _encoder_bytes(told.checkpoint, None)
    cap = results["qvsplit cap"]
    ratios = {
        "peak over whole": results["qvsplit"]["peak_bytes"] / results["whole"]["peak_bytes"],
        "peak over usual": results["qvsplit"]["peak_bytes"] / results["usual"]["peak_bytes"],
        "read over whole": results["qvsplit"]["read_bytes"] / max(results["whole"]["read_bytes"], 1),
        "read over usual": results["qvsplit"]["read_bytes"] / max(results["usual"]["read_bytes"], 1),
        "peak over the encoder in the compute dtype": results["qvsplit"]["peak_bytes"] / encoder,
        "peak at the cap over the encoder in the compute dtype": cap["peak_bytes"] / encoder,
        "read over the encoder's own bytes": results["qvsplit"]["read_bytes"] / stored,
        "ask: peak over whole": results["qvsplit asks"]["peak_bytes"] / results["whole asks"]["peak_bytes"],
        "ask: peak over the language model in the compute dtype": results["qvsplit asks"]["peak_bytes"]
        / _language_bytes(told.checkpoint, told.dtype),
    }
    for name, ratio in ratios.items():
        print(f"{name:52} {ratio:.3f}")
    print(json.dumps({"bench": "light", "machine": machine(), "dtype": told.dtype, "device": told.device,
                      "results": results, "ratios": ratios}))  # fmt: skip


def _line(result: dict[str, float]) -> str:
    gpu = f", GPU peak {result['gpu_peak_bytes'] / 1e9:.2f} GB" if result.get("gpu_peak_bytes") else ""
    return f"peak {result['peak_bytes'] / 1e9:6.2f} GB, read {result['read_bytes'] / 1e9:6.2f} GB{gpu}"


def _measure(told: argparse.Namespace, contender: str, image: Path) -> dict[str, float]:
    for file in told.checkpoint.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    command = [sys.executable, "-m", "bench.light", str(told.checkpoint), "--contender", contender, "--image",
               str(image), "--dtype", told.dtype, "--device", told.device]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _usage(device: str) -> dict[str, float]:
    import resource

    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    usage: dict[str, float] = {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "read_bytes": int(counted["read_bytes"]) - _BEFORE,
    }
    if device.startswith("cuda"):
        import torch

        usage["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return usage


_BEFORE = 0


def _ready() -> None:
    """Import what every contender needs, so that reading libraries is not counted as reading weights."""
    global _BEFORE
    import accelerate  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from transformers import AutoProcessor  # noqa: F401
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401

    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    _BEFORE = int(counted["read_bytes"])


def _pixels(checkpoint: Path, image: Path) -> Any:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 1280 * 28 * 28}
    return processor.image_processor(images=[Image.open(image).convert("RGB")], return_tensors="pt")


def whole(checkpoint: Path, image: Path, dtype: str, device: str) -> None:
    """The full model, for its features."""
    _ready()
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device).eval()
    inputs = _pixels(checkpoint, image).to(device)
    with torch.inference_mode():
        model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])


def usual(checkpoint: Path, image: Path, dtype: str, device: str) -> None:
    """The script that users pass on to one another: QwenLM/Qwen3-VL#287; here in bfloat16 on any machine."""
    _ready()
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    model = Qwen2VisionTransformerPretrainedModel._from_config(AutoConfig.from_pretrained(checkpoint).vision_config)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(file)
    model.load_state_dict({k.replace("visual.", ""): v for k, v in weights.items() if "visual." in k}, strict=False)
    model = model.to(device, torch.bfloat16).eval()
    inputs = _pixels(checkpoint, image).to(device)
    with torch.inference_mode():
        model(inputs["pixel_values"].to(torch.bfloat16), grid_thw=inputs["image_grid_thw"])


def whole_asks(checkpoint: Path, image: Path, dtype: str, device: str) -> None:
    """The full model, for an answer."""
    _ready()
    import torch
    from PIL import Image
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 1280 * 28 * 28}
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.open(image).convert("RGB")], return_tensors="pt").to(device)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=4, do_sample=False)


def qvsplit_asks(checkpoint: Path, store: Path, dtype: str, device: str) -> None:
    """The command, in this process, on a store that another one made."""
    words = ["ask", "--embeds", str(store), "--max-new-tokens", "4", "--dtype", dtype, "--device", device]
    _command([*words, *(f"What is at place {number}?" for number in range(20))])


def qvsplit(checkpoint: Path, image: Path, dtype: str, device: str) -> None:
    """The command, in this process."""
    with tempfile.TemporaryDirectory() as out:
        words = ["extract", str(image), "--model", str(checkpoint), "--out", out]
        _command([*words, "--dtype", dtype, "--device", device])


def _command(words: list[str]) -> None:
    _ready()
    from typer.testing import CliRunner

    from qvsplit.cli import app

    done = CliRunner().invoke(app, words)
    if done.exit_code:
        raise SystemExit(done.output)


CONTENDERS = {
    "whole": whole, "usual": usual, "qvsplit": qvsplit, "whole_asks": whole_asks,
    "qvsplit_asks": qvsplit_asks,
}  # fmt: skip


def _photograph(name: str) -> Path:
    import skimage

    return Path(skimage.__file__).parent / "data" / name


def _language_bytes(checkpoint: Path, dtype: str) -> int:
    from qvsplit.checkpoints.opening import open_checkpoint
    from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES
    from qvsplit.runtime.dtypes import DTYPE_BYTES

    opened = open_checkpoint(checkpoint, "language")
    places = opened.places(opened.language_names).values()
    return sum(p.size // SAFETENSORS_BYTES[p.dtype] * DTYPE_BYTES[dtype] for p in places)


def _encoder_bytes(checkpoint: Path, dtype: str | None) -> int:
    from qvsplit.checkpoints.opening import open_checkpoint
    from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES
    from qvsplit.runtime.dtypes import DTYPE_BYTES

    places = open_checkpoint(checkpoint, "encoder").encoder_places().values()
    return sum(p.size if dtype is None else p.size // SAFETENSORS_BYTES[p.dtype] * DTYPE_BYTES[dtype] for p in places)


if __name__ == "__main__":
    main()
