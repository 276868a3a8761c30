"""The files of a checkpoint's folder: their names, its JSON, and which file holds which tensor. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qvsplit.checkpoints.tensors import read_header
from qvsplit.errors import ModelError, some_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NOTE_FILE = "qvsplit.json"  # what our own language-only checkpoints say of the encoder they came with
MODELSCOPE_NOTE = "configuration.json"  # which task its hub lists a model under; no model reads it
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 << 20


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read the JSON object in `path`; `{}` if it is not there and `optional`. ModelError if it is anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is over {MAX_JSON_BYTES >> 20} MiB: not a configuration file")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelError(f"{path.parent} has no {path.name}; is it a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; download it again")
    return content


def small_files(folder: Path) -> list[Path]:
    """List the files that are no weights and say nothing of where these lie: configs, tokenizer, templates."""
    return [
        path
        for path in folder.iterdir()
        if path.suffix in {".json", ".jinja", ".txt", ".model"}
        and path.name not in {INDEX_FILE, NOTE_FILE, MODELSCOPE_NOTE}
    ]


def has_weights(folder: Path) -> bool:
    """Say whether a folder has weights of any form, or an index of them."""
    return any(path.suffix in {".safetensors", *PICKLES} or path.name == INDEX_FILE for path in folder.iterdir())


def tensor_files(folder: Path) -> dict[str, str]:
    """Map every tensor's name to its file's. Where a single file and an index exist, the single file is taken.

    That is what transformers does. ModelError if there are no usable safetensors files, or only pickled weights.
    """
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE_FILE), SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if isinstance(weight_map, dict) and weight_map and all(_is_plain_name(f) for f in weight_map.values()):
            return weight_map
        raise ModelError(f"{folder / INDEX_FILE} has no usable weight_map; download it again")
    pickled = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights ({some_of(pickled, 2)}), which can run code when loaded and are "
            "never opened; use the checkpoint's safetensors version"
        )
    loose = sorted(entry.name for entry in folder.glob("*.safetensors"))
    if loose:
        raise ModelError(f"{folder} has {some_of(loose, 2)} but no {INDEX_FILE} that says what they hold; download it")
    raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the checkpoint again")


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")
