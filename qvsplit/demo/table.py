"""What a demo answered, for people: a thumbnail of each image, question, answer and truth; then what was done."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.opening import DEFAULT_MODEL
from qvsplit.demo import DemoAnswer, DemoOutcome
from qvsplit.errors import printable, size
from qvsplit.output.text import plural

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

THUMBNAIL = (24, 16)  # pixels at most; a character shows two, one above the other


def postcard_tables(answers: Iterable[DemoAnswer], photos: Path, console: Console) -> Iterable[Table]:
    """Give one table an image, as wide as the console; with thumbnails where it has the colours and the room."""
    from rich import box
    from rich.table import Table

    drawn = console.color_system in {"256", "truecolor"} and not console.no_color and console.width >= 90
    for path, lines in groupby(answers, lambda one: one.path):
        table = Table(box=box.ROUNDED, width=min(console.width, 130), show_header=False, border_style="dim")
        table.add_column(width=THUMBNAIL[0] if drawn else 20, overflow="fold")
        table.add_column(ratio=1)
        table.add_row(_image(path, photos, drawn), _answers(list(lines)))
        yield table


def _answers(lines: Sequence[DemoAnswer]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, header_style="dim", pad_edge=False, show_edge=False)
    for name, ratio in (("question", 5), ("answer", 6), ("truth", 6)):
        table.add_column(name, ratio=ratio)
    for one in lines:
        answer = Text(printable(one.answer) if one.error is None else f"not answered: {one.error}")
        if one.truth is not None:
            right = one.answer == one.truth
            answer = Text("✓ " if right else "✗ ", "green" if right else "bold red") + answer
        table.add_row(Text(printable(one.question)), answer, Text(printable(one.truth or "not known"), "dim"))
    return table


def _image(path: str, photos: Path, drawn: bool) -> Text:
    from rich.text import Text

    name = Text(printable(path), "bold")
    return Text("\n").join([_thumbnail(photos / path), name]) if drawn else name


def _thumbnail(file: Path) -> Text:
    """Give the image as half blocks: foreground the upper pixel, background the lower one."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    from qvsplit.errors import ItemError
    from qvsplit.sources.images import open_file

    try:
        image = open_file(file)
    except (OSError, ItemError):  # deleted or changed since it was extracted: the answers stand without it
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


def summary_lines(outcome: DemoOutcome) -> list[str]:
    """Say what was done, what was not, and what to do next, in a line each."""
    known = sum(one.truth is not None for one in outcome.answers)
    store, program = shlex.quote(printable(str(outcome.store))), _program()
    stored = (
        f"{outcome.tokens:,} tokens of {plural(len(outcome.rows), 'image')}: {size(outcome.store_bytes)} in {store}"
    )
    return [
        f"encoded      {_extraction(outcome)}",
        f"answered     {outcome.answered} questions by the language model alone, from the stored features, in "
        f"{outcome.ask_seconds:.1f} s: no image was encoded twice",
        f"stored       {stored}",
        f"right        {outcome.right} of {known} answers, word for word",
        f'next         {program} ask --embeds {store} "What colour is the house?"',
        "             with your own images and a real model (4.4 GB):",
        f"             {program} extract ~/Pictures --model {DEFAULT_MODEL}",
        f'             {program} ask "Is there a dog?"',
    ]


def _extraction(outcome: DemoOutcome) -> str:
    """Say what the extraction did; a demo that is run again has nothing to do."""
    summary = outcome.summary
    counts = {"a copy of another": summary.copied, "damaged and recorded as failed": summary.failed}
    beside = "".join(f", {number} {what}" for what, number in counts.items() if number)
    if summary.encoded:
        images = plural(summary.encoded, "image")
        return f"{images} once, by the vision encoder alone, in {summary.seconds:.1f} s{beside}"
    if summary.encoder_bytes:
        return f"nothing new{beside}"
    return f"nothing: {plural(summary.unchanged, 'image')} unchanged, the vision encoder was not even loaded{beside}"


def _program() -> str:
    """Give the words by which the user calls this program."""
    return "qvsplit" if shutil.which("qvsplit") else shlex.quote(printable(sys.argv[0]))
