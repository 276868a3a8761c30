"""Find out which tensors of a checkpoint its vision encoder reads, by a dry run: no weights, no list of names.

The full model is built without memory for its parameters. `get_image_features` is called with what the checkpoint's own
processor makes of small images, of one alone and of one that is cut into tiles; whatever tensor the call reads is stood
in for by zeros that take no memory, and noted. What it gives is fed back, up to the text decoder: what is read on that
way is the language model's, too. Modules that hold none of the language model's tensors go to the encoder as a whole:
an expert or a branch that no input here reached must not be missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.cache import cache_folder
from qvsplit.checkpoints.families import Family, without_root
from qvsplit.checkpoints.hf import load_config, load_processor, process_image, transformers_errors
from qvsplit.checkpoints.model_class import (
    class_of,
    features_of,
    forward_takes,
    output_problem,
    wanted_arguments,
)
from qvsplit.errors import ModelError
from qvsplit.runtime.atomic_files import written_whole

if TYPE_CHECKING:
    import torch

    from qvsplit.checkpoints.checkpoint import Checkpoint

TRACED_SIZES = ((160, 120), (900, 400))  # width and height: one that is small, one that families with tiles cut up


def traced_family(checkpoint: Checkpoint) -> Family:
    """Give what is to be known of a checkpoint whose family is not listed; remembered by its config.

    Args:
        checkpoint: Its config and its processor's files must be on this disk; of its tensors, only their names count.

    Raises:
        ModelError: It cannot be split; the message says what is missing.
    """
    import transformers

    about = [checkpoint.config, sorted(checkpoint.files), transformers.__version__, "split 2"]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    entry = cache_folder() / "splits" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not ours: traced again
        known = json.loads(entry.read_bytes())
        return _family(checkpoint, known["modules"], known["loose"], known["names"])
    modules, loose = encoder_parts(checkpoint)
    names = _names_in_checkpoint(checkpoint, {*modules, *loose})
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(entry, durable=False) as stream:
            stream.write(json.dumps({"modules": modules, "loose": loose, "names": names}).encode())
    return _family(checkpoint, modules, loose, names)


def _family(checkpoint: Checkpoint, modules: list[str], loose: list[str], names: list[str]) -> Family:
    return Family(
        checkpoint.family.model_type, tuple(modules), tuple(loose), frozenset(names) if checkpoint.files else None
    )


def encoder_parts(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Find the modules, and the tensors beside them, that only the vision encoder reads; both without root.

    Raises:
        ModelError: It cannot be split, or cannot be traced.
    """
    model = empty_model(checkpoint)
    read: set[str] = set()
    language = set(_language_tensors(model))
    processor = load_processor(checkpoint)
    with transformers_errors(checkpoint, "cannot be split"):
        for size in TRACED_SIZES:
            processed, tokens = _processed(processor, size)
            found, output = _features_traced(model, processed)
            read |= found
            language |= _read_with_features(model, {**processed, **tokens}, output)
    if not read - language:
        raise ModelError(f"{checkpoint.folder} cannot be split: its get_image_features reads no tensor of its own")
    modules = list(_whole_modules("", model, read, language))
    loose = [name for name in sorted(read) if not any(name.startswith(f"{module}.") for module in modules)]
    return [without_root(module) for module in modules], [without_root(name) for name in loose]


def empty_model(checkpoint: Checkpoint) -> Any:
    """Build the full model without memory for its parameters; its buffers are real."""
    from accelerate import init_empty_weights

    model_class = class_of(checkpoint)
    config = load_config(checkpoint)
    # some say it of their text config alone
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config())):
        raise ModelError(
            f"{checkpoint.folder} cannot be split: it is an encoder-decoder, whose text encoder sees image and question"
            " at once; name another checkpoint as `model`"
        )
    with transformers_errors(checkpoint), init_empty_weights(include_buffers=False):
        return model_class._from_config(config).eval().requires_grad_(False)


def _processed(processor: Any, size: tuple[int, int]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Give what the checkpoint's processor makes of a grey image, and the tokens of the text that stands for it."""
    import torch
    from PIL import Image

    processed, text = process_image(processor, Image.new("RGB", size, "grey"))
    ids = list(processor.tokenizer(text)["input_ids"])
    tokens = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
    with suppress(TypeError):  # some would have to know more than the tokens, of models that take no types
        tokens["mm_token_type_ids"] = processor.create_mm_token_type_ids([ids])
    return processed, {name: torch.tensor(values) for name, values in tokens.items()}


def _language_tensors(model: Any) -> Iterator[str]:
    """List the tensors under the text decoder, the input embeddings and the output head."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None and part is not model:
            yield from (names[id(tensor)] for tensor in (*part.parameters(), *part.buffers()) if id(tensor) in names)


def _whole_modules(path: str, module: Any, read: set[str], language: set[str]) -> Iterator[str]:
    """List the largest modules of which some tensor is read by the encoder and none is the language model's."""
    tensors = {name for name, _ in (*module.named_parameters(path), *module.named_buffers(path))}
    if path and tensors and not tensors & language and path not in ("model", "thinker"):
        if tensors & read:
            yield path
        return
    for name, child in module.named_children():
        yield from _whole_modules(f"{path}.{name}" if path else name, child, read, language)


def _names_in_checkpoint(checkpoint: Checkpoint, parts: Iterable[str]) -> list[str]:
    """List the tensors of the checkpoint that transformers brings to these parts of the full model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = empty_model(checkpoint)
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    within = tuple(f"{part}." for part in parts)

    def is_encoders(name: str) -> bool:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return f"{without_root(renamed if renamed in state else name)}.".startswith(within)

    return [name for name in sorted(checkpoint.files) if is_encoders(name)]


def _features_traced(model: Any, processed: Mapping[str, Any]) -> tuple[set[str], Any]:
    """Name the parameters and buffers that `get_image_features` reads, and give what it gives.

    Raises:
        ModelError: That cannot be stored, or it takes what the processor does not give.
    """
    import torch

    features = features_of(model, "image")
    given = wanted_arguments(features, processed)
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            given[name] = value.to(model.dtype)
    with _noted(model) as read:
        output = features(**given, return_dict=True)
    if (problem := output_problem(output)) is not None:
        raise ModelError(f"{type(model).__name__} models cannot be split: {problem}")
    return read, output


def _read_with_features(model: Any, prompt: Mapping[str, Any], output: Any) -> set[str]:
    """Name what the full model reads of a prompt and an encoder's output before its text decoder begins.

    Of the output it is given what a store keeps. Raises what the model does where it needs more.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    kept = BaseModelOutputWithPooling(pooler_output=output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        kept["deepstack_features"] = output.deepstack_features

    class Begun(Exception):
        """The text decoder was called."""

    def stop(*_: Any) -> None:
        raise Begun

    takes = forward_takes(type(model))
    given = {name: value for name, value in prompt.items() if name in takes and "pixel" not in name}
    handle = model.get_decoder().register_forward_pre_hook(stop)
    try:
        with _noted(model) as read, suppress(Begun):
            model(**given, mm_encoder_outputs={"image": kept})
    finally:
        handle.remove()
    return read


@contextmanager
def _noted(model: Any) -> Iterator[set[str]]:
    """Note the names of the parameters and buffers that are read inside the block, and stand in for them."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_map

    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    names = {id(tensor): name for name, tensor in tensors}
    read: set[str] = set()
    stand_ins: dict[int, torch.Tensor] = {}

    def stand_in(value: Any) -> Any:
        """Give zeros that take no memory for a tensor that has none."""
        if not isinstance(value, torch.Tensor) or id(value) not in names or value.device.type != "meta":
            return value
        if id(value) not in stand_ins:
            stand_ins[id(value)] = torch.zeros((), dtype=value.dtype).expand(value.shape)
        return stand_ins[id(value)]

    def note(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and id(value) in names:
            read.add(names[id(value)])
        return stand_in(value)

    class Reads(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # .dtype, .device and .shape of a parameter are looked at, not read
            look = getattr(function, "__name__", "") in ("__get__", "is_floating_point")
            args, kwargs = tree_map(stand_in if look else note, (tuple(args), kwargs or {}))
            return function(*args, **kwargs)

    with torch.no_grad(), Reads():
        yield read
