"""Run the command line: `python -m qvsplit` is `qvsplit`."""

from __future__ import annotations

import os
import sys
import traceback


def main() -> None:
    """Run the `qvsplit` command, and end the process.

    Ctrl-C while it is being imported, and an import that fails, end as they do later. Everything has been written and
    closed when a command is done, so the process ends without taking its modules apart: after torch and transformers
    Python needs more than a second for that.
    """
    try:
        from qvsplit.cli import main as run
    except KeyboardInterrupt:
        os._exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(70)
    try:
        run()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)


if __name__ == "__main__":
    main()
