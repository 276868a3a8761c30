"""`qvsplit verify`: hold a store against its checksums, and against the full model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qvsplit.commands.opening import open_with_progress
from qvsplit.commands.options import (
    INPUT,
    AnswerKernels,
    AskAdapter,
    Device,
    Json,
    Model,
    ProgressMode,
    Quiet,
    StoreArgument,
    StoreOption,
    one_adapter,
    store_place,
)
from qvsplit.commands.wording import on_command_line, say_note, without_advice
from qvsplit.errors import StoreDamaged, UsageError, escaped, printable
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import plural, print_json

if TYPE_CHECKING:
    from qvsplit.verify import ItemCheck, ShardCheck


def verify(
    store: StoreArgument = None,
    embeds: StoreOption = None,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also encode this many images and videos again with the full model, and compare.",
            rich_help_panel=INPUT,
        ),
    ] = 0,
    model: Model = None,
    adapter: AskAdapter = None,
    device: Device = None,
    kernels: AnswerKernels = "fused",
    as_json: Json = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Check a store, byte by byte.

    Exit code 6 if anything is not as it was written.

    With --sample N and the full checkpoint, N items, images or videos, are encoded again by the full model, one by one,
    in the store's dtype: the store's features, and the answer that `ask --kernels` would give from them, must be its
    own, within rounding; with the kernels reference of both, to the bit. A line says which is compared.

    Examples:
        # Whether every byte is as it was written
        qvsplit verify album
        # And whether five items, encoded again, give the same features and answers
        qvsplit verify album --sample 5
        # And whether the answers of the exact mode do
        qvsplit verify album --sample 5 --kernels reference
    """
    from qvsplit import verify as library
    from qvsplit.store.shards import shard_paths

    _check_used(sample, {"--model": model, "--adapter": adapter, "--device": device})
    place = store_place(store, embeds)
    problems, shards = [], shard_paths(place)
    with ProgressBar(progress, shown=not quiet, prints=True) as shown:
        shown.start("shards", len(shards))
        for check in library.check_shards(shards):
            _print_shard(check, as_json=as_json, quiet=quiet)
            shown.advance()
            problems += [check.error] if check.error else []
    if not problems:
        opened = open_with_progress(place, quiet=quiet, progress=progress)
        problems += library.check_store(opened)
        if sample:
            checks, rows = [], library.sample(opened, sample)
            if not as_json and not quiet:
                print(library.compared_as(opened, kernels), flush=True)
            with ProgressBar(progress, shown=not quiet, prints=True) as shown:
                shown.start("images", len(rows))
                items = library.check_items(
                    opened, rows, model=model, adapter=one_adapter(adapter), device=device, kernels=kernels,
                    on_load=shown.loading, on_item=shown.advance,
                )  # fmt: skip
                for item in items:
                    _print_item(item, as_json=as_json, quiet=quiet)
                    checks.append(item)
            problems += _problems(checks)
            if not problems:
                library.require_comparison(checks)
    for line in problems[1:]:
        say_note(line)
    if problems:
        raise StoreDamaged(problems[0])


def _check_used(sample: int, given: Mapping[str, object]) -> None:
    """UsageError for options of the full model where nothing is to be encoded again: they would be passed over."""
    if not sample and (named := [option for option, value in given.items() if value]):
        raise UsageError(
            f"without --sample no model is loaded, and {' and '.join(named)} would do nothing; say --sample 3, or "
            f"leave {'it' if len(named) == 1 else 'them'} out"
        )


def _print_shard(check: ShardCheck, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"type": "shard"} | check.to_json())
    elif check.error is None and not quiet:
        print(f"{escaped(check.shard)}: {plural(check.rows, 'row')}, {plural(check.tokens, 'token')}, no damage")


def _print_item(check: ItemCheck, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"type": "sample"} | check.to_json())
    elif not quiet:
        print(f"{escaped(check.path)}: {printable(on_command_line(without_advice(check.explanation)))}", flush=True)


def _problems(checks: Sequence[ItemCheck]) -> list[str]:
    return [
        f"{check.path}: {check.error or f'the store and the full model disagree ({check.explanation})'}"
        for check in checks
        if not check.agrees
    ]
