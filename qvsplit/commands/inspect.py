"""`qvsplit inspect`: describe a store."""

from __future__ import annotations

import json

from qvsplit.commands.options import Json, StoreArgument, StoreOption, store_place
from qvsplit.output.text import description_lines


def inspect(store: StoreArgument = None, embeds: StoreOption = None, as_json: Json = False) -> None:
    """Describe a store.

    Counts by status, tokens, sizes, the extraction config, provenance, the last runs, and what failed and why.
    """
    from qvsplit.store.store import open_store
    from qvsplit.verify import describe

    description = describe(open_store(store_place(store, embeds)))
    if as_json:
        print(json.dumps(description))
        return
    for line in description_lines(description):
        print(line)
