"""Load one half of a checkpoint, strictly.

A half is the full model's class without the modules of the other. `load_encoder_weights` reads exactly the encoder's
bytes, tensor by tensor. `load_language_model` goes through transformers' own loader on a view of the checkpoint, so
that device maps and quantised weights work as they do there; on a CPU tensors are mostly read our way, see
checkpoints/streaming.py. Either way every tensor of the half must be there, of the right shape, with none left over:
there is no path on which a weight stays random.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import Family, without_root
from qvsplit.checkpoints.files import INDEX_FILE, SINGLE_FILE, small_files
from qvsplit.checkpoints.fingerprint import TensorHasher, fingerprint_of
from qvsplit.checkpoints.hf import hearing_tensors, load_config, transformers_errors
from qvsplit.checkpoints.merging import fitted_adapter
from qvsplit.checkpoints.model_class import class_of, half_class
from qvsplit.checkpoints.quantised import (
    check_language_model,
    check_one_dtype,
    convert_plain,
    finish,
    forget_quantisation,
    is_dequantised,
    quantiser,
    set_quantisation,
    spare_encoder,
)
from qvsplit.checkpoints.streaming import StreamedReading
from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES, TensorPlace, read_tensors, torch_dtype_name
from qvsplit.errors import ModelError, WeightsError
from qvsplit.runtime.loading import LAYOUT, TENSORS, OnLoad, nobody
from qvsplit.runtime.versions import warn_of_other_versions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EncoderWeights:
    """The encoder with its weights, in evaluation mode, and what it took to load it.

    Attributes:
        model: The full model's class, without the modules that only the language model reads.
        module: The encoder itself, where it is one module of that; else `model`.
        fingerprint: See checkpoints/fingerprint.py.
        bytes_read: Bytes of tensors; the headers' few kB are not counted.
        encoder_bytes: Bytes of the encoder in the compute dtype.
    """

    model: Any
    module: Any
    fingerprint: str
    bytes_read: int
    encoder_bytes: int


# ---------------------------------------------------------------------------------------------------- vision encoder


def load_encoder_weights(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, on_load: OnLoad = nobody
) -> EncoderWeights:
    """Load the vision encoder alone, on `device`, in `dtype`. Reads nothing but its bytes, once, and hashes them.

    Tensors get their names in the full model, and their form where it is another, by transformers' own rules.
    `on_load` hears how many bytes have been read.

    Raises:
        WeightsError: The checkpoint holds not exactly the encoder's tensors.
        ModelError: There is no encoder, or it is quantised, or a file is damaged.
    """
    warn_of_other_versions("transformers")
    adapter = fitted_adapter(checkpoint, "encoder")
    places = checkpoint.plain_encoder_places()
    config = load_config(checkpoint)
    forget_quantisation(config)
    encoder_class = half_class(class_of(checkpoint), checkpoint.family.encoder_has)
    state: dict[str, torch.Tensor] = {}
    done, total = 0, sum(place.size for place in places.values())
    on_load(TENSORS, 0, total)
    with TensorHasher() as hasher:
        for name, raw in read_tensors(places):
            # in the compute dtype at once: else the stored tensors stay in memory beside those that are computed with
            stored = _as_tensor(raw, places[name])
            state[name] = stored.to(device=device, dtype=dtype if stored.is_floating_point() else None)
            del stored
            hasher.add(name, raw)
            del raw  # else it is in memory beside the next
            done += places[name].size
            on_load(TENSORS, done, total)
        fingerprint = fingerprint_of(checkpoint, places, hasher.digests())
    on_load(LAYOUT, 0, 0)
    size = sum(t.numel() * t.element_size() for t in state.values())
    with transformers_errors(checkpoint):
        model, info = encoder_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check_loaded(checkpoint, info)
    del state
    if adapter is not None:
        model = adapter.merged(model)
    model.requires_grad_(False)
    model.to(device)  # the rotary buffers, which no checkpoint holds; transformers too computes them on the CPU
    return EncoderWeights(
        model=model.eval(),
        module=_only_module(model, checkpoint.family),
        fingerprint=fingerprint,
        bytes_read=total,
        encoder_bytes=size,
    )


def _only_module(model: Any, family: Family) -> Any:
    """Give the encoder itself where it is one module; else the full model's class without its language model."""
    if len(family.encoder_modules) > 1 or family.loose_tensors:
        return model
    (path,) = (name for name, _ in model.named_modules() if without_root(name) == family.encoder_modules[0])
    return model.get_submodule(path)


def _as_tensor(raw: bytearray, place: TensorPlace) -> torch.Tensor:
    """View `raw` as the tensor that it holds."""
    import torch

    dtype = getattr(torch, torch_dtype_name(place.dtype))
    if place.size != SAFETENSORS_BYTES[place.dtype] * int(torch.Size(place.shape).numel()):
        raise ModelError(f"{place.file}: tensor {place.name} has {place.size} bytes, which its shape denies")
    return torch.frombuffer(raw, dtype=dtype).view(place.shape)


# ------------------------------------------------------------------------------------------ language and full models


def load_language_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device_map: str | Mapping[str, Any] | None = None,
    kernels: str = "fused",
    on_load: OnLoad = nobody,
) -> Any:
    """Load the full model's class without its encoder, with its weights, in evaluation mode.

    On a CPU, with the kernels "fused", tensors are read one ahead of the one that is put in place. Transformers reads
    them with a device map or the kernels "reference", where experts are merged, of quantised checkpoints, and where a
    tensor is missing, left over or misshapen, which is then said. A quantised one is computed by its quantiser's own
    layers, with transformers' modules around them; FP8 is dequantised on a CPU, and then a model as any other.

    Args:
        checkpoint: Its language model's files must be on this disk.
        dtype: None keeps the checkpoint's. Of a quantised one: of what is not quantised.
        device_map: As transformers' `from_pretrained` takes it; a quantised checkpoint's own settings hold as well.
        kernels: With "fused" modules are replaced by our own on a CPU, and on a GPU that has the whole model; with
            "reference" all are transformers'.
        on_load: Hears how many bytes of tensors are in place.

    Raises:
        WeightsError: The checkpoint holds not exactly the language model's tensors.
        ModelError: It cannot be loaded.
    """
    from qvsplit.kernels.layout import Layout, Plain, join, lay_out
    from qvsplit.kernels.packed_linear import can_pack

    warn_of_other_versions("transformers")
    adapter = fitted_adapter(checkpoint, "language")
    family = checkpoint.family
    config = load_config(checkpoint)
    # a file may hold tensors of both halves
    others = [rf"^(model\.|thinker\.)*{re.escape(module)}\." for module in (*family.encoder_modules, *family.ignored)]
    language_class = half_class(class_of(checkpoint), family.language_model_has, ignored=others)
    places = checkpoint.places(checkpoint.language_names)
    check_language_model(checkpoint, places)
    device_type = "cpu" if device_map is None else "cuda"
    set_quantisation(config, checkpoint, device_type=device_type)
    sizes = {name: place.size for name, place in places.items()}
    # with "reference" transformers reads: a float32 product has other bits where its weights lie at other addresses
    ours = kernels == "fused" and device_map is None
    is_quantised = checkpoint.quantisation is not None
    plain = ours and dtype is not None and not is_quantised
    # what is dequantised is plain once it is loaded
    fused = ours and (plain or is_dequantised(checkpoint, device_type)) and can_pack(dtype)
    reading = StreamedReading(places, Layout if fused and adapter is None else Plain, on_load)
    if plain:
        language_class = reading.model_class(language_class)
    with (
        _language_view(checkpoint) as folder,
        transformers_errors(checkpoint),
        hearing_tensors(on_load, sizes),
        quantiser(checkpoint),
    ):
        model, info = language_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype is not None else "auto",
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed below with everything else that is wrong
        )
    _check_loaded(checkpoint, info)
    if info.get("error_msgs"):
        raise ModelError(f"{checkpoint.folder} cannot be loaded: {info['error_msgs'][0]}")
    model.name_or_path = str(checkpoint.folder)
    if is_quantised:
        _as_computed(checkpoint, model, dtype)
    if adapter is not None:
        model = adapter.merged(model)
    if fused and (adapter is not None or not reading.used):
        on_load(LAYOUT, 0, 0)
        lay_out(model)
    elif kernels == "fused" and not is_quantised and _is_whole_on_a_gpu(model):
        join(model)
    if kernels == "fused":  # else as transformers has it, whose bits are wanted
        model.requires_grad_(False)
    return model.eval()


def _as_computed(checkpoint: Checkpoint, model: Any, dtype: torch.dtype | None) -> None:
    """Make a model from a quantised checkpoint ready to compute, in `dtype`. ModelError where that is not so."""
    finish(model)
    if dtype is None:
        return
    if not getattr(model, "is_quantized", False):
        convert_plain(model, dtype)
    check_one_dtype(checkpoint, model, dtype)


def _is_whole_on_a_gpu(model: Any) -> bool:
    """Say whether a model is on one GPU, and nothing moves its weights about."""
    devices = {parameter.device for parameter in model.parameters()}
    moved = any(hasattr(module, "_hf_hook") for module in model.modules())
    return len(devices) == 1 and devices.pop().type == "cuda" and not moved


def load_full_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, on_load: OnLoad = nobody
) -> Any:
    """Load the full model as transformers does: the reference that `verify` holds a store against.

    `on_load` hears how many bytes of tensors are in place.

    Raises:
        WeightsError: The checkpoint holds not exactly the model's tensors.
        ModelError: It cannot be loaded.
    """
    warn_of_other_versions("transformers")
    adapter = fitted_adapter(checkpoint, "both")
    places = checkpoint.places(checkpoint.tensor_names("both"))
    sizes = {name: place.size for name, place in places.items()}
    config = load_config(checkpoint)
    is_quantised = checkpoint.quantisation is not None
    if is_quantised:
        checkpoint.plain_encoder_places()
    check_language_model(checkpoint, {name: places[name] for name in checkpoint.language_names})
    set_quantisation(config, checkpoint, device_type=device.type)
    spare_encoder(config, checkpoint)
    with transformers_errors(checkpoint), hearing_tensors(on_load, sizes), quantiser(checkpoint):
        model, info = class_of(checkpoint).from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            device_map={"": device} if is_quantised and device.type != "cpu" else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_loaded(checkpoint, info)
    if is_quantised:
        _as_computed(checkpoint, model, dtype)
    if adapter is not None:
        model = adapter.merged(model)
    return (model if is_quantised else model.to(device)).eval()


def _check_loaded(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raise WeightsError where transformers' loading info says that a tensor was missing, left over or misshapen."""
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    misshapen = {str(entry[0]): f"{list(entry[1])} instead of {list(entry[2])}" for entry in info["mismatched_keys"]}
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
