"""A checkpoint on disk: its configuration, its family, and which file holds which tensor.

Takes a folder or a hub name; gives a `Checkpoint` whose files for the half asked for are all on this disk.
Reads JSON and safetensors headers only: no tensor, no torch, no transformers. A hub name goes through
huggingface_hub (its cache, its token, its offline switch) and only the files of the half asked for are fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvsplit.errors import ModelError, some_of
from qvsplit.families import FAMILIES, Family

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
DEMO_MODEL = "demo"  # the small checkpoint that lies in the package
DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoint"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NOTE_FILE = "qvsplit.json"  # what our own language-only checkpoints say of the tower they came with
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

Half = Literal["vision", "language", "both"]

# safetensors' names for the dtypes a checkpoint may hold, and their bytes a value
SAFETENSORS_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies: `size` bytes from `start` in `file`, row-major, little-endian."""

    name: str  # as the checkpoint has it, with its prefix
    file: Path
    dtype: str  # safetensors' name: F32, BF16, F16, …
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint. `files` maps every tensor name to its file name; files of the other half may be absent."""

    folder: Path
    name: str  # hub name, or the folder as an absolute path
    revision: str | None  # commit hash on the hub; None for a folder
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    family: Family = field(repr=False)

    @property
    def tower_names(self) -> list[str]:
        """Names of the vision half's tensors, as the checkpoint has them."""
        return [name for name in self.files if name.startswith(self.family.vision_prefixes)]

    @property
    def language_names(self) -> list[str]:
        """Names of all other tensors."""
        return [name for name in self.files if not name.startswith(self.family.vision_prefixes)]

    def file_names(self, half: Half) -> list[str]:
        """Names of the safetensors files that hold `half`, sorted."""
        names = {"vision": self.tower_names, "language": self.language_names, "both": list(self.files)}[half]
        return sorted({self.files[name] for name in names})

    def has(self, half: Half) -> bool:
        """Whether every file of `half` is on this disk, and there is at least one."""
        names = self.file_names(half)
        return bool(names) and all((self.folder / name).is_file() for name in names)

    @property
    def vision_config(self) -> Mapping[str, Any]:
        """The `vision_config` of config.json."""
        section = self.config.get("vision_config")
        return section if isinstance(section, dict) else {}

    @property
    def processor_config(self) -> Mapping[str, Any]:
        """The image processor's settings, from today's or the hub's older file; empty if there is neither."""
        nested = read_json(self.folder / "processor_config.json", optional=True).get("image_processor")
        return (
            nested if isinstance(nested, dict) else read_json(self.folder / "preprocessor_config.json", optional=True)
        )

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """The fewest and the most pixels that the checkpoint's own processor resizes to, by today's names or older."""
        told = self.processor_config
        size = told.get("size")
        size = size if isinstance(size, dict) else {}
        low = told.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        high = told.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        return int(low), int(high)

    def places(self, names: list[str]) -> dict[str, TensorPlace]:
        """Where the named tensors lie, from their files' headers. ModelError for a damaged or missing file."""
        places: dict[str, TensorPlace] = {}
        for file_name in sorted({self.files[name] for name in names}):
            header = read_header(self.folder / file_name)
            places |= {name: header[name] for name in names if self.files[name] == file_name and name in header}
            lost = [name for name in names if self.files[name] == file_name and name not in header]
            if lost:
                raise ModelError(
                    f"{self.folder / file_name} has no tensor {some_of(lost)}, which {INDEX_FILE} says it holds; "
                    "download the checkpoint again"
                )
        return places


def open_checkpoint(model: str | os.PathLike[str], half: Half, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `model` names, with every file of `half` on this disk.

    `model` is a folder, or a hub name, optionally with a revision behind an `@`, or `demo`, the small checkpoint in the
    package (a folder of that name is `./demo`). Raises ModelError where there is no such model, where it is of an
    unknown family, or where its weights are pickled.
    """
    text = os.fspath(model)
    if text == DEMO_MODEL:
        checkpoint = _from_folder(DEMO_FOLDER, name=DEMO_MODEL, revision=None)
    elif os.path.isdir(text):
        checkpoint = _from_folder(Path(text).resolve(), name=None, revision=None)
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


def default_model() -> str:
    """What is taken where nobody names a model and no album has its own."""
    return os.environ.get("QVSPLIT_MODEL") or DEFAULT_MODEL


def read_settings(model: str) -> Checkpoint:
    """The checkpoint that `model` names as far as its small files tell: none of its weights need be there.

    `files` is empty. ModelError where there is no such model.
    """
    name, _, revision = model.partition("@")
    if model == DEMO_MODEL:
        folder = DEMO_FOLDER
    elif os.path.isdir(model):
        folder = Path(model).resolve()
    elif looks_like_hub_name(model):
        from huggingface_hub import snapshot_download

        with _hub_errors(model):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(SMALL_FILES)))
    else:
        raise ModelError(f"no model folder at {model}; give a folder with config.json, or a hub name")
    config = read_json(folder / "config.json")
    return Checkpoint(folder, model, revision or None, config, {}, _family_of(config, folder))


def choose_checkpoint(asked: str | None, half: Half, *, own: str, revision: str | None) -> Checkpoint:
    """The checkpoint asked for; else the `own` of an album, as its rows name it; else QVSPLIT_MODEL or the default.

    `own` is empty where there is no album yet. ModelError, which says where the name is from if it is an album's.
    """
    if asked is not None or not own:
        return open_checkpoint(asked or default_model(), half)
    try:
        return open_checkpoint(own, half, revision=revision)
    except ModelError as error:
        raise ModelError(f"the album was made with {own}: {error}; if it has moved, name it with --model") from None


def looks_like_hub_name(text: str) -> bool:
    """Whether `text` has the form of a hub name, owner/name, and not that of a path."""
    owner, slash, rest = text.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and owner[0] not in ".~"


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in `path`; `{}` if it is not there and `optional`. ModelError if it is anything else."""
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


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Every tensor's place in a safetensors `file`.

    The safetensors library checks the file first (lengths, overlaps, truncation); the offsets, which it does not
    give away, are then read from the same header: 8 bytes of length, little-endian, and JSON.
    Format: github.com/huggingface/safetensors, README.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too large")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ModelError(f"{file.parent} lacks {file.name}; download the checkpoint again") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged or cut short ({error}); download it again") from None
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: TensorPlace(
            name, file, entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }  # fmt: skip


def _from_folder(folder: Path, *, name: str | None, revision: str | None) -> Checkpoint:
    config = read_json(folder / "config.json")
    family = _family_of(config, folder)
    return Checkpoint(
        folder=folder,
        name=name or str(folder),
        revision=revision,
        config=config,
        files=_file_map(folder),
        family=family,
    )


def _family_of(config: Mapping[str, Any], folder: Path) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ModelError(
        f"{folder} is a {model_type!r} model, and qvsplit knows {', '.join(sorted(FAMILIES))}; "
        "point --model at a checkpoint of one of these"
    )


def _file_map(folder: Path) -> dict[str, str]:
    """Every tensor's file name. Where both a single file and an index exist transformers takes the single file."""
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


def _from_hub(text: str, half: Half, revision: str | None) -> Checkpoint:
    """Fetch (or find in the hub's cache) the small files, then the safetensors files of `half`.

    All files come from the one commit that the first look found, so that a push in between mixes nothing.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    name, _, asked = text.partition("@")
    revision = asked or revision
    with _hub_errors(text):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES)))
    commit = folder.name  # the hub's cache names a snapshot's folder by its commit
    if not (folder / "config.json").is_file():
        raise ModelError(f"{text} has no config.json: it is not a model that transformers can load; {_ELSEWHERE}")
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        with _hub_errors(text):
            hf_hub_download(name, SINGLE_FILE, revision=commit)
    checkpoint = _from_folder(folder, name=name, revision=commit)
    for file_name in checkpoint.file_names(half):
        with _hub_errors(text):
            hf_hub_download(name, file_name, revision=commit)
    return checkpoint


_ELSEWHERE = "give a checkpoint's folder with --model DIR"
_OR_DEMO = f"{_ELSEWHERE}, or see the whole way on the small model in the package: qvsplit demo"


class _hub_errors:  # noqa: N801 - used as a verb: `with _hub_errors(name):`
    """Turns what huggingface_hub raises into one line that says what to do next."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ModelError) or not isinstance(error, Exception):
            return
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            raise ModelError(
                f"{self.name} is gated: accept its terms on the hub and log in with `hf auth login`"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError):
            raise ModelError(
                f"the hub has no model {self.name} (or it is private: `hf auth login`); {_ELSEWHERE}"
            ) from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise ModelError(f"{self.name}: the hub has no such revision of it") from None
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            raise ModelError(
                f"{self.name} is not in the hub's cache and the hub cannot be reached; {_OR_DEMO}"
            ) from None
        if isinstance(error, errors.EntryNotFoundError):
            raise ModelError(
                f"{self.name} has no {SINGLE_FILE} or {INDEX_FILE} on the hub (pickled weights are never opened)"
            ) from None
        # whatever else the network, the disk or the hub's client stumbles over
        raise ModelError(
            f"{self.name} cannot be fetched from the hub ({error or type(error).__name__}); {_OR_DEMO}"
        ) from None
