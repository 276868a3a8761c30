"""A PEFT adapter: its config, its tensors, and which half of a model each of them belongs to.

Reads JSON and a safetensors header only: no tensor, no torch, no PEFT. Which half a tensor is of is told by its name,
which says the module it belongs to, and not by the config's `target_modules`, which may be a pattern.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvsplit.checkpoints.families import Family
from qvsplit.checkpoints.files import PICKLES, read_json
from qvsplit.checkpoints.hub import fetch_adapter, looks_like_hub_name
from qvsplit.checkpoints.tensors import TensorPlace, read_header, torch_dtype_name
from qvsplit.errors import ModelError, some_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MODEL_PREFIX = "base_model.model."  # of every tensor that PEFT saves
_WRAPPED = ".base_layer"  # what PEFT calls a module inside its own in that module's place

_PATTERNS = ("rank_pattern", "alpha_pattern")
# PEFT's methods that are tried: what their tensors' names have behind the module's, and the fields of the config that
# decide what is added to the model. The others change prompts, or the forward pass as a whole, or are not tried.
_OF_METHOD: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "LORA": (
        "lora_",
        ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "lora_bias", *_PATTERNS,
         "modules_to_save", "target_parameters", "trainable_token_indices"),
    ),
    "IA3": ("ia3_", ("fan_in_fan_out", "feedforward_modules", "modules_to_save")),
    "LOHA": ("hada_", ("r", "alpha", "use_effective_conv2d", *_PATTERNS, "modules_to_save")),
    "LOKR": (
        "lokr_",
        ("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor", *_PATTERNS, "modules_to_save"),
    ),
}  # fmt: skip
# Which modules are meant: the tensors' names say it
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Of training, or of where the adapter came from
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_ia3_weights", "init_lora_weights", "init_weights", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "module_dropout", "peft_type", "peft_version", "qalora_group_size", "rank_dropout",
    "rank_dropout_scale", "revision", "runtime_config", "task_type",
})  # fmt: skip
# Names of modules, which the tensors' names have as well
_NAMING = frozenset({"modules_to_save", "target_parameters", "feedforward_modules"})
# Beginnings of training that leave the model's own weights as they are
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """One adapter. Made by `open_adapter`.

    Attributes:
        folder: Where its two files lie.
        name: The hub name, or the folder as an absolute path.
        revision: The commit hash on the hub; None for a folder.
        config: The content of adapter_config.json.
        places: Where each tensor lies, by its name.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any] = field(repr=False)
    places: Mapping[str, TensorPlace] = field(repr=False)

    @property
    def label(self) -> str:
        """What names it again: the folder, or the hub name with its commit behind an `@`."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def method(self) -> str:
        """PEFT's name of how it adapts: LORA."""
        return str(self.config["peft_type"])

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its config that are given to PEFT."""
        _, deciding = _OF_METHOD[self.method]
        return {name: self.config[name] for name in (*deciding, *CHOOSING) if self.config.get(name) is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """What its config says of how tensors are merged, beside their names."""
        _, deciding = _OF_METHOD[self.method]
        return {"peft_type": self.method} | {
            name: self.config[name] for name in deciding if self.config.get(name) and name not in _NAMING
        }

    def module_of(self, name: str) -> str:
        """Give the module that a tensor belongs to, as the adapter calls it: `model.layers.0.self_attn.q_proj`."""
        path = name.removeprefix(MODEL_PREFIX)
        for mark in (f".{_OF_METHOD[self.method][0]}", ".token_adapter."):
            if mark in path:
                return path[: path.index(mark)].replace(_WRAPPED, "")
        return path.rpartition(".")[0].replace(_WRAPPED, "")

    def is_added(self, name: str) -> bool:
        """Say whether a tensor is added to a module's own; the others take the place of one of the model's."""
        return f".{_OF_METHOD[self.method][0]}" in name or ".token_adapter." in name

    def names_of(self, family: Family, half: Literal["encoder", "language"]) -> list[str]:
        """List the names of the tensors that belong to a half of a model of this family, sorted."""
        in_half = _in_encoder if half == "encoder" else _in_language_model
        return sorted(name for name in self.places if in_half(family, self.module_of(name)))


def _in_encoder(family: Family, module: str) -> bool:
    weight = f"{module}.weight"  # adapters have names of today's modules, or those that checkpoints have
    return family.encoder_has(weight) or family.is_encoders(weight)


def _in_language_model(family: Family, module: str) -> bool:
    weight = f"{module}.weight"
    return family.language_model_has(weight) and family.is_language_models(weight)


def open_adapter(adapter: str | os.PathLike[str]) -> Adapter:
    """Open the adapter that is named: a folder, or a hub name, optionally with a revision behind an `@`.

    Raises:
        ModelError: There is none, a file is missing or damaged, its weights are pickled, or it is of a kind that is not
            merged.
    """
    text = os.fspath(adapter)
    if os.path.isdir(text):
        folder = Path(text).resolve()
        name, revision = str(folder), None
    elif os.path.isfile(text):
        raise ModelError(f"{text} is a file; give the folder that it is in, {Path(text).resolve().parent}")
    elif looks_like_hub_name(text):
        folder = fetch_adapter(text, [CONFIG_FILE, WEIGHTS_FILE])
        name, revision = text.partition("@")[0], folder.name
    else:
        raise ModelError(f"no adapter folder at {text}; give a folder with {CONFIG_FILE}, or a hub name")
    _check_files(folder, text)
    config = read_json(folder / CONFIG_FILE)
    _check_config(config, text)
    places = read_header(folder / WEIGHTS_FILE)
    _check_tensors(places, text)
    return Adapter(folder, name, revision, config, places)


def _check_files(folder: Path, name: str) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{name} has no {CONFIG_FILE}; is it a PEFT adapter?")
    if (folder / WEIGHTS_FILE).is_file():
        return
    if pickled := sorted(one.name for one in folder.iterdir() if one.suffix in PICKLES):
        raise ModelError(
            f"{name} has only pickled weights ({some_of(pickled, 2)}), which can run code when loaded and are never "
            f"opened; save it as {WEIGHTS_FILE}, with a PEFT of today"
        )
    raise ModelError(f"{name} has no {WEIGHTS_FILE} (pickled weights are never opened)")


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """ModelError for what is not merged, by its name: nothing that a config says is passed over."""
    method = str(config.get("peft_type"))
    if method not in _OF_METHOD:
        raise ModelError(
            f"{name} is an adapter of the type {method}, which qvsplit does not merge; it takes {', '.join(_OF_METHOD)}"
        )
    beginning = config.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise ModelError(
            f"{name} began from {beginning!r}, which changes the model's own weights as well; save it as plain LoRA "
            "(`path_initial_model_for_weight_conversion` of PEFT's save_pretrained)"
        )
    known = {*_OF_METHOD[method][1], *CHOOSING, *_WITHOUT_EFFECT}
    if other := sorted(one for one, value in config.items() if one not in known and value):
        raise ModelError(f"{name} is an adapter with {some_of(other)}, which qvsplit does not merge")


def _check_tensors(places: Mapping[str, TensorPlace], name: str) -> None:
    if not places:
        raise ModelError(f"{name}: {WEIGHTS_FILE} holds no tensors")
    if strange := sorted(one for one in places if not one.startswith(MODEL_PREFIX)):
        raise ModelError(f"{name}: {WEIGHTS_FILE} has tensors that PEFT does not save: {some_of(strange)}")
    for place in places.values():
        try:
            torch_dtype_name(place.dtype)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
