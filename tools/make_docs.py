"""Write what the documents show of the program: docs/commands.md from the commands' own --help-all, docs/demo.svg.

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

PRINTED = """
## Words

- **Short forms**: `-e` is `--embeds`, `-m` `--model`, `-o` `--out`, `-i` `--image`, `-q` `--quiet`, `-h` `--help`,
  wherever there is such an option.
- **Completion**: `qvsplit --install-completion` has bash, zsh, fish or PowerShell, whichever it is run in, complete
  commands, options and choices; `--show-completion` prints what that installs.
- **Other names**: `bf16`, `fp16`, `half` and `fp32` are bfloat16, float16 and float32; the device `gpu` is cuda,
  `gpu:1` cuda:1. Capitals do not matter in choices and devices.
- **Mistakes** are one line on stderr with what may have been meant, and exit code 2. Words behind `--` are no options.

## What is printed

Answers and `--json` go to stdout, all else to stderr.

- **Paths** are those of the files, blanks of all kinds included. What a line cannot hold is escaped: control
  characters, tabs, line ends and direction overrides as `\\x1b`, `\\u202e`; a backslash that would read as such
  an escape as `\\x5c`. What was printed can be given to `ask --image` as it is. A byte of a name that is not UTF-8
  is `//x` and two digits, as in the store.
- **Answers in a pipe** are lines of fields with a tab between them: path, question, answer. In all but the path each
  run of blanks, tabs and line ends is one blank; `--json` has the answer as it is.
- **Encodings**: characters that the encoding of stdout or stderr lacks are escaped in the same way; JSON is then ASCII.
  Tables and reports are always UTF-8. Questions are read as UTF-8, or else in the encoding of the locale.
- **Terminals**: with `TERM=dumb`, without TERM, or with NO_COLOR there are no escape codes, and in place of a bar the
  lines that others get. With NO_COLOR, `chat` still edits lines on the terminal: without colours, by escape codes that
  move the cursor. Nothing is drawn while the process is in the background.
- **How far a run is** goes to stderr: on a terminal a bar, elsewhere a line once a minute, the first after a minute:
  `2026-11-26T01:02:03Z images 120 of 4,000, 2.1/s, about 31 min left`. `--progress json` prints an object on a line
  as each phase begins and ends, and once a second: `type` (`progress`), `phase`, `part` (of loading the model),
  `done`, `total`, `unit`, `rate` (a second), `seconds_left`, `time`; null is what is not known. Where answers are
  printed on the same terminal there is no bar; `--progress none` and `--quiet` show nothing.
- **Streams**: stdin, stdout and stderr may be closed. A stdout that cannot be written ends the command with 7; if its
  reader has gone (`| head`), with 141 and without a word. What cannot be written to stderr is dropped, and the run
  goes on.
- **Signals**: Ctrl-C ends a run with 130, SIGTERM and SIGHUP with 143; what is finished is kept. A signal that was
  ignored when the process began, as by `nohup`, stays ignored.
"""


def reference() -> str:
    """Give the page of commands as it should be."""
    page = (
        "# Commands\n\nWritten by `make docs` from the commands' own `--help-all`; `--help` shows what is used most.\n"
    )
    for command in ("", *COMMANDS):
        words = [command, "--help-all"] if command else ["--help"]
        page += f"\n## {' '.join(['qvsplit', *words[:-1]])}\n\n```\n{_help(words)}```\n"
    return page + PRINTED


def _help(words: list[str]) -> str:
    """Give the help of a command, 100 columns wide, in whatever terminal and locale this runs."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit", *words],
        env=environment, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n") + "\n"


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
