"""Does a store come from a checkpoint's own encoder? Nothing is asked until that is shown. Needs no torch."""

from __future__ import annotations

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.errors import ConfigError
from qvsplit.store.store import Store


def check_encoder(store: Store, checkpoint: Checkpoint, *, allow_unchecked: bool = False) -> str:
    """Give the evidence that `store` was made by the encoder of `checkpoint`; ConfigError if there is none, or against.

    `fingerprint`: computed from the encoder at hand. `note`: from the note of a language-only checkpoint of ours.
    `revision`: the same name and commit on the hub. `unchecked`: none, and the user said that will do.
    """
    from qvsplit.checkpoints.fingerprint import encoder_fingerprint, noted_fingerprint

    config, provenance = store.config, store.provenance
    assert config is not None
    assert provenance is not None
    _check_fit(store, checkpoint)
    noted = None
    if checkpoint.has("encoder"):
        evidence, noted = "fingerprint", encoder_fingerprint(checkpoint)
    elif (noted := noted_fingerprint(checkpoint)) is not None:
        evidence = "note"
    elif checkpoint.revision is not None and (provenance.model, provenance.revision) == (
        checkpoint.name,
        checkpoint.revision,
    ):
        return "revision"
    elif allow_unchecked:
        return "unchecked"
    else:
        raise ConfigError(
            f"nothing shows that the store was made by the encoder of {checkpoint.name}: it has none at hand; "
            "use a checkpoint with its encoder, or take the responsibility with --unchecked-encoder"
        )
    if noted != config.encoder:
        raise ConfigError(
            f"the store was made by another encoder (encoder: {config.encoder[:12]}…, and {checkpoint.name} has "
            f"{noted[:12]}…); ask with the model it was made with ({provenance.model}), or extract again"
        )
    return evidence


def _check_fit(store: Store, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where family, processor or widths alone show that they are strangers."""
    from qvsplit.checkpoints.families import settings_of

    config = store.config
    assert config is not None
    vision = settings_of(checkpoint.vision_config, checkpoint.family.vision_settings)
    processor = settings_of(checkpoint.processor_config, checkpoint.family.processor_settings)
    pairs = {f"processor.{name}": (config.processor.get(name), value) for name, value in processor.items()}
    pairs |= {
        "family": (config.family, checkpoint.family.model_type),
        "hidden_size": (store.width, vision["hidden_size"]),
        "merge_size": (config.merge_size, vision["spatial_merge_size"]),
    }
    wrong = [f"{name}: {mine}, not {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if wrong:
        raise ConfigError(
            f"the store does not fit {checkpoint.name} ({'; '.join(wrong)}); ask with the model it was made with"
        )
