"""What a demo told, for people: a thumbnail of each picture, question, answer and truth; then what was done."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoint import DEFAULT_MODEL
from qvsplit.demo import Outcome, Told
from qvsplit.errors import printable, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

THUMBNAIL = (24, 16)  # pixels at most; a character shows two, one above the other


def postcards(told: Iterable[Told], photos: Path, console: Console) -> Iterable[Table]:
    """One table a picture, as wide as the console; with thumbnails where it has the colours and the room for them."""
    from rich import box
    from rich.table import Table

    drawn = console.color_system in {"256", "truecolor"} and not console.no_color and console.width >= 90
    for path, lines in groupby(told, lambda one: one.path):
        table = Table(box=box.ROUNDED, width=min(console.width, 130), show_header=False, border_style="dim")
        table.add_column(width=THUMBNAIL[0] if drawn else 20, overflow="fold")
        table.add_column(ratio=1)
        table.add_row(_picture(path, photos, drawn), _answers(list(lines)))
        yield table


def _answers(lines: Sequence[Told]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, header_style="dim", pad_edge=False, show_edge=False)
    for name, ratio in (("question", 5), ("answer", 6), ("truth", 6)):
        table.add_column(name, ratio=ratio)
    for one in lines:
        answer = Text(printable(one.answer))
        if one.truth is not None:
            right = one.answer == one.truth
            answer = Text("✓ " if right else "✗ ", "green" if right else "bold red") + answer
        table.add_row(Text(printable(one.question)), answer, Text(printable(one.truth or "not known"), "dim"))
    return table


def _picture(path: str, photos: Path, drawn: bool) -> Text:
    from rich.text import Text

    name = Text(printable(path), "bold")
    return Text("\n").join([_thumbnail(photos / path), name]) if drawn else name


def _thumbnail(file: Path) -> Text:
    """The picture as half blocks: foreground the upper pixel, background the lower one."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    from qvsplit.errors import PictureError
    from qvsplit.images import open_file

    try:
        image = open_file(file)
    except (OSError, PictureError):  # gone or changed since it was extracted: the answers stand without it
        return Text("(cannot be shown)")
    scale = min(THUMBNAIL[0] / image.width, THUMBNAIL[1] / image.height)
    width, height = max(1, round(image.width * scale)), max(2, round(image.height * scale / 2) * 2)
    pixels: Any = image.resize((width, height)).load()
    text = Text()
    for y in range(0, height, 2):
        for x in range(width):
            upper, lower = (Color.from_rgb(*pixels[x, row]) for row in (y, y + 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n" if y + 2 < height else "")
    return text


def story(outcome: Outcome) -> list[str]:
    """What was done, what was not, and what to do next, in a line each."""
    extracted = outcome.extracted
    counted = {"a copy of another": extracted.copied, "broken and set aside": extracted.failed}
    beside = "".join(f", {number} {what}" for what, number in counted.items() if number)
    if extracted.encoded:
        seen = f"{extracted.encoded} pictures seen once, by the vision half alone, in {extracted.seconds:.1f} s{beside}"
    elif extracted.tower_bytes:
        seen = f"nothing new could be seen{beside}"
    else:
        seen = f"nothing: {extracted.skipped} pictures were known, the vision half was not even loaded{beside}"
    known = sum(one.truth is not None for one in outcome.told)
    album, program = shlex.quote(printable(str(outcome.album))), _program()
    return [
        f"computed     {seen}",
        f"not again    {len(outcome.told)} answers by the language half alone, from the shards, in "
        f"{outcome.ask_seconds:.1f} s: no picture looked at twice",
        f"stored       {outcome.tokens} tokens of {len(outcome.rows)} pictures: {size(outcome.album_bytes)} in {album}",
        f"right        {outcome.right} of {known} answers, word for word",
        f'next         {program} ask --embeds {album} "What colour is the house?"',
        "             with your own pictures and a real model (4.4 GB):",
        f"             {program} extract ~/Pictures --model {DEFAULT_MODEL} --out album",
        f'             {program} ask --embeds album "Is there a dog?"',
    ]


def _program() -> str:
    """How the user calls this program."""
    return "qvsplit" if shutil.which("qvsplit") else shlex.quote(printable(sys.argv[0]))
