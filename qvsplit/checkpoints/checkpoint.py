"""A checkpoint on disk: its configuration, its family, and which file holds which tensor.

Takes a folder or a hub name; gives a `Checkpoint` whose files for the half asked for are all on this disk. From the
hub, only the files of that half are fetched. Reads JSON and safetensors headers only: no tensor, no torch, no
transformers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvsplit.checkpoints.families import FAMILIES, Family
from qvsplit.checkpoints.files import INDEX_FILE, SINGLE_FILE, read_json, tensor_files
from qvsplit.checkpoints.hub import fetch_files, fetch_small_files, looks_like_hub_name
from qvsplit.checkpoints.tensors import TensorPlace, read_header, torch_dtype_name
from qvsplit.errors import ModelError, some_of

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
DEMO_MODEL = "demo"  # the small checkpoint that lies in the package
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"

Half = Literal["encoder", "language", "both"]
_HALF_NAMES: Mapping[Half, str] = {"encoder": "vision encoder", "language": "language model", "both": "tensors"}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint. Files of the half that was not asked for may be absent.

    Attributes:
        folder: Where its files lie.
        name: The hub name, or the folder as an absolute path.
        revision: The commit hash on the hub; None for a folder.
        config: The content of config.json.
        files: The file name of every tensor, by the tensor's name.
        family: What its `model_type` is.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    family: Family = field(repr=False)

    @property
    def encoder_names(self) -> list[str]:
        """List the names of the vision encoder's tensors, as the checkpoint has them."""
        return [name for name in self.files if name.startswith(self.family.encoder_prefixes)]

    @property
    def language_names(self) -> list[str]:
        """List the names of all other tensors."""
        return [name for name in self.files if not name.startswith(self.family.encoder_prefixes)]

    def tensor_names(self, half: Half) -> list[str]:
        """List the names of the tensors of `half`."""
        if half == "both":
            return list(self.files)
        return self.encoder_names if half == "encoder" else self.language_names

    def file_names(self, half: Half) -> list[str]:
        """List the names of the safetensors files that hold `half`, sorted."""
        return sorted({self.files[name] for name in self.tensor_names(half)})

    def has(self, half: Half) -> bool:
        """Say whether every file of `half` is on this disk, and there is at least one."""
        names = self.file_names(half)
        return bool(names) and all((self.folder / name).is_file() for name in names)

    @property
    def vision_config(self) -> Mapping[str, Any]:
        """Give the `vision_config` of config.json."""
        section = self.config.get("vision_config")
        return section if isinstance(section, dict) else {}

    @property
    def processor_config(self) -> Mapping[str, Any]:
        """Give the image processor's settings, from today's file or the hub's older one; empty if there is neither."""
        nested = read_json(self.folder / "processor_config.json", optional=True).get("image_processor")
        if isinstance(nested, dict):
            return nested
        return read_json(self.folder / "preprocessor_config.json", optional=True)

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Give the fewest and the most pixels that the checkpoint's own processor resizes to."""
        config = self.processor_config
        size = config.get("size")
        size = size if isinstance(size, dict) else {}
        low = config.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        high = config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        return int(low), int(high)

    def places(self, names: list[str]) -> dict[str, TensorPlace]:
        """Find where the named tensors lie, from their files' headers. ModelError for a damaged or missing file."""
        places: dict[str, TensorPlace] = {}
        for file_name in sorted({self.files[name] for name in names}):
            header = read_header(self.folder / file_name)
            wanted = [name for name in names if self.files[name] == file_name]
            missing = [name for name in wanted if name not in header]
            if missing:
                raise ModelError(
                    f"{self.folder / file_name} has no tensor {some_of(missing)}, which {INDEX_FILE} says it holds; "
                    "download the checkpoint again"
                )
            places |= {name: header[name] for name in wanted}
        return places

    def encoder_places(self) -> dict[str, TensorPlace]:
        """Find where the encoder's tensors lie, by their names without prefix.

        Raises:
            ModelError: There is no encoder, or there are two; or a file is damaged or missing.
        """
        names = self.encoder_names
        if not names:
            raise ModelError(f"{self.folder} holds no vision encoder; it is needed to encode images")
        bare = {name: self.family.without_encoder_prefix(name) for name in names}
        if len(set(bare.values())) < len(bare):
            raise ModelError(f"{self.folder} holds two vision encoders under different prefixes; keep one")
        return {bare[name]: place for name, place in self.places(names).items()}

    def stored_dtype(self, half: Half) -> str:
        """Give torch's name of the dtype that most of `half` is stored in. ModelError if there is nothing in it."""
        sizes: dict[str, int] = {}
        for place in self.places(self.tensor_names(half)).values():
            sizes[place.dtype] = sizes.get(place.dtype, 0) + place.size
        if not sizes:
            raise ModelError(f"{self.folder} holds no {_HALF_NAMES[half]}")
        return torch_dtype_name(max(sizes, key=lambda dtype: sizes[dtype]))


def open_checkpoint(model: str | os.PathLike[str], half: Half, *, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint that `model` names, with every file of `half` on this disk.

    Args:
        model: A folder, or a hub name, optionally with a revision behind an `@`, or `demo`, the small checkpoint in the
            package (a folder of that name is `./demo`).
        half: What will be loaded from it.
        revision: The revision of a hub name that has none behind an `@`.

    Raises:
        ModelError: There is no such model, its family is unknown, files are missing, or its weights are pickled.
    """
    text = os.fspath(model)
    folder = _local_folder(text)
    if folder is not None:
        checkpoint = _from_folder(folder, name=text if text == DEMO_MODEL else str(folder), revision=None)
    elif looks_like_hub_name(text):
        checkpoint = _from_hub(text, half, revision)
    else:
        raise ModelError(
            f"no model folder at {text}; give a folder with config.json, or a hub name such as {DEFAULT_MODEL}, or demo"
        )
    absent = [name for name in checkpoint.file_names(half) if not (checkpoint.folder / name).is_file()]
    if absent:
        raise ModelError(f"{checkpoint.folder} lacks {some_of(absent)}, which {INDEX_FILE} names; download it again")
    return checkpoint


def read_settings(model: str) -> Checkpoint:
    """Open the checkpoint that `model` names as far as its small files say: none of its weights need be there.

    Returns:
        A checkpoint whose `files` is empty.

    Raises:
        ModelError: There is no such model, or its family is unknown.
    """
    folder = _local_folder(model)
    if folder is None and looks_like_hub_name(model):
        folder = fetch_small_files(model, None)
    if folder is None:
        raise ModelError(f"no model folder at {model}; give a folder with config.json, or a hub name")
    config = read_json(folder / "config.json")
    return Checkpoint(folder, model, model.partition("@")[2] or None, config, {}, _family_of(config, folder))


def default_model() -> str:
    """Give what is taken where nobody names a model and no store has its own."""
    return os.environ.get("QVSPLIT_MODEL") or DEFAULT_MODEL


def choose_checkpoint(asked: str | None, half: Half, *, own: str, revision: str | None) -> Checkpoint:
    """Open the checkpoint asked for; else a store's own; else QVSPLIT_MODEL or the default.

    Args:
        asked: The model that the user names.
        half: What will be loaded from it.
        own: The model that the store's rows name; empty where there is no store yet.
        revision: Of the store's own model.

    Raises:
        ModelError: It cannot be opened; the message says where the name is from if it is a store's.
    """
    if asked is not None or not own:
        return open_checkpoint(asked or default_model(), half)
    try:
        return open_checkpoint(own, half, revision=revision)
    except ModelError as error:
        raise ModelError(f"the store was made with {own}: {error}; if it has moved, name it as `model`") from None


def _local_folder(model: str) -> Path | None:
    if model == DEMO_MODEL:
        return DEMO_FOLDER
    return Path(model).resolve() if os.path.isdir(model) else None


def _from_folder(folder: Path, *, name: str, revision: str | None) -> Checkpoint:
    config = read_json(folder / "config.json")
    family = _family_of(config, folder)
    return Checkpoint(folder, name, revision, config, tensor_files(folder), family)


def _family_of(config: Mapping[str, Any], folder: Path) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ModelError(
        f"{folder} is a {model_type!r} model, and qvsplit knows {', '.join(sorted(FAMILIES))}; "
        "name a checkpoint of one of these as `model`"
    )


def _from_hub(text: str, half: Half, revision: str | None) -> Checkpoint:
    """Fetch (or find in the hub's cache) the small files, then the safetensors files of `half`.

    All files come from the one commit that the first look found, so that a push in between mixes nothing.
    """
    folder = fetch_small_files(text, revision)
    commit = folder.name
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        fetch_files(text, [SINGLE_FILE], commit)
    checkpoint = _from_folder(folder, name=text.partition("@")[0], revision=commit)
    fetch_files(text, checkpoint.file_names(half), commit)
    return checkpoint
