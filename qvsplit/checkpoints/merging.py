"""Merge a PEFT adapter into one half of a model, by PEFT's own merge; and hold it against the full model before that.

PEFT passes over tensors that belong to no module, and takes missing ones as they were drawn, with a warning at most.
Here the adapter is first laid over the full model without memory, and every tensor of it must find its place there,
of the right shape, with none missing: an adapter of another model is refused whatever half it is for.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.adapter import CHOOSING, MODEL_PREFIX, Adapter
from qvsplit.checkpoints.checkpoint import Checkpoint, Half
from qvsplit.checkpoints.hf import quiet_transformers
from qvsplit.checkpoints.tensors import read_tensors, torch_dtype_name
from qvsplit.checkpoints.tracing import empty_model
from qvsplit.errors import ModelError, QvsplitError, some_of
from qvsplit.runtime.devices import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter that fits a checkpoint's model, and what of it belongs to one half.

    Attributes:
        adapter: As it was opened.
        config: PEFT's config, whose fields name exactly the modules of this half.
        names: The names that PEFT gives its tensors of this half, by those in its file.
    """

    adapter: Adapter
    config: Any
    names: Mapping[str, str]

    def merged(self, model: Any) -> Any:
        """Give `model`, the half with its weights, with the adapter merged into them, in the dtype that they have.

        Raises:
            ModelError: PEFT cannot merge it.
        """
        import peft

        with _peft_errors(self.adapter):
            if any(parameter.device.type == "meta" for parameter in model.parameters()):
                raise ModelError(f"{self.adapter.label} cannot be merged into a model that is not in memory as a whole")
            if not getattr(model, "all_tied_weights_keys", None):
                model._tied_weights_keys = None  # else PEFT asks for an input embedding, which an encoder has not
            wrapped = peft.get_peft_model(model, copy.deepcopy(self.config))
            loaded = peft.set_peft_model_state_dict(wrapped, self._tensors())
            if loaded.unexpected_keys:
                raise ModelError(f"{self.adapter.label}: PEFT has no place for {some_of(loaded.unexpected_keys)}")
            merged = wrapped.eval().merge_and_unload()
        _tie_what_is_one(merged)
        return merged

    def _tensors(self) -> dict[str, torch.Tensor]:
        import torch

        places = {name: self.adapter.places[name] for name in self.names}
        return {
            self.names[name]: torch.frombuffer(raw, dtype=getattr(torch, torch_dtype_name(places[name].dtype))).view(
                places[name].shape
            )
            for name, raw in read_tensors(places)
        }


def fitted_adapter(checkpoint: Checkpoint, half: Half) -> FittedAdapter | None:
    """Hold the adapter of a checkpoint against its full model; give what of it is for `half`, or for both.

    Returns:
        None where the checkpoint has no adapter, or one that has nothing for this half.

    Raises:
        ModelError: PEFT is not installed, or the adapter does not fit the model.
    """
    adapter = checkpoint.adapter
    if adapter is None:
        return None
    _require_peft()
    is_quantised = half != "encoder" and checkpoint.quantisation is not None
    if is_quantised and adapter.names_of(checkpoint.family, "language"):
        raise ModelError(
            f"{adapter.label} cannot be merged into {checkpoint.name}, which is quantised: give the model that it was "
            "quantised from as `model`"
        )
    with _peft_errors(adapter):
        place = _Placed(adapter, checkpoint)
        place.check()
        family = checkpoint.family
        _check_halves(adapter, checkpoint)
        if half == "both":
            return place.of_half(lambda module: True)
        is_of_half = family.encoder_has if half == "encoder" else family.language_model_has
        return place.of_half(lambda module: is_of_half(f"{module}.weight"))


def _check_halves(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """ModelError where an adapter is for what neither half has, audio for one: nothing of it would be applied."""
    if not any(adapter.names_of(checkpoint.family, half) for half in ("encoder", "language")):
        modules = {adapter.module_of(name) for name in adapter.places}
        raise ModelError(
            f"{adapter.label} changes nothing here: it is for {some_of(modules)}, which neither the "
            f"vision encoder nor the language model of {checkpoint.name} has; leave it out"
        )


class _Placed:
    """An adapter laid over the full model, without memory."""

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint) -> None:
        self.adapter = adapter
        self.where = checkpoint.name
        model = empty_model(checkpoint)
        paths = {name for name, _ in model.named_modules()}
        named = _modules_in_model({adapter.module_of(name) for name in adapter.places}, model)
        if strange := sorted(one for one in adapter.places if named[adapter.module_of(one)] not in paths):
            raise self._misfit(f"the model has no {some_of({adapter.module_of(one) for one in strange})}")
        self.modules = {name: named[adapter.module_of(name)] for name in adapter.places}
        self.names = {name: self._renamed(name) for name in adapter.places}
        self.config = _peft_config(adapter)
        self._check_patterns(model)
        self._wrapped = self._laid_over(model, checkpoint)

    def _renamed(self, name: str) -> str:
        before = f"{MODEL_PREFIX}{self.adapter.module_of(name)}"
        return f"{MODEL_PREFIX}{self.modules[name]}{name[len(before) :]}"

    def _misfit(self, why: str) -> ModelError:
        return ModelError(f"{self.adapter.label} does not fit {self.where}: {why}; give the model it was trained on")

    def _check_patterns(self, model: Any) -> None:
        """ModelError where ranks or scales are given for what the model has not: PEFT passes over these.

        PEFT holds them against names of modules, and of the parameters that `target_parameters` chooses.
        """
        paths = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self.config, field, None) or {}:
                if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths):
                    raise self._misfit(f"its {field} names {key}, and it has no such module or parameter")

    def _laid_over(self, model: Any, checkpoint: Checkpoint) -> Any:
        """Give PEFT's model over the empty one, its modules chosen by the config if that names those of the tensors."""
        added = {self.modules[name] for name in self.names if self.adapter.is_added(name)}
        chosen: set[str] = set()
        parameters: list[str] = []
        wrapped = None
        try:
            wrapped = _over(model, self.config)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
        if wrapped is not None:
            chosen = set(wrapped.base_model.targeted_module_names)
            parameters = list(wrapped.base_model.targeted_parameter_names)
        beside = {parameter.rpartition(".")[0] for parameter in parameters} | self._of_tokens()
        if lacking := sorted(chosen - added):
            raise self._misfit(f"it has no tensors for {some_of(lacking)}, which its target_modules name")
        if wrapped is None or added - chosen - beside:  # a pattern for the names of another layout
            self.config = _naming(self.config, added - beside, parameters)
            wrapped = _over(empty_model(checkpoint), self.config)
        return wrapped

    def _of_tokens(self) -> set[str]:
        return {module for name, module in self.modules.items() if ".token_adapter." in name}

    def check(self) -> None:
        """ModelError unless every tensor has its place, and every place its tensor."""
        import peft

        expected = peft.get_peft_model_state_dict(self._wrapped, save_embedding_layers=False)
        places = self._wrapped.state_dict() | expected
        shapes = {self.names[name]: place.shape for name, place in self.adapter.places.items()}
        if strange := sorted(shapes.keys() - places.keys()):
            raise self._misfit(f"PEFT has no place for {some_of(strange)}")
        if lacking := sorted(expected.keys() - shapes.keys()):
            raise self._misfit(f"it lacks {some_of(lacking)}")
        if wrong := sorted(name for name, shape in shapes.items() if shape != tuple(places[name].shape)):
            one = wrong[0]
            raise self._misfit(f"{some_of(wrong)} has the shape {[*shapes[one]]} instead of {[*places[one].shape]}")

    def of_half(self, is_of_half: Callable[[str], bool]) -> FittedAdapter | None:
        """Give what belongs to the modules of a half; None where nothing does."""
        import peft.utils

        names = {name: own for name, own in self.names.items() if is_of_half(self.modules[name])}
        if not names:
            return None
        base = self._wrapped.base_model
        config = _naming(
            self.config,
            filter(is_of_half, base.targeted_module_names),
            [name for name in base.targeted_parameter_names if is_of_half(name.rpartition(".")[0])],
        )
        if getattr(config, "modules_to_save", None):
            saved = [
                path.removeprefix(MODEL_PREFIX)
                for path, module in self._wrapped.named_modules()
                if isinstance(module, peft.utils.ModulesToSaveWrapper)
            ]
            config.modules_to_save = [*filter(is_of_half, saved)] or None
        if getattr(config, "trainable_token_indices", None) and not any(".token_adapter." in name for name in names):
            config.trainable_token_indices = None
        return FittedAdapter(self.adapter, config, names)


def _over(model: Any, config: Any) -> Any:
    import peft

    return peft.get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=True)


def _naming(config: Any, modules: Iterable[str], parameters: Iterable[str]) -> Any:
    """Give a config that names these modules and parameters, by their whole paths, and no others."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config = copy.deepcopy(config)
    for name in CHOOSING:
        if hasattr(config, name):
            setattr(config, name, None)
    chosen, named = set(modules), [*parameters]
    config.target_modules = chosen or (None if named else DUMMY_TARGET_MODULES)  # there may be whole modules alone
    if hasattr(config, "target_parameters"):
        config.target_parameters = named or None
    return config


def _peft_config(adapter: Adapter) -> Any:
    """Make PEFT's config of the fields that decide; whatever else the file says is given to nobody."""
    from peft import mapping

    made = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[adapter.method](**adapter.fields)
    made.inference_mode = True
    return made


def _modules_in_model(modules: Iterable[str], model: Any) -> dict[str, str]:
    """Name modules as the model does, by the rules by which transformers renames the tensors of older checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    paths = {name for name, _ in model.named_modules()}
    found: dict[str, str] = {}
    for module in modules:
        own, _ = rename_source_key(f"{module}.weight", renamings, converters, model.base_model_prefix, state)
        path = own.removesuffix(".weight")
        found[module] = path if path in paths or module not in paths else module
    return found


def _tie_what_is_one(model: Any) -> None:
    """Have the model say of parameters that they are tied only where they are still one: one may have been replaced."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {a: b for a, b in tied.items() if parameters.get(a) is parameters.get(b)}


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError("`adapter` needs peft; install it with: pip install 'qvsplit[adapters]'") from None


@contextmanager
def _peft_errors(adapter: Adapter) -> Iterator[None]:
    """Show no remarks of PEFT's: what matters is an error here; and turn what it raises into a ModelError of a line."""
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    except QvsplitError:
        raise
    except Exception as error:  # an adapter's files can be wrong in more ways than PEFT names
        text = " ".join(str(error).split()) or type(error).__name__
        if is_out_of_memory(error):
            raise ModelError(f"{adapter.label} does not fit into memory beside the model ({text[:240]})") from error
        raise ModelError(f"{adapter.label} cannot be merged: {text[:240]}") from error
