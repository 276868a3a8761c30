"""qvsplit's command line whose answers and features are made up: Python starts anew, but loads no model.

    python -m tests.support.made_up COMMAND …

For tests of standard streams, encodings and exit codes: all else of a command is as users have it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command of the arguments."""
    from qvsplit import ask, cli

    if sys.argv[1:2] == ["extract"]:
        from tests.support import fake_encoder

        fake_encoder.install()
    if sys.argv[1:2] == ["ask"]:
        from tests.support.fake_engine import FakeEngine

        ask.engine_for = lambda *_, **__: FakeEngine()  # type: ignore[assignment]
    cli.main()


if __name__ == "__main__":
    main()
