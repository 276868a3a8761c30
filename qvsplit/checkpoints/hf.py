"""Call transformers' own loaders: without their chatter, and with errors of one line for what is wrong with files."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.errors import ModelError, QvsplitError
from qvsplit.runtime.devices import is_out_of_memory


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show no progress bars and remarks of transformers inside the block: what matters is an error of ours."""
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
    """Turn what a checkpoint's own files make transformers raise into a ModelError, with the reason on one line."""
    try:
        with quiet_transformers():
            yield
    except QvsplitError:
        raise
    except Exception as error:  # a checkpoint's files can be wrong in more ways than transformers names
        if is_out_of_memory(error):
            raise ModelError(
                f"{checkpoint.folder} does not fit into memory ({_shortened(error)}); "
                "try another `device` or a narrower `dtype`"
            ) from error
        if type(error).__module__.startswith("torch"):
            raise
        raise ModelError(f"{checkpoint.folder} cannot be loaded: {_shortened(error)}") from error


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240] + "…"


def import_libraries(checkpoint: Checkpoint) -> None:
    """Import what loading a checkpoint will need, so that the time this takes is not counted as loading's."""
    from accelerate import init_empty_weights  # noqa: F401
    from transformers import AutoConfig, AutoProcessor  # noqa: F401

    for name in ("torchvision.transforms.v2", checkpoint.family.modeling):
        importlib.import_module(name)


def load_processor(checkpoint: Checkpoint) -> Any:
    """Load the checkpoint's AutoProcessor, with the torchvision backend whatever its files say."""
    from transformers import AutoProcessor

    with transformers_errors(checkpoint):
        return AutoProcessor.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="torchvision"
        )
