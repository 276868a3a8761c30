"""`qvsplit inspect`: describe a store."""

from __future__ import annotations

import os

from qvsplit.commands.opening import open_with_progress
from qvsplit.commands.options import Json, StoreArgument, StoreOption, store_place
from qvsplit.commands.wording import on_command_line
from qvsplit.output.text import description_lines, print_json


def inspect(store: StoreArgument = None, embeds: StoreOption = None, as_json: Json = False) -> None:
    """Describe a store.

    Images, videos and clips by status, tokens, sizes, the extraction config, provenance, the last runs, and what failed
    and why.

    Examples:
        qvsplit inspect
        qvsplit inspect album --json
    """
    from qvsplit.pipeline.plan import failure_now
    from qvsplit.runtime.memory import machine_memory
    from qvsplit.runtime.names import file_on_disk
    from qvsplit.sources.images import optional_readers
    from qvsplit.verify import describe

    opened = open_with_progress(store_place(store, embeds))
    description = describe(opened)
    readers, memory = optional_readers(), machine_memory()
    for failure in description["failures"]:  # advice that has been followed is none
        row = opened.current(failure["root"], failure["path"])
        if row is not None:
            readable = os.access(file_on_disk(row.root, row.path), os.R_OK)
            failure["error"] = failure_now(row, readers, memory, readable=readable)
    if as_json:
        print_json({"type": "store"} | description)
        return
    for line in description_lines(description):
        print(on_command_line(line))
