"""The class in transformers that holds both halves of a checkpoint, and the class without one half.

Nothing is loaded here. A class that cannot be split is refused in one sentence that says which part is missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ModelError

if TYPE_CHECKING:
    from qvsplit.checkpoints.checkpoint import Checkpoint


# of get_image_features: what is stored, and how the names of what nobody reads end: the encoder's own inner states
_STORED_FIELDS = frozenset({"pooler_output", "deepstack_features"})
_INNER_STATES = ("hidden_state", "hidden_states", "attentions")


def full_class(model_type: str, where: object, name: str | None = None) -> Any:
    """Give the full model's class.

    Args:
        model_type: The checkpoint's, which transformers maps to a class.
        where: The checkpoint, for messages.
        name: The class's name, where it is not the one that transformers maps the `model_type` to.

    Raises:
        ModelError: transformers has none, or it cannot be split.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if name is None:
        name = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ModelError(
            f"{where} is a {model_type!r} model, for which transformers {transformers.__version__} has no class that "
            "answers about images; name another checkpoint as `model`, or upgrade transformers"
        )
    found = getattr(transformers, name)
    if (missing := missing_part(found)) is not None:
        raise ModelError(
            f"{where} is a {model_type!r} model, which cannot be split: {found.__name__} of transformers "
            f"{transformers.__version__} {missing}; name another checkpoint as `model`"
        )
    return found


def missing_part(model_class: Any) -> str | None:
    """Say what a class lacks that a split needs; None if nothing."""
    from transformers import GenerationMixin

    inside = vars(inspect.getmodule(model_class)).values()  # the method may be of what is inside the class alone
    if not any(inspect.isclass(one) and hasattr(one, "get_image_features") for one in (model_class, *inside)):
        return "has no get_image_features"
    if "mm_encoder_outputs" not in forward_takes(model_class):
        return "takes no mm_encoder_outputs"
    if not issubclass(model_class, GenerationMixin):
        return "does not generate token by token"
    return None


def class_of(checkpoint: Checkpoint) -> Any:
    """Give the full model's class of a checkpoint. ModelError as `full_class` has it."""
    return full_class(checkpoint.family.model_type, checkpoint.folder, checkpoint.family.model_class)


def forward_takes(model_class: Any) -> frozenset[str]:
    """Give the names of what a class's forward takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def wanted_arguments(function: Callable[..., Any], processed: Mapping[str, Any]) -> dict[str, Any]:
    """Pick from a processor's outputs those that a function names."""
    return {name: processed[name] for name in inspect.signature(function).parameters if name in processed}


def takes_videos(model_class: Any) -> bool:
    """Say whether the full model's class has features of videos, by a method of its own or of what is inside it."""
    return any(hasattr(one, "get_video_features") for one in _classes_beside(model_class))


def encoders_alone(model_class: Any) -> frozenset[str]:
    """Give the names of inputs that only features are computed by: nothing else of the model looks at them."""
    takes: dict[str, set[str]] = {"features": set(), "positions": set()}
    for one in _classes_beside(model_class):
        for name, by in ("image_features", "features"), ("video_features", "features"), ("rope_index", "positions"):
            if (method := getattr(one, f"get_{name}", None)) is not None:
                takes[by] |= inspect.signature(method).parameters.keys()
    return frozenset(takes["features"] - takes["positions"])


def _classes_beside(model_class: Any) -> list[Any]:
    """Give the classes of the module in which a class is defined."""
    classes = [one for one in vars(inspect.getmodule(model_class)).values() if inspect.isclass(one)]
    return [one for one in classes if one.__module__ == model_class.__module__]


def features_of(model: Any, kind: str) -> Callable[..., Any]:
    """Give the method `get_image_features` or `get_video_features` that names its arguments.

    It is of what is inside the full model or of itself. What is inside comes first, as in transformers' `generate`: the
    method outside may name fewer arguments.

    Args:
        model: The full model, or its encoder.
        kind: `image` or `video`.

    Raises:
        ModelError: There is none.
    """
    for owner in (getattr(model, model.base_model_prefix, None), getattr(model, "model", None), model):
        method = getattr(owner, f"get_{kind}_features", None)
        if method is not None and "args" not in inspect.signature(method).parameters:
            found: Callable[..., Any] = method
            return found
    raise ModelError(f"{type(model).__name__} has no get_{kind}_features that names its arguments")


def output_problem(output: Any) -> str | None:
    """Say why what `get_image_features` gave cannot be stored and given back; None if it can."""
    given = [name for name, value in output.items() if value is not None]
    if "pooler_output" not in given:
        return f"its get_image_features gives no pooler_output, only {' and '.join(given)}"
    if unknown := [name for name in given if name not in _STORED_FIELDS and not name.endswith(_INNER_STATES)]:
        return f"its get_image_features gives {' and '.join(unknown)} beside pooler_output, which no store can hold"
    return None


def half_class(full: Any, is_wanted: Callable[[str], bool], ignored: Sequence[str] = ()) -> Any:
    """Derive from the full model's class one that has but those modules in which a tensor is wanted.

    Args:
        full: The full model's class.
        is_wanted: Says of a tensor's name in the full model whether the half has it.
        ignored: Regular expressions of names that a checkpoint may hold beside the half's.
    """

    class Half(full):  # type: ignore[misc]
        _keys_to_ignore_on_load_unexpected = (*(full._keys_to_ignore_on_load_unexpected or ()), *ignored)

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _drop(self, is_wanted)

    # transformers finds a class's renamed tensors, and files beside it, by these
    Half.__name__, Half.__qualname__, Half.__module__ = full.__name__, full.__qualname__, full.__module__
    return Half


def _drop(model: Any, is_wanted: Callable[[str], bool]) -> None:
    """Delete the largest modules, and the single tensors, that are not wanted."""
    for path in _unwanted("", model, is_wanted):
        parent, _, leaf = path.rpartition(".")
        delattr(model.get_submodule(parent), leaf)
    left = {name for name, _ in model.named_parameters()}
    tied = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {name: source for name, source in tied.items() if {name, source} <= left}


def _unwanted(path: str, module: Any, is_wanted: Callable[[str], bool]) -> list[str]:
    found: list[str] = []
    own = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]
    found += [name for name, _ in own if not is_wanted(name)]
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        tensors = [n for n, _ in (*child.named_parameters(below), *child.named_buffers(below))]
        if not tensors or any(map(is_wanted, tensors)):
            found += _unwanted(below, child, is_wanted)
        else:
            found.append(below)
    return found
