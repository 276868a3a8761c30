"""Write docs/commands.md, the command reference, from the commands' own --help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("extract", "ask", "inspect", "verify")
PAGE = Path(__file__).parent.parent / "docs" / "commands.md"


def reference() -> str:
    """The page as it should be."""
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


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
