"""Write the halves of a checkpoint as checkpoints of their own: bytes are copied, nothing is loaded. No torch.

Each half has all small files of the checkpoint, and the tensors that are its own by the family's rules, under the names
that they have; a tensor that both halves need is in both. Each is a model folder like any other.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import without_root
from qvsplit.checkpoints.files import small_files
from qvsplit.checkpoints.fingerprint import encoder_fingerprint, noted_fingerprint
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.tensors import TensorPlace
from qvsplit.checkpoints.writing import check_space, fill_checkpoint, new_folder
from qvsplit.errors import UsageError
from qvsplit.runtime import arguments
from qvsplit.runtime.atomic_files import disk_errors

OneHalf = Literal["encoder", "language"]
OnBytes = Callable[[int, int], None]  # how many bytes of how many have been written


@dataclass(frozen=True)
class WrittenHalf:
    """One half that was written.

    Attributes:
        folder: Where it is.
        tensors: How many tensors are in it.
        bytes: Of tensors.
    """

    folder: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Split:
    """What `split_checkpoint` wrote.

    Attributes:
        encoder: None where it was not asked for.
        language_model: Likewise.
        fingerprint: The encoder's, which the language model's folder notes; None where no encoder was at hand.
        left_out: How many tensors are of neither half, by module: an audio encoder, say.
    """

    encoder: WrittenHalf | None
    language_model: WrittenHalf | None
    fingerprint: str | None
    left_out: Mapping[str, int]


def split_checkpoint(
    model: str | os.PathLike[str] | Checkpoint,
    *,
    encoder: str | os.PathLike[str] | None = None,
    language_model: str | os.PathLike[str] | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> Split:
    """Write the vision encoder, the language model or both of `model` as checkpoints of their own.

        qvsplit.split_checkpoint("Qwen/Qwen2-VL-2B-Instruct", language_model="language")

    `extract` takes the encoder's folder as its model and makes the same stores as with the whole; `ask` takes the
    language model's, which notes the encoder's fingerprint, so that stores of another encoder are refused. Tensors
    keep their names, dtypes and bytes; a few megabytes of them are in memory at a time. The folders appear when all is
    written, or not at all.

    Args:
        model: A folder, a hub name, or a checkpoint without an adapter; of a hub name only what the halves asked for
            need is fetched, all of one commit.
        encoder: A new folder for the encoder.
        language_model: A new folder for the language model.
        on_bytes: Hears how many bytes of how many have been written.

    Raises:
        UsageError: No folder is given, or one exists, or both are one; or the checkpoint has an adapter.
        ModelError: The model cannot be opened, lacks a half that was asked for, or its encoder is quantised itself.
        DiskError: There is not enough room for both, or a folder cannot be written.
    """
    targets = _targets(encoder, language_model)
    checkpoints = _opened(model, targets)
    found = {half: _places(checkpoints[half], half) for half in targets}
    fingerprint = _fingerprint(model, checkpoints["language"]) if "language" in found else None
    sizes = {half: sum(place.size for place in places.values()) for half, places in found.items()}
    done, total = 0, sum(sizes.values())

    def on_written(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    on_bytes(0, total)
    with ExitStack() as stack:  # both appear or none: what failed is to be run again as it was
        unfinished = {half: stack.enter_context(new_folder(folder)) for half, folder in targets.items()}
        check_space({folder: sizes[half] for half, folder in unfinished.items()})
        for half, places in found.items():
            checkpoint = checkpoints[half]
            note = {"half": half, "model": checkpoint.name, "revision": checkpoint.revision}
            if half == "language" and fingerprint is not None:
                note["encoder"] = fingerprint
            small = small_files(checkpoint.folder)
            with disk_errors(targets[half], kept="nothing of what was written is left"):
                fill_checkpoint(unfinished[half], places, small=small, note=note, on_written=on_written)
    written = {half: WrittenHalf(str(targets[half]), len(places), sizes[half]) for half, places in found.items()}
    return Split(written.get("encoder"), written.get("language"), fingerprint, _left_out(checkpoints.values()))


def _targets(encoder: object, language_model: object) -> dict[OneHalf, Path]:
    """Give the folder of each half that is asked for. UsageError where one cannot be that."""
    given: dict[OneHalf, tuple[str, object]] = {
        "encoder": ("encoder", encoder),
        "language": ("language_model", language_model),
    }
    targets = {
        half: Path(arguments.a_path(name, folder)) for half, (name, folder) in given.items() if folder is not None
    }
    if not targets:
        raise UsageError("nothing to write: give a new folder as `encoder`, as `language_model`, or one for each")
    for folder in targets.values():
        if os.path.lexists(folder):
            raise UsageError(f"{folder} exists, and nothing is overwritten; give a new folder")
    if len(targets) == 2:
        one, other = (folder.resolve() for folder in targets.values())
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UsageError("`encoder` and `language_model` name one folder, or one within the other; give two")
    return targets


def _opened(model: str | os.PathLike[str] | Checkpoint, halves: Iterable[OneHalf]) -> dict[OneHalf, Checkpoint]:
    """Open a checkpoint with the files of each half: of a hub name all of the commit that the first look found.

    The language model comes first: its files, whole, mostly hold the encoder, which then is not fetched by itself as
    well.
    """
    if isinstance(model, Checkpoint):
        if model.adapter is not None:
            raise UsageError(
                f"{model.name} has the adapter {model.adapter.label}, and halves are written without one; give the "
                "model alone, and the adapter to `extract` and `ask`"
            )
        return dict.fromkeys(halves, model)
    name = arguments.a_path("model", model, "a checkpoint's folder or hub name")
    opened: dict[OneHalf, Checkpoint] = {}
    for half in sorted(halves, reverse=True):
        opened[half] = open_checkpoint(name, half)
        name = _this_commit(opened[half]) or name
    return opened


def _this_commit(checkpoint: Checkpoint) -> str | None:
    """Give the hub name that is this very checkpoint; None for a folder."""
    return None if checkpoint.revision is None else f"{checkpoint.name}@{checkpoint.revision}"


def _places(checkpoint: Checkpoint, half: OneHalf) -> dict[str, TensorPlace]:
    """Find a half's tensors. ModelError where `extract` would refuse the encoder."""
    if half == "encoder":
        return checkpoint.plain_encoder_places()
    return checkpoint.places(checkpoint.language_names)


def _fingerprint(model: str | os.PathLike[str] | Checkpoint, checkpoint: Checkpoint) -> str | None:
    """Name the encoder that the language model of `checkpoint` came with; None where nothing at hand says it."""
    if checkpoint.has("encoder"):
        return encoder_fingerprint(checkpoint)
    noted, name = noted_fingerprint(checkpoint), _this_commit(checkpoint)
    if noted is None and name is not None and not isinstance(model, Checkpoint):
        return encoder_fingerprint(open_checkpoint(name, "encoder"))
    return noted


def _left_out(checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
    """Count the tensors that are of neither half, by module."""
    names = {
        name
        for checkpoint in checkpoints
        for name in checkpoint.files.keys() - {*checkpoint.encoder_names, *checkpoint.language_names}
    }
    return dict(sorted(Counter(without_root(name).partition(".")[0] for name in names).items()))
