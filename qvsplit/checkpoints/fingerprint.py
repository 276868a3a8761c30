"""Name the halves of a checkpoint by what is in them, and remember the names.

An encoder's fingerprint is over its tensors (names without prefix, dtypes, shapes, every byte), its vision config and
its processor's settings: the fields that the family names, else what the checkpoint's files have. Nothing of the
language model is in it, nor how the tensors are cut into files. Needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from qvsplit.checkpoints.adapter import CONFIG_FILE, MODEL_PREFIX, WEIGHTS_FILE
from qvsplit.checkpoints.cache import cache_folder
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import without_root
from qvsplit.checkpoints.files import INDEX_FILE, NOTE_FILE, read_json, small_files
from qvsplit.checkpoints.tensors import TensorPlace, read_tensors
from qvsplit.errors import ConfigError
from qvsplit.runtime.atomic_files import written_whole

# Tensors that may be read but not yet hashed: bounds the memory beside the weights themselves.
HASH_BACKLOG = 2
CACHE_FORMAT = "fingerprint 2"  # another wherever what a fingerprint is over changes: none of before is remembered
FRESH_NS = 2_000_000_000  # a file younger than this may still change within its timestamp's resolution


def encoder_fingerprint(checkpoint: Checkpoint, *, cache: Path | None = None) -> str:
    """Give the encoder's fingerprint, 64 hex digits. Reads the encoder once, then remembers it.

    Remembered by path, size, inode and times of every file it depends on; a file touched within the last two seconds
    is not trusted.

    Args:
        checkpoint: Its encoder's files must be on this disk.
        cache: The folder to remember it in; None is `cache_folder()`.

    Raises:
        ModelError: There is no encoder, or a file is damaged.
    """
    began = time.time_ns()
    places = checkpoint.encoder_places()
    files = _files_of_encoder(checkpoint, places)
    entry = _cache_entry(files, cache or cache_folder())
    known = _remembered(entry)
    if known is None:
        known = _fingerprint_of_files(checkpoint, places, _digests(places))
        _remember(entry, known, files, began)
    return with_adapter(known, checkpoint, "encoder")


def fingerprint_of(checkpoint: Checkpoint, places: Mapping[str, TensorPlace], digests: Mapping[str, str]) -> str:
    """Compute the encoder's fingerprint from the SHA-256 of each of its tensors, both by names in the checkpoint."""
    return with_adapter(_fingerprint_of_files(checkpoint, places, digests), checkpoint, "encoder")


def _fingerprint_of_files(checkpoint: Checkpoint, places: Mapping[str, TensorPlace], digests: Mapping[str, str]) -> str:
    bare = checkpoint.family.bare_name
    content = {
        "family": checkpoint.family.model_type,
        "vision": checkpoint.vision_settings,
        "processor": checkpoint.processor_settings,
        "tensors": _listed(
            {bare(name): place for name, place in places.items()},
            {bare(name): digest for name, digest in digests.items()},
        ),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def language_fingerprint(checkpoint: Checkpoint) -> str:
    """Give what names the language model: its tensors, and its small files, any of which may decide an answer.

    64 hex digits. Reads that half once, then remembers as `encoder_fingerprint` does. Unlike an encoder's it does not
    survive other names or settings that mean the same: it only says that answers given before are still this model's.
    """
    began = time.time_ns()
    places = checkpoint.places(checkpoint.language_names)
    small = sorted(small_files(checkpoint.folder))
    files = sorted({*(place.file for place in places.values()), *small})
    entry = _cache_entry(files, cache_folder(), "language")
    known = _remembered(entry)
    if known is None:
        content = {
            "tensors": _listed(places, _digests(places)),
            "files": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in small],
        }
        known = hashlib.sha256(canonical_json(content)).hexdigest()
        _remember(entry, known, files, began)
    return with_adapter(known, checkpoint, "language")


def noted_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Read the fingerprint of the encoder that a language-only checkpoint of ours came with; None if none is noted."""
    noted = read_json(checkpoint.folder / NOTE_FILE, optional=True).get("encoder")
    return with_adapter(noted, checkpoint, "encoder") if isinstance(noted, str) else None


def with_adapter(fingerprint: str, checkpoint: Checkpoint, half: Literal["encoder", "language"]) -> str:
    """Give the fingerprint of a half with the checkpoint's adapter on it: the same if that has nothing for the half."""
    digest = adapter_digest(checkpoint, half)
    if digest is None:
        return fingerprint
    return hashlib.sha256(canonical_json({"without adapter": fingerprint, "adapter": digest})).hexdigest()


def adapter_digest(checkpoint: Checkpoint, half: Literal["encoder", "language"]) -> str | None:
    """Give what names all that a checkpoint's adapter does to a half: its tensors of that, and how they are merged.

    64 hex digits; None where there is no adapter, or it has nothing for this half. Remembered as fingerprints are.
    """
    adapter = checkpoint.adapter
    names = [] if adapter is None else adapter.names_of(checkpoint.family, half)
    if adapter is None or not names:
        return None
    began = time.time_ns()
    files = [adapter.folder / CONFIG_FILE, adapter.folder / WEIGHTS_FILE]
    entry = _cache_entry(files, cache_folder(), f"adapter of the {half}", checkpoint.family.model_type)
    known = _remembered(entry)
    if known is None:
        places = {name: adapter.places[name] for name in names}
        bare = {name: without_root(name.removeprefix(MODEL_PREFIX)) for name in names}
        tensors = _listed(
            {bare[name]: place for name, place in places.items()},
            {bare[name]: digest for name, digest in _digests(places).items()},
        )
        content = {"settings": adapter.settings, "tensors": tensors}
        known = hashlib.sha256(canonical_json(content)).hexdigest()
        _remember(entry, known, files, began)
    return known


def check_adapter_unchanged(checkpoint: Checkpoint, adapter: str | None, digest: str | None, what: str) -> None:
    """Raise ConfigError where a checkpoint's adapter is that of this name, and no longer what it was.

    Args:
        checkpoint: With its adapter, if any.
        adapter: What named the adapter that features were made with.
        digest: What it did to the encoder then, as `adapter_digest` has it.
        what: The features, for the message: `the store was`.
    """
    mine = checkpoint.adapter
    if mine is not None and mine.label == adapter and adapter_digest(checkpoint, "encoder") != digest:
        raise ConfigError(
            f"{adapter} has changed since {what} made with it; bring its old files back, or extract again with "
            "`rebuild=True`"
        )


def canonical_json(value: Any) -> bytes:
    """Write `value` as JSON with sorted keys and no white space; whole floats become integers, so 4 and 4.0 agree."""
    return json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


class TensorHasher:
    """Hash tensors in a thread of its own while the next are read: `with TensorHasher() as hasher`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "qvsplit-hash")
        self._digests: dict[str, Future[str]] = {}

    def __enter__(self) -> TensorHasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def add(self, name: str, raw: bytearray) -> None:
        """Have `raw` hashed. Waits while HASH_BACKLOG tensors before it are not hashed yet."""
        self._digests[name] = self._pool.submit(_sha256, raw)
        pending = list(self._digests.values())
        if len(pending) > HASH_BACKLOG:
            pending[-1 - HASH_BACKLOG].result()

    def digests(self) -> dict[str, str]:
        """Give the SHA-256 of every tensor, in hex."""
        return {name: digest.result() for name, digest in self._digests.items()}


def _sha256(raw: bytearray) -> str:
    return hashlib.sha256(raw).hexdigest()


def _digests(places: Mapping[str, TensorPlace]) -> dict[str, str]:
    with TensorHasher() as hasher:
        for name, raw in read_tensors(places):
            hasher.add(name, raw)
        return hasher.digests()


def _listed(places: Mapping[str, TensorPlace], digests: Mapping[str, str]) -> list[Any]:
    return [[name, places[name].dtype, list(places[name].shape), digests[name]] for name in sorted(places)]


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ------------------------------------------------------------------------------------------------------------- cache


def _files_of_encoder(checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> list[Path]:
    configs = ("config.json", "processor_config.json", "preprocessor_config.json", INDEX_FILE)
    return [
        *sorted({place.file for place in places.values()}),
        *(checkpoint.folder / name for name in configs if (checkpoint.folder / name).is_file()),
    ]


def _cache_entry(files: list[Path], cache: Path, *of: str) -> Path:
    stats = []
    for path in files:
        status = path.stat()
        stats.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns))
    key = hashlib.sha256(canonical_json([CACHE_FORMAT, stats, *of])).hexdigest()
    return cache / "fingerprints" / f"{key}.json"


def _remembered(entry: Path) -> str | None:
    try:
        known = json.loads(entry.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours: computed again
    return known if isinstance(known, str) and len(known) == 64 else None


def _remember(entry: Path, known: str, files: list[Path], began: int) -> None:
    """Write `known`, but not where a file is so fresh that it may change unseen. An error only costs time later."""
    if began - max(path.stat().st_mtime_ns for path in files) <= FRESH_NS:
        return
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(entry, durable=False) as stream:
            stream.write(json.dumps({"fingerprint": known}).encode())
