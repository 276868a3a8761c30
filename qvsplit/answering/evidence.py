"""Do features come from a checkpoint's own encoder? Nothing is asked until that is shown. Needs no torch."""

from __future__ import annotations

from qvsplit.answering.collection import Collection
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.tensors import is_computed_in, torch_dtype_name
from qvsplit.errors import ConfigError
from qvsplit.store.config import ExtractionConfig, Provenance


def check_encoder(store: Collection, checkpoint: Checkpoint, *, allow_unchecked: bool = False) -> str:
    """Give the evidence that `store` was made by the encoder of `checkpoint`; see `check_features`."""
    assert store.config is not None
    return check_features(
        store.config, store.width, checkpoint, provenance=store.provenance, what="the store",
        allow_unchecked=allow_unchecked,
    )  # fmt: skip


def check_features(
    config: ExtractionConfig,
    width: int | None,
    checkpoint: Checkpoint,
    *,
    provenance: Provenance | None = None,
    what: str = "the features",
    allow_unchecked: bool = False,
) -> str:
    """Give the evidence that features were made by the encoder of `checkpoint`.

    `fingerprint`: computed from the encoder at hand. `note`: from the note of a language-only checkpoint of ours.
    `revision`: the same name and commit on the hub. `unchecked`: none, and the user said that will do. In each of them
    the encoder is that with the checkpoint's adapter on it.

    Args:
        config: Under which they were made.
        width: Values a token.
        checkpoint: Whose language model is to answer.
        provenance: Where they came from, where that is known.
        what: What they are, for messages.
        allow_unchecked: Whether no evidence will do.

    Raises:
        ConfigError: There is no evidence, or there is some against.
    """
    from qvsplit.checkpoints.fingerprint import encoder_fingerprint, noted_fingerprint

    _check_fit(config, width, checkpoint, what)
    noted = None
    if checkpoint.has("encoder"):
        evidence, noted = "fingerprint", encoder_fingerprint(checkpoint)
    elif (noted := noted_fingerprint(checkpoint)) is not None:
        evidence = "note"
    elif provenance is not None and _is_revision_of(checkpoint, provenance):
        return "revision"
    elif allow_unchecked:
        return "unchecked"
    else:
        _refuse_for_adapter(provenance, checkpoint, what)
        raise ConfigError(
            f"nothing shows that {what} {_was(what)} made by the encoder of {checkpoint.name}: it has none at hand; "
            "use a checkpoint with its encoder, or take the responsibility with `unchecked_encoder=True`"
        )
    if noted != config.encoder:
        _refuse_for_adapter(provenance, checkpoint, what)
        made_with = f" ({provenance.model})" if provenance is not None else ""
        raise ConfigError(
            f"{what} {_was(what)} made by another encoder (encoder: {config.encoder[:12]}…, and {checkpoint.label} has "
            f"{noted[:12]}…{_if_quantised(checkpoint)}); ask with the model that made {_them(what)}{made_with}, or "
            "extract again"
        )
    return evidence


def _if_quantised(checkpoint: Checkpoint) -> str:
    """Say of a quantised checkpoint what its encoder is stored in: many are cast, which makes it another one."""
    if checkpoint.quantisation is None or not checkpoint.has("encoder"):
        return ""
    dtypes = {place.dtype for place in checkpoint.encoder_places().values()}
    if not all(map(is_computed_in, dtypes)):
        return "; it is quantised, its encoder too"
    stored = " and ".join(sorted(map(torch_dtype_name, dtypes)))
    return f"; it is quantised, with an encoder in {stored}: one that was cast is another"


def _is_revision_of(checkpoint: Checkpoint, provenance: Provenance) -> bool:
    """Say whether model and commit are the same, and what adapters did to the encoder."""
    from qvsplit.checkpoints.fingerprint import adapter_digest

    mine = checkpoint.name, checkpoint.revision, adapter_digest(checkpoint, "encoder")
    theirs = provenance.model, provenance.revision, provenance.adapter_digest
    return checkpoint.revision is not None and theirs == mine


def _refuse_for_adapter(provenance: Provenance | None, checkpoint: Checkpoint, what: str) -> None:
    """Raise ConfigError where the adapter that features were made with does something else to the encoder."""
    from qvsplit.checkpoints.fingerprint import adapter_digest, check_adapter_unchanged

    digest = adapter_digest(checkpoint, "encoder")
    if provenance is None or digest == provenance.adapter_digest:
        return
    made = f"{what} {_was(what)}"
    check_adapter_unchanged(checkpoint, provenance.adapter, provenance.adapter_digest, made)
    if digest is None:
        raise ConfigError(
            f"{made} made with the adapter {provenance.adapter}, which changes the vision encoder; ask "
            f"with it: `adapter={provenance.adapter}`"
        )
    assert checkpoint.adapter is not None
    name = checkpoint.adapter.label
    without = "without it" if provenance.adapter is None else f"with another one, {provenance.adapter}"
    raise ConfigError(
        f"{name} changes the vision encoder, and {made} made {without}; extract with `adapter={name}` "
        "into another store, and ask that"
    )


def _was(what: str) -> str:
    return "were" if what.endswith("s") else "was"


def _them(what: str) -> str:
    return "them" if what.endswith("s") else "it"


def _check_fit(config: ExtractionConfig, width: int | None, checkpoint: Checkpoint, what: str) -> None:
    """Raise ConfigError where family, processor or widths alone show that they are strangers."""
    processor = checkpoint.processor_settings
    named = checkpoint.family.processor_settings or {}  # a store may have one of these that this checkpoint leaves out
    pairs = {
        f"processor.{name}": (config.processor.get(name), processor.get(name))
        for name in dict.fromkeys((*processor, *named))
    }
    pairs["family"] = (config.family, checkpoint.family.model_type)
    if checkpoint.width is not None:
        pairs["hidden_size"] = (width, checkpoint.width)
    merge = checkpoint.vision_settings.get("spatial_merge_size")
    if merge is not None:
        pairs["merge_size"] = (config.merge_size, merge)
    if config.family != checkpoint.family.model_type:
        pairs = {"family": pairs["family"]}  # of another family everything else differs as well
    wrong = [f"{name}: {mine}, not {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if wrong:
        verb = "do not fit" if what.endswith("s") else "does not fit"
        raise ConfigError(
            f"{what} {verb} {checkpoint.name} ({'; '.join(wrong)}); ask with the model that made {_them(what)}"
        )
