"""Write what the documents show of the program: docs/commands.md from the commands' own --help, docs/demo.svg.

python tools/make_docs.py            # the command reference
python tools/make_docs.py --picture  # and what `qvsplit demo` prints, as an image
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from qvsplit.cli import COMMANDS

DOCS = Path(__file__).parent.parent / "docs"
SHOWN = ("turned-left.jpg", "city-lights.jpg", "kite-dogs.webp")  # of the demo's postcards, in its image


def reference() -> str:
    """Give the page of commands as it should be."""
    page = "# Commands\n\nWritten by `make docs` from the commands' own `--help`.\n"
    for command in ("", *COMMANDS):
        words = ["qvsplit", *([command] if command else []), "--help"]
        page += f"\n## {' '.join(words[:-1])}\n\n```\n{_help(words[1:])}```\n"
    return page


def _help(words: list[str]) -> str:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit", *words], env=environment, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


def demo_image() -> str:
    """Give the end of a demo on a terminal of 116 columns, as SVG: some postcards, and what was done."""
    from rich.console import Console

    from qvsplit import demo
    from qvsplit.demo.table import postcard_tables, summary_lines

    console = Console(record=True, width=116, force_terminal=True, color_system="truecolor", file=io.StringIO())
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        outcome = demo.run(Path("qvsplit-demo"))
        console.print("$ qvsplit demo", highlight=False)
        shown = [answer for answer in outcome.answers if answer.path in SHOWN]
        for table in postcard_tables(shown, outcome.photos, console):
            console.print(table)
        console.print("…", highlight=False)
        sys.argv[0] = "qvsplit"
        for line in summary_lines(outcome):
            console.print(line, markup=False, highlight=False)
    svg = console.export_svg(title="qvsplit demo")
    return re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", svg, flags=re.DOTALL)  # fonts come from the reader's machine


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(reference(), encoding="utf-8")
    if "--picture" in sys.argv:
        (DOCS / "demo.svg").write_text(demo_image(), encoding="utf-8")
