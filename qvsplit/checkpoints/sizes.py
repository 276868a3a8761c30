"""What each half of a checkpoint takes, from its config and its files' headers alone: tensors, parameters, memory.

What lies in the files is counted from their headers; what `extract` and `ask` load, from the two classes that they
build (checkpoints/model_class.py), here without memory for their parameters. How much memory goes beside the weights
was measured: docs/hardware.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import without_root
from qvsplit.checkpoints.hf import load_config, quiet_transformers, transformers_errors
from qvsplit.checkpoints.model_class import class_of, half_class
from qvsplit.checkpoints.tensors import TensorPlace

# bytes, from measurements of the 2B: see docs/hardware.md
LIBRARIES = 800_000_000  # torch, transformers and pyarrow themselves, on a CPU
ENCODING = 400_000_000  # one image near the cap, on a CPU
ASKING = 600_000_000  # an image's keys and values, a batch behind it, buffers; on a CPU
ON_GPU = 300_000_000  # beside the weights, of either half


@dataclass(frozen=True)
class Stored:
    """Some tensors of a checkpoint, as its files hold them.

    Attributes:
        tensors: How many.
        dtypes: Bytes by safetensors' name of the dtype, the most first; of those whose header is at hand.
        unknown: How many there are whose header is not at hand.
    """

    tensors: int
    dtypes: Mapping[str, int]
    unknown: int

    @property
    def bytes(self) -> int | None:
        """Bytes of all of them; None where some are not known."""
        return None if self.unknown else sum(self.dtypes.values())


def stored(names: Iterable[str], places: Mapping[str, TensorPlace]) -> Stored:
    """Count the named tensors by where they lie; a name that `places` lacks is unknown."""
    wanted = list(names)
    dtypes: dict[str, int] = {}
    for place in (places[name] for name in wanted if name in places):
        dtypes[place.dtype] = dtypes.get(place.dtype, 0) + place.size
    most_first = dict(sorted(dtypes.items(), key=lambda one: -one[1]))
    return Stored(len(wanted), most_first, sum(name not in places for name in wanted))


_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}


def dtype_name(safetensors_name: str) -> str:
    """Give torch's name of any dtype that safetensors has: `float8_e4m3` of F8_E4M3."""
    found = re.fullmatch(r"([A-Z]+?)(\d.*)?", safetensors_name)
    kind, width = found.groups() if found else (safetensors_name, None)
    return _KINDS.get(kind, kind.lower()) + (width or "").lower()


def not_loaded(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Group by module the names of the tensors that neither `extract` nor `ask` loads.

    They are of neither half (a talker, an audio encoder), or transformers' class passes them over (layers that predict
    further tokens).
    """
    passed_over = [re.compile(pattern) for pattern in class_of(checkpoint)._keys_to_ignore_on_load_unexpected or ()]
    halves = {*checkpoint.encoder_names, *checkpoint.language_names}
    found: dict[str, list[str]] = {}
    for name in checkpoint.files:
        if name not in halves or any(pattern.search(name) for pattern in passed_over):
            found.setdefault(without_root(name).partition(".")[0], []).append(name)
    return found


@dataclass(frozen=True)
class Loaded:
    """Parameters of what `extract` and `ask` load; a tied matrix counts once.

    Attributes:
        encoder, language: Parameters.
        embedding: Those of the input embedding.
        is_tied: Whether that is the output layer, too.
        cached: Values that a token leaves in the KV cache; None where its config does not say.
    """

    encoder: int
    language: int
    embedding: int
    is_tied: bool
    cached: int | None

    def embedding_beside(self, value_bytes: int, stored_bytes: int) -> int:
        """Give what the embedding takes on a CPU beside the parameters, in bytes; negative where that is less.

        Its rows are looked up as they are stored; in another dtype a tied one is held in both.

        Args:
            value_bytes: Of a value that is computed with.
            stored_bytes: Of a value as the checkpoint has it.
        """
        if value_bytes == stored_bytes:
            return 0
        return self.embedding * (stored_bytes if self.is_tied else stored_bytes - value_bytes)


def count(checkpoint: Checkpoint) -> Loaded:
    """Count the parameters of both halves, as `extract` and `ask` divide them. No weight need be on this disk.

    Raises:
        ModelError: transformers has no class for it, or it cannot be split.
    """
    from accelerate import init_empty_weights

    family, full, config = checkpoint.family, class_of(checkpoint), load_config(checkpoint)
    with transformers_errors(checkpoint):
        with init_empty_weights():
            encoder = half_class(full, family.encoder_has)._from_config(config)
            language = half_class(full, family.language_model_has)._from_config(config)
        language.tie_weights()
    embedding = language.get_input_embeddings().weight
    return Loaded(
        _parameters(encoder, family.encoder_has),
        _parameters(language, family.language_model_has),
        embedding.numel(),
        language.get_output_embeddings().weight is embedding,
        _cached_values(language),
    )


def _parameters(module: Any, is_wanted: Callable[[str], bool]) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if is_wanted(name))


def _cached_values(language: Any) -> int | None:
    """Have one token computed without memory, and count the keys and values that it leaves in the cache.

    None for a decoder that looks at numbers, which are not there.
    """
    import torch

    decoder = language.eval().to("meta").get_decoder()
    try:
        with torch.no_grad(), quiet_transformers():
            token = torch.zeros((1, 1), dtype=torch.long, device="meta")
            layers = decoder(input_ids=token, use_cache=True).past_key_values.layers
        states = [state for layer in layers for state in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return None
    return sum(int(state.numel()) for state in states if state is not None)
