"""Load the encoder on every device that was asked for, held against the store's extraction config."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.opening import choose_checkpoint
from qvsplit.errors import ConfigError, ItemError, ModelError, StoreDamaged, some_of
from qvsplit.models import encoder as models
from qvsplit.models.clips import other_reader
from qvsplit.models.copies import copies_to
from qvsplit.models.encoder import Clips, EncoderSpec
from qvsplit.models.preparing import pixel_settings
from qvsplit.pipeline.encoding import Devices, DeviceWorker
from qvsplit.pipeline.options import ExtractOptions, video_options, with_videos_of
from qvsplit.pipeline.stages import Encode, Prepare, Quantize
from qvsplit.pipeline.summary import Summary, Timer
from qvsplit.runtime import devices
from qvsplit.runtime.loading import LIBRARIES, PROCESSOR, READY, OnLoad, nobody
from qvsplit.runtime.memory import keep_freed_activations
from qvsplit.store.config import PREPARED_ON, ExtractionConfig, Provenance, installed_versions
from qvsplit.store.features import TensorSpec
from qvsplit.store.schema import ShardSchema

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loaded:
    """Encoders, ready to work, and what the shards they fill declare."""

    devices: Devices
    schema: ShardSchema


@dataclass(frozen=True)
class StoreDeclares:
    """What a store has declared so far; None and empty where there is none."""

    where: str
    config: ExtractionConfig | None
    tensors: tuple[TensorSpec, ...] | None
    provenance: Provenance | None


def load_devices(
    options: ExtractOptions,
    own: StoreDeclares,
    summary: Summary,
    on_note: Callable[[str], None],
    on_load: OnLoad = nobody,
) -> Loaded:
    """Load; `on_load` hears of each part.

    Raises:
        UsageError: No such device, or pixel limits that cross.
        ModelError: The checkpoint cannot be loaded.
        ConfigError: The store was made under another extraction config.
    """
    checkpoint = _checkpoint(options, own.provenance)
    if own.provenance is not None:
        _check_adapter(checkpoint, own.provenance)
    summary.model = checkpoint.label
    on_load(LIBRARIES, 0, 0)
    with Timer(summary.stages, "load libraries"):
        places = devices.choose_devices(options.device)  # imports torch
        hf.import_libraries(checkpoint)
    spec = _spec(options, own.config, checkpoint, places[0])
    specs = {place: replace(spec, device=str(place)) for place in dict.fromkeys(places)}
    loaded = {place: models.load_encoder(one, on_load) for place, one in specs.items()}
    keep_freed_activations()
    for one in loaded.values():
        summary.add_seconds(one.load_seconds)
    encoder = loaded[places[0]]
    _check_readable(encoder.config, checkpoint)
    _check_config(encoder.config, encoder.tensors, own)
    budget = options.patch_budget or min(
        models.patch_budget(one, devices.free_memory(place)) // places.count(place) or 1
        for place, one in loaded.items()
    )
    quantize = Quantize(encoder.config, encoder.tensors)
    workers = [
        DeviceWorker(
            Encode(functools.partial(models.load_encoder, specs[place]), loaded[place]), quantize, copies_to(place)
        )
        for place in places
    ]
    summary.patch_budget = budget
    summary.encoder_bytes, summary.weights_bytes_read = encoder.weights.encoder_bytes, encoder.weights.bytes_read
    provenance = _provenance(checkpoint, loaded)
    if options.adapter is not None and provenance.adapter is None:
        note_adapter_for_questions(options.adapter, on_note)
    _note_other_versions(own.provenance, provenance, on_note)
    if own.config is None and options.dtype is None and models.would_be_faster_in_bfloat16(encoder):
        on_note(
            "this CPU multiplies bfloat16 in hardware: with `dtype=bfloat16`, the checkpoint's own, a new store is "
            "made faster and is half as large, and its features differ by that dtype's rounding"
        )
    on_load(READY, 0, 0)
    return Loaded(
        Devices(
            encoder, Prepare(encoder.preparer), workers, budget, encoder.tensors, models.slice_budget(encoder, budget)
        ),
        ShardSchema(encoder.config, encoder.tensors, (provenance,)),
    )


def load_prepare(options: ExtractOptions, own: StoreDeclares) -> Prepare:
    """Load the stage that prepares images, without the encoder, as the store's extraction config has it.

    Raises:
        ModelError: The checkpoint's processor cannot be loaded.
        ConfigError: It makes other pixels than the store's.
    """
    import torch

    checkpoint = _checkpoint(options, own.provenance)
    hf.import_libraries(checkpoint)
    spec = _spec(options, own.config, checkpoint, torch.device("cpu"))
    preparer = models.load_image_preparer(spec)
    if own.config is not None and own.tensors is not None:
        mine = pixel_settings(preparer.processor.image_processor, checkpoint, spec.prepare_on)
        _check_config(replace(own.config, processor=mine), own.tensors, own)
    return Prepare(preparer)


def load_clips(loaded: Loaded, own: StoreDeclares, on_load: OnLoad = nobody) -> Clips | ItemError:
    """Load what videos need beside the encoder; an ItemError says why none can be encoded in this run.

    Raises:
        ConfigError: The store's videos were encoded under other settings.
        UsageError: Limits that the model's processor does not have.
    """
    on_load(PROCESSOR, 0, 0)
    try:
        clips = loaded.devices.encoder.load_clips()
    except ModelError as error:
        return ItemError(f"is a video: {error}; `videos=False` leaves videos out")
    finally:
        on_load(READY, 0, 0)
    before, now = own.config.videos if own.config else None, clips.config.videos
    if before is not None and now is not None and (reader := other_reader(now, before)) is not None:
        return ItemError(
            f"is a video, and the store's others were read by {reader}: install that, or make the store again with "
            "`rebuild=True`", "reader-missing",
        )  # fmt: skip
    _check_config(clips.config, loaded.schema.tensors, own)
    return clips


def _checkpoint(options: ExtractOptions, provenance: Provenance | None) -> Checkpoint:
    own, revision = (provenance.model, provenance.revision) if provenance else ("", None)
    own_adapter = provenance.adapter if provenance else None
    return choose_checkpoint(
        options.model, "encoder", own=own, revision=revision, adapter=options.adapter, own_adapter=own_adapter
    )


def note_adapter_for_questions(adapter: str, on_note: Callable[[str], None]) -> None:
    """Say of an adapter that the user names that no feature depends on it."""
    on_note(f"{adapter} changes nothing here: it has nothing for the vision encoder, and is for questions")


def _provenance(checkpoint: Checkpoint, places: Iterable[object]) -> Provenance:
    """Say where features come from; of an adapter only where it has something for the encoder."""
    from qvsplit.checkpoints.fingerprint import adapter_digest

    digest = adapter_digest(checkpoint, "encoder")
    adapter = checkpoint.adapter.label if checkpoint.adapter is not None and digest is not None else None
    return Provenance(
        checkpoint.name, checkpoint.revision, ", ".join(map(str, places)), installed_versions(), adapter, digest
    )


def _spec(
    options: ExtractOptions, own: ExtractionConfig | None, checkpoint: Checkpoint, device: torch.device
) -> EncoderSpec:
    """Describe the encoder: by the options, else by the store, else by default."""
    asked = options.dtype or (own.compute_dtype if own else None)
    dtype = devices.choose_dtype(asked, device, checkpoint.stored_dtype("encoder"))
    limits: Mapping[str, Any] = own.processor if own else {}
    return EncoderSpec(
        checkpoint=checkpoint,
        device=str(device),
        dtype=devices.dtype_name(dtype),
        storage_dtype=options.storage_dtype or (own.storage_dtype if own else None),
        min_pixels=limits.get("min_pixels") if options.min_pixels is None else options.min_pixels,
        max_pixels=limits.get("max_pixels") if options.max_pixels is None else options.max_pixels,
        kernels=options.kernels or (own.kernels if own else checkpoint.family.default_kernels),
        prepare_on=options.prepare_on or (own.prepared_on if own else PREPARED_ON[0]),
        videos=video_options(with_videos_of(own, options)),
    )


def _check_readable(config: ExtractionConfig, checkpoint: Checkpoint) -> None:
    """ModelError where a store under this extraction config could not be read: known before anything is encoded."""
    try:
        ExtractionConfig.from_json(json.loads(json.dumps(config.to_json())), str(checkpoint.folder))
    except (StoreDamaged, ConfigError):
        raise ModelError(
            f"{checkpoint.folder} cannot be split: the settings of its image processor are none that a store can hold"
        ) from None


def _check_config(config: ExtractionConfig, tensors: tuple[TensorSpec, ...], own: StoreDeclares) -> None:
    if own.config is None:
        return
    differences = own.config.differences(config)
    if not differences and own.tensors != tensors:
        differences = ["tensors: others"]
    if differences:
        raise ConfigError(
            f"{own.where} was made under another extraction config ({some_of(differences)}); use the checkpoint it was "
            "made with, choose another store, or make this one again with `rebuild=True`"
        )


def _note_other_versions(before: Provenance | None, now: Provenance, on_note: Callable[[str], None]) -> None:
    """Say so where the libraries that touch pixels or numbers are others than before."""
    old, new = before.versions if before else {}, now.versions
    changed = [
        f"{name} {old[name]} → {new[name]}"
        for name in old
        if name not in ("qvsplit", "python") and old[name] != new.get(name, "")
    ]
    if changed:
        on_note(
            f"the store's rows were made with other library versions ({', '.join(changed)}); "
            "`qvsplit verify` with `sample=3` shows whether they still agree"
        )


def check_model(options: ExtractOptions, config: ExtractionConfig | None, provenance: Provenance | None) -> None:
    """Refuse another model than the store's, without loading any. Raises ConfigError."""
    if (options.model is None and options.adapter is None) or options.rebuild or config is None or provenance is None:
        return
    if options.model is not None and options.adapter is None and provenance.adapter is None:
        name, _, revision = options.model.partition("@")
        if provenance.model in {name, os.path.realpath(options.model)} and revision in {"", provenance.revision}:
            return  # nothing is to be encoded, so that not even the hub need be asked for news of it
    from qvsplit.checkpoints.fingerprint import adapter_digest, encoder_fingerprint

    checkpoint = _checkpoint(options, provenance)
    _check_adapter(checkpoint, provenance)
    mine = checkpoint.name, checkpoint.revision, adapter_digest(checkpoint, "encoder")
    if mine == (provenance.model, provenance.revision, provenance.adapter_digest):
        return
    if encoder_fingerprint(checkpoint) != config.encoder:
        raise ConfigError(
            f"the store was made by another encoder than that of {checkpoint.label}{_by_adapter(provenance)}; leave "
            f"{'`model`' if options.adapter is None else '`adapter`'} out, choose another store, or make this one "
            "again with `rebuild=True`"
        )


def _check_adapter(checkpoint: Checkpoint, provenance: Provenance) -> None:
    """Refuse the store's own adapter where its files are others now. Raises ConfigError."""
    from qvsplit.checkpoints.fingerprint import check_adapter_unchanged

    check_adapter_unchanged(checkpoint, provenance.adapter, provenance.adapter_digest, "the store was")


def _by_adapter(provenance: Provenance) -> str:
    return "" if provenance.adapter is None else f" (with adapter {provenance.adapter})"
