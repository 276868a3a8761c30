"""Checkpoints that were saved quantised: what they say of it, and what must not be read as plain weights.

Most keep their vision encoder plain and quantise the linear layers of the language model. So the encoder is loaded as
any other's, without the library that its quantised layers need; an encoder that is itself quantised is refused. The
language model is loaded by transformers' own quantiser. What transformers would take without a word and wrongly is
refused here first: a method that it does not know, numbers without their scales. Reads config and headers; no torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.hf import shortened, transformers_errors
from qvsplit.checkpoints.tensors import TensorPlace, described, is_computed_in
from qvsplit.errors import ModelError, QvsplitError

if TYPE_CHECKING:
    import torch

    from qvsplit.checkpoints.checkpoint import Checkpoint

# Forms whose weights transformers multiplies by their scales while it loads them, where there is no GPU for them.
_DEQUANTISED = frozenset({"fp8", "mxfp8"})
# how safetensors' names of floats begin that mean nothing without a scale
_NARROW = ("F8_", "F6_", "F4")
# what stands beside an FP8 weight `x.weight`: Qwen's and DeepSeek's name, and two others that transformers reads
_SCALES = ("weight_scale_inv", "scale", "qscale_weight")
# and what other programs' FP8 has there, which it does not read
_FOREIGN_SCALES = ("weight_scale", "input_scale")


_ELSEWHERE = "ask where there is a GPU for it, or name a checkpoint of another form as `model`"
# what has to be installed for a form that transformers does not load by itself
_PACKAGES = {
    "aqlm": "aqlm[cpu]", "auto-round": "auto-round", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "gptq": "optimum gptqmodel", "hqq": "hqq", "quanto": "optimum-quanto",
    "quark": "amd-quark", "torchao": "torchao",
}  # fmt: skip


def method_of(checkpoint: Checkpoint) -> str:
    """Name the method by which a quantised checkpoint was quantised."""
    assert checkpoint.quantisation is not None
    method = checkpoint.quantisation.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & checkpoint.quantisation.keys():
        return "bitsandbytes"
    return str(method or "a way that it does not name")


def is_dequantised(checkpoint: Checkpoint, device_type: str) -> bool:
    """Say whether a language model becomes a plain one on `cpu` or `cuda`, its weights times their scales."""
    return checkpoint.quantisation is not None and device_type == "cpu" and method_of(checkpoint) in _DEQUANTISED


def is_decompressed(checkpoint: Checkpoint) -> bool:
    """Say whether a language model is decompressed as it is loaded, on a CPU and on a GPU: see `finish`."""
    return checkpoint.quantisation is not None and method_of(checkpoint) == "compressed-tensors"


def check_language_model(checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> None:
    """Raise ModelError where transformers would read a language model's tensors, at `places`, as what they are not."""
    if checkpoint.quantisation is None:
        _check_plain(checkpoint, places)
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    with transformers_errors(checkpoint):
        is_known = AutoHfQuantizer.supports_quant_method(checkpoint.quantisation)
    if not is_known:
        raise ModelError(
            f"{checkpoint.name} is quantised by {method_of(checkpoint)}, which transformers does not load; name a "
            "checkpoint of another form as `model`"
        )
    if method_of(checkpoint) in _DEQUANTISED:
        _check_scales(checkpoint, places)


def set_quantisation(config: Any, checkpoint: Checkpoint, *, device_type: str) -> None:
    """Have transformers' `config` say how a language model is quantised, wherever the checkpoint's files say it.

    Args:
        config: transformers', of the full model.
        checkpoint: What it is of.
        device_type: `cpu` or `cuda`: where the model will be.
    """
    if checkpoint.quantisation is None:
        return
    settings = dict(checkpoint.quantisation)
    if is_dequantised(checkpoint, device_type):
        settings["dequantize"] = True  # transformers does that by itself only where there is no GPU at all
    config.quantization_config = settings


def forget_quantisation(config: Any) -> None:
    """Take from transformers' `config` what it says of quantised layers: the encoder alone has none."""
    for one in (config, *vars(config).values()):
        if getattr(one, "quantization_config", None) is not None:
            del one.quantization_config


def spare_encoder(config: Any, checkpoint: Checkpoint) -> None:
    """Have transformers leave the encoder of a full model plain, by the names that its modules have today.

    Lists of modules that are not converted have the names of older versions: `visual`, which is now `model.visual`.
    """
    if checkpoint.quantisation is None:
        return
    roots = r"(?:model\.|thinker\.)*"
    modules = [f"{roots}{module}" for module in checkpoint.family.encoder_modules]
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if (listed := config.quantization_config.get(name)) is not None:
            config.quantization_config[name] = [*listed, *modules]


@contextmanager
def quantiser(checkpoint: Checkpoint) -> Iterator[None]:
    """Run a quantiser's own code inside the block: its chatter is left out, its errors say which form it is and why.

    Raises:
        ModelError: A package is missing, there is no GPU for it, or the checkpoint cannot be loaded otherwise.
    """
    if checkpoint.quantisation is None:
        yield
        return
    method = method_of(checkpoint)
    try:
        # gptqmodel prints on the standard output, which is for answers
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except QvsplitError:
        raise
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        text = str(error)
        if isinstance(error, ImportError) and (method in _PACKAGES or "pip install" in text):
            why = "needs a package that is not here"
            todo = f"pip install {_PACKAGES[method]}" if method in _PACKAGES else _ELSEWHERE
        elif any(word in text for word in ("GPU", "CUDA", "MPS", "not supported")):
            why, todo = "cannot be computed here", _ELSEWHERE
        else:
            raise
        raise ModelError(
            f"{checkpoint.name} is quantised by {method}, which {why} ({shortened(error)}); {todo}"
        ) from error


def finish(model: Any) -> None:
    """Do to a model what its quantiser leaves to the first call of all of it: here only its parts are called."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        with redirect_stderr(io.StringIO()):
            compressor.decompress_model(model)


def convert_plain(model: Any, dtype: torch.dtype) -> None:
    """Convert the parameters of a dequantised `model` to `dtype`; transformers leaves those that were plain as stored.

    What its class keeps in float32 whatever is asked for (routers of experts) stays so.
    """
    import torch

    wide = _kept_wide(model, dtype)
    for name, parameter in model.named_parameters():
        is_plain = parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if is_plain and not any(part in name for part in wide):
            parameter.data = parameter.data.to(dtype)


def check_one_dtype(checkpoint: Checkpoint, model: Any, dtype: torch.dtype) -> None:
    """Raise ModelError where the plain parameters of a quantised `model` are not all in the `dtype` asked for."""
    wide = _kept_wide(model, dtype)
    plain = {
        str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if parameter.dtype.is_floating_point and not any(part in name for part in wide)
    }
    mixed = {name for name in plain if not name.startswith("float8")} - {str(dtype).removeprefix("torch.")}
    if mixed:
        raise ModelError(
            f"{checkpoint.name} is quantised by {method_of(checkpoint)}, of which parts stay in "
            f"{' and '.join(sorted(mixed))} whatever `dtype` says; leave `dtype` out, or give that"
        )


def _kept_wide(model: Any, dtype: torch.dtype) -> set[str]:
    """Give what the names of those parameters contain that transformers keeps in float32 where `dtype` is narrower."""
    dtype_name = str(dtype).removeprefix("torch.")
    always = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype_name in ("bfloat16", "float16") else None
    in_float16 = getattr(model, "_keep_in_fp32_modules", None) if dtype_name == "float16" else None
    return {*(always or ()), *(in_float16 or ())}


def _check_plain(checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> None:
    wrong = [
        place
        for place in places.values()
        if place.dtype.startswith(_NARROW) or (place.name.endswith(".weight") and not is_computed_in(place.dtype))
    ]
    if not wrong:
        return
    settings = next((name for name in ("compression_config",) if name in checkpoint.config), None)
    if (checkpoint.folder / "hf_quant_config.json").is_file():
        settings = "hf_quant_config.json, which is for other programs"
    elsewhere = f"only {settings}" if settings else "nothing that says how"
    raise ModelError(
        f"{checkpoint.name} is quantised ({described(wrong)}), but its config.json has no quantization_config, "
        f"{elsewhere}: transformers cannot read it; name a checkpoint of another form as `model`"
    )


def _check_scales(checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> None:
    """Refuse FP8 without a scale, which is read as it is, and blocks that its scales do not divide it into."""
    assert checkpoint.quantisation is not None
    blocks = checkpoint.quantisation.get("weight_block_size")
    for name, place in places.items():
        if not place.dtype.startswith(_NARROW) or name.rpartition(".")[2] in _SCALES:
            continue
        module = name.removesuffix("weight").removesuffix(".")
        scales = [places.get(one) for one in (f"{name}_scale_inv", *(f"{module}.{scale}" for scale in _SCALES))]
        scale = next((one for one in scales if one is not None), None)
        foreign = [one for one in _FOREIGN_SCALES if f"{module}.{one}" in places]
        if foreign:
            raise ModelError(
                f"{checkpoint.name} is quantised by {method_of(checkpoint)} with scales by the name {foreign[0]}, "
                "which are not read; name a checkpoint of another form as `model`"
            )
        if scale is None:
            raise ModelError(
                f"{checkpoint.folder} has {name} as {place.dtype} without its scale; download the checkpoint again"
            )
        if blocks and len(scale.shape) >= 2:
            _check_blocks(checkpoint, place, scale, blocks)


def _check_blocks(checkpoint: Checkpoint, place: TensorPlace, scale: TensorPlace, blocks: list[int]) -> None:
    """Refuse a matrix whose last block is cut: transformers would make all its blocks of one size, and wrongly."""
    for length, grid, block in zip(place.shape[-2:], scale.shape[-2:], blocks, strict=True):
        if grid > 1 and grid == math.ceil(length / block) and length % block:
            raise ModelError(
                f"{checkpoint.name} has {place.name} of shape {list(place.shape)} in blocks of {blocks}, the last of "
                "them cut, which transformers cannot dequantise; name a checkpoint of another form as `model`"
            )
