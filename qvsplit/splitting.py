"""Write the halves of a checkpoint as checkpoints of their own: bytes are copied, nothing is loaded. No torch.

Each half has all small files of the checkpoint, and the tensors that are its own by the family's rules, under the names
that they have; a tensor that both halves need is in both. Each is a model folder like any other.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import without_root
from qvsplit.checkpoints.files import small_files
from qvsplit.checkpoints.fingerprint import encoder_fingerprint, noted_fingerprint
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.tensors import TensorPlace
from qvsplit.checkpoints.writing import write_checkpoint
from qvsplit.errors import UsageError
from qvsplit.runtime import arguments

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
    keep their names, dtypes and bytes; a few megabytes of them are in memory at a time. A folder appears when it is
    whole.

    Args:
        model: A folder, a hub name, or a checkpoint; of a hub name only what the halves asked for need is fetched.
        encoder: A new folder for the encoder.
        language_model: A new folder for the language model.
        on_bytes: Hears how many bytes of how many have been written.

    Raises:
        UsageError: No folder is given, or one exists, or both are one.
        ModelError: The model cannot be opened, or lacks a half that was asked for.
        DiskError: The disk is full, or a folder cannot be written.
    """
    targets = _targets(encoder, language_model)
    found = {half: _opened(model, half) for half in targets}
    fingerprint = _fingerprint(model, found["language"][0]) if "language" in found else None
    places = [place for _, tensors in found.values() for place in tensors.values()]
    done, total = 0, sum(place.size for place in places)

    def on_written(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    on_bytes(0, total)
    written = {}
    for half, (checkpoint, tensors) in found.items():
        note = {"half": half, "model": checkpoint.name, "revision": checkpoint.revision}
        if half == "language" and fingerprint is not None:
            note["encoder"] = fingerprint
        small = small_files(checkpoint.folder)
        write_checkpoint(targets[half], tensors, small=small, note=note, on_written=on_written)
        size = sum(place.size for place in tensors.values())
        written[half] = WrittenHalf(str(targets[half]), len(tensors), size)
    left_out = _left_out([checkpoint for checkpoint, _ in found.values()])
    return Split(written.get("encoder"), written.get("language"), fingerprint, left_out)


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


def _opened(model: str | os.PathLike[str] | Checkpoint, half: OneHalf) -> tuple[Checkpoint, dict[str, TensorPlace]]:
    """Open a checkpoint with the files of a half, and find the half's tensors."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(_name(model), half)
    if half == "encoder":
        return checkpoint, checkpoint.encoder_places()
    return checkpoint, checkpoint.places(checkpoint.language_names)


def _name(model: object) -> str:
    return arguments.a_path("model", model, "a checkpoint's folder or hub name")


def _fingerprint(model: str | os.PathLike[str] | Checkpoint, checkpoint: Checkpoint) -> str | None:
    """Name the encoder that the language model of `checkpoint` came with; None where nothing at hand says it."""
    if checkpoint.has("encoder"):
        return encoder_fingerprint(checkpoint)
    noted = noted_fingerprint(checkpoint)
    if noted is None and checkpoint.revision is not None and not isinstance(model, Checkpoint):
        return encoder_fingerprint(open_checkpoint(_name(model), "encoder", revision=checkpoint.revision))
    return noted


def _left_out(checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
    """Count the tensors that are of neither half, by module."""
    names = {
        name
        for checkpoint in checkpoints
        for name in checkpoint.files.keys() - {*checkpoint.encoder_names, *checkpoint.language_names}
    }
    return dict(sorted(Counter(without_root(name).partition(".")[0] for name in names).items()))
