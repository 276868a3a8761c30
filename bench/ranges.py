"""Bytes that `extract` moves from a hub, for the true shapes of Qwen2-VL: the encoder's, of how many.

    python -m bench.ranges [--models 2B 7B 72B] [--folder DIR]

A hub on loopback (tests/support/hub_server.py) serves each checkpoint from sparse files with true headers: names,
shapes, bfloat16, files of up to 4 GB and an index, as the hub's own are cut; tokenizer files are zeros of the true
lengths. The encoder is opened by its hub name with an empty cache, and what the server has sent is counted: headers,
index and tokenizer, too. About 1.4 GB of disk are used at a time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvsplit.checkpoints.files import INDEX_FILE
from qvsplit.checkpoints.tensors import TensorPlace
from qvsplit.checkpoints.writing import header_of
from tests.support.hub_server import NAME, Hub

FILE_BYTES = 4_000_000_000  # Qwen2-VL 7B has 5 files so, 72B has 38
# hidden_size, intermediate_size, layers, heads, key and value heads, vocabulary, whether the output layer is tied
SHAPES = {
    "2B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
# bytes of the hub's small files
SMALL = {"tokenizer.json": 7_031_645, "vocab.json": 2_776_833, "merges.txt": 1_671_853, "tokenizer_config.json": 4_190,
         "generation_config.json": 244, "preprocessor_config.json": 347, "chat_template.json": 1_050}  # fmt: skip


def config_of(model: str) -> Any:
    """The config of a Qwen2-VL of true shape."""
    from transformers import Qwen2VLConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[model]
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": hidden, "num_heads": 16, "mlp_ratio": 4}
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied,
        architectures=["Qwen2VLForConditionalGeneration"],
    )  # fmt: skip


def tensors_of(config: Any) -> Iterator[TensorPlace]:
    """Every tensor by the hub's name, in the order of the model's modules: the encoder first."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from tests.support.checkpoints import hub_name

    with torch.device("meta"):
        state = Qwen2VLForConditionalGeneration(config).state_dict()
    for name, tensor in sorted(state.items(), key=lambda item: "visual" not in item[0]):
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            size = 2 * tensor.numel()
            yield TensorPlace(hub_name(name), Path(), "BF16", tuple(tensor.shape), 0, size)


def make(folder: Path, model: str) -> dict[str, int]:
    """A checkpoint of sparse files with true headers; gives the bytes of its encoder and of its safetensors files."""
    config = config_of(model)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name, size in SMALL.items():
        (folder / name).write_bytes(b"{}" if name == "preprocessor_config.json" else bytes(size))
    parts: list[list[TensorPlace]] = [[]]
    for place in tensors_of(config):
        if parts[-1] and sum(one.size for one in parts[-1]) + place.size > FILE_BYTES:
            parts.append([])
        parts[-1].append(place)
    weight_map: dict[str, str] = {}
    for number, places in enumerate(parts, 1):
        file = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header = header_of({place.name: place for place in sorted(places, key=lambda place: place.name)})
        file.write_bytes(header)
        os.truncate(file, len(header) + sum(place.size for place in places))
        weight_map |= {place.name: file.name for place in places}
    index = {"metadata": {"total_size": sum(place.size for part in parts for place in part)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
    encoders = [place for part in parts for place in part if place.name.startswith("visual.")]
    holding = {weight_map[place.name] for place in encoders}
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    small = sum(size for name, size in sizes.items() if not name.endswith(".safetensors"))
    return {
        "encoder": sum(place.size for place in encoders),
        "whole_files": small + sum(sizes[name] for name in holding),
        "checkpoint": sum(sizes.values()),
    }


def measure(folder: Path, home: Path) -> dict[str, int]:
    """Open the encoder of a checkpoint by its hub name, with empty caches: bytes sent and files or ranges asked for."""
    from qvsplit.checkpoints.opening import open_checkpoint

    with Hub(folder) as hub, tempfile.TemporaryDirectory(dir=home) as cache:
        point_at(hub.url, Path(cache))
        opened = open_checkpoint(NAME, "encoder")
        if opened.folder.name != "encoder":
            raise SystemExit("whole files were fetched")
        return {
            "moved": hub.sent.total(),
            "requests": len(hub.asked),
            "ranges": sum(a.range is not None for a in hub.asked),
        }


def point_at(url: str, home: Path) -> None:
    """Point huggingface_hub at the hub on loopback for the rest of this process."""
    import pytest

    from tests.support import hub_server

    hub_server.point_at(pytest.MonkeyPatch(), url, home)


def table(rows: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The lines of a table in Markdown; bytes in GB of 10⁹."""
    yield "| Qwen2-VL | encoder, GB | moved, GB | ranges | files that hold it, GB | of these | checkpoint, GB | of it |"
    yield "|--|--:|--:|--:|--:|--:|--:|--:|"
    for model, row in rows.items():
        files, whole = row["whole_files"], row["checkpoint"]
        yield (
            f"| {model} | {row['encoder'] / 1e9:.3f} | {row['moved'] / 1e9:.3f} | {row['ranges']} | {files / 1e9:.3f} "
            f"| {row['moved'] / files:.0%} | {whole / 1e9:.2f} | {row['moved'] / whole:.1%} |"
        )


def main() -> None:
    """Parse, make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    rows: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-ranges-") as home:
        for model in options.models:
            folder = Path(home) / model
            sizes = make(folder, model)
            rows[model] = sizes | measure(folder, Path(home))
            shutil.rmtree(folder)
    print("\n".join(table(rows)))
    print(json.dumps({"bench": "ranges", "models": rows}))


if __name__ == "__main__":
    main()
