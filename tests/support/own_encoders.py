"""An encoder as any family has it that is not known to take patches: by the model's own `get_image_features`."""

from __future__ import annotations

from pathlib import Path

import torch

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.model_class import class_of, forward_takes
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models.encoder import EncoderSpec, TransformersEncoder
from qvsplit.models.preparing import Preparer, load_processor
from qvsplit.weights import load_encoder_weights


def load_own_encoder(folder: Path) -> TransformersEncoder:
    """Load the encoder of a checkpoint so, in float32 on the CPU."""
    checkpoint = open_checkpoint(folder, "encoder")
    processor = load_processor(checkpoint, min_pixels=None, max_pixels=None)
    token = hf.image_token(checkpoint, hf.load_config(checkpoint), processor.tokenizer)
    preparer = Preparer(processor, checkpoint.family, token, forward_takes(class_of(checkpoint)))
    weights = load_encoder_weights(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    weights.model.requires_grad_(True)
    return TransformersEncoder(EncoderSpec(checkpoint, "cpu", "float32", kernels="reference"), weights, preparer)
