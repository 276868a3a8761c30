"""What questions can be asked of: items with their rows and features. A store is one; files at hand are another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import Features
from qvsplit.store.row import Content, Row


@runtime_checkable
class Collection(Protocol):
    """Items under one extraction config, as far as asking needs them: see `Store` for each."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def config(self) -> ExtractionConfig | None:
        """The extraction config of every row; None where there is none with features."""

    @property
    def width(self) -> int | None:
        """Values a token of `pooler_output`."""

    @property
    def provenance(self) -> Provenance | None:
        """Where its newest rows came from; None where there is none."""

    @property
    def device_types(self) -> frozenset[str]:
        """The kinds of device that computed any of its features: cpu, cuda."""

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows that can be asked about, sorted."""

    def __getitem__(self, name: str) -> Row:
        """Give the row of this name. KeyError if there is none."""

    def matching(self, pattern: str) -> list[Row]:
        """Give the rows, whatever their status, that a name or a glob names."""

    def hint(self, pattern: str) -> str:
        """Say, behind a semicolon, what may have been meant by a name that names nothing; empty where that is open."""

    def rows_with_status(self, status: str) -> Iterator[Row]:
        """Iterate over the rows of this status, sorted."""

    def current(self, root: str, path: str) -> Row | None:
        """Give the row that stands for one item; None if there is no such item."""

    def home(self, content: Content | None) -> Row | None:
        """Give a row that holds the features of this content; None if there is none."""

    def features(self, row: Row) -> Features:
        """Give the checked features of a row. QvsplitError if there are none."""
