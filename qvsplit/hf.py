"""transformers' own loaders, without their chatter, and with one line for what a checkpoint's files make them raise."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qvsplit.checkpoint import Checkpoint
from qvsplit.devices import is_out_of_memory
from qvsplit.errors import ModelError, QvsplitError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no remarks of transformers' inside the block: what matters is an error of ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def transformers_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """ModelError, with the reason on one line, for what a checkpoint's own files make transformers raise."""
    try:
        with quiet_transformers():
            yield
    except QvsplitError:
        raise
    except Exception as error:  # a checkpoint's files can be wrong in more ways than transformers names
        if is_out_of_memory(error):
            raise ModelError(
                f"{checkpoint.folder} does not fit into memory ({_shortened(error)}); "
                "try another --device or a narrower --dtype"
            ) from error
        if type(error).__module__.startswith("torch"):
            raise
        raise ModelError(f"{checkpoint.folder} cannot be loaded: {_shortened(error)}") from error


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "…"


def import_libraries(checkpoint: Checkpoint) -> None:
    """What loading a checkpoint will need, so that the time it takes can be told from loading's own."""
    from accelerate import init_empty_weights  # noqa: F401
    from transformers import AutoConfig, AutoProcessor  # noqa: F401

    for name in ("torchvision.transforms.v2", checkpoint.family.modeling):
        importlib.import_module(name)


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's AutoProcessor, with the torchvision backend whatever its files say."""
    from transformers import AutoProcessor

    with transformers_errors(checkpoint):
        return AutoProcessor.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="torchvision"
        )
