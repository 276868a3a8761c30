"""What a model is and takes, from its config and its files' headers alone: nothing is loaded.

Parameters and memory: checkpoints/sizes.py. Tokens of an image: its own processor's, as a dry run of `extract` counts
them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.checkpoint import Checkpoint, Half
from qvsplit.checkpoints.families import FAMILIES
from qvsplit.checkpoints.files import NOTE_FILE, read_json
from qvsplit.checkpoints.opening import open_headers
from qvsplit.checkpoints.tensors import TensorPlace, is_computed_in
from qvsplit.errors import ItemError, ModelError
from qvsplit.runtime import arguments
from qvsplit.runtime.dtypes import DTYPE_BYTES, STORED_SHARE, token_bytes

if TYPE_CHECKING:
    from qvsplit.checkpoints.sizes import Loaded

# Megapixels, and a photograph of so many, 4:3: width and height
PHOTOGRAPHS = {1: (1152, 864), 2: (1600, 1200), 12: (4000, 3000)}
COMPUTED_IN = ("float32", "bfloat16")
STORED_AS = ("float32", "bfloat16", "int8")
AS_STORED = "as stored"


def describe_model(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a model: tensors and bytes of each half, memory, and tokens and stored bytes of photographs.

        print(qvsplit.describe_model("Qwen/Qwen2-VL-2B-Instruct")["memory"])

    From config and headers alone: of a hub name nothing else is fetched, and of a folder the weights of a half may be
    absent. `memory` is that of the weights, and of `extract` and `ask` with what they take beside them, in bytes, by
    the formulas of docs/hardware.md; `images` says of photographs of 1, 2 and 12 megapixels how many tokens they have
    at the default limits, and the bytes of their features before (`features`) and after compression (`stored`);
    `refused` says of a half why `extract` or `ask` does not take it. None stands for what is not known.

    Args:
        model: A folder, a hub name, or `demo`.

    Raises:
        ModelError: There is no such model, or it cannot be split.
    """
    from qvsplit.checkpoints import quantised, sizes
    from qvsplit.checkpoints.model_class import class_of

    checkpoint, places = open_headers(arguments.a_path("model", model, "a checkpoint's folder or hub name"))
    loaded = sizes.count(checkpoint)
    passed_over = sizes.not_loaded(checkpoint)
    left_out = {name for names in passed_over.values() for name in names}
    encoder = _half(checkpoint, "encoder", loaded.encoder, places, left_out)
    language = _half(checkpoint, "language", loaded.language, places, left_out)
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "half_of": _half_of(checkpoint),
        "family": checkpoint.family.model_type,
        "listed": checkpoint.family.model_type in FAMILIES,
        "class": class_of(checkpoint).__name__,
        "quantised": None if checkpoint.quantisation is None else quantised.method_of(checkpoint),
        "encoder": encoder.to_json(),
        "language_model": language.to_json(),
        "not_loaded": {module: _stored(names, places) for module, names in sorted(passed_over.items())},
        "memory": [_memory(dtype, encoder, language, loaded) for dtype in (*COMPUTED_IN, AS_STORED)],
        "kv_cache_bytes": loaded.cached and {dtype: loaded.cached * DTYPE_BYTES[dtype] for dtype in COMPUTED_IN},
        "width": checkpoint.width,
        "tensors_a_token": checkpoint.tensors_a_token,
        **_images(checkpoint),
    }


# --------------------------------------------------------------------------------------------------------------- halves


def _half_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Give which half of which model a folder that `split` wrote is; None for any other."""
    note = read_json(checkpoint.folder / NOTE_FILE, optional=True)
    return {"half": note["half"], "model": note["model"]} if {"half", "model"} <= note.keys() else None


@dataclass(frozen=True)
class _Half:
    """What of a half is loaded.

    Attributes:
        stored: How its files hold it: tensors, bytes, bytes by dtype.
        files, absent: Those that hold it, and those of them that are not on this disk.
        parameters: A tied matrix counts once.
        dtype: What most of it is stored in.
        is_quantised: Whether nothing is computed in what its weights are stored in.
        is_plain_on_cpu: Whether they are multiplied by their scales when they are loaded on a CPU.
        is_plain: Whether they are when they are loaded anywhere.
        refused: Why `extract` or `ask` refuses it; None where it does not, or not all headers are at hand.
    """

    stored: Mapping[str, Any]
    files: list[str]
    absent: list[str]
    parameters: int
    dtype: str
    is_quantised: bool
    is_plain_on_cpu: bool
    is_plain: bool
    refused: str | None

    def to_json(self) -> dict[str, Any]:
        """Give what is printed of it."""
        return {
            **self.stored, "parameters": self.parameters, "files": self.files, "absent_files": self.absent,
            "refused": self.refused,
        }  # fmt: skip

    def value_bytes(self, dtype: str) -> int:
        """Give the bytes of a value in this dtype, which may be `as stored`."""
        return DTYPE_BYTES[self.dtype if dtype == AS_STORED else dtype]

    def weights(self, dtype: str, *, on_gpu: bool = False) -> int | None:
        """Give the bytes of its weights in this dtype; None where they cannot be had in that."""
        if self.refused is not None:
            return None
        if not self.is_quantised or self.is_plain or (self.is_plain_on_cpu and not on_gpu and dtype != AS_STORED):
            return self.parameters * self.value_bytes(dtype)
        size: int | None = self.stored["bytes"]
        return size if dtype == AS_STORED and (on_gpu or not self.is_plain_on_cpu) else None


def _half(
    checkpoint: Checkpoint, half: Half, parameters: int, places: Mapping[str, TensorPlace], left_out: set[str]
) -> _Half:
    from qvsplit.checkpoints import quantised

    names = [name for name in checkpoint.tensor_names(half) if name not in left_out]
    files = sorted({checkpoint.files[name] for name in names})
    absent = [name for name in files if not (checkpoint.folder / name).is_file()]
    stored = _stored(names, places)
    # unseen, a language model is taken to be what its config says of the checkpoint
    is_quantised = checkpoint.quantisation is not None and (
        not all(is_computed_in(places[name].dtype) for name in names if name in places)
        if stored["dtypes"]
        else half == "language"
    )
    known = {name: places[name] for name in names if name in places}
    return _Half(
        stored, files, absent, parameters, _stored_dtype(stored["dtypes"], checkpoint), is_quantised,
        is_plain_on_cpu=half == "language" and quantised.is_dequantised(checkpoint, "cpu"),
        is_plain=half == "language" and quantised.is_decompressed(checkpoint),
        refused=None if len(known) < len(names) else _refusal(checkpoint, half, known),
    )  # fmt: skip


def _refusal(checkpoint: Checkpoint, half: Half, places: Mapping[str, TensorPlace]) -> str | None:
    """Say why a half's numbers, at `places`, are not loaded; None where they are."""
    from qvsplit.checkpoints import quantised

    try:
        if half == "encoder":
            checkpoint.check_plain(places)
        else:
            quantised.check_language_model(checkpoint, places)
    except ModelError as error:
        return str(error)
    return None


def _stored_dtype(dtypes: Iterable[str], checkpoint: Checkpoint) -> str:
    """Give the first dtype of these that is computed in; where there is none, the one that the config names."""
    text = checkpoint.config.get("text_config")
    sections = [section for section in (checkpoint.config, text) if isinstance(section, dict)]
    named = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
    return next((dtype for dtype in [*dtypes, *named] if dtype in DTYPE_BYTES), "bfloat16")


def _stored(names: Iterable[str], places: Mapping[str, TensorPlace]) -> dict[str, Any]:
    from qvsplit.checkpoints import sizes

    found = sizes.stored(names, places)
    dtypes = {sizes.dtype_name(dtype): size for dtype, size in found.dtypes.items()}
    return {"tensors": found.tensors, "bytes": found.bytes, "dtypes": dtypes}


def _memory(dtype: str, encoder: _Half, language: _Half, loaded: Loaded) -> dict[str, Any]:
    """Say what weights of this dtype take, and `extract` and `ask` with them; None where they cannot be had in it."""
    from qvsplit.checkpoints import sizes

    def plus(weights: int | None, more: int) -> int | None:
        return None if weights is None else weights + more

    encoders, languages = encoder.weights(dtype), language.weights(dtype)
    on_gpu = encoder.weights(dtype, on_gpu=True), language.weights(dtype, on_gpu=True)
    beside = 0
    if not language.is_quantised:
        beside = loaded.embedding_beside(language.value_bytes(dtype), language.value_bytes(AS_STORED))
    return {
        "dtype": dtype,
        "encoder": on_gpu[0] if encoders is None else encoders,
        "language_model": on_gpu[1] if languages is None else languages,
        "extract": plus(encoders, sizes.LIBRARIES + sizes.ENCODING),
        "ask": plus(languages, sizes.LIBRARIES + beside + sizes.ASKING),
        "extract_on_gpu": plus(on_gpu[0], sizes.ON_GPU),
        "ask_on_gpu": plus(on_gpu[1], sizes.ON_GPU),
    }


# --------------------------------------------------------------------------------------------------------------- images


def _images(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say what photographs make: by the processor, with the limits that `extract` has where nobody says."""
    from qvsplit.pipeline.preview import TokenCounter

    try:
        counter = TokenCounter(checkpoint)
        counted = {
            megapixels: (width, height, counter.tokens(width, height))
            for megapixels, (width, height) in PHOTOGRAPHS.items()
        }
    except (ModelError, ItemError) as error:
        return {"pixel_limits": None, "images": [], "images_unknown": str(error)}
    limits = counter.pixel_limits
    images = [
        {"megapixels": megapixels, "width": width, "height": height, "tokens": tokens, **_features(checkpoint, tokens)}
        for megapixels, (width, height, tokens) in counted.items()
    ]
    return {"pixel_limits": limits and list(limits), "images": images, "images_unknown": None}


def _features(checkpoint: Checkpoint, tokens: int) -> dict[str, Any]:
    """Give the bytes of so many tokens' features, before and after compression."""
    if checkpoint.width is None:
        return {"features": None, "stored": None}
    width, tensors = checkpoint.width, checkpoint.tensors_a_token
    features = {dtype: tokens * tensors * token_bytes(dtype, width) for dtype in STORED_AS}
    return {
        "features": features,
        "stored": {dtype: round(size * STORED_SHARE[dtype]) for dtype, size in features.items()},
    }
