"""`qvsplit doctor`: what qvsplit runs on here, and whether that works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvsplit.commands.options import DEFAULT_STORE, INPUT, Json, Model, StoreArgument, StoreOption, store_place
from qvsplit.commands.wording import on_command_line, say_note
from qvsplit.errors import QvsplitError, StoreDamaged, UsageError, printable
from qvsplit.output.text import print_json


def doctor(
    store: StoreArgument = None,
    embeds: StoreOption = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Also read every byte of the store.", rich_help_panel=INPUT)
    ] = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Describe this machine and its libraries: the text that a bug report should carry.

    Versions, devices, decoders, the hub and what of the model is cached, and the store, if there is one. No user names,
    no tokens; the home folder is ~. What cannot be found out says why. Exit code 3 if a library is broken, 6 if the
    store is damaged, 7 if its folder cannot be written, else 0.

    Examples:
        qvsplit doctor
        qvsplit doctor album --checksums
        # For a program
        qvsplit doctor --json
    """
    from qvsplit import doctor as library

    named = store is not None or embeds is not None
    place = Path(store_place(store, embeds))
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place} is no folder; give the store's")
    found = library.examine(place if named or Path(DEFAULT_STORE).is_dir() else None, model)
    wrong = library.problems(found)
    if checksums and "store" in found and not any(isinstance(one, StoreDamaged) for one in wrong):
        damaged = library.without_names(_damaged(place))
        found["store"]["checksums"] = damaged or "all right"
        wrong += [StoreDamaged(line) for line in damaged]
    if as_json:
        print_json({"type": "doctor", "problems": [str(one) for one in wrong]} | found)
    else:
        for line in library.lines(found):
            print(printable(on_command_line(line)))
    for one in wrong[1:]:
        say_note(str(one))
    if wrong:
        raise wrong[0]


def _damaged(place: Path) -> list[str]:
    from qvsplit.store.shards import shard_paths
    from qvsplit.verify import check_shards

    try:
        return [check.error for check in check_shards(shard_paths(place)) if check.error]
    except QvsplitError as error:
        return [str(error)]
