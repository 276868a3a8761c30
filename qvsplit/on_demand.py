"""Files at hand: encoded in memory for the questions of one run, as if they had been extracted, and kept in no store.

Wires runner, encoder and a store that may have some of them already. Every file is read and hashed by the stages of an
extraction, in decoder processes that can be killed. A content that the store has is taken from there, by whatever name;
anything else is encoded under the store's extraction config, or under the defaults where there is no store: rows,
features and so answers are those of `extract` and `ask`. Nothing is written to a store.
"""

from __future__ import annotations

import gc
import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from os import PathLike
from tempfile import TemporaryFile, gettempdir
from typing import IO, TYPE_CHECKING, NamedTuple

from qvsplit.answering.options import AskOptions
from qvsplit.ask import StoreReader, checked_language_model
from qvsplit.checkpoints.opening import default_model, open_checkpoint
from qvsplit.errors import ItemError, ModelError, UsageError
from qvsplit.models.encoder import Clips
from qvsplit.pipeline.devices import Loaded, StoreDeclares, load_clips, load_devices
from qvsplit.pipeline.encoding import Devices
from qvsplit.pipeline.options import ExtractOptions, check_against, check_options, with_videos_of
from qvsplit.pipeline.plan import Plan
from qvsplit.pipeline.record import RowRecorder
from qvsplit.pipeline.runner import Load, LocalRunner, RunnerOptions
from qvsplit.pipeline.summary import ExtractCallbacks, Summary
from qvsplit.runtime import arguments, interrupts
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.runtime.interrupts import held_back
from qvsplit.runtime.memory import give_back_now
from qvsplit.runtime.names import absolute, name_on_disk, storable_mtime, stored_name
from qvsplit.sources.decoder import ITEM_SECONDS
from qvsplit.sources.files import sha256_of
from qvsplit.sources.folders import root_of
from qvsplit.sources.images import MAX_IMAGE_PIXELS
from qvsplit.sources.source import Entry
from qvsplit.store.config import KERNELS
from qvsplit.store.features import Features, StoredTensor
from qvsplit.store.row import Content, Key, Row, item_row
from qvsplit.store.schema import ShardSchema

if TYPE_CHECKING:
    from pathlib import Path

    from qvsplit.store.config import ExtractionConfig, Provenance
    from qvsplit.store.store import Store

IN_MEMORY_BYTES = 256 << 20  # of features; more of them lie in a file without a name
NOT_FOUND = "there is no such file"


class _Identity(NamedTuple):
    """A file's stat: what tells whether it is another one, or has been written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # unlike mtime nobody can put it back; a change of mode or name moves it, too


@dataclass(frozen=True)
class GivenFile:
    """One file as it was given.

    Attributes:
        name: As it was given.
        place: Its whole path, links as they are.
        key: Root and path that its rows have, as an extraction would name them.
        identity: What tells whether it has changed since: its stat before it was read; None where there was none.
        error: Why it cannot be looked at.
    """

    name: str
    place: str
    key: Key
    identity: _Identity | None
    error: str = ""

    @property
    def entry(self) -> Entry:
        """Give it as a listing has it."""
        assert self.identity is not None
        mtime_ns = self.identity.mtime_ns
        return Entry(*self.key, self.identity.size, str(mtime_ns), mtime_ns)


class FilesAtHand:
    """Files with their rows and features, beside what a store has. A `Collection`: it is asked as a store is.

        with files_at_hand(["cat.jpg"]) as files:
            session = session_over(files, AskOptions())

    Attributes:
        files: As they were given, in that order; one that was given twice is there twice.
        encoded: Files whose features were made for this, as the store had none of them.
        store: The store that they lie beside, if there is one.
    """

    def __init__(self, files: Sequence[GivenFile], made: _Made, store: Store | None) -> None:
        self.files = tuple(files)
        self.encoded = made.encoded
        self._made = made
        self.store = store
        self._reader = None if store is None else StoreReader(store)

    def rows_of(self, file: GivenFile) -> list[Row]:
        """Give the rows of a file: one, or of a video one for each clip. One that failed says why."""
        return self._made.held.rows[file.key]

    @property
    def rows(self) -> list[Row]:
        """The rows of all files, each file once, in the order in which they were given."""
        return [row for rows in self._made.held.rows.values() for row in rows]

    def is_changed(self, file: GivenFile) -> bool:
        """Say whether the file on disk is no longer the one that was read. Where its stat cannot tell, it is hashed."""
        row, then, now = self.rows_of(file)[0], file.identity, _identity(file.place)
        if then is None or now is None:
            return now != then
        if now[:-1] != then[:-1] or (row.size, row.mtime_ns) != (now.size, now.mtime_ns):
            return True
        is_sure = row.version is not None and now.ctime_ns == then.ctime_ns
        return not is_sure and sha256_of(file.place) != row.sha256

    # ------------------------------------------------------------------------------------------------- a Collection

    @property
    def name(self) -> str:
        """What they are called in messages."""
        return "the files given" if self.store is None else self.store.name

    @property
    def config(self) -> ExtractionConfig | None:
        """The extraction config of all features; it says how videos were looked at once any was."""
        return None if self._made.schema is None else self._made.schema.config

    @property
    def width(self) -> int | None:
        """Values a token of `pooler_output`."""
        return None if self._made.schema is None else self._made.schema.width

    @property
    def provenance(self) -> Provenance | None:
        """Where the features came from."""
        return None if self._made.schema is None else self._made.schema.provenance[-1]

    @property
    def device_types(self) -> frozenset[str]:
        """The kinds of device that computed any of the features, the store's and those of files: cpu, cuda."""
        return self._made.device_types | (frozenset() if self.store is None else self.store.device_types)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows that can be asked about, of the files and of the store, sorted."""
        return self.rows_with_status("ok")

    def __len__(self) -> int:
        """Count the rows that can be asked about."""
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Row:
        """Give the row of a file as it was given, or of the store's item of this name. KeyError if there is none."""
        found = self._given(name)
        if len(found) > 1:
            raise UsageError(f"{name} has {len(found)} parts, each with a row of its own; give one of these rows")
        if found:
            return found[0]
        if self.store is None:
            raise KeyError(f"{self.name} have none named {name}")
        return self.store[name]

    def matching(self, pattern: str) -> list[Row]:
        """Give the rows of the file that was so given; else of what a name or a glob names, as the files are now."""
        if (found := self._given(pattern)) or self.store is None:
            return found
        rows: dict[Row, None] = {}
        for row in self.store.matching(pattern):
            rows |= dict.fromkeys(self._made.held.rows.get(row.key, [row]))
        return list(rows)

    def _given(self, name: str) -> list[Row]:
        return next((self.rows_of(file) for file in self.files if file.name == name), [])

    def rows_with_status(self, status: str) -> Iterator[Row]:
        """Iterate over the rows of this status, of the files and of the store's other items, sorted."""
        mine = sorted((row for row in self.rows if row.status == status), key=_place_of)
        stored = self.store.rows_with_status(status) if self.store is not None else iter(())
        others = (row for row in stored if row.key not in self._made.held.rows)
        return heapq.merge(mine, others, key=_place_of)

    def hint(self, pattern: str) -> str:
        """Say what may have been meant by a name that names nothing."""
        return "" if self.store is None else self.store.hint(pattern)

    def current(self, root: str, path: str) -> Row | None:
        """Give the row that stands for a file, or for an item of the store."""
        rows = self._made.held.rows.get((root, path))
        if rows is not None:
            return item_row(rows)
        return None if self.store is None else self.store.current(root, path)

    def home(self, content: Content | None) -> Row | None:
        """Give a row that holds the features of this content."""
        mine = self._made.held.home(content)
        return mine if mine is not None or self.store is None else self.store.home(content)

    def features(self, row: Row) -> Features:
        """Give the features of a row. QvsplitError if it has none."""
        if row.status != "ok" or row.content is None:
            raise UsageError(f"{row.path} has no features: it is {row.status} ({row.error})")
        mine = self._made.held.features(row.content)
        if mine is not None:
            return mine
        if self.store is None:
            raise UsageError(f"{row.path} is none of the files given")
        return self.store.features(row)

    # ------------------------------------------------------------------------------------------------------ closing

    def close(self) -> None:
        """Let go of the features; nothing can be asked any more."""
        self._made.held.close()

    def __enter__(self) -> FilesAtHand:
        """Give itself; it is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _place_of(row: Row) -> tuple[str, str, int]:
    return row.root, row.path, row.part


def files_at_hand(
    files: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    store: Store | None = None,
    options: ExtractOptions | None = None,
    callbacks: ExtractCallbacks | None = None,
) -> FilesAtHand:
    """Read files, and encode those of whose content `store` has no features. The encoder is loaded only for these.

    When it returns, the encoder's memory is free again.

    Args:
        files: Paths of images and videos. One that cannot be read has a failed row, and so has one that is not there.
        store: Where features may be already. All others are made under its extraction config.
        options: As for `extract_files`: `model`, `device`, `workers`, `item_timeout`; without a store also how images
            and videos are looked at.
        callbacks: Who hears of what goes on.

    Raises:
        UsageError: A path is a folder's, or an option cannot be.
        ConfigError: The options are not those that the store was made with.
        ModelError: The encoder cannot be loaded.
    """
    names = arguments.paths("files", files)
    options = ExtractOptions() if options is None else options
    callbacks = ExtractCallbacks() if callbacks is None else callbacks
    check_options(options)
    if store is not None and store.config is not None:
        check_against(options, store.config, store.name)
    roots = frozenset(map(name_on_disk, store.roots)) if store is not None else frozenset()
    given = [_given(name, roots) for name in names]
    made = _made(given, store, options, callbacks)
    if made.encoded:
        _free_encoder()
    return FilesAtHand(given, made, store)


def encoder_options(
    store: Store | None,
    asked: AskOptions,
    item_timeout: float = ITEM_SECONDS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> ExtractOptions:
    """Say how files are encoded that `asked` is to be answered about: as the store's were, if there is one.

    Raises:
        ConfigError: The store does not belong to the model; nothing has been encoded.
        ModelError: There is no such model.
    """
    device = None if asked.device == "auto" else asked.device
    common = ExtractOptions(device=device, item_timeout=item_timeout, max_image_pixels=max_image_pixels)
    if store is None:
        kernels = None if asked.kernels == KERNELS[0] else asked.kernels  # a family may have but one
        return replace(common, model=asked.model, adapter=asked.adapter, dtype=asked.dtype, kernels=kernels)
    checkpoint, _ = checked_language_model(store, asked)
    has_encoder = bool(checkpoint.file_names("encoder"))  # of a language model alone: the store's own, then
    is_adapted = checkpoint.adapter is not None and bool(checkpoint.adapter.names_of(checkpoint.family, "encoder"))
    adapter = asked.adapter if is_adapted else None  # one for questions alone is nothing to the encoder
    return replace(common, model=asked.model if has_encoder else None, adapter=adapter)


def is_file(name: str) -> bool:
    """Say whether a word of the command line is the path of a file that could be read."""
    try:
        return os.path.isfile(name)
    except ValueError:  # no path at all
        return False


# ------------------------------------------------------------------------------------------------------------ listing


def _given(name: str, roots: frozenset[str]) -> GivenFile:
    """Look at one path, and name it as a listing of it would. UsageError for a folder."""
    place = absolute(name)
    folder, base = os.path.split(place)
    folder = os.path.realpath(folder)
    root = root_of(folder, roots) or folder
    key = stored_name(root), stored_name(os.path.join(folder[len(root) :].strip("/"), base))
    if os.path.isdir(name):
        raise UsageError(f"{name} is a folder; give the files in it, so that none is passed over for its name")
    try:
        return GivenFile(name, place, key, _stat(place))
    except (FileNotFoundError, NotADirectoryError):
        return GivenFile(name, place, key, None, NOT_FOUND)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return GivenFile(name, place, key, None, f"cannot be looked at: {reason}")


def _identity(place: str) -> _Identity | None:
    try:
        return _stat(place)
    except OSError:
        return None


def _stat(place: str) -> _Identity:
    status = os.stat(place)
    mtime_ns = storable_mtime(status.st_mtime_ns)
    return _Identity(status.st_dev, status.st_ino, status.st_size, mtime_ns, status.st_ctime_ns)


def _failed_row(file: GivenFile, error: str) -> Row:
    return Row(*file.key, sha256=None, size=0, status="failed", error=error, error_kind="permission")


# ----------------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class _Made:
    """What came of the files: their rows and features, what these are declared as, how many were encoded, and where."""

    held: _Held
    schema: ShardSchema | None
    encoded: int
    device_types: frozenset[str]


def _made(
    given: Sequence[GivenFile], store: Store | None, options: ExtractOptions, callbacks: ExtractCallbacks
) -> _Made:
    """Run the files through the stages; `finally` leaves no process and no file behind, whatever ends it."""
    unique = {file.key: file for file in given}
    entries = [file.entry for file in unique.values() if file.identity is not None]
    held, loader, summary = _Held(), _Loader(store, options, callbacks), Summary()
    plan = Plan(found=len(entries), to_read=tuple(entries), unchanged=0, failed_before=0)
    recorder = RowRecorder(_Contents(store), plan, 0, lambda: held, summary, callbacks)
    bounds = RunnerOptions(
        options.workers, item_timeout=options.item_timeout, videos=options.videos,
        gifs_are_videos=with_videos_of(loader.own.config, options).gif == "video", scratch=held.folder,
        max_image_pixels=options.max_image_pixels,
    )  # fmt: skip
    runner = LocalRunner(bounds, Load(loader.devices, loader.clips), recorder.holds)
    callbacks.on_plan(len(entries))
    try:
        with closing(runner.run(entries)) as results:
            for result in results:
                interrupts.check()
                recorder.take(result)
        recorder.finish()
    except BaseException:
        held.close()
        raise
    finally:
        with held_back():
            runner.close()
    for file in unique.values():
        if file.key not in held.rows:
            held.append_item([(_failed_row(file, file.error or NOT_FOUND), None)])
    held.rows = {key: held.rows[key] for key in unique}
    return _Made(held, loader.schema, summary.encoded, loader.device_types if summary.encoded else frozenset())


def _free_encoder() -> None:
    """Give back the encoder's memory, which nobody holds any more, before the language model takes it."""
    from qvsplit.runtime.devices import empty_cache

    gc.collect()
    empty_cache()
    give_back_now()


class _Loader:
    """Loads the encoder when the first file needs it, held against the store's extraction config."""

    def __init__(self, store: Store | None, options: ExtractOptions, callbacks: ExtractCallbacks) -> None:
        self.own = StoreDeclares("", None, None, None)
        self.schema: ShardSchema | None = None
        if store is not None and store.config is not None and store.tensors is not None and store.provenance:
            self.own = StoreDeclares(store.name, store.config, store.tensors, store.provenance)
            self.schema = ShardSchema(store.config, store.tensors, (store.provenance,))
        self._options = options
        self._callbacks = callbacks
        self._loaded: Loaded | None = None

    @property
    def device_types(self) -> frozenset[str]:
        """The kinds of device that the encoder was loaded on; none if no file needed it."""
        entries = () if self._loaded is None else self._loaded.schema.provenance
        return frozenset().union(*(one.device_types for one in entries))

    def devices(self) -> Devices:
        """Load the encoder."""
        if self._loaded is None:
            note = self._callbacks.on_note if self.own.config is not None else _ignored  # advice about new stores
            with interrupts.at_once():
                if self.own.config is None:
                    _fetch_language_model(self._options.model)
                self._loaded = load_devices(self._options, self.own, Summary(), note, self._callbacks.on_load)
            if self.schema is None:
                self.schema = self._loaded.schema
        return self._loaded.devices

    def clips(self) -> Clips | ItemError:
        """Load what videos need beside it."""
        self.devices()
        assert self._loaded is not None
        assert self.schema is not None
        clips = load_clips(self._loaded, self.own, self._callbacks.on_load)
        if not isinstance(clips, ItemError):
            self.schema = replace(self.schema, config=clips.config)
        return clips


def _fetch_language_model(model: str | None) -> None:
    """Have the files of the language model here that will be asked: they mostly hold the encoder, which is then used.

    What cannot be had is said when it is needed: the encoder may be a checkpoint of its own.
    """
    with suppress(ModelError):
        open_checkpoint(model or default_model(), "language")


def _ignored(line: str) -> None:
    """Pass over a note."""


class _Contents:
    """A catalogue that knows contents, and no item by its name: every file is read, whatever the store says of it."""

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def holds(self, content: Content | None) -> bool:
        """Say whether the store has the features of all parts of this file."""
        return self._store is not None and self._store.holds(content)

    def home(self, content: Content | None) -> Row | None:
        """Give the row that holds these features."""
        return None if self._store is None else self._store.home(content)

    def home_rows(self, sha256: str | None) -> Sequence[Row]:
        """Give the rows that hold the features of this file, by part."""
        return [] if self._store is None else self._store.home_rows(sha256)

    def current(self, root: str, path: str) -> Row | None:
        """Know nothing."""

    def rows_of(self, root: str, path: str) -> Sequence[Row]:
        """Know nothing."""
        return []

    def rows_in(self, wanted: object) -> Iterable[Row]:
        """Know nothing."""
        return []

    def folder_rows(self, folder: object) -> dict[Key, tuple[Row, bool]]:
        """Know nothing."""
        return {}


# ------------------------------------------------------------------------------------------------------------ keeping


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in the scratch file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class _Held:
    """The rows of files, and those features that no store has: in memory, and beyond some bytes in a scratch file.

    The file has no name: it goes with the process, whatever ends that.
    """

    def __init__(self) -> None:
        from pathlib import Path

        self.rows: dict[Key, list[Row]] = {}
        self.folder: Path = Path(gettempdir())
        self._features: dict[Content, Features] = {}
        self._homes: dict[Content, Row] = {}
        self._places: dict[Content, dict[str, _Place]] = {}  # of features whose tensors are in the file
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append_item(self, parts: Iterable[tuple[Row, Features | None]]) -> list[Row]:
        """Keep all rows of one item, with their features; gives the rows. DiskError where they find no place."""
        rows = []
        for row, features in parts:
            rows.append(row)
            if features is not None and row.content is not None:
                self._keep(row.content, features)
                self._homes[row.content] = row
        self.rows[rows[0].key] = rows
        return rows

    def _keep(self, content: Content, features: Features) -> None:
        self._bytes += sum(tensor.raw.nbytes for tensor in features.tensors.values())
        if self._bytes > IN_MEMORY_BYTES:
            with disk_errors(self.folder, kept="", elsewhere="name another folder in TMPDIR"):
                self._places[content] = {name: self._written(one) for name, one in features.tensors.items()}
            features = replace(features, tensors={})
        self._features[content] = features

    def _written(self, tensor: StoredTensor) -> _Place:
        if self._file is None:
            self._file = TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed by `close`
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(tensor.raw.data)
        self._file.flush()
        return _Place(offset, tensor.raw.shape, tensor.dtype)

    def home(self, content: Content | None) -> Row | None:
        """Give the row that holds these features."""
        return None if content is None else self._homes.get(content)

    def features(self, content: Content) -> Features | None:
        """Give these features; None if they are not here."""
        features = self._features.get(content)
        if features is None or content not in self._places:
            return features
        return replace(features, tensors={name: self._read(one) for name, one in self._places[content].items()})

    def _read(self, place: _Place) -> StoredTensor:
        import math

        import numpy as np

        assert self._file is not None
        with disk_errors(self.folder, kept="", elsewhere="name another folder in TMPDIR"):
            self._file.seek(place.offset)
            raw = np.fromfile(self._file, np.uint8, math.prod(place.shape))
        return StoredTensor(raw.reshape(place.shape), place.dtype)

    def close(self) -> None:
        """Let go of all features."""
        self._features, self._places = {}, {}
        if self._file is not None:
            self._file.close()
            self._file = None
