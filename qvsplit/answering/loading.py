"""Load a language model for an engine, as options say; and what they mean before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvsplit.answering.local_engine import PREFIX_CACHE_TOKENS, TOKEN_BUDGET, EngineLimits, FeatureReader, LocalEngine
from qvsplit.answering.options import AskOptions
from qvsplit.answering.survey import WindowLimits
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.quantised import is_dequantised, method_of
from qvsplit.runtime.loading import LIBRARIES, READY, OnLoad, nobody

if TYPE_CHECKING:
    from qvsplit.models.language import LanguageModel

QUANTISED = "quantised by"


def engine_for(
    checkpoint: Checkpoint, options: AskOptions, reader: FeatureReader, *, loaded: bool, on_load: OnLoad = nobody
) -> LocalEngine:
    """Give an engine for the language model of a checkpoint; if not `loaded`, that is loaded when it is first used."""
    limits = EngineLimits(options.token_budget, options.prefix_cache_tokens)
    engine = LocalEngine(lambda: load(checkpoint, options, on_load), reader, limits)
    if loaded:
        _ = engine.language
    return engine


def load(checkpoint: Checkpoint, options: AskOptions, on_load: OnLoad = nobody) -> LanguageModel:
    """Load the language model alone, on the device and in the dtype that the options name."""
    on_load(LIBRARIES, 0, 0)
    from qvsplit.models import language
    from qvsplit.runtime import devices

    spread = options.device == "auto"
    device = devices.choose_device(None if spread else options.device)
    dtype = None  # a quantised checkpoint's own
    if options.dtype is not None:
        dtype = devices.choose_dtype(options.dtype, device, "")
    elif checkpoint.quantisation is None or is_dequantised(checkpoint, device.type):
        dtype = devices.choose_dtype(None, device, checkpoint.stored_dtype("language"))
    model = language.load(
        checkpoint, device=device, dtype=dtype, device_map="auto" if spread else None, kernels=options.kernels,
        on_load=on_load,
    )  # fmt: skip
    on_load(READY, 0, 0)
    return model


def expected_dtype(checkpoint: Checkpoint, options: AskOptions) -> str:
    """Name the dtype that answers will be computed in, without loading the model; or how it is quantised."""
    kind = device_type(options)
    dtype = options.dtype or (checkpoint.stored_dtype("language") if kind == "cuda" else "float32")
    if checkpoint.quantisation is None:
        return dtype
    how = f"{QUANTISED} {method_of(checkpoint)}"
    if is_dequantised(checkpoint, kind):
        return f"{how}, dequantised to {dtype}"
    return how if options.dtype is None else f"{how}, the rest in {dtype}"


def device_type(options: AskOptions) -> str:
    """Say whether answers are computed on `cuda` or the `cpu`."""
    from qvsplit.runtime import devices

    return "cuda" if devices.is_cuda(None if options.device == "auto" else options.device) else "cpu"


def window_limits(options: AskOptions) -> WindowLimits:
    """Give windows whose prefixes all fit into the engine's cache, with room to spare for a shared beginning."""
    kind = device_type(options)
    budget = options.token_budget or TOKEN_BUDGET[kind]
    cached = PREFIX_CACHE_TOKENS[kind] if options.prefix_cache_tokens is None else options.prefix_cache_tokens
    # without a cache each round computes its prefixes again, whatever the window
    return WindowLimits(tokens=(min(budget, cached) if cached else budget) * 7 // 8)
