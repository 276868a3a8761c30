"""`qvsplit inspect`: describe a store, or a model.

What an argument is: a folder that holds shards is a store, as it would be without this command's models; a folder with
config.json is a model; `demo` is the one in the package; a name of the hub's form that is no path here is a model on
the hub, unless its first part is a folder here and it names no revision: then it is a path with a slip in it. All else
is a store's place. No folder is both unless somebody put a model's files among shards, and `--embeds` always means a
store: so no option is needed that says "model".
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvsplit.commands.opening import open_with_progress
from qvsplit.commands.options import Json, StoreOption, store_place
from qvsplit.commands.wording import model_as_argument, on_command_line
from qvsplit.errors import ModelError, UsageError
from qvsplit.output.text import description_lines, print_json, say

if TYPE_CHECKING:
    from qvsplit.store.store import Store

# owner/name or owner/name@revision: none of the characters of a glob, and no shard
_HUB_NAME = re.compile(r"[\w-][\w.-]*/(?!.*\.parquet)[\w.-]+(@[\w./-]+)?")


def inspect(
    store: Annotated[
        str | None,
        typer.Argument(
            metavar="STORE|SHARD|MODEL",
            help="A store: a folder, a shard or a glob. Or a model: a folder with config.json, a hub name or demo "
            "[default: embeds].",
            show_default=False,
        ),
    ] = None,
    embeds: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Describe a store, or a model.

    Of a store: images, videos and clips by status, tokens, sizes, the extraction config, provenance, the last runs, and
    what failed and why.

    Of a model, from its config and its files' headers alone, nothing else of a hub name is fetched: family, tensors and
    bytes of each half, the memory that each takes, and the tokens and stored bytes of images.

    Examples:
        qvsplit inspect
        qvsplit inspect album --json
        # A model, before it is downloaded
        qvsplit inspect Qwen/Qwen2-VL-7B-Instruct
    """
    place = store_place(store, embeds)
    if embeds is None and (model := _model_of(place)) is not None:
        _print_model(model, as_json=as_json)
        return
    if embeds is None:
        _refuse_part(place)
    try:
        opened = open_with_progress(place)
    except UsageError as error:
        if embeds is not None and os.path.isfile(Path(embeds, "config.json")):
            raise UsageError(f"{embeds} is a model's folder, and no store: qvsplit inspect {embeds}") from None
        raise UsageError(f"{error}{'' if store is None else _no_model_either(store)}") from None
    _print_store(opened, as_json=as_json)


def _print_store(opened: Store, *, as_json: bool) -> None:
    from qvsplit.pipeline.plan import failure_now
    from qvsplit.runtime.memory import machine_memory
    from qvsplit.runtime.names import file_on_disk
    from qvsplit.sources.images import optional_readers
    from qvsplit.verify import describe

    description = describe(opened)
    readers, memory = optional_readers(), machine_memory()
    for failure in description["failures"]:  # advice that has been followed is none
        row = opened.current(failure["root"], failure["path"])
        if row is not None:
            readable = os.access(file_on_disk(row.root, row.path), os.R_OK)
            failure["error"] = failure_now(row, readers, memory, readable=readable)
    if as_json:
        print_json({"type": "store"} | description)
        return
    for line in description_lines(description):
        print(on_command_line(line))


# --------------------------------------------------------------------------------------------------------------- models


def _print_model(model: str, *, as_json: bool) -> None:
    from qvsplit.inspecting import describe_model
    from qvsplit.output.model_text import model_lines

    on_hub = not _is_here(model)
    if on_hub:
        say(f"{model} is no path here: taken as the name of a model on the hub")
    try:
        with model_as_argument():
            description = describe_model(model)
    except ModelError as error:
        if not on_hub:
            raise
        raise ModelError(f"no store or shard at {model}, and as a hub name: {error}") from None
    if as_json:
        print_json({"type": "model"} | description)
        return
    for line in model_lines(description):
        print(on_command_line(line))


def _refuse_part(place: str) -> None:
    """Raise UsageError where `place` is a file of a model, or an adapter: a slip that no store's error would tell."""
    from qvsplit.checkpoints.adapter import CONFIG_FILE

    path = Path(place)
    if os.path.isfile(path) and (path.name == "config.json" or ".safetensors" in path.suffixes):
        raise UsageError(f"{place} is a file of a model; give its folder, {path.parent}")
    if os.path.isfile(path / CONFIG_FILE) and not _has_shards(place):
        raise UsageError(f"{place} is an adapter: give it to extract and ask as `adapter`; here a store or a model")


def _model_of(place: str) -> str | None:
    """Give `place` if it names a model; None if it is a store's."""
    from qvsplit.checkpoints.opening import DEMO_MODEL

    if os.path.lexists(place):
        return place if os.path.isfile(Path(place, "config.json")) and not _has_shards(place) else None
    return place if place == DEMO_MODEL or (_HUB_NAME.fullmatch(place) and not _begins_here(place)) else None


def _has_shards(folder: str) -> bool:
    from qvsplit.store.shards import shards_in
    from qvsplit.store.storage import LocalStorage

    try:
        return bool(shards_in(LocalStorage(Path(folder))))
    except OSError:  # it cannot be listed, which the store's own error says
        return True


def _is_here(model: str) -> bool:
    from qvsplit.checkpoints.opening import DEMO_MODEL

    return model == DEMO_MODEL or os.path.lexists(model)


def _begins_here(name: str) -> bool:
    """Say whether the first part of a hub name without a revision is a folder here."""
    return "@" not in name and os.path.isdir(name.partition("/")[0])


def _no_model_either(place: str) -> str:
    """Say, behind a store's error, why `place` is no model."""
    if os.path.isdir(place):
        return "; nor is it a model's folder, as there is no config.json in it"
    if os.path.lexists(place):
        return ""
    if _HUB_NAME.fullmatch(place):
        return (
            f"; as {place.partition('/')[0]} is a folder here, it is not taken as a hub name: give that with a "
            f"revision, {place}@main"
        )
    return "; of a model give the folder with its config.json, or its hub name, owner/name"
