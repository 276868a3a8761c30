"""A store: a folder of shards under one extraction config, and what is current in it.

The shards are the only truth. Current are all rows of an item with the highest generation; features are found by
content: any row with the same hash and part that holds them. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qvsplit.errors import ConfigError, StoreDamaged, UsageError, some_of
from qvsplit.runtime.memory import garbage_collection_paused
from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import Features, TensorSpec
from qvsplit.store.row import Content, Row
from qvsplit.store.row_cache import open_shards
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import shard_paths, shards_in
from qvsplit.store.storage import LocalStorage, Storage


class Store:
    """Shards opened for reading, under one extraction config, the oldest first.

    Iterating gives the current rows that can be asked about: those with status `ok`, sorted by root and path.

    Raises:
        ConfigError: The shards are of two extraction configs.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        _check_one_config(self.shards)
        self._current: dict[tuple[str, str], tuple[Row, ...]] = {}
        self._homes: dict[Content, tuple[Shard, int]] = {}
        self.generation = 0  # the highest
        with garbage_collection_paused():
            for shard in self.shards:
                for index, row in enumerate(shard.rows):
                    self._add(row)
                    if row.has_features and row.sha256 is not None:
                        self._homes[row.sha256, row.part] = (shard, index)

    def _add(self, row: Row) -> None:
        """Take up a row of a later place: it supersedes lower generations, and the same part of its own."""
        key = row.root, row.path
        before = self._current.get(key)
        if before is None or row.generation > before[0].generation:
            self._current[key] = (row,)
        elif row.generation == before[0].generation:
            others = (one for one in before if one.part != row.part)
            self._current[key] = tuple(sorted((*others, row), key=lambda one: one.part))
        if row.generation > self.generation:
            self.generation = row.generation

    @property
    def config(self) -> ExtractionConfig | None:
        """The extraction config of every row; None for a store without shards."""
        return self.shards[0].config if self.shards else None

    @property
    def tensors(self) -> tuple[TensorSpec, ...] | None:
        """The tensors of every row with features."""
        return self.shards[0].schema.tensors if self.shards else None

    @property
    def provenance(self) -> Provenance | None:
        """Where the newest rows came from."""
        return self.shards[-1].provenance if self.shards else None

    @property
    def name(self) -> str:
        """The folders its shards lie in, as they were given."""
        return ", ".join(dict.fromkeys(shard.storage.location for shard in self.shards))

    @property
    def width(self) -> int | None:
        """Values a token of `pooler_output`."""
        return self.shards[0].schema.width if self.shards else None

    @property
    def roots(self) -> frozenset[str]:
        """The roots of all rows, as stored."""
        return frozenset(root for root, _ in self._current)

    @property
    def rows(self) -> list[Row]:
        """The current rows of every item, whatever their status, sorted by root, path and part."""
        return [row for key in sorted(self._current) for row in self._current[key]]

    def current(self, root: str, path: str) -> Row | None:
        """Give the current row of one item; of several parts the first."""
        rows = self._current.get((root, path))
        return None if rows is None else rows[0]

    def is_current(self, row: Row) -> bool:
        """Say whether this very row is current."""
        return any(one is row for one in self._current.get(row.key, ()))

    def home(self, content: Content | None) -> Row | None:
        """Give the row that holds the features of this content."""
        place = self._homes.get(content) if content is not None else None
        return None if place is None else place[0].rows[place[1]]

    def is_home(self, content: Content, shard: Shard, index: int) -> bool:
        """Say whether row `index` of `shard` is where the features of this content are taken from."""
        place = self._homes.get(content)
        return place is not None and place[0] is shard and place[1] == index

    @property
    def contents(self) -> frozenset[Content]:
        """What features there are."""
        return frozenset(self._homes)

    def features(self, row: Row) -> Features:
        """Give the checked features of an `ok` row, its own or those of the same bytes under another name.

        Raises:
            UsageError: The row has none: it failed, or was deleted.
            StoreDamaged: They are in no shard, or in a damaged one.
        """
        if row.status != "ok" or row.content is None:
            reason = f" ({row.error})" if row.error else ""
            raise UsageError(f"{row.path} has no features: it is {row.status}{reason}")
        place = self._homes.get(row.content)
        if place is None:
            raise StoreDamaged(
                f"the features of {row.path} are in no shard given; give the whole store, or run `qvsplit extract` "
                "again"
            )
        return place[0].features(place[1])

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the current rows that can be asked about, sorted."""
        return (row for row in self.rows if row.status == "ok")

    def __len__(self) -> int:
        """Count the rows that can be asked about."""
        return sum(row.status == "ok" for rows in self._current.values() for row in rows)


def open_store(*places: str | os.PathLike[str]) -> Store:
    """Open the store in the given folders, shards or globs.

    Raises:
        UsageError: There is none.
        StoreInUse: A rebuilt store is not wholly in place.
        StoreDamaged, ConfigError: See `Shard` and `Store`.
    """
    names: dict[str, dict[str, None]] = {}  # folder → names of shards, each once, in order
    for place in places:
        for path in shard_paths(place):
            names.setdefault(str(path.parent), {})[path.name] = None
    return Store(
        [shard for folder, some in names.items() for shard in open_shards(LocalStorage(Path(folder)), [*some])]
    )


def read_store(storage: Storage) -> Store:
    """Open all shards of `storage` themselves, without the cache of rows."""
    return Store([Shard(storage, name) for name in shards_in(storage)])


def _check_one_config(shards: Sequence[Shard]) -> None:
    for shard in shards[1:]:
        first = shards[0]
        if (shard.config, shard.schema.tensors) == (first.config, first.schema.tensors):
            continue
        differences = first.config.differences(shard.config)
        if first.schema.tensors != shard.schema.tensors:
            differences.append(f"tensors: {_described(first)}, not {_described(shard)}")
        raise ConfigError(
            f"{first.where} and {shard.where} were made under two extraction configs ({some_of(differences)}); ask "
            "them apart"
        )


def _described(shard: Shard) -> str:
    return ", ".join(f"{spec.key} {spec.width} {spec.dtype}" for spec in shard.schema.tensors)
