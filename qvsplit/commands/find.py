"""`qvsplit find`: the images and videos whose answers are such; as paths, as links in a folder, as keywords."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from qvsplit.commands.answers import item_json, say_runs
from qvsplit.commands.options import FORMATS, INPUT, OUTPUT, Absolute, Json, Quiet, as_format, one_of
from qvsplit.errors import StoreDamaged, UsageError, escaped, printable, some_of
from qvsplit.output.levels import UNSURE
from qvsplit.output.text import plural, print_json, print_path, say
from qvsplit.runtime import interrupts
from qvsplit.runtime.names import file_on_disk, utf8_text
from qvsplit.runtime.streams import is_terminal

if TYPE_CHECKING:
    from qvsplit.output.query import Found
    from qvsplit.output.table import Record
    from qvsplit.store.row import Row

LIGHTROOM = "lightroom"
PROGRAMS = ("digikam", "darktable", LIGHTROOM)
CAPTIONS = ("caption", "description")  # ids of the question whose answer is the description, where there are several
_Row = Mapping[str, Any]
_ByItem: TypeAlias = "Mapping[tuple[str, str, int], Mapping[str, Record]]"


def find(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="As `qvsplit ask --out` makes it.", show_default=False)
    ],
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY", help="Such as 'animal = yes and place = sea': see docs/finding.md.", show_default=False
        ),
    ],
    link_to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Have this folder hold a symbolic link to each file found, and no other link that was made so.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    relative_links: Annotated[
        bool,
        typer.Option(
            "--relative-links",
            help="Have links say where a file is from DIR, for a tree that is moved or mounted as a whole.",
            rich_help_panel=OUTPUT,
            hidden=True,
        ),
    ] = False,
    xmp: Annotated[
        bool,
        typer.Option(
            "--xmp",
            help="Write the answers as keywords, and a caption, into XMP sidecars beside the files found.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    xmp_for: Annotated[
        str,
        typer.Option(
            **one_of("--xmp-for", *PROGRAMS),
            help="The sidecar is IMG.jpg.xmp for digikam and darktable, IMG.xmp for lightroom.",
            rich_help_panel=OUTPUT,
            hidden=True,
        ),
    ] = PROGRAMS[0],
    keyword: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --xmp: write this keyword instead; it is taken out where a file is not found any more. May be "
            "repeated.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="With --xmp: the question whose answer is the caption [default: caption or description, else the only "
            "one without choices].",
            show_default=False,
            rich_help_panel=OUTPUT,
            hidden=True,
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="Take this run of its question; may be repeated [default: of each question the run asked last].",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            **one_of("--format", *FORMATS),
            help="paths one a line, paths0 with a NUL after each, text for people, tsv with 8 fixed columns, or jsonl "
            "(as --json) [default: paths; none with --link-to or --xmp].",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    print0: Annotated[
        bool, typer.Option("--print0", "-0", help="As --format paths0, for xargs -0.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
    absolute: Absolute = False,
    quiet: Quiet = False,
) -> None:
    """Find images and videos by their answers in a table.

    A query compares answers, by the ids of their questions, with values, by =, !=, <, >, <= and >=; and, or, not and
    parentheses join comparisons. What was not asked of an item, or not answered, is neither equal nor unequal to
    anything. Exit code 0, also where nothing is found.

    Examples:
        # Paths, one a line
        qvsplit find answers.parquet 'animal = yes and place = sea'
        # For another program, whatever is in their names
        qvsplit find answers.parquet 'quality = blurred' -0 | xargs -0 ls -l
        # A folder of links, kept in step by every run
        qvsplit find answers.parquet 'animal = yes' --link-to albums/dogs
        # Answers as keywords, and a caption, for digiKam and darktable
        qvsplit find answers.parquet 'quality = sharp' --xmp
    """
    from qvsplit.output.query import choices_of, parse
    from qvsplit.output.query import find as query_table
    from qvsplit.output.table import read_records
    from qvsplit.output.wide import answers_by_item, chosen_runs, wide

    if print0 and output_format not in (None, "paths0"):
        raise UsageError(f"--print0 is --format paths0, and --format {output_format} is given too; give one of them")
    chosen = as_format("paths0" if print0 else output_format, as_json=as_json)
    names = _keywords(keyword or [], caption, xmp=xmp)
    if relative_links and link_to is None:
        raise UsageError("--relative-links is about --link-to DIR, which is not given")
    parse(utf8_text(query))  # what is wrong with it need not wait for the table
    records = read_records(table)
    runs = chosen_runs(records, run or [])
    found = query_table(wide(records, runs), utf8_text(query), choices_of(records, runs))
    say_runs(records, runs, quiet=quiet)
    for note in found.notes:
        say(f"find: {note}")
    if not found.rows and not quiet and is_terminal(sys.stderr):
        say(f"find: none of {plural(len(found.others), 'item')} in {escaped(str(table))}")
    if link_to is not None:
        _link(found, link_to, relative=relative_links, quiet=quiet)
    if xmp:
        _write_sidecars(found, names, _caption(found, caption), for_lightroom=xmp_for == LIGHTROOM, quiet=quiet)
    if chosen is not None or (link_to is None and not xmp):
        _print(found, answers_by_item(records, runs), chosen or "paths", absolute=absolute)


def _print(found: Found, answers: _ByItem, chosen: str, *, absolute: bool) -> None:
    if chosen == "jsonl":
        for row in found.rows:
            print_json(item_json(dict(row), absolute=absolute))
    elif chosen == "tsv":
        _print_tsv(found, answers, absolute=absolute)
    elif chosen == "text":
        _print_text(found)
    else:
        from qvsplit.output.names import file_of

        files = dict.fromkeys(file_of(_item(row), absolute=absolute) for row in found.rows)
        for file in files:
            print_path(file, nul=chosen == "paths0")


def _print_tsv(found: Found, answers: _ByItem, *, absolute: bool) -> None:
    """Print a line for each answer that the query names, or one for an item where it names none."""
    from qvsplit.output.names import file_of

    for row in found.rows:
        item = _item(row)
        part = str(item.part) if item.is_part else ""
        mine = answers[row["root"], row["path"], row["part"]]
        for name, answer in _named_answers(found, row) or [("", None)]:
            probability = mine[name]["choice_probability"] if name in mine else None
            shown_probability = "" if probability is None else f"{probability:.6g}"
            cells = [name, answer or "", shown_probability, row["verdict"] or "", ""]
            shown = [printable(" ".join(cell.split())) for cell in cells]
            print("\t".join(["item", escaped(file_of(item, absolute=absolute)), part, *shown]))


def _print_text(found: Found) -> None:
    """Print a line for each item, with the answers that the query names."""
    from qvsplit.output.names import shown_name

    with_root = len({row["root"] for row in found.rows}) > 1
    for row in found.rows:
        answers = [f"{name}: {answer}" for name, answer in _named_answers(found, row) if answer]
        print("  ".join([escaped(shown_name(_item(row), with_root=with_root)), *map(printable, answers)]))


def _named_answers(found: Found, row: _Row) -> list[tuple[str, str | None]]:
    """Give question and answer of what the query names."""
    from qvsplit.output.query import captions_of, checks_of
    from qvsplit.output.wide import SCORE

    questions = {*captions_of(found.columns), *checks_of(found.columns)}
    named = dict.fromkeys(name if name in questions else name.removesuffix(SCORE) for name in found.names)
    return [(name, row[name]) for name in named if name in questions]


def _item(row: _Row) -> Row:
    from qvsplit.store.row import Row

    return Row(
        row["root"], row["path"], row["sha256"], 0, "ok",
        part=row["part"] or 0, start=row["start"], end=row["end"], kind=row["kind"] or "image",
    )  # fmt: skip


def _file(row: _Row) -> str:
    return file_on_disk(row["root"], row["path"])


def _say_missing(missing: Sequence[str], what: str) -> None:
    if missing:
        are = "file does not exist and has" if len(missing) == 1 else "files do not exist and have"
        say(f"{len(missing):,} {are} no {what}: {some_of(map(escaped, missing), 3)}")


# ----------------------------------------------------------------------------------------------------------- links


def _link(found: Found, folder: Path, *, relative: bool, quiet: bool) -> None:
    from qvsplit.output.links import link_files

    done = link_files(map(_file, found.rows), folder, relative=relative)
    _say_missing(done.missing, "link")
    if (done.made or done.removed) and not quiet:
        say(f"{plural(done.made, 'link')} made, {done.removed:,} removed, {done.kept:,} kept; {escaped(str(folder))}")


# -------------------------------------------------------------------------------------------------------- sidecars


@dataclass
class _Sidecar:
    """What is to stand in one: of all parts of a video, and of all files that it is the sidecar of."""

    keywords: dict[str, None] = field(default_factory=dict)
    caption: str | None = None


def _keywords(keywords: Sequence[str], caption: str | None, *, xmp: bool) -> list[str]:
    """Give the keywords that are named, in UTF-8. UsageError where they cannot be."""
    if (keywords or caption is not None) and not xmp:
        raise UsageError(f"--{'keyword' if keywords else 'caption'} is about --xmp, which is not given")
    if keywords and caption is not None:
        raise UsageError("--keyword and --caption: with --keyword the captions stay as they are; choose one")
    for name in keywords:
        if "=" in name or not name.strip() or not name.isprintable():
            raise UsageError(f"--keyword {name}: give a name on one line and without =, which keywords of answers have")
    return [" ".join(utf8_text(name).split()) for name in keywords]


def _caption(found: Found, given: str | None) -> str | None:
    """Give the column whose answers are captions; None where it is not clear which."""
    from qvsplit.output.query import captions_of

    captions = captions_of(found.columns)
    if given is not None:
        if given not in captions:
            known = f"; there are {', '.join(captions)}" if captions else ""
            raise UsageError(f"--caption {given}: the table has no such question without choices{known}")
        return given
    usual = [name for name in CAPTIONS if name in captions]
    return usual[0] if usual else captions[0] if len(captions) == 1 else None


def _write_sidecars(
    found: Found, names: Sequence[str], caption: str | None, *, for_lightroom: bool, quiet: bool
) -> None:
    from qvsplit.output.query import checks_of
    from qvsplit.output.xmp import SidecarRefused, sidecar_of, write_sidecar

    wanted: dict[Path, _Sidecar] = {}
    missing: dict[str, None] = {}
    checks = checks_of(found.columns)
    for row in found.rows:
        file = _file(row)
        if not os.path.exists(file):
            missing[file] = None
            continue
        sidecar = wanted.setdefault(sidecar_of(file, replace_suffix=for_lightroom), _Sidecar())
        sidecar.keywords |= dict.fromkeys(names or _answers(row, checks))
        sidecar.caption = sidecar.caption or (row[caption] if caption is not None else None)
    _say_missing(list(missing), "sidecar")
    # an album's keyword goes where the file is not found any more
    stale = {sidecar_of(_file(row), replace_suffix=for_lightroom) for row in found.others} if names else set()
    everything = [*wanted.items(), *((path, _Sidecar()) for path in sorted(stale - wanted.keys()) if path.exists())]
    written = refused = 0
    for path, sidecar in everything:
        interrupts.check()
        try:
            written += write_sidecar(path, sidecar.keywords, sidecar.caption, only=set(names) if names else None)
        except SidecarRefused as why:
            refused += 1
            say(f"left as it is: {escaped(str(path))}: {why}")
    if written and not quiet:
        say(f"{plural(written, 'sidecar')} written, {len(everything) - written - refused:,} right as they were")
    if refused:
        raise StoreDamaged(f"{plural(refused, 'sidecar')} could not be changed; repair or remove them, and run again")


def _answers(row: _Row, checks: Iterable[str]) -> list[str]:
    """Give the keywords of an item's answers to checks: of those that are known."""
    return [f"{name}={row[name]}" for name in checks if row[name] and row[name] != UNSURE]
