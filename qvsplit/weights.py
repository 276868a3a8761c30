"""Load one half of a checkpoint, strictly, and say which tower it is.

`load_vision` reads exactly the tower's bytes, tensor by tensor, straight into place; `load_language` goes through
transformers' own loader on a view of the checkpoint, so that device maps and quantised weights work as they do
there. Either way every tensor of the half must be there, of the right shape, with none left over: there is no
path on which a weight stays random.

`fingerprint` names a tower: its tensors (names without prefix, dtypes, shapes, every byte), its vision config and
its processor's settings. Nothing of the language half is in it, nor how the tensors are cut into files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoint import (
    INDEX_FILE,
    NOTE_FILE,
    SAFETENSORS_BYTES,
    SINGLE_FILE,
    Checkpoint,
    Half,
    TensorPlace,
    open_checkpoint,
    read_json,
)
from qvsplit.errors import ModelError, WeightsError
from qvsplit.families import FAMILIES, Family, settings_of
from qvsplit.hf import transformers_errors

if TYPE_CHECKING:
    import torch

# Tensors that may be read but not yet hashed: bounds the memory beside the weights themselves.
HASH_BACKLOG = 2
# The small files that decide a prompt or an answer
DECIDING_FILES = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json",
})  # fmt: skip
FRESH_NS = 2_000_000_000  # a file younger than this may still change within its timestamp's resolution


@dataclass(frozen=True)
class VisionWeights:
    """The tower with its weights, in evaluation mode, and what it took to load it."""

    module: Any  # the family's vision class; see Family.vision_class
    fingerprint: str
    bytes_read: int  # of tensor data; the headers' few kB are not counted
    tower_bytes: int  # of the tower in the compute dtype


# ---------------------------------------------------------------------------------------------------- vision half


def load_vision(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> VisionWeights:
    """The vision half alone, on `device`, in `dtype`; reads nothing but its bytes, once.

    Raises WeightsError unless the checkpoint holds exactly the tower's tensors, ModelError for damaged files.
    """
    places = tower_places(checkpoint)
    module = _empty_tower(checkpoint, dtype)
    _check_tensors(places, {name: tuple(t.shape) for name, t in module.state_dict().items()}, checkpoint)
    state: dict[str, torch.Tensor] = {}
    digests: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1, "qvsplit-hash") as pool:
        for name, raw in _read_in_file_order(places):
            digests[name] = pool.submit(_digest, raw)
            state[name] = _as_tensor(raw, places[name]).to(device=device, dtype=dtype)
            _wait_for_backlog(digests)
            del raw
        summary = _fingerprint_of(checkpoint, places, {name: d.result() for name, d in digests.items()})
    # assign: the tensors become the parameters, so the tower is never in memory twice
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)
    module.to(device)  # the rotary buffers, which no checkpoint holds; transformers too computes them on the CPU
    return VisionWeights(
        module=module.eval(),
        fingerprint=summary,
        bytes_read=sum(place.size for place in places.values()),
        tower_bytes=sum(t.numel() * t.element_size() for t in state.values()),
    )


def tower_places(checkpoint: Checkpoint) -> dict[str, TensorPlace]:
    """Where the tower's tensors lie, by their name without prefix. ModelError if there is no tower, or two."""
    names = checkpoint.tower_names
    if not names:
        raise ModelError(f"{checkpoint.folder} holds no vision tower; it is needed to look at pictures")
    bare = {name: _strip_prefix(name, checkpoint.family) for name in names}
    if len(set(bare.values())) < len(bare):
        raise ModelError(f"{checkpoint.folder} holds two vision towers under different prefixes; keep one")
    return {bare[name]: place for name, place in checkpoint.places(names).items()}


def stored_dtype(checkpoint: Checkpoint, half: Half) -> str:
    """Torch's name of the dtype that most of `half` is stored in, e.g. `bfloat16`."""
    names = checkpoint.tower_names if half == "vision" else checkpoint.language_names
    sizes: dict[str, int] = {}
    for place in checkpoint.places(names).values():
        sizes[place.dtype] = sizes.get(place.dtype, 0) + place.size
    if not sizes:
        raise ModelError(f"{checkpoint.folder} holds no {half} half")
    return torch_dtype_name(max(sizes, key=lambda dtype: sizes[dtype]))


def torch_dtype_name(safetensors_name: str) -> str:
    """Torch's name of a safetensors dtype. ModelError for one that nothing is computed in."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    if safetensors_name not in names:
        raise ModelError(f"its tensors are stored as {safetensors_name}; qvsplit reads {', '.join(names)}")
    return names[safetensors_name]


def _strip_prefix(name: str, family: Family) -> str:
    prefix = next(p for p in sorted(family.vision_prefixes, key=len, reverse=True) if name.startswith(p))
    return name.removeprefix(prefix)


def _empty_tower(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The tower's module without memory for its parameters; its buffers are real, as no checkpoint holds them."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    with transformers_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            return _class_of(checkpoint.family, checkpoint.family.vision_class)._from_config(
                config.vision_config, dtype=dtype, attn_implementation="sdpa"
            )


def _check_tensors(
    places: Mapping[str, TensorPlace], expected: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> None:
    wrong = {
        name: f"{list(places[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in places and places[name].shape != shape
    }
    missing, unexpected = expected.keys() - places.keys(), places.keys() - expected.keys()
    if missing or unexpected or wrong:
        raise WeightsError(str(checkpoint.folder), missing=missing, unexpected=unexpected, misshapen=wrong)


def _read_in_file_order(places: Mapping[str, TensorPlace]) -> Iterator[tuple[str, bytearray]]:
    """Each tensor's bytes, in the order they lie on disk, read (not mapped: mapped pages would count as memory)."""
    by_file: dict[Path, list[str]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, []).append(name)
    for file, names in sorted(by_file.items()):
        with file.open("rb", buffering=0) as stream:
            for name in sorted(names, key=lambda n: places[n].start):
                yield name, _read_exactly(stream.fileno(), places[name])


def _read_exactly(descriptor: int, place: TensorPlace) -> bytearray:
    raw = bytearray(place.size)
    view, done = memoryview(raw), 0
    while done < place.size:
        got = os.preadv(descriptor, [view[done:]], place.start + done)
        if got == 0:
            raise ModelError(f"{place.file} ends inside tensor {place.name}; download the checkpoint again")
        done += got
    return raw


def _as_tensor(raw: bytearray, place: TensorPlace) -> torch.Tensor:
    import torch

    dtype = getattr(torch, torch_dtype_name(place.dtype))
    if place.size != SAFETENSORS_BYTES[place.dtype] * int(torch.Size(place.shape).numel()):
        raise ModelError(f"{place.file}: tensor {place.name} has {place.size} bytes, which its shape denies")
    return torch.frombuffer(raw, dtype=dtype).view(place.shape)


# --------------------------------------------------------------------------------------------------- fingerprint


def fingerprint(checkpoint: Checkpoint, *, cache: Path | None = None) -> str:
    """The tower's fingerprint, 64 hex digits. Reads the tower once, then remembers it under `cache`.

    Remembered by path, size, inode and times of every file it depends on; a file touched within the last two seconds
    is not trusted. Needs neither torch nor transformers.
    """
    began = time.time_ns()
    places = tower_places(checkpoint)
    entry = (cache or cache_folder()) / "fingerprints" / f"{_stat_key(_files_behind(checkpoint, places))}.json"
    known = _remembered(entry)
    if known is not None:
        return known
    summary = _fingerprint_of(checkpoint, places, _digests(places))
    _remember(entry, summary, [*_files_behind(checkpoint, places)], began)
    return summary


def language_fingerprint(checkpoint: Checkpoint) -> str:
    """What names the language half: its tensors, and the small files that decide prompts and answers. 64 hex digits.

    Reads that half once, then remembers as `fingerprint` does. Unlike a tower's it does not survive other names or
    settings that mean the same: it only says that answers given before are still this model's.
    """
    began = time.time_ns()
    places = checkpoint.places(checkpoint.language_names)
    deciding = sorted(path for path in _small_files(checkpoint) if path.name in DECIDING_FILES)
    files = sorted({*(place.file for place in places.values()), *deciding})
    entry = cache_folder() / "fingerprints" / f"{_stat_key(files, 'language')}.json"
    known = _remembered(entry)
    if known is None:
        small = [
            [path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(_small_files(checkpoint))
        ]
        digests = _digests(places)
        tensors = [[name, places[name].dtype, list(places[name].shape), digests[name]] for name in sorted(places)]
        known = hashlib.sha256(canonical_json({"tensors": tensors, "files": small})).hexdigest()
        _remember(entry, known, files, began)
    return known


def _digests(places: Mapping[str, TensorPlace]) -> dict[str, str]:
    """SHA-256 of every tensor's bytes."""
    with ThreadPoolExecutor(1, "qvsplit-hash") as pool:
        digests: dict[str, Future[str]] = {}
        for name, raw in _read_in_file_order(places):
            digests[name] = pool.submit(_digest, raw)
            _wait_for_backlog(digests)
        return {name: digest.result() for name, digest in digests.items()}


def noted_fingerprint(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of the tower that a language-only checkpoint of ours came with, as noted in it."""
    noted = read_json(checkpoint.folder / NOTE_FILE, optional=True).get("tower")
    return noted if isinstance(noted, str) else None


def cache_folder() -> Path:
    """Where qvsplit keeps what it can always compute again: `QVSPLIT_CACHE`, else XDG's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("QVSPLIT_CACHE") or os.path.join(base, "qvsplit"))


def canonical_json(value: Any) -> bytes:
    """`value` as JSON with sorted keys and no white space; whole floats become integers, so 4 and 4.0 agree."""
    return json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(raw: bytearray) -> str:
    return hashlib.sha256(raw).hexdigest()


def _wait_for_backlog(digests: Mapping[str, Future[str]]) -> None:
    pending = list(digests.values())
    if len(pending) > HASH_BACKLOG:
        pending[-1 - HASH_BACKLOG].result()


def _fingerprint_of(checkpoint: Checkpoint, places: Mapping[str, TensorPlace], digests: Mapping[str, str]) -> str:
    family = checkpoint.family
    content = {
        "family": family.model_type,
        "vision": settings_of(checkpoint.vision_config, family.vision_settings),
        "processor": settings_of(checkpoint.processor_config, family.processor_settings),
        "tensors": [[name, places[name].dtype, list(places[name].shape), digests[name]] for name in sorted(places)],
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _files_behind(checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> list[Path]:
    configs = ("config.json", "processor_config.json", "preprocessor_config.json", INDEX_FILE)
    return [
        *sorted({place.file for place in places.values()}),
        *(checkpoint.folder / name for name in configs if (checkpoint.folder / name).is_file()),
    ]


def _stat_key(files: list[Path], *of: str) -> str:
    stats = []
    for path in files:
        status = path.stat()
        stats.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns))
    return hashlib.sha256(canonical_json(["fingerprint 1", stats, *of])).hexdigest()


def _remembered(entry: Path) -> str | None:
    try:
        known = json.loads(entry.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours: computed again
    return known if isinstance(known, str) and len(known) == 64 else None


def _remember(entry: Path, summary: str, files: list[Path], began: int) -> None:
    """Not where a file is so fresh that it may change unseen. A cache that cannot be written only costs time."""
    if began - max(path.stat().st_mtime_ns for path in files) <= FRESH_NS:
        return
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as temporary:
            json.dump({"fingerprint": summary}, temporary)
        os.replace(temporary.name, entry)
    except OSError:
        return


# ------------------------------------------------------------------------------------------------- language half


def load_language(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, device_map: str | Mapping[str, Any] | None = None
) -> Any:
    """The whole model's class without its tower, with its weights, in evaluation mode.

    `dtype` None keeps the checkpoint's. Loaded by transformers' `from_pretrained`, so `device_map` and a
    quantised checkpoint's own settings work as they do there. WeightsError unless every tensor fits.
    """
    with _view(checkpoint) as folder, transformers_errors(checkpoint):
        model, info = _language_class(checkpoint.family.model_type).from_pretrained(
            folder,
            dtype=dtype if dtype is not None else "auto",
            device_map=device_map,
            key_mapping=dict(checkpoint.family.language_renames),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed below with everything else that is wrong
        )
    misshapen = {str(entry[0]): f"{list(entry[1])} instead of {list(entry[2])}" for entry in info["mismatched_keys"]}
    if info["missing_keys"] or info["unexpected_keys"] or misshapen:
        raise WeightsError(
            str(checkpoint.folder),
            missing=info["missing_keys"],
            unexpected=info["unexpected_keys"],
            misshapen=misshapen,
        )
    if info.get("error_msgs"):
        raise ModelError(f"{checkpoint.folder} cannot be loaded: {info['error_msgs'][0]}")
    model.name_or_path = str(checkpoint.folder)
    model.requires_grad_(False)
    return model.eval()


def load_whole(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The unsplit model, as transformers loads it: the reference that `verify` holds an album against."""
    with transformers_errors(checkpoint):
        model, info = _class_of(checkpoint.family, checkpoint.family.whole_class).from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise WeightsError(str(checkpoint.folder), missing=info["missing_keys"], unexpected=info["unexpected_keys"])
    return model.to(device).eval()


def save_language_half(model: str | os.PathLike[str] | Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write the language half of `model` (folder or hub name) into the new `folder`, with a note of its tower.

    The note lets `ask` accept albums of that tower where the tower is not at hand. Tensors keep their names, dtypes
    and files; one file's worth of them is in memory at a time. ModelError if `folder` exists.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, "both")
    tower = fingerprint(checkpoint)
    target = Path(folder)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{target} cannot be made ({error.strerror}); give a new folder") from None
    for path in _small_files(checkpoint):
        (target / path.name).write_bytes(path.read_bytes())
    for file_name in checkpoint.file_names("language"):
        names = [n for n in checkpoint.language_names if checkpoint.files[n] == file_name]
        with safe_open(checkpoint.folder / file_name, framework="pt") as source:
            save_file({n: source.get_tensor(n) for n in names}, target / file_name, metadata={"format": "pt"})
    _write_index(checkpoint, target)
    (target / NOTE_FILE).write_text(json.dumps({"half": "language", "tower": tower}) + "\n")


@contextmanager
def _view(checkpoint: Checkpoint) -> Iterator[Path]:
    """A passing folder of links that shows transformers only the files, and the index entries, of the language half.

    Without it `from_pretrained` would ask for files that hold nothing but tower, and that need not be here.
    """
    with tempfile.TemporaryDirectory(prefix="qvsplit-") as name:
        folder = Path(name)
        for path in [*_small_files(checkpoint), *(checkpoint.folder / f for f in checkpoint.file_names("language"))]:
            (folder / path.name).symlink_to(path)
        _write_index(checkpoint, folder)
        yield folder


def _small_files(checkpoint: Checkpoint) -> list[Path]:
    return [
        path
        for path in checkpoint.folder.iterdir()
        if path.suffix in {".json", ".jinja", ".txt", ".model"} and path.name not in {INDEX_FILE, NOTE_FILE}
    ]


def _write_index(checkpoint: Checkpoint, folder: Path) -> None:
    files = {name: checkpoint.files[name] for name in checkpoint.language_names}
    if set(files.values()) != {SINGLE_FILE}:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@functools.cache
def _language_class(model_type: str) -> Any:
    """The whole model's class, built without its tower. Keys are renamed by `Family.language_renames`."""
    family = FAMILIES[model_type]
    whole = _class_of(family, family.whole_class)

    class LanguageHalf(whole):  # type: ignore[misc, valid-type]
        _keys_to_ignore_on_load_unexpected = (rf"^model\.{family.vision_module}\.",)

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            delattr(self.model, family.vision_module)

    LanguageHalf.__module__ = whole.__module__  # where transformers looks for things beside a class
    return LanguageHalf


def _class_of(family: Family, name: str) -> Any:
    return getattr(importlib.import_module(family.modeling), name)
