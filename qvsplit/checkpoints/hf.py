"""Call transformers' own loaders: without their chatter, and with errors of one line for what is wrong with files."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.model_class import class_of
from qvsplit.errors import ModelError, QvsplitError
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.runtime.loading import TENSORS, OnLoad


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show no progress bars and remarks of transformers inside the block: what matters is an error of ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    others = getLogger("bitsandbytes")  # says of every product that it casts what goes in
    level = others.level
    logging.set_verbosity_error()
    others.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        others.setLevel(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def transformers_errors(checkpoint: Checkpoint, outcome: str = "cannot be loaded") -> Iterator[None]:
    """Turn what a checkpoint's own files make transformers raise into a ModelError, with the reason on one line."""
    try:
        with quiet_transformers():
            yield
    except QvsplitError:
        raise
    except Exception as error:  # a checkpoint's files can be wrong in more ways than transformers names
        if is_out_of_memory(error):
            raise ModelError(
                f"{checkpoint.folder} does not fit into memory ({shortened(error)}); "
                "try another `device` or a narrower `dtype`"
            ) from error
        if type(error).__module__.startswith("torch"):
            raise
        raise ModelError(f"{checkpoint.folder} {outcome}: {shortened(error)}") from error


@contextmanager
def hearing_tensors(on_load: OnLoad, sizes: Mapping[str, int]) -> Iterator[None]:
    """Have `on_load` hear inside the block how many bytes of tensors transformers' `from_pretrained` has put in place.

    transformers tells a progress bar of its own, parameter by parameter, and lets others take that bar's place. What it
    tells is its own affair and may be otherwise in another version: then less is heard, and all is loaded the same.

    Args:
        on_load: Hears.
        sizes: The bytes of every tensor that is to be read, by its name in the checkpoint.
    """
    from transformers.utils import logging

    total = sum(sizes.values())

    def counted(parameters: Iterable[Any]) -> Iterator[Any]:
        done = 0
        on_load(TENSORS, 0, total)
        for parameter in parameters:
            yield parameter
            done += sum(sizes.get(name, 0) for name in _names_of(parameter))
            on_load(TENSORS, done, total)

    def in_place_of_bar(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Iterable) and options.get("desc") == "Loading weights":
            args = (counted(args[0]), *args[1:])
        return make(*args, **options)

    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return
    before = set_hook(in_place_of_bar)
    try:
        yield
    finally:
        set_hook(before)


def _names_of(parameter: Any) -> set[Any]:
    """Give the names in the checkpoint of what a parameter is made of; none where transformers does not tell."""
    try:
        return {name for sources in parameter[1].layer_targets.values() for name in sources}
    except (AttributeError, TypeError, LookupError):
        return set()


def shortened(error: Exception) -> str:
    """Give what an error says, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "…"


def import_libraries(checkpoint: Checkpoint) -> None:
    """Import what loading a checkpoint will need, so that the time this takes is not counted as loading's."""
    from accelerate import init_empty_weights  # noqa: F401
    from transformers import AutoConfig, AutoProcessor  # noqa: F401

    importlib.import_module("torchvision.transforms.v2")
    class_of(checkpoint)


def load_config(checkpoint: Checkpoint) -> Any:
    """Load the config of the full model's class."""
    with transformers_errors(checkpoint):
        return class_of(checkpoint).config_class.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )


def load_processor(checkpoint: Checkpoint) -> Any:
    """Load the checkpoint's AutoProcessor, with the torchvision backend whatever its files say."""
    from transformers import AutoProcessor

    with transformers_errors(checkpoint):
        return AutoProcessor.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="torchvision"
        )


def process_image(
    processor: Any, image: Any, *, later: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], str]:
    """Have a processor prepare one image as it would for a prompt of its own.

    Args:
        processor: The checkpoint's.
        image: What its image processor takes: a PIL image, or uint8 [height, width, 3].
        later: Settings of the image processor for this call.

    Returns:
        All that its image processor gives, as tensors, and the text that stands for the image in a prompt.

    Raises:
        ModelError: The processor makes no such text.
    """
    name = type(processor).__name__
    if getattr(processor, "image_token", None) is None or not hasattr(processor, "image_processor"):
        raise ModelError(f"{name} has no image processor or no image token: models that have it cannot be split")
    images, *_ = processor.prepare_inputs_layout(images=[image], text=[processor.image_token])
    merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt")
    takes = inspect.signature(processor._process_images).parameters
    more = {name: merged[name] for name in takes if name in merged and not name.endswith("_kwargs")}
    options = merged["images_kwargs"] | dict(later or {})
    try:
        processed, texts = processor._process_images(images, **more, **options)
    except NotImplementedError:
        texts = []
    if len(texts) != 1:
        raise ModelError(f"{name} gives no text that stands for an image: models that have it cannot be split")
    return processed, texts[0]


def process_video(
    processor: Any, frames: Any, metadata: Any, *, later: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], str]:
    """Have a processor prepare one clip as it would for a prompt of its own.

    Args:
        processor: The checkpoint's.
        frames: Those that were sampled, uint8 [frames, 3, height, width].
        metadata: transformers' `VideoMetadata`, with the `frames_indices` of these frames. Not changed.
        later: Settings of the video processor for this call.

    Returns:
        All that its video processor gives, as tensors, and the text that stands for the clip in a prompt.

    Raises:
        ModelError: The processor makes no such text.
    """
    from transformers.processing_utils import OmniModalProcessorMixin

    name = type(processor).__name__
    if getattr(processor, "video_token", None) is None or getattr(processor, "video_processor", None) is None:
        raise ModelError(f"{name} has no video processor or no video token")
    merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt")
    own = {"video_metadata": [copy.deepcopy(metadata)], "do_sample_frames": False, "return_metadata": True}
    options = merged["videos_kwargs"] | own | dict(later or {})
    if isinstance(processor, OmniModalProcessorMixin):  # whose method wants the settings of all kinds
        options = merged | {"videos_kwargs": options | {"fps": getattr(processor.video_processor, "fps", None)}}
    processed, texts = processor._process_videos([frames], **options)
    if len(texts) != 1:
        raise ModelError(f"{name} gives no text that stands for a video")
    return {key: value for key, value in processed.items() if key != "video_metadata"}, texts[0]


def image_token(checkpoint: Checkpoint, config: Any, tokenizer: Any) -> str:
    """Give the token that stands in a prompt where one row of features goes. ModelError if there is none."""
    number = getattr(config, "image_token_id", None)
    token = None if number is None else tokenizer.convert_ids_to_tokens(int(number))
    if token is None:
        raise ModelError(
            f"{checkpoint.folder} names no image token that its tokenizer has; it cannot be split, or download it again"
        )
    return str(token)


def token_shown(text: str, *tokens: str | None) -> str | None:
    """Give the first of these tokens that a placeholder has: some families show the frames of a video as images."""
    return next((token for token in tokens if token is not None and token in text), None)


def video_token(config: Any, processor: Any) -> str | None:
    """Give the token that a config names for one row of a video's features; None where it names none."""
    number = getattr(config, "video_token_id", None)
    if number is None or getattr(processor, "video_token", None) is None:
        return None
    token = processor.tokenizer.convert_ids_to_tokens(int(number))
    return None if token is None else str(token)
