"""Load one half of a checkpoint, strictly.

`load_encoder_weights` reads exactly the encoder's bytes, tensor by tensor, straight into place. `load_language_model`
goes through transformers' own loader on a view of the checkpoint, so that device maps and quantised weights work as
they do there. Either way every tensor of the half must be there, of the right shape, with none left over: there is no
path on which a weight stays random.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvsplit.checkpoints.families import FAMILIES, Family
from qvsplit.checkpoints.files import INDEX_FILE, NOTE_FILE, SINGLE_FILE, small_files
from qvsplit.checkpoints.fingerprint import TensorHasher, encoder_fingerprint, fingerprint_of
from qvsplit.checkpoints.hf import transformers_errors
from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES, TensorPlace, read_tensors, torch_dtype_name
from qvsplit.errors import ModelError, WeightsError
from qvsplit.runtime import arguments

if TYPE_CHECKING:
    import torch

_A_MODEL = "a checkpoint's folder or hub name"


@dataclass(frozen=True)
class EncoderWeights:
    """The encoder with its weights, in evaluation mode, and what it took to load it.

    Attributes:
        module: Of the class that `Family.encoder_class` names.
        fingerprint: See checkpoints/fingerprint.py.
        bytes_read: Bytes of tensors; the headers' few kB are not counted.
        encoder_bytes: Bytes of the encoder in the compute dtype.
    """

    module: Any
    fingerprint: str
    bytes_read: int
    encoder_bytes: int


# ---------------------------------------------------------------------------------------------------- vision encoder


def load_encoder_weights(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> EncoderWeights:
    """Load the vision encoder alone, on `device`, in `dtype`. Reads nothing but its bytes, once, and hashes them.

    Raises:
        WeightsError: The checkpoint holds not exactly the encoder's tensors.
        ModelError: There is no encoder, or a file is damaged.
    """
    places = checkpoint.encoder_places()
    module = _empty_encoder(checkpoint, dtype)
    _check_tensors(places, {name: tuple(t.shape) for name, t in module.state_dict().items()}, checkpoint)
    state: dict[str, torch.Tensor] = {}
    with TensorHasher() as hasher:
        for name, raw in read_tensors(places):
            state[name] = _as_tensor(raw, places[name]).to(device=device, dtype=dtype)
            hasher.add(name, raw)
            del raw  # else it is in memory beside the next
        fingerprint = fingerprint_of(checkpoint, places, hasher.digests())
    # assign: the tensors become the parameters, so the encoder is never in memory twice
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)
    module.to(device)  # the rotary buffers, which no checkpoint holds; transformers too computes them on the CPU
    return EncoderWeights(
        module=module.eval(),
        fingerprint=fingerprint,
        bytes_read=sum(place.size for place in places.values()),
        encoder_bytes=sum(t.numel() * t.element_size() for t in state.values()),
    )


def _empty_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build the encoder without memory for its parameters; its buffers are real, as no checkpoint holds them."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    with transformers_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            return _class_of(checkpoint.family, checkpoint.family.encoder_class)._from_config(
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
    found = {"missing_keys": expected.keys() - places.keys(), "unexpected_keys": places.keys() - expected.keys()}
    _check_loaded(checkpoint, found, wrong)


def _as_tensor(raw: bytearray, place: TensorPlace) -> torch.Tensor:
    """View `raw` as the tensor that it holds."""
    import torch

    dtype = getattr(torch, torch_dtype_name(place.dtype))
    if place.size != SAFETENSORS_BYTES[place.dtype] * int(torch.Size(place.shape).numel()):
        raise ModelError(f"{place.file}: tensor {place.name} has {place.size} bytes, which its shape denies")
    return torch.frombuffer(raw, dtype=dtype).view(place.shape)


# ------------------------------------------------------------------------------------------ language and full models


def load_language_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, device_map: str | Mapping[str, Any] | None = None
) -> Any:
    """Load the full model's class without its encoder, with its weights, in evaluation mode.

    Args:
        checkpoint: Its language model's files must be on this disk.
        dtype: None keeps the checkpoint's.
        device_map: As transformers' `from_pretrained` takes it; a quantised checkpoint's own settings hold as well.

    Raises:
        WeightsError: The checkpoint holds not exactly the language model's tensors.
        ModelError: It cannot be loaded.
    """
    with _language_view(checkpoint) as folder, transformers_errors(checkpoint):
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
    _check_loaded(checkpoint, info, misshapen)
    if info.get("error_msgs"):
        raise ModelError(f"{checkpoint.folder} cannot be loaded: {info['error_msgs'][0]}")
    model.name_or_path = str(checkpoint.folder)
    model.requires_grad_(False)
    return model.eval()


def load_full_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the full model as transformers does: the reference that `verify` holds a store against.

    Raises:
        WeightsError: The checkpoint holds not exactly the model's tensors.
        ModelError: It cannot be loaded.
    """
    with transformers_errors(checkpoint):
        model, info = _class_of(checkpoint.family, checkpoint.family.full_class).from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_loaded(checkpoint, info, {})
    return model.to(device).eval()


def save_language_model(model: str | os.PathLike[str] | Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write the language model of `model` into the new `folder`, with a note of its encoder's fingerprint.

        qvsplit.save_language_model("Qwen/Qwen2-VL-2B-Instruct", "language")

    The note lets `ask` accept stores of that encoder where the encoder is not at hand. Tensors keep their names, dtypes
    and files; one file's worth of them is in memory at a time.

    Args:
        model: A folder, a hub name, or a checkpoint with both halves.
        folder: Where to write it.

    Raises:
        ModelError: The model cannot be opened, or `folder` exists.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    target = Path(arguments.a_path("folder", folder))
    name = model if isinstance(model, Checkpoint) else arguments.a_path("model", model, _A_MODEL)
    checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(name, "both")
    encoder = encoder_fingerprint(checkpoint)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{target} cannot be made ({error.strerror}); give a new folder") from None
    for path in small_files(checkpoint.folder):
        (target / path.name).write_bytes(path.read_bytes())
    for file_name in checkpoint.file_names("language"):
        names = [n for n in checkpoint.language_names if checkpoint.files[n] == file_name]
        with safe_open(checkpoint.folder / file_name, framework="pt") as source:
            save_file({n: source.get_tensor(n) for n in names}, target / file_name, metadata={"format": "pt"})
    _write_language_index(checkpoint, target)
    (target / NOTE_FILE).write_text(json.dumps({"half": "language", "encoder": encoder}) + "\n")


def _check_loaded(checkpoint: Checkpoint, info: Mapping[str, Any], misshapen: Mapping[str, str]) -> None:
    """Raise WeightsError where transformers' loading info says that a tensor was missing, left over or misshapen."""
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if missing or unexpected or misshapen:
        raise WeightsError(str(checkpoint.folder), missing=missing, unexpected=unexpected, misshapen=misshapen)


@contextmanager
def _language_view(checkpoint: Checkpoint) -> Iterator[Path]:
    """Make a temporary folder of links that shows transformers only the language model's files and index entries.

    Without it `from_pretrained` would ask for files that hold nothing but encoder, and that need not be here.
    """
    with tempfile.TemporaryDirectory(prefix="qvsplit-") as name:
        folder = Path(name)
        weights = [checkpoint.folder / file_name for file_name in checkpoint.file_names("language")]
        for path in [*small_files(checkpoint.folder), *weights]:
            (folder / path.name).symlink_to(path)
        _write_language_index(checkpoint, folder)
        yield folder


def _write_language_index(checkpoint: Checkpoint, folder: Path) -> None:
    files = {name: checkpoint.files[name] for name in checkpoint.language_names}
    if set(files.values()) != {SINGLE_FILE}:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@functools.cache
def _language_class(model_type: str) -> Any:
    """Derive from the full model's class one that has no encoder. Keys are renamed by `Family.language_renames`."""
    family = FAMILIES[model_type]
    full = _class_of(family, family.full_class)

    class LanguageModelOnly(full):  # type: ignore[misc, valid-type]
        _keys_to_ignore_on_load_unexpected = (rf"^model\.{family.encoder_module}\.",)

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            delattr(self.model, family.encoder_module)

    LanguageModelOnly.__module__ = full.__module__  # where transformers looks for things beside a class
    return LanguageModelOnly


def _class_of(family: Family, name: str) -> Any:
    return getattr(importlib.import_module(family.modeling), name)
