"""Turn the library's messages into the command line's: options in backquotes become flags.

The library names an option as Python does: `item_timeout`, `rebuild=True`, `dtype=bfloat16`. On the command line
that is --item-timeout, --rebuild, --dtype bfloat16. Whatever else stands in backquotes stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qvsplit.errors import ModelError, QvsplitError, UsageError
from qvsplit.output.text import say

# Options of the commands that have the same name in Python, with - for _
OPTIONS = frozenset({
    "absolute", "adapter", "all_runs", "allow", "caption", "checks", "checksum", "checksums", "choices",
    "clip_seconds", "compare", "device", "dry_run", "dtype", "embeds", "encoder", "exclude", "fail_on",
    "files_from", "format", "fps", "gif", "image", "item_timeout", "json_schema", "kernels", "keyword",
    "language_model", "limit", "link_to", "logprobs", "max_frames", "max_image_pixels", "max_new_tokens",
    "max_pixels", "max_runtime", "min_pixels", "model", "no_video", "num_frames", "out", "patch_budget",
    "prepare_on", "print0", "progress", "prune", "quiet", "ray", "ray_encoders", "rebuild", "relative_links",
    "report", "retry_failed", "run", "sample", "seed", "stop", "storage_dtype", "system", "temperature", "thinking",
    "together", "token_budget", "top_k", "top_p", "unchecked_encoder", "video_max_pixels", "video_max_tokens",
    "wait", "wide", "workers", "xmp", "xmp_for",
})  # fmt: skip
# in backquotes, or bare as `runtime.arguments` begins: `out: give a path`
_OPTION = re.compile(r"`([a-z]\w*)(?:=([^`]+))?`|\A([a-z]\w*)(?=: give )")


def on_command_line(text: str | QvsplitError) -> str:
    """Give a message of the library, or an error's, with flags for its options."""
    return _OPTION.sub(_flag, str(text))


def say_note(line: str) -> None:
    """Print a line of the library on stderr, with flags for its options."""
    say(on_command_line(line))


@contextmanager
def model_as_argument() -> Iterator[None]:
    """Have an error inside the block name the model as what it is: an argument, of a command without --model."""
    try:
        yield
    except (ModelError, UsageError) as error:
        text = str(error).replace("with `model=DIR`", "as MODEL").replace("as `model`", "as MODEL")
        text = re.sub(r"\Amodel(?=: give )", "MODEL", text)
        raise (ModelError if isinstance(error, ModelError) else UsageError)(text) from None


def without_advice(text: str) -> str:
    """Leave out which option allows more, for a command that has no such option."""
    return re.sub(r"; `\w+` allows more", "", text)


def _flag(match: re.Match[str]) -> str:
    quoted, value, bare = match.groups()
    name = quoted or bare
    if (name, value) == ("videos", "False"):
        return "--no-video"
    if name not in OPTIONS:
        return match[0]
    flag = f"--{name.replace('_', '-')}"
    return flag if value in (None, "True") else f"{flag} {value}"
