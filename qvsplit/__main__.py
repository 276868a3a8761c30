"""Run the command line: `python -m qvsplit` is `qvsplit`."""

from __future__ import annotations

import os
import sys
import traceback


def main() -> None:
    """Run the `qvsplit` command. Ctrl-C while it is being imported, and an import that fails, end as they do later."""
    try:
        from qvsplit.cli import main as run
    except KeyboardInterrupt:
        os._exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(70)
    run()


if __name__ == "__main__":
    main()
