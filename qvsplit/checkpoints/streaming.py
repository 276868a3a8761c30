"""Have transformers' `from_pretrained` read tensors our way: one ahead, into memory that is used again.

transformers builds the model without memory, names every tensor, ties, initialises what no checkpoint holds, and says
what is missing. What it does between, opening files as maps of memory and holding what it has read until all is in
place, is done here instead: a tensor is read while the one before it is laid out, and nothing is held twice.

It takes the place of one of its methods that other versions may have in another form, and it is for checkpoints whose
tensors are the model's own under other names. In every other case transformers reads the files itself.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.checkpoints.tensors import SAFETENSORS_BYTES, TensorPlace, is_computed_in, read_ahead, torch_dtype_name
from qvsplit.runtime.loading import TENSORS, OnLoad, nobody

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 64 << 20  # larger tensors have memory of their own

_METHOD, _TAKES = "_load_pretrained_model", ["model", "state_dict", "checkpoint_files", "load_config"]


class Placing(Protocol):
    """What puts tensors into a model."""

    def place(self, name: str, stored: torch.Tensor, is_reused: bool) -> None:
        """Take a tensor, by its name in the model, as it is stored; if `is_reused` its memory is only lent."""

    def finish(self) -> None:
        """Hear that all have been placed."""


class StreamedReading:
    """Reads the tensors of one checkpoint for one `from_pretrained`. `used` says whether it did."""

    def __init__(self, places: Mapping[str, TensorPlace], placing: Callable[[Any], Placing], on_load: OnLoad) -> None:
        self.used = False
        self._places = places
        self._placing = placing
        self._on_load = on_load

    def model_class(self, half: Any) -> Any:
        """Derive from a half's class one whose `from_pretrained` reads in this way, where that can be."""
        takes = inspect.signature(getattr(half, _METHOD, lambda: None)).parameters
        if list(takes)[: len(_TAKES)] != _TAKES:
            return half
        reading = self

        class Streamed(half):  # type: ignore[misc]
            @staticmethod
            def _load_pretrained_model(
                model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *others: Any, **more: Any
            ) -> Any:
                return reading._read(model, load_config) or half._load_pretrained_model(
                    model, state_dict, checkpoint_files, load_config, *others, **more
                )

        Streamed.__name__, Streamed.__qualname__, Streamed.__module__ = (
            half.__name__,
            half.__qualname__,
            half.__module__,
        )
        return Streamed

    def _read(self, model: Any, load_config: Any) -> Any:
        """Read all tensors into `model`; None, and nothing done, where transformers must do that."""
        from transformers.modeling_utils import LoadStateDictInfo

        names = names_in_model(model, self._places, load_config)
        if names is None:
            return None
        self.used = True
        placing, memory = self._placing(model), _Memory()
        places = {name: self._places[name] for name in names}
        done, total = 0, sum(one.size for one in places.values())
        self._on_load(TENSORS, 0, total)
        for name, view in read_ahead(places, memory.of):
            tensor, is_reused = memory.take()
            placing.place(names[name], tensor, is_reused)
            del tensor, view  # nothing may hold its memory while the next but one is read
            done += places[name].size
            self._on_load(TENSORS, done, total)
        placing.finish()
        self._on_load, self._places = nobody, {}  # the model's class holds this object as long as it lives
        model.all_tied_weights_keys = {}  # that has been done
        nothing: dict[str, Any] = {name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        more = inspect.signature(LoadStateDictInfo).parameters.keys() - nothing.keys()
        nothing |= {name: {} if name == "conversion_errors" else [] if name == "error_msgs" else set() for name in more}
        return LoadStateDictInfo(**nothing), None


class _Memory:
    """Memory for `read_ahead`: two buffers in turn. Remembers what it has given, in that order."""

    def __init__(self) -> None:
        self._buffers: list[Any] = [None, None]
        self._turn = 0
        self._given: list[tuple[Any, bool]] = []

    def of(self, place: TensorPlace) -> memoryview:
        """Give memory for a tensor."""
        import torch

        is_reused = place.size <= BUFFER_BYTES
        if is_reused:
            self._turn = 1 - self._turn
            if self._buffers[self._turn] is None or len(self._buffers[self._turn]) < place.size:
                self._buffers[self._turn] = None  # before there is a larger one
                self._buffers[self._turn] = torch.empty(place.size, dtype=torch.uint8)
            raw = self._buffers[self._turn][: place.size]
        else:
            raw = torch.empty(place.size, dtype=torch.uint8)
        self._given.append((raw.view(getattr(torch, torch_dtype_name(place.dtype))).view(place.shape), is_reused))
        return memoryview(raw.numpy())

    def take(self) -> tuple[torch.Tensor, bool]:
        """Give the first tensor that has not been taken, and whether its memory is used again."""
        return self._given.pop(0)


def names_in_model(model: Any, places: Mapping[str, TensorPlace], load_config: Any) -> dict[str, str] | None:
    """Name every tensor as the model has it; None where not all are the model's own under another name, and no more.

    Those that transformers ignores in a checkpoint (heads for training, say) are left out.

    Args:
        model: On torch's "meta" device.
        places: By names in the checkpoint.
        load_config: transformers' `LoadStateDictConfig`.
    """
    try:
        from transformers.core_model_loading import (
            PrefixChange,
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return None
    if load_config.hf_quantizer is not None or load_config.device_map or load_config.dtype_plan:
        return None
    mapping = load_config.weight_mapping or []
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    unusual = [one for one in renamings if type(one) not in (WeightRenaming, PrefixChange)]
    expected = model.state_dict()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names: dict[str, str] = {}
    for name in places:
        if any(one.rename_source_key(name)[0] != name for one in unusual):
            return None
        own, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if own not in expected and name in expected:
            own, converter = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if own not in expected and any(re.search(pattern, own) for pattern in ignored):
            continue
        if converter is not None or own not in expected:
            return None
        names[name] = own
    tied = getattr(model, "all_tied_weights_keys", {})
    if len(set(names.values())) != len(names) or set(names.values()) != expected.keys() - tied.keys():
        return None
    return names if all(_is_sound(places[name], expected[own]) for name, own in names.items()) else None


def _is_sound(place: TensorPlace, expected: torch.Tensor) -> bool:
    size = SAFETENSORS_BYTES.get(place.dtype, 0) * math.prod(place.shape)
    return is_computed_in(place.dtype) and place.shape == tuple(expected.shape) and place.size == size
