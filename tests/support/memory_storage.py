"""A storage in memory: what the Storage door asks for, and nothing of a file system."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO

from qvsplit.errors import StoreInUse
from qvsplit.store import layout
from qvsplit.store.lock import Lock
from qvsplit.store.storage import StoredFile


class MemoryLock(Lock):
    """A lock that is held."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.announced = 0

    def announce(self) -> None:
        self.announced += 1


class MemoryStorage:
    """Files by name."""

    def __init__(self, name: str = "memory") -> None:
        self.files: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.location = name
        self._clock = 0
        self._locked = False

    def where(self, name: str) -> str:
        return f"{self.location}:{name}"

    def list(self, folder: str = "") -> list[StoredFile]:
        below = f"{folder}/" if folder else ""
        return [
            StoredFile(name.removeprefix(below), len(data), str(self.versions[name]))
            for name, data in sorted(self.files.items())
            if name.startswith(below) and "/" not in name.removeprefix(below)
        ]

    def open(self, name: str) -> IO[bytes]:
        if name not in self.files:
            raise FileNotFoundError(2, "No such file", name)
        return io.BytesIO(self.files[name])

    def local_path(self, name: str) -> None:
        return None

    @contextmanager
    def put_whole(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.seek(0)
            self._put(name, stream.read())

    def put_if_absent(self, name: str, content: bytes) -> bool:
        if name in self.files:
            return False
        self._put(name, content)
        return True

    def move(self, name: str, to: str) -> None:
        self._put(to, self.files.pop(name))

    def delete(self, *names: str) -> None:
        for name in names:
            self.files.pop(name, None)

    def below(self, folder: str) -> Below:
        return Below(self, folder)

    def delete_below(self, folder: str, *, last: str = "") -> bool:
        found = [name for name in self.files if name.startswith(f"{folder}/")]
        self.delete(*sorted(found, key=lambda name: name == f"{folder}/{last}"))
        return bool(found)

    @contextmanager
    def lock(self, *, wait: bool = False, on_note: Callable[[str], None] = lambda line: None) -> Iterator[Lock]:
        if self._locked:
            raise StoreInUse(f"{self.location} is being written")
        self._locked = True
        try:
            self.delete(*(f"{layout.STAGING}/{file.name}" for file in self.list(layout.STAGING)))
            yield MemoryLock()
        finally:
            self._locked = False

    def _put(self, name: str, content: bytes) -> None:
        self._clock += 1
        self.files[name], self.versions[name] = content, self._clock


class Below:
    """What lies in one folder of another storage."""

    def __init__(self, parent: MemoryStorage, folder: str) -> None:
        self._parent = parent
        self._folder = folder
        self.location = parent.where(folder)

    def _name(self, name: str) -> str:
        return f"{self._folder}/{name}" if name else self._folder

    def where(self, name: str) -> str:
        return self._parent.where(self._name(name))

    def list(self, folder: str = "") -> list[StoredFile]:
        return self._parent.list(self._name(folder))

    def open(self, name: str) -> IO[bytes]:
        return self._parent.open(self._name(name))

    def local_path(self, name: str) -> None:
        return None

    def put_whole(self, name: str, *, durable: bool = True) -> AbstractContextManager[IO[bytes]]:
        return self._parent.put_whole(self._name(name), durable=durable)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        return self._parent.put_if_absent(self._name(name), content)

    def move(self, name: str, to: str) -> None:
        self._parent.move(self._name(name), self._name(to))

    def delete(self, *names: str) -> None:
        self._parent.delete(*map(self._name, names))

    def below(self, folder: str) -> Below:
        return Below(self._parent, self._name(folder))

    def delete_below(self, folder: str, *, last: str = "") -> bool:
        return self._parent.delete_below(self._name(folder), last=last)

    def lock(
        self, *, wait: bool = False, on_note: Callable[[str], None] = lambda line: None
    ) -> AbstractContextManager[Lock]:
        return self._parent.lock(wait=wait, on_note=on_note)
