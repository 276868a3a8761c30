"""`qvsplit purge`: remove images and videos from a store, and from the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from qvsplit.commands.options import DEFAULT_STORE, INPUT, DryRun, Json, Quiet, Wait
from qvsplit.commands.wording import say_note
from qvsplit.output.text import foretold_purge_lines, print_json, purged_lines, say


def purge(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="An image, a video, a folder, or a path as the store has it.")
    ],
    embeds: Annotated[
        str,
        typer.Option(
            "--embeds",
            "-e",
            metavar="STORE",
            help="The store's folder.",
            rich_help_panel=INPUT,
        ),
    ] = DEFAULT_STORE,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove images and videos from a store for good.

    Their rows and features, superseded ones too, are removed from the disk. Tables and reports that were written from
    the store are not changed. The next `extract` encodes a file that still exists again.

    Examples:
        # Which items that would be
        qvsplit purge ./photos/private --dry-run
        # A folder, and an image by its path in the store, from another store
        qvsplit purge ./photos/private 2024/you.jpg -e album
    """
    from qvsplit.store import compact as library

    if dry_run:
        _foretell(embeds, paths, as_json=as_json)
        return
    with library.opened_for_writing(embeds, wait=wait, on_note=say_note) as (storage, lock):
        done = library.purge(storage, paths, lock)
    if as_json:
        print_json({"type": "summary"} | asdict(done))
        return
    what_happened, *warnings = purged_lines(asdict(done), embeds)
    for line in warnings if quiet else [what_happened, *warnings]:
        say(line)


def _foretell(place: str, paths: Sequence[str], *, as_json: bool) -> None:
    """Print what would be purged, to stdout: it is the result."""
    from qvsplit.output.names import file_of
    from qvsplit.store import compact as library

    with library.opened_for_reading(place) as (storage, store):
        found = library.foretell_purge(storage, store, paths)
    plan = {name: value for name, value in vars(found).items() if name != "items"}
    if as_json:
        items = [{"file": file_of(row), "root": row.root, "path": row.path} for row in found.items]
        print_json({"type": "preview"} | plan | {"items": items})
        return
    for line in foretold_purge_lines(plan, [file_of(row) for row in found.items]):
        print(line)
