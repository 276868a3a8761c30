"""A store: a folder of shards under one extraction config, and what is current in it.

The shards are the only truth, and the catalogue knows what is in them. Current are all rows of an item with the highest
generation: one, or of a video that was cut one for each part. Features are found by content: any row with the same hash
and part that holds them. Needs no torch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from qvsplit.errors import ConfigError, ShardDamaged, ShardNotFound, StoreDamaged, UsageError, some_of
from qvsplit.runtime import arguments
from qvsplit.store.catalogue import Catalogue, CataloguedShard, Place
from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import Features, TensorSpec
from qvsplit.store.finding import hint, matching, named
from qvsplit.store.row import Content, Key, Row, item_row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import ADVICE, Shard
from qvsplit.store.storage import Storage

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa

OPEN_SHARDS = 16  # whose footers are kept in memory
_ATTEMPTS = 100  # to open a store that is being written
_PAUSE_SECONDS = 0.02


class Store:
    """A store opened for reading, under one extraction config: one whole state of it, whatever others write meanwhile.

    Iterating gives the current rows that can be asked about: those with status `ok`, sorted by root, path and part.

        store = qvsplit.open_store("embeds")
        row = store["coffee.png"]
        store.features(row)["pooler_output"]  # a NumPy array
        store["clip.mp4#2"]  # of a video that was cut into parts, the third

    Args:
        catalogue: What is in the shards.
        storages: Where each of them lies, by its number in the catalogue; one storage for all where they lie together.
        reopen: Opens the store anew, should a shard have been replaced since.

    Raises:
        ConfigError: The shards are of two extraction configs.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        storages: Storage | Sequence[Storage],
        reopen: Callable[[], Store] | None = None,
    ) -> None:
        self.catalogue = catalogue
        self._storages = storages
        self._reopen = reopen
        self._now: Store | None = None  # the same store, once a shard of this state has gone
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._entries = {shard.number: shard for shard in catalogue.shards}
        check_one_config([(self._where(one), one.schema) for one in catalogue.shards])

    def __repr__(self) -> str:
        """Say what it holds."""
        if self.config is None:
            return f"<Store {self.name}: empty>"
        counts = self.catalogue.item_counts()
        images, (videos, clips) = counts.get(("ok", "image"), (0, 0))[0], counts.get(("ok", "video"), (0, 0))
        shown = [f"{images:,} images"] if images or not videos else []
        shown += [f"{videos:,} videos" + (f" in {clips:,} parts" if clips > videos else "")] if videos else []
        failed = sum(items for (status, _), (items, _) in counts.items() if status == "failed")
        rest = f", {failed:,} failed" if failed else ""
        return f"<Store {self.name}: {' and '.join(shown)} by {self.config.family}{rest}>"

    def close(self) -> None:
        """Let go of the catalogue's file; the store is of no use any more."""
        self.catalogue.close()
        if self._now is not None:
            self._now.close()

    def __enter__(self) -> Store:
        """Give the store, which is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- the whole

    @property
    def config(self) -> ExtractionConfig | None:
        """The extraction config of every row; None for a store without shards.

        It says of videos what any of the shards says, those that know nothing of them notwithstanding.
        """
        return self.catalogue.config

    @property
    def tensors(self) -> tuple[TensorSpec, ...] | None:
        """The tensors of every row with features."""
        schema = self._schema
        return schema.tensors if schema is not None else None

    @property
    def width(self) -> int | None:
        """Values a token of `pooler_output`."""
        schema = self._schema
        return schema.width if schema is not None else None

    @property
    def token_bytes(self) -> int | None:
        """Bytes of one token before compression, of all tensors together."""
        return None if self.tensors is None else sum(spec.token_bytes for spec in self.tensors)

    @property
    def provenance(self) -> Provenance | None:
        """Where the newest rows came from."""
        shards = self.catalogue.shards
        return shards[-1].schema.provenance[-1] if shards else None

    @property
    def device_types(self) -> frozenset[str]:
        """The kinds of device that computed any of its shards: cpu, cuda."""
        entries = (one for shard in self.catalogue.shards for one in shard.schema.provenance)
        return frozenset().union(*(one.device_types for one in entries))

    @property
    def _schema(self) -> ShardSchema | None:
        shards = self.catalogue.shards
        return shards[0].schema if shards else None

    @property
    def name(self) -> str:
        """The folders its shards lie in, as they were given."""
        storages = self._storages if isinstance(self._storages, Sequence) else [self._storages]
        return ", ".join(dict.fromkeys(storage.location for storage in storages))

    @property
    def generation(self) -> int:
        """The highest generation of any row."""
        return self.catalogue.generation

    @property
    def roots(self) -> frozenset[str]:
        """The roots of all rows, as stored."""
        return self.catalogue.roots

    # ------------------------------------------------------------------------------------------------------- rows

    @property
    def rows(self) -> list[Row]:
        """The current rows of every item, whatever their status, sorted by root, path and part."""
        return list(self.catalogue.rows())

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the current rows that can be asked about, sorted."""
        return self.catalogue.rows_with_status("ok")

    def __len__(self) -> int:
        """Count the rows that can be asked about."""
        return self.catalogue.ok

    def __bool__(self) -> bool:
        """Say whether there is a row that can be asked about."""
        return len(self) > 0

    def __contains__(self, name: object) -> bool:
        """Say whether there is an item of this name, ok or failed: a path, a file name or a whole path. Rows too."""
        if isinstance(name, Row):
            return self.is_current(name)
        return isinstance(name, str | os.PathLike) and bool(self._named(os.fspath(name)))

    def __getitem__(self, name: str | os.PathLike[str]) -> Row:
        """Give the row of the image or video of this name, ok or failed: its path below its root, file name, or all.

        A video that was cut into several parts has a row for each: `store["clip.mp4#2"]` is the third. `matching` gives
        all of them.

        Raises:
            KeyError: There is none.
            UsageError: There are several, of several items or of one.
        """
        if not isinstance(name, str | os.PathLike):
            raise arguments.wrong("store[name]", name, "the name of an image or video")
        text = os.fspath(name)
        found = self._named(text)
        if not found:
            raise KeyError(f"{self.name} has no image named {text}{hint(self.catalogue, text)}")
        if len({row.key for row in found}) > 1:
            places = some_of((f"{row.root}/{row.name}" for row in found), 3)
            raise UsageError(f"{self.name} has several images named {text} ({places}); give the whole path")
        if len(found) > 1:
            raise UsageError(
                f"{text} has {len(found)} parts, each with a row of its own; name one of them, {found[0].name} to "
                f"{found[-1].name}, or take all with `store.matching(name)`"
            )
        return found[0]

    def _named(self, name: str) -> list[Row]:
        return [row for row in named(self.catalogue, name) if row.status != "deleted"]

    def matching(self, pattern: str) -> list[Row]:
        """Give the current rows, whatever their status, that a name or, as a glob, `pattern` names: see finding.py."""
        return matching(self.catalogue, pattern)

    def hint(self, pattern: str) -> str:
        """Say, behind a semicolon, what a name or a glob may have meant that names nothing; see finding.py."""
        return hint(self.catalogue, pattern)

    def rows_with_status(self, status: str) -> Iterator[Row]:
        """Iterate over the current rows of this status, sorted."""
        return self.catalogue.rows_with_status(status)

    def current(self, root: str, path: str) -> Row | None:
        """Give the row that stands for one item: of several parts the first, or one that failed."""
        rows = self.rows_of(root, path)
        return item_row(rows) if rows else None

    def rows_of(self, root: str, path: str) -> list[Row]:
        """Give the current rows of one item, all its parts in order; none if there is no such item."""
        return self.catalogue.rows_of(root, path)

    def folder_rows(self, folder: Key) -> dict[Key, tuple[Row, bool]]:
        """Give the row that stands for each item in one folder, and whether the features of all its parts are there."""
        return self.catalogue.folder_rows(folder)

    def rows_in(self, wanted: Callable[[Key], bool]) -> Iterator[Row]:
        """Give the current rows in those folders, root and path, that are `wanted`, in no order."""
        return self.catalogue.rows_in(wanted)

    def is_current(self, row: Row) -> bool:
        """Say whether there is such a current row."""
        return row in self.catalogue.rows_of(row.root, row.path)

    # --------------------------------------------------------------------------------------------------- features

    def features(self, row: Row | str | os.PathLike[str], names: str | Collection[str] | None = None) -> Features:
        """Give the checked features of an `ok` row, its own or those of the same bytes under another name.

            store.features("coffee.png", ["pooler_output"])  # reads the column of that tensor alone

        Args:
            row: A row of this store, or what names one: see `__getitem__`.
            names: Tensors, of which alone the columns are read and checked; None: all. No language model takes
                features of which some were left out.

        Raises:
            UsageError: The row has none: it failed, or was deleted. Or a name is that of no tensor.
            StoreDamaged: They are in no shard, or in a damaged one.
        """
        if isinstance(row, str | os.PathLike):
            row = self[row]
        if not isinstance(row, Row):
            raise arguments.wrong("row", row, "a row of the store, or its name")
        if row.status != "ok" or row.content is None:
            reason = f" ({row.error})" if row.error else ""
            raise UsageError(f"{row.path} has no features: it is {row.status}{reason}")
        names = self._tensor_names(names)
        if self._now is None:
            place = self.catalogue.home(row.content)
            if place is None:
                raise StoreDamaged(
                    f"the features of {row.path} are in no shard given; give the whole store, or run `qvsplit extract` "
                    "again"
                )
            try:
                return self._features_at(place, row.content, names)
            except ShardNotFound:
                if self._reopen is None:
                    raise
        return self._features_now(row, row.content, names)

    def _tensor_names(self, names: str | Collection[str] | None) -> Collection[str] | None:
        """Give the names as a collection. UsageError if they are none, or that of no tensor of this store."""
        if names is None or self.tensors is None:
            return None
        wanted = [names] if isinstance(names, str) else names
        if not isinstance(wanted, Collection) or not wanted or not all(isinstance(name, str) for name in wanted):
            raise arguments.wrong("names", names, "names of tensors")
        there = [spec.key for spec in self.tensors]
        if unknown := [name for name in wanted if name not in there]:
            raise UsageError(f"names: {self.name} has no tensor {some_of(unknown)}; there are {', '.join(there)}")
        return wanted

    def _features_at(self, place: Place, content: Content, names: Collection[str] | None) -> Features:
        shard = self.shard(place[0])
        if shard.row(place[1]).content != content:
            what = f"row {place[1]} is not the one that it was"
            raise ShardDamaged(f"{shard.where} is damaged: {what}; {ADVICE}", shard.where, what)
        return shard.features(place[1], names)

    def _features_now(self, row: Row, content: Content, names: Collection[str] | None) -> Features:
        """Give features whose shard has gone, as a compaction writes them anew; rows stay those that they were."""
        for _ in range(_ATTEMPTS):
            if self._now is None:
                assert self._reopen is not None
                self._now = self._reopen()
            place = self._now.catalogue.home(content) if self._is_as_before(self._now) else None
            if place is None:
                break
            try:
                return self._now._features_at(place, content, names)
            except ShardNotFound:
                self._now = None
        raise StoreDamaged(
            f"{self.name} is no longer the store that it was, and the features of {row.path} are not in it; open it "
            "again"
        )

    def _is_as_before(self, now: Store) -> bool:
        """Say whether a store that was opened anew is still of this one's extraction config."""
        return self.config is not None and now.config is not None and now.config.fits(self.config)

    def holds(self, content: Content | None) -> bool:
        """Say whether there are features of the whole file that this content is of: of all its parts, whichever it is.

        `home` says it of one part.
        """
        return content is not None and bool(self.catalogue.home_places(content[0]))

    def home(self, content: Content | None) -> Row | None:
        """Give the row that holds the features of this content, one part of a file, current or not."""
        place = self.catalogue.home(content)
        return None if place is None else self.shard(place[0]).row(place[1])

    def home_rows(self, sha256: str | None) -> list[Row]:
        """Give the rows that hold the features of all parts of a file's content, by part, current or not.

        None where one of them is in no shard: then the file has to be encoded again.
        """
        return [self.shard(shard).row(row) for shard, row in self.catalogue.home_places(sha256)]

    # ------------------------------------------------------------------------------------------------------ shards

    @property
    def shards(self) -> list[Shard]:
        """All its shards, the oldest first, opened."""
        return [self.shard(number) for number in self._entries]

    def shard(self, number: int) -> Shard:
        """Open a shard by its number in the catalogue; those used last are kept open.

        Raises:
            ShardNotFound: It is no longer there.
            ShardDamaged: It is not the one whose rows are in the catalogue.
        """
        if number not in self._open:
            entry = self._entries[number]
            shard = Shard(self._storage(number), entry.name)
            if shard.checksum != entry.checksum:
                what = "it is no longer the shard that it was when its rows were read"
                raise ShardDamaged(f"{shard.where} is damaged: {what}; {ADVICE}", shard.where, what)
            self._open[number] = shard
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _storage(self, number: int) -> Storage:
        if isinstance(self._storages, Sequence):
            return self._storages[number - 1]
        return self._storages

    def _where(self, entry: CataloguedShard) -> str:
        return self._storage(entry.number).where(entry.name)

    def size(self) -> int:
        """Count the bytes of its shards on disk."""
        sizes = {}
        for entry in self.catalogue.shards:
            storage = self._storage(entry.number)
            if storage.location not in sizes:
                sizes[storage.location] = {file.name: file.size for file in storage.list()}
        return sum(sizes[self._storage(entry.number).location].get(entry.name, 0) for entry in self.catalogue.shards)

    @property
    def storage(self) -> Storage | None:
        """Where its shards lie, if they lie in one folder."""
        storages = self._storages if isinstance(self._storages, Sequence) else [self._storages]
        return storages[0] if len({storage.location for storage in storages}) == 1 else None

    # ---------------------------------------------------------------------------------------------- other libraries

    def to_arrow(self, *, features: bool = False) -> pa.Table:
        """Give the current rows, whatever their status, as a table, a column for each of a row's.

        Args:
            features: Also the columns of features as they are stored (docs/format.md), for rows with status `ok`.
        """
        from qvsplit.store.arrow import rows_table

        if not features:
            return rows_table(self.catalogue.rows())
        return rows_table(self.catalogue.rows(), self.tensors or (), self.features)

    def to_pandas(self, *, features: bool = False) -> pandas.DataFrame:
        """Give the current rows as a data frame: `to_arrow`, for pandas."""
        return self.to_arrow(features=features).to_pandas()


def check_one_config(shards: Sequence[tuple[str, ShardSchema]]) -> None:
    """ConfigError unless shards, each with its place, declare configs that fit each other, and the same tensors."""
    with_videos = [one for one in shards if one[1].config.videos is not None]
    for first, rest in ((shards[:1], shards[1:]), (with_videos[:1], with_videos[1:])):
        for shard in rest:
            _check_two(first[0], shard)


def _check_two(one: tuple[str, ShardSchema], other: tuple[str, ShardSchema]) -> None:
    (where, mine), (other_where, theirs) = one, other
    if (mine.config, mine.tensors) == (theirs.config, theirs.tensors):
        return
    differences = mine.config.differences(theirs.config)
    if mine.tensors != theirs.tensors:
        differences.append(f"tensors: {_described(mine)}, not {_described(theirs)}")
    if differences:
        raise ConfigError(
            f"{where} and {other_where} were made under two extraction configs ({some_of(differences)}); ask them apart"
        )


def _described(schema: ShardSchema) -> str:
    return ", ".join(f"{spec.key} {spec.width} {spec.dtype}" for spec in schema.tensors)
