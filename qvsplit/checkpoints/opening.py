"""Open the checkpoint that a user names: a folder, a hub name, or the small one in the package.

From the hub, only the files of the half asked for are fetched, and of a vision encoder's files only its own bytes; a
language model is most of its files (of 7 B parameters, over nine tenths), so that this would save less there. Reads
JSON and safetensors headers only: no tensor; torch and transformers only for a family that is not listed, and that
once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvsplit.checkpoints.adapter import Adapter, open_adapter
from qvsplit.checkpoints.checkpoint import Checkpoint, Half
from qvsplit.checkpoints.families import FAMILIES, Family
from qvsplit.checkpoints.files import INDEX_FILE, NOTE_FILE, SINGLE_FILE, has_weights, read_json, tensor_files
from qvsplit.checkpoints.hub import fetch_files, fetch_small_files, hub_errors, looks_like_hub_name
from qvsplit.checkpoints.ranges import fetch_encoder, headers_on_hub, kept_encoder, ranges_are_wanted
from qvsplit.checkpoints.tensors import TensorPlace
from qvsplit.errors import ModelError, some_of

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
DEMO_MODEL = "demo"  # the small checkpoint that lies in the package
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"


class _HalfAlone(ModelError):
    """The model was found, and is one half alone, which does not do."""


def open_checkpoint(
    model: str | os.PathLike[str],
    half: Half,
    *,
    revision: str | None = None,
    adapter: Adapter | None = None,
) -> Checkpoint:
    """Open the checkpoint that `model` names, with every file of `half` on this disk.

    Args:
        model: A folder, or a hub name, optionally with a revision behind an `@`, or `demo`, the small checkpoint in the
            package (a folder of that name is `./demo`).
        half: What will be loaded from it.
        revision: The revision of a hub name that has none behind an `@`.
        adapter: The PEFT adapter that is merged into it when it is loaded.

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
    if half != "encoder" and not checkpoint.language_names:
        raise _HalfAlone(_half_alone(checkpoint, half, missing="language model", held="vision encoder"))
    if half != "language" and not checkpoint.encoder_names:
        raise _HalfAlone(_half_alone(checkpoint, half, missing="vision encoder", held="language model"))
    return checkpoint if adapter is None else replace(checkpoint, adapter=adapter)


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
    return _with_family(folder, model, model.partition("@")[2] or None, read_json(folder / "config.json"), {})


def open_headers(model: str | os.PathLike[str]) -> tuple[Checkpoint, dict[str, TensorPlace]]:
    """Open the checkpoint that `model` names as far as its small files and headers say: no weight need be there.

    Of a hub name nothing else is fetched.

    Returns:
        The checkpoint, any of whose files may be absent, and where its tensors lie: those whose header is at hand.
        Where no header is, and no index, its `files` is empty.

    Raises:
        ModelError: There is no such model, its family is unknown, its weights are pickled, or a header is damaged.
    """
    text = os.fspath(model)
    folder = _local_folder(text)
    if folder is not None:
        name, revision = text if text == DEMO_MODEL else str(folder), None
        config = read_json(folder / "config.json")
        files = tensor_files(folder) if has_weights(folder) else {}
        checkpoint = _with_family(folder, name, revision, config, files)
        return checkpoint, checkpoint.places([name for name in files if (folder / files[name]).is_file()])
    if not looks_like_hub_name(text):
        raise ModelError(f"no model folder at {text}; give a folder with config.json, or a hub name")
    folder = fetch_small_files(text, None)
    name, commit = text.partition("@")[0], folder.name
    known = (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()
    files = tensor_files(folder) if known else {}
    with hub_errors(text):
        places = headers_on_hub(name, commit, set(files.values()) or {SINGLE_FILE}, small=folder)
    files = files or {tensor: place.file.name for tensor, place in places.items()}
    return _with_family(folder, name, commit, read_json(folder / "config.json"), files), places


def default_model() -> str:
    """Give what is taken where nobody names a model and no store has its own."""
    return os.environ.get("QVSPLIT_MODEL") or DEFAULT_MODEL


def choose_checkpoint(
    asked: str | None,
    half: Half,
    *,
    own: str,
    revision: str | None,
    adapter: str | None = None,
    own_adapter: str | None = None,
) -> Checkpoint:
    """Open the checkpoint asked for; else a store's own; else QVSPLIT_MODEL or the default.

    Args:
        asked: The model that the user names.
        half: What will be loaded from it.
        own: The model that the store's rows name; empty where there is no store yet.
        revision: Of the store's own model.
        adapter: The adapter that the user names.
        own_adapter: The adapter that the store's rows name: taken with the store's own model alone.

    Raises:
        ModelError: It cannot be opened; the message says where the name is from if it is a store's.
    """
    merged = None if adapter is None else open_adapter(adapter)  # first: it is small
    if asked is not None or not own:
        return open_checkpoint(asked or default_model(), half, adapter=merged)
    if adapter is None and own_adapter is not None:
        merged = _own_adapter(own_adapter)
    try:
        return open_checkpoint(own, half, revision=revision, adapter=merged)
    except _HalfAlone as error:
        raise ModelError(f"the store was made with {own}: {error}") from None
    except ModelError as error:
        raise ModelError(f"the store was made with {own}: {error}; if it has moved, name it as `model`") from None


def _own_adapter(adapter: str) -> Adapter:
    try:
        return open_adapter(adapter)
    except ModelError as error:
        raise ModelError(
            f"the store was made with the adapter {adapter}: {error}; if it has moved, name it as `adapter`"
        ) from None


def _half_alone(checkpoint: Checkpoint, half: Half, *, missing: str, held: str) -> str:
    """Say that a checkpoint is one half alone, and what to do: its note may name the model that it is of."""
    model = read_json(checkpoint.folder / NOTE_FILE, optional=True).get("model")
    if not isinstance(model, str):
        return f"{checkpoint.folder} holds no {missing}; name a checkpoint that has one as `model`"
    other = "" if half == "both" else f", or the folder of its {missing},"
    return f"{checkpoint.folder} holds no {missing}; it is the {held} of {model} alone: name that{other} as `model`"


def _local_folder(model: str) -> Path | None:
    if model == DEMO_MODEL:
        return DEMO_FOLDER
    return Path(model).resolve() if os.path.isdir(model) else None


def _from_folder(folder: Path, *, name: str, revision: str | None) -> Checkpoint:
    config = read_json(folder / "config.json")  # first: a folder without one is no model, whatever else it lacks
    return _with_family(folder, name, revision, config, tensor_files(folder))


def _with_family(
    folder: Path, name: str, revision: str | None, config: Mapping[str, Any], files: Mapping[str, str]
) -> Checkpoint:
    """Give a checkpoint with what is known of its family; of one that is not listed a dry run says it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{folder / 'config.json'} names no model_type; is it a model folder?")
    checkpoint = Checkpoint(folder, name, revision, config, files, FAMILIES.get(model_type, Family(model_type)))
    if model_type in FAMILIES:
        return checkpoint
    from qvsplit.checkpoints.tracing import traced_family

    return replace(checkpoint, family=traced_family(checkpoint))


def _from_hub(text: str, half: Half, revision: str | None) -> Checkpoint:
    """Fetch (or find in the hub's cache) the small files, then the safetensors files of `half`.

    All files come from the one commit that the first look found, so that a push in between mixes nothing.
    """
    folder = fetch_small_files(text, revision)
    commit = folder.name
    if half == "encoder" and ranges_are_wanted() and (alone := _encoder_alone(text, folder)) is not None:
        return alone
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        fetch_files(text, [SINGLE_FILE], commit)
    checkpoint = _from_folder(folder, name=text.partition("@")[0], revision=commit)
    fetch_files(text, checkpoint.file_names(half), commit)
    return checkpoint


def _encoder_alone(text: str, folder: Path) -> Checkpoint | None:
    """Give the encoder of a hub name without the rest of its files; None where whole ones are here, or are to be taken.

    Args:
        text: The hub name, with its revision if it has one.
        folder: Of its small files, in the hub's cache.
    """
    name, commit = text.partition("@")[0], folder.name
    if (folder / SINGLE_FILE).is_file():
        return None

    def opened(files: Mapping[str, str]) -> Checkpoint:
        return _with_family(folder, name, commit, read_json(folder / "config.json"), files)

    file_names = [SINGLE_FILE]
    indexed = tensor_files(folder) if (folder / INDEX_FILE).is_file() else None
    if indexed is not None:
        checkpoint = opened(indexed)
        if checkpoint.has("encoder"):
            return None
        file_names = checkpoint.file_names("encoder")

    def encoders_of(found: Mapping[str, str]) -> dict[str, str]:
        checkpoint = opened(found if indexed is None else indexed)
        return {tensor: checkpoint.files[tensor] for tensor in checkpoint.encoder_names}

    kept = kept_encoder(name, commit, encoders_of, small=folder)
    # of files of which some are here whole, as the language model needs them, the others hold little but the encoder
    if kept is None and file_names and not any((folder / file).is_file() for file in file_names):
        with hub_errors(text):
            kept = fetch_encoder(name, commit, file_names, encoders_of, small=folder)
    return None if kept is None else _from_folder(kept, name=name, revision=commit)
