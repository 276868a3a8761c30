"""A folder of staged shards: other processes write them whole, and the holder of the store's lock commits them.

Each run has a folder of its own in `.qvsplit/staging`, which the holder of the lock makes and removes. A process that
outlives its run, on another machine, finds the folder gone, and leaves nothing behind.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qvsplit.errors import DiskError
from qvsplit.runtime.atomic_files import disk_errors, remove_folder, sync_folder
from qvsplit.store import layout
from qvsplit.store.storage import Storage


@dataclass(frozen=True)
class Staging:
    """The staged shards of one run. Picklable.

    Attributes:
        store: The store's folder, under a path that every process has it at.
        name: The run's folder in `.qvsplit/staging`.
    """

    store: Path
    name: str

    @property
    def location(self) -> str:
        """The store as a person would name it."""
        return str(self.store)

    @property
    def folder(self) -> Path:
        """Where the staged shards are."""
        return self.store / layout.STAGING / self.name

    def create(self) -> None:
        """Make the folder. Only for whoever holds the lock. Raises DiskError."""
        with disk_errors(self.store):
            self.folder.mkdir(parents=True)

    def remove(self) -> None:
        """Remove the folder and what was not committed. Only for whoever holds the lock."""
        with disk_errors(self.store):
            remove_folder(self.folder)

    def check(self) -> None:
        """DiskError unless the folder is there: the run has ended, or this machine has another disk there."""
        if not self.folder.is_dir():
            raise DiskError(
                f"{self.folder} is not there on {socket.gethostname()}; every node needs the store, and what is "
                "extracted, under the same paths"
            )

    def size(self, name: str) -> int:
        """Give the bytes of a staged shard. Raises DiskError."""
        with disk_errors(self.store):
            return (self.folder / name).stat().st_size

    @staticmethod
    def new_name() -> str:
        """Give a name that no other attempt at the same shard has."""
        return f"{secrets.token_hex(8)}.parquet"

    @contextmanager
    def put_whole(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """Give a stream whose content is on the disk at the end of the block, or of which nothing is left."""
        self.check()
        file = self.folder / name
        with disk_errors(self.store), file.open("x+b") as stream:
            try:
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
                    sync_folder(self.folder)
            except BaseException:
                with suppress(OSError):
                    file.unlink()
                raise

    def commit(self, storage: Storage, name: str, number: int) -> None:
        """Make a staged shard one of the store's. Only for whoever holds the lock."""
        storage.move(f"{layout.STAGING}/{self.name}/{name}", layout.shard_name(number))
