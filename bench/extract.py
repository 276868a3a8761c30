"""How near is `extract` to what the hardware can do? Side by side, one process a contender, in turn, several rounds.

    python -m bench.extract CHECKPOINT [--images 12] [--rounds 3] [--dtype float32] [--device cpu] > LOG
    python -m bench.extract - --plot FILE.svg LOG…

CHECKPOINT is one of the true shape: `python -m tests.support.checkpoints DIR --shape 2b`, with `--vision-depth 4` for
quick runs. The photographs are those that scikit-image and scikit-learn ship, saved as JPEG in mixed sizes. Contenders:

    usual        the usual script, as passed on in QwenLM/Qwen3-VL#287: `load_file` on the files (there on the first
                 alone), keys that hold `visual.` stripped of it, `strict=False`, the AutoProcessor and the encoder on
                 one image at a time; in bfloat16, as Tencent's KsanaLLM and NativeRes-LLaVA have it
    plain        what a good engineer writes with transformers: the encoder alone in the right dtype, the fast
                 processor, a DataLoader with a worker a core, batches of like size, one file of features an image
    qvsplit      `qvsplit extract`
    limit        the FLOPs of the encoder's matrix products on these images, divided by the rate of torch's matrix
                 product that is measured in the same round; beside it the share of the best rate there is, on a CPU
                 oneDNN's on weights laid out for it

Rates are of images without start-up (imports and weights), which is shown apart. Embeddings of all contenders are
held against plain's. `--without-bf16` has oneDNN leave out a CPU's bfloat16 units, as if it had none. `--few N` gives
usual only the first N images. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PIXELS = 1280 * 28 * 28
PLAIN_BATCH = {"cpu": 4, "cuda": 16}
# how large photographs are: shares of 12 megapixels, in turn
SIDES = ((640, 480), (1280, 960), (2048, 1536), (480, 640), (4000, 3000), (1024, 768), (800, 800), (1600, 900))


def main() -> None:
    """Run every contender in turn, several rounds; print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, help="images for usual, where it would take hours")
    parser.add_argument("--dtype", default="float32", help="of plain, qvsplit and the limit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", default="usual,plain,qvsplit")
    parser.add_argument("--largest", type=int, default=12_000_000, help="pixels of the largest photograph")
    parser.add_argument("--without-bf16", action="store_true")
    parser.add_argument("--plot", type=Path, nargs="+", metavar=("FILE.svg", "LOG"), help="draw earlier runs' output")
    parser.add_argument("--prepare-on", default="cpu", help="where qvsplit resizes images: cpu or device")
    parser.add_argument("--without-copies", action="store_true", help="qvsplit copies between two batches, unpinned")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--photos", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.plot:
        told.plot[0].write_text(plot(told.plot[1:]))
        return
    if told.child:
        began = time.perf_counter()
        CHILDREN[told.child](told, began)
        return
    with tempfile.TemporaryDirectory() as folder:
        _compare(told, Path(folder))


def _compare(told: argparse.Namespace, folder: Path) -> None:
    photos = folder / "photos"
    make_photographs(photos, told.images, told.largest)
    if told.few:
        make_photographs(folder / "few", told.few, told.largest)
    names = told.contenders.split(",")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in [*names, "limit"]}
    for number in range(told.rounds):
        for name in rounds:
            few = name == "usual" and told.few
            result = _run(told, name, folder / "few" if few else photos, folder / f"{name}-{number}")
            rounds[name].append(result)
            print(f"round {number + 1}: {name} {json.dumps(result)}", file=sys.stderr, flush=True)
    _tell(told, rounds, _agreement(folder, names), sum(f.stat().st_size for f in photos.iterdir()))


def make_photographs(folder: Path, number: int, largest: int) -> None:
    """That many JPEG files: real photographs, cut and scaled to mixed sizes, no two alike."""
    from PIL import Image

    from tests.support.photographs import photographs

    folder.mkdir()
    sources = [Image.open(path).convert("RGB") for path in photographs()]
    for index in range(number):
        source = sources[index % len(sources)]
        width, height = SIDES[index % len(SIDES)]
        if width * height > largest:
            scale = (largest / (width * height)) ** 0.5
            width, height = int(width * scale), int(height * scale)
        brighter, cut = divmod(index // len(sources), 40)  # of later turns the margin is another, then the light
        source = source.crop((cut, cut, source.width - cut, source.height - cut))
        source = source.point(lambda value, brighter=brighter: min(255, value + brighter)) if brighter else source
        source.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index:05}.jpg", quality=90)


def _run(told: argparse.Namespace, name: str, photos: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.extract", str(told.checkpoint), "--child", name, "--photos", str(photos),
               "--out", str(out), "--dtype", told.dtype, "--device", told.device, "--prepare-on", told.prepare_on,
               *(["--without-copies"] if told.without_copies else [])]  # fmt: skip
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"} if told.without_bf16 else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _tell(
    told: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]], agreement: dict[str, float], size: int
) -> None:
    median = {
        name: {
            key: statistics.median(one[key] for one in results)
            for key, value in results[0].items()
            if isinstance(value, (int, float))
        }
        for name, results in rounds.items()
    }
    limit = median["limit"]
    print(f"\n{told.images} photographs, {limit['patches']:,.0f} patches, {size / 1e6:.1f} MB of JPEG")
    print(f"{limit['flops'] / 1e12:.2f} TFLOP at {limit['rate'] / 1e9:,.0f} GFLOP/s: {limit['seconds']:.1f} s; "
          f"the best rate there is: {limit['best_rate'] / 1e9:,.0f} GFLOP/s")  # fmt: skip
    heads = ("", "images/s", "patches/s", "of limit", "of best", "start-up", "peak", "features off by")
    print("{:12} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9}  {}".format(*heads))
    for name in [*rounds][:-1]:
        one = median[name]
        one["of_limit"] = one["patches"] / one["seconds"] / (limit["patches"] / limit["seconds"])
        one["of_best"] = one["of_limit"] * limit["rate"] / limit["best_rate"]
        print(
            f"{name:12} {one['images'] / one['seconds']:10.3f} {one['patches'] / one['seconds']:10.0f} "
            f"{one['of_limit']:9.2f} {one['of_best']:9.2f} {one['startup']:8.1f}s "
            f"{one['peak_bytes'] / 1e9:7.2f}GB  {agreement[name]:.1e}"
        )
    rate = {name: median[name]["patches"] / median[name]["seconds"] for name in rounds}
    ratios = {name: rate["qvsplit"] / rate[name] for name in rounds if name != "qvsplit" and "qvsplit" in rate}
    for name, ratio in ratios.items():
        print(f"qvsplit against {name}: {ratio:.2f} x")
    stages = rounds["qvsplit"][-1]["stages"] if "qvsplit" in rounds else {}
    print("qvsplit's stages, last round: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items()))
    print(json.dumps({
        "bench": "extract", "machine": platform.machine(), "cores": os.cpu_count(), "device": told.device,
        "dtype": told.dtype, "without_bf16": told.without_bf16, "images": told.images, "rounds": told.rounds,
        "median": median, "ratios": ratios, "agreement": agreement, "stages": stages,
    }))  # fmt: skip


def plot(logs: list[Path]) -> str:
    """Bars of patches a second, a group for the last line of each of these logs."""
    from bench.plot import bars

    groups = {}
    for log in logs:
        told = json.loads(log.read_text().splitlines()[-1])
        name = {"cpu": f"{told['cores']} CPU cores"}.get(told["device"], told["device"])
        units = ", bfloat16 units off" if told["without_bf16"] else ""
        groups[f"{told['dtype']}, {name}{units}"] = {
            contender: one["patches"] / one["seconds"] for contender, one in told["median"].items()
        }
    return bars(groups, title="Patches a second, from JPEG files to a shard", unit="patches/s")


def _agreement(folder: Path, names: list[str]) -> dict[str, float]:
    """The largest distance of an image's features from plain's, relative to their norm."""
    import numpy as np

    def embeds(name: str) -> dict[str, Any]:
        out = folder / f"{name}-0"
        if name != "qvsplit":
            return {path.stem: np.load(path) for path in out.glob("*.npy")}
        import qvsplit

        store = qvsplit.open_store(out)
        return {Path(row.path).stem: store.features(row)["pooler_output"].astype(np.float32) for row in store}

    if "plain" not in names:
        return dict.fromkeys(names, float("nan"))
    mine = embeds("plain")
    off = {}
    for name in names:
        theirs = embeds(name)
        assert theirs.keys() <= mine.keys()
        off[name] = max(
            float(np.linalg.norm(one - mine[key]) / np.linalg.norm(mine[key])) for key, one in theirs.items()
        )
    return off


# -------------------------------------------------------------------------------------------------- the contenders


def _done(began: float, ready: float, photos: Path, patches: int, device: str, **more: Any) -> None:
    from qvsplit.runtime.memory import peak_memory

    now = time.perf_counter()
    told = {
        "seconds": now - ready, "startup": ready - began, "images": len(list(photos.iterdir())), "patches": patches,
        "peak_bytes": peak_memory(),
    }  # fmt: skip
    if device.startswith("cuda"):
        import torch

        told["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(told | more))


def usual(told: argparse.Namespace, began: float) -> None:
    """The script that users pass on to one another: QwenLM/Qwen3-VL#287; here in bfloat16 on any machine."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    told.out.mkdir()
    config = AutoConfig.from_pretrained(told.checkpoint)
    model = Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(told.checkpoint.glob("*.safetensors")):
        weights |= load_file(file)
    model.load_state_dict({k.replace("visual.", ""): v for k, v in weights.items() if "visual." in k}, strict=False)
    model = model.to(told.device, torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(told.checkpoint)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}
    ready, patches = time.perf_counter(), 0
    for path in sorted(told.photos.iterdir()):
        inputs = processor.image_processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            pixels = inputs["pixel_values"].to(told.device, torch.bfloat16)
            embeds = model(pixels, grid_thw=inputs["image_grid_thw"].to(told.device)).pooler_output
        patches += len(pixels)
        np.save(told.out / f"{path.stem}.npy", embeds.float().cpu().numpy())
    _done(began, ready, told.photos, patches, told.device)


def plain(told: argparse.Namespace, began: float) -> None:
    """Transformers alone, written well."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    told.out.mkdir()
    device, dtype = torch.device(told.device), getattr(torch, told.dtype)
    model, info = Qwen2VisionTransformerPretrainedModel.from_pretrained(
        told.checkpoint, config=AutoConfig.from_pretrained(told.checkpoint).vision_config, dtype=dtype,
        key_mapping={r"^(model\.)?visual\.": ""}, output_loading_info=True,
    )  # fmt: skip
    assert not info["missing_keys"]
    model = model.to(device).eval()
    processor = AutoProcessor.from_pretrained(told.checkpoint).image_processor
    processor.size = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}

    class Pictures(torch.utils.data.Dataset):  # type: ignore[misc]
        def __init__(self, paths: list[Path]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[Path, Any]:
            with Image.open(self.paths[index]) as image:
                return self.paths[index], processor(images=[image.convert("RGB")], return_tensors="pt")

    def together(batch: list[tuple[Path, Any]]) -> tuple[list[Path], torch.Tensor, torch.Tensor]:
        paths, inputs = zip(*batch, strict=True)
        return (
            list(paths),
            torch.cat([i["pixel_values"] for i in inputs]),
            torch.cat([i["image_grid_thw"] for i in inputs]),
        )

    loader = torch.utils.data.DataLoader(
        Pictures(sorted(told.photos.iterdir())), batch_size=PLAIN_BATCH[device.type], collate_fn=together,
        num_workers=min(8, os.cpu_count() or 1), pin_memory=device.type == "cuda",
    )  # fmt: skip
    ready, patches = time.perf_counter(), 0
    for paths, pixels, grid in loader:
        with torch.inference_mode():
            embeds = model(pixels.to(device, non_blocking=True).to(dtype), grid_thw=grid.to(device)).pooler_output
        patches += len(pixels)
        counts = (grid.prod(-1) // 4).tolist()
        for path, one in zip(paths, torch.split(embeds.float().cpu(), counts), strict=True):
            np.save(told.out / f"{path.stem}.npy", one.numpy())
    _done(began, ready, told.photos, patches, told.device)


def qvsplit(told: argparse.Namespace, began: float) -> None:
    """The command, in this process."""
    import contextlib
    import io

    from typer.testing import CliRunner

    from qvsplit.cli import app
    from qvsplit.pipeline import devices

    if told.without_copies:
        vars(devices)["copies_to"] = lambda device: None
    words = ["extract", str(told.photos), "--model", str(told.checkpoint), "--out", str(told.out), "--json",
             "--prepare-on", told.prepare_on]  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        done = CliRunner().invoke(app, [*words, "--dtype", told.dtype, "--device", told.device])
    if done.exit_code:
        raise SystemExit(done.output)
    summary = json.loads(done.stdout.splitlines()[-1])
    now = time.perf_counter()
    startup = summary["stages"]["scan"] + summary["stages"]["load"]  # imports included
    _done(began, now - (summary["seconds"] - startup), told.photos, summary["tokens"] * 4, told.device,
          stages=summary["stages"], whole_seconds=now - began, startup=now - began - (summary["seconds"] - startup),
          **{key: summary[key] for key in ("decoder_memory_bytes", "bytes")})  # fmt: skip


def limit(told: argparse.Namespace, began: float) -> None:
    """What is to be done, and the best rate of a matrix product, over the encoder's shapes and a square one."""
    import torch

    vision = json.loads((told.checkpoint / "config.json").read_text())["vision_config"]
    width, depth = int(vision["embed_dim"]), int(vision["depth"])
    device, dtype = torch.device(told.device), getattr(torch, told.dtype)
    rows = 5120 if device.type == "cpu" else 16384
    shapes = ((rows, width, 4 * width), (rows, 4 * width, width), (rows, width, 3 * width), (4096, 4096, 4096))
    rates = [_rates(*shape, device, dtype) for shape in shapes]
    plain_rate, best_rate = max(rate[0] for rate in rates), max(max(rate) for rate in rates)
    grids = list(_grids(told))
    flops = sum(encoder_flops(h * w, width=width, depth=depth, out=int(vision["hidden_size"])) for h, w in grids)
    told_all = {
        "seconds": flops / plain_rate,
        "rate": plain_rate,
        "best_rate": best_rate,
        "flops": flops,
        "startup": 0.0,
    }
    print(json.dumps(told_all | {"images": len(grids), "patches": sum(h * w for h, w in grids), "peak_bytes": 0}))


def encoder_flops(patches: int, *, width: int, depth: int, out: int) -> int:
    """FLOPs of the matrix products for one image of so many patches: nothing else is counted."""
    linear = 2 * patches * 12 * width**2  # queries, keys, values; projection; the MLP
    attention = 4 * patches**2 * width
    embed, merger = 2 * patches * 1176 * width, 2 * (patches // 4) * 4 * width * (4 * width + out)
    return depth * (linear + attention) + embed + merger


def _rates(rows: int, inner: int, columns: int, device: Any, dtype: Any) -> list[float]:
    """FLOP/s of one matrix product: torch's own, and on a CPU oneDNN's on a packed weight."""
    import torch

    from qvsplit.kernels.packed_linear import PackedLinear, can_pack

    linear = torch.nn.Linear(inner, columns, device=device, dtype=dtype).requires_grad_(False)
    ways = [linear, PackedLinear(linear)] if device.type == "cpu" and can_pack(dtype) else [linear]
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    medians = []
    with torch.inference_mode():
        for way in ways:
            seconds = []
            for _ in range(8):
                began = time.perf_counter()
                way(x)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            medians.append(statistics.median(seconds[1:]))
    return [2 * rows * inner * columns / seconds for seconds in medians]


def _grids(told: argparse.Namespace) -> Iterator[tuple[int, int]]:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for path in sorted(told.photos.iterdir()):
        width, height = Image.open(path).size
        tall, wide = smart_resize(height, width, 28, 3136, MAX_PIXELS)
        yield tall // 14, wide // 14


CHILDREN = {"usual": usual, "plain": plain, "qvsplit": qvsplit, "limit": limit}

if __name__ == "__main__":
    main()
