"""Fetch a checkpoint's files from the hub, through huggingface_hub: its cache, its token, its offline switch."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qvsplit.checkpoints.files import INDEX_FILE, SINGLE_FILE, SMALL_FILES
from qvsplit.errors import ModelError, QvsplitError
from qvsplit.runtime.atomic_files import disk_errors

_ELSEWHERE = "give a checkpoint's folder with `model=DIR`"
_OR_DEMO = f"{_ELSEWHERE}, or see the whole way on the small model in the package: qvsplit demo"
_ADAPTER_ELSEWHERE = "give an adapter's folder with `adapter=DIR`"


def looks_like_hub_name(text: str) -> bool:
    """Say whether `text` has the form of a hub name, owner/name, and not that of a path."""
    owner, slash, rest = text.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and owner[0] not in ".~"


def fetch_small_files(model: str, revision: str | None) -> Path:
    """Fetch, or find in the hub's cache, all files of `model` that are no weights.

    Args:
        model: The hub name, optionally with a revision behind an `@`.
        revision: The revision where `model` names none; None is the hub's newest.

    Returns:
        Their folder, which the hub's cache names by the commit.

    Raises:
        ModelError: There is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, asked = model.partition("@")
    with hub_errors(model):
        folder = Path(snapshot_download(name, revision=asked or revision, allow_patterns=list(SMALL_FILES)))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model} has no config.json: it is not a model that transformers can load; {_ELSEWHERE}")
    return folder


def fetch_files(model: str, file_names: Iterable[str], commit: str) -> None:
    """Fetch, or find in the hub's cache, the named files of one commit. ModelError if they cannot be had."""
    from huggingface_hub import hf_hub_download

    for file_name in file_names:
        with hub_errors(model):
            hf_hub_download(model.partition("@")[0], file_name, revision=commit)


def fetch_adapter(adapter: str, file_names: Sequence[str]) -> Path:
    """Fetch, or find in the hub's cache, the named files of an adapter, all of one commit.

    Args:
        adapter: The hub name, optionally with a revision behind an `@`.
        file_names: Those that are fetched; one that the hub does not have is left out.

    Returns:
        Their folder, which the hub's cache names by the commit.

    Raises:
        ModelError: There is no such adapter, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = adapter.partition("@")
    with hub_errors(adapter, "adapter"):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(file_names)))


@contextmanager
def hub_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Turn what huggingface_hub raises into a ModelError of one line that says what to do next; DiskError if full."""
    from huggingface_hub import constants

    try:
        yield
    except QvsplitError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            with disk_errors(constants.HF_HUB_CACHE, kept=""):
                raise
        reason = _reason(name, error, kind)
        if kind == "adapter":
            reason = reason.replace(_OR_DEMO, _ADAPTER_ELSEWHERE).replace(_ELSEWHERE, _ADAPTER_ELSEWHERE)
        raise ModelError(reason) from None


def _reason(model: str, error: Exception, kind: str) -> str:
    from huggingface_hub import errors

    # the first that fits: some of these classes are derived from others
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated: accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {kind} {model} (or it is private: `hf auth login`); {_ELSEWHERE}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model}: the hub has no such revision of it"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"{model} is not in the hub's cache and the hub cannot be reached; {_OR_DEMO}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{model} has no {SINGLE_FILE} or {INDEX_FILE} on the hub (pickled weights are never opened)"
    # whatever else the network, the disk or the hub's client stumbles over
    return f"{model} cannot be fetched from the hub ({error or type(error).__name__}); {_OR_DEMO}"
