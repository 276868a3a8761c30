"""One run of `qvsplit demo` a session, for all tests that look at what it leaves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvsplit.demo import DemoOutcome


@functools.cache
def demo_outcome(folder: Path) -> DemoOutcome:
    """Run the demo in `folder`, once for each folder."""
    from qvsplit import demo

    return demo.run(folder)


def session_demo(tmp_path_factory) -> DemoOutcome:
    """The outcome of this session's run. What lies in its folders is read only."""
    return demo_outcome(tmp_path_factory.getbasetemp() / "demo")
