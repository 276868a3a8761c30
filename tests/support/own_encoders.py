"""An encoder as any family has it that is not known to take patches: by the model's own `get_image_features`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.model_class import class_of, forward_takes
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models.encoder import EncoderSpec, TransformersEncoder
from qvsplit.models.preparing import Preparer, load_processor
from qvsplit.weights import load_encoder_weights


def peak_bytes(call: Callable[[], object]) -> int:
    """Give the most bytes that torch's allocator holds at once for what a call makes. Not seen: oneDNN's own memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in events))


def load_own_encoder(folder: Path) -> TransformersEncoder:
    """Load the encoder of a checkpoint so, in float32 on the CPU."""
    checkpoint = open_checkpoint(folder, "encoder")
    processor = load_processor(checkpoint, min_pixels=None, max_pixels=None)
    token = hf.image_token(checkpoint, hf.load_config(checkpoint), processor.tokenizer)
    preparer = Preparer(processor, checkpoint.family, token, forward_takes(class_of(checkpoint)))
    weights = load_encoder_weights(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    weights.model.requires_grad_(True)
    return TransformersEncoder(EncoderSpec(checkpoint, "cpu", "float32", kernels="reference"), weights, preparer)
