"""The pipeline: scan → read and decode → prepare → batch → encode → write.

Decoders, processes of their own, read, hash and decode pictures, a bounded number ahead, while the tower computes, in
one thread a device, and while what it gave is written. Rows go to a shard as soon as they are known, those of encoded
pictures in the order of the candidates. One bad picture becomes a `failed` row; an interrupt keeps every row written so
far. The shards are read only if the index of the last run cannot say that nothing is to be done; the tower is loaded
when the first picture needs it, and not before.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, cpu_count, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit import folders, index, interrupts, rebuild, runs
from qvsplit.album import (
    Album,
    Plan,
    gone_row,
    is_known,
    next_number,
    no_longer_there,
    placed_from,
    plan,
    refuse_half_placed,
    shard_path,
    shards_in,
)
from qvsplit.checkpoint import Checkpoint, choose_checkpoint, open_checkpoint
from qvsplit.compact import damage_marks, mend
from qvsplit.decoder import PICTURE_SECONDS, Decoders, PixelBudget
from qvsplit.devices import peak_memory
from qvsplit.errors import (
    AlbumDamaged,
    DiskError,
    PictureError,
    PictureVanished,
    QvsplitError,
    RecipeError,
    ShardDamaged,
    UsageError,
    some_of,
)
from qvsplit.folders import Found, Walked, name_on_disk
from qvsplit.index import Index, Tally
from qvsplit.interrupts import held_back
from qvsplit.lock import LOCK_FILE, Lock, locked
from qvsplit.recipe import DTYPE_BYTES, KERNELS, STORED_DTYPES, Made, Recipe, installed_versions
from qvsplit.rows import leave_rows
from qvsplit.store import SHARD_BYTES, SHARD_ROWS, Row, Shard, ShardWriter, disk_errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from qvsplit.preview import Preview
    from qvsplit.vision import Patches, Vision

# A shard ends also after this time, which bounds what a killed run loses on a slow machine
SHARD_SECONDS = 300.0
# Decoded and not yet prepared: 0.4 GB of RGB. A larger picture goes alone.
PIXELS_IN_FLIGHT = 100_000_000


@dataclass(frozen=True)
class Settings:
    """What `extract` may be told. None is the album's own where there is one, else the default."""

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    store: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    workers: int | None = None
    patch_budget: int | None = None
    kernels: str | None = None  # "reference" or "fused"
    prune: bool = False
    retry_failed: bool = False
    checksum: bool = False  # read every file again, whatever its stat says
    rebuild: bool = False  # make the album anew, under another recipe if need be
    wait: bool = False  # for another run to end
    limit: int | None = None  # pictures read in this run
    max_runtime: float | None = None  # seconds after which no further picture is begun
    picture_seconds: float = PICTURE_SECONDS  # for each of a picture's steps
    dry_run: bool = False


@dataclass
class Summary:
    """What a run did. Counts are of pictures; `seconds` and `stages` wall time, workers' stages summed over workers.

    found = skipped + failed_before + to_do, and to_do = encoded + copied + moved + touched + failed + failed_again +
    vanished + left. encoded = new + edited + recovered.
    """

    found: int = 0
    skipped: int = 0  # known and unchanged
    failed_before: int = 0  # known to be bad, unchanged, not tried again
    to_do: int = 0  # pictures that had to be read (with --dry-run: would have to be)
    encoded: int = 0
    new: int = 0
    edited: int = 0
    recovered: int = 0  # neither: their embeddings had been lost, or they had failed
    copied: int = 0  # the same bytes as another picture: nothing encoded, nothing stored twice
    moved: int = 0  # from a name that is no longer there: nothing encoded
    touched: int = 0  # read, and found to be what they were
    failed: int = 0  # that had not failed before
    failed_again: int = 0
    vanished: int = 0  # deleted between being found and being read
    left: int = 0  # for another run: stopped by --limit, --max-runtime or an interrupt
    gone: int = 0  # marked by this run (--prune); a moved file's old name is not counted
    missing: int = 0  # rows whose file is no longer there, left as they are
    mended: int = 0  # damaged shards set aside
    tokens: int = 0
    bytes: int = 0  # of shards written
    shards: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    tower_bytes: int = 0  # of the tower in the compute dtype
    weights_bytes_read: int = 0
    peak_memory_bytes: int = 0
    decoder_memory_bytes: int = 0  # the most that the decoders took, summed over them
    peak_gpu_memory_bytes: int = 0  # of the device that took the most
    patch_budget: int = 0  # patches in one forward pass
    album: str = ""
    model: str = ""
    interrupted: bool = False
    stopped: str = ""  # "limit" or "max-runtime" where that left pictures for another run
    preview: Preview | None = None  # with --dry-run: what it would take

    @property
    def did_anything(self) -> bool:
        """Whether there is something to tell: a run that changed nothing, and met nothing new, did nothing."""
        done = self.encoded + self.copied + self.moved + self.gone
        return bool(done or self.failed or self.left or self.mended or self.interrupted or self.vanished)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass
class Watcher:
    """What a caller may want to hear while a run goes on. Called in the caller's thread."""

    on_plan: Callable[[int], None] = lambda to_do: None
    on_picture: Callable[[str], None] = lambda path: None
    on_failure: Callable[[str, str], None] = lambda path, reason: None
    on_note: Callable[[str], None] = lambda line: None


def extract_pictures(
    paths: Sequence[str | PathLike[str]],
    *,
    out: str | PathLike[str] = "embeds",
    settings: Settings | None = None,
    watcher: Watcher | None = None,
) -> Summary:
    """Bring the album `out` up to date with the pictures under `paths`.

    On KeyboardInterrupt the rows so far are kept and the summary, marked `interrupted`, hangs on the exception as
    `qvsplit_summary`. Raises QvsplitError where the run cannot go on; what was finished stays, and if anything was
    begun the summary hangs on it too.
    """
    settings, watcher = settings or Settings(), watcher or Watcher()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; sizes have our own limit
        folder = Path(out)
        target = os.path.realpath(folder)
        if any(target == os.path.realpath(path) for path in paths):
            raise UsageError(f"--out {fspath(out)} is itself the folder of pictures; give another, it may be inside")
        _check_settings(settings)
        extraction = _Extraction(paths, folder, settings, watcher)
        with ExitStack() as stack:
            lock = None
            if not settings.dry_run and (folder / LOCK_FILE).exists():  # before the album is read
                lock = stack.enter_context(locked(folder, wait=settings.wait, on_note=watcher.on_note))
            extraction.scan(lock)
            summary = extraction.nothing_to_do()
            if summary is not None:
                return summary
            if not settings.dry_run and lock is None:  # a new album: made now that there is something for it
                lock = stack.enter_context(locked(folder, wait=settings.wait, on_note=watcher.on_note))
            return extraction.go(lock)


class _Extraction:
    """One call of `extract_pictures`: what the album knows, what the walk saw, and what follows from the two."""

    def __init__(
        self, paths: Sequence[str | PathLike[str]], folder: Path, settings: Settings, watcher: Watcher
    ) -> None:
        self.paths = paths
        self.folder = folder
        self.settings = settings
        self.watcher = watcher
        self.started = time.perf_counter()
        self.album: Album | None = None
        self.index: Index | None = None
        self.walked = Walked([], [], [], [], 0)
        self.scanned = 0.0
        self.mended: int | None = None  # shards set aside, once that was looked into

    def scan(self, lock: Lock | None) -> None:
        """Walk, with what the last run's index knows; without it, the album is read first."""
        with disk_errors(self.folder):
            shards = shards_in(self.folder)
        whole = self.settings.checksum or self.settings.rebuild
        if shards and not whole and placed_from(self.folder) is None and not damage_marks(self.folder):
            self.index = index.read_index(self.folder, shards)
        if self.index is None:
            self.album = self._unlocked() if lock is None else self._mended(lock)
        self._walk()
        self.scanned = time.perf_counter() - self.started
        if not self.walked.pictures:
            self._refuse_nothing()

    def _refuse_nothing(self) -> None:
        """UsageError where no path holds a picture: that is more often a mistake, or a disk that is not mounted."""
        if self.index is not None:
            counts = {f"{root}/{path}": one.ok + one.failed for (root, path), one in self.index.folders.items()}
        else:
            counts = {f"{row.root}/{row.path}": 1 for row in self._rows_of().rows if row.status != "gone"}
        for start in self.walked.empty:
            number = sum(
                count for name, count in counts.items() if folders.is_within(name_on_disk(name).rstrip("/"), start)
            )
            if number:
                raise UsageError(no_longer_there(start, number))
        raise UsageError(
            f"no pictures in {', '.join(fspath(path) for path in self.paths)} (looked for "
            f"{some_of(folders.SUFFIXES, 40)}); nothing was changed"
        )

    def _walk(self) -> None:
        roots = self._roots()
        tallies = self.index.folders if self.index else {}
        again = self.settings.retry_failed
        self.walked = folders.walk(
            self.paths,
            self.watcher.on_note,
            out=os.path.realpath(self.folder),
            roots=roots,
            known={key: one.digest for key, one in tallies.items() if one.digest and not (again and one.failed)},
        )

    def _roots(self) -> frozenset[str]:
        return self.index.roots_on_disk if self.index else frozenset(map(name_on_disk, self._rows_of().roots))

    def nothing_to_do(self) -> Summary | None:
        """The summary, if the index alone shows that there is nothing to do."""
        if self.index is None:
            return None
        total = index.nothing_to_do(self.index, self.walked, prune=self.settings.prune)
        if total is None:
            return None
        self._check(self.index.recipe, self.index.made)
        if self.settings.model is not None:
            _check_model(self.settings, self.index.recipe, self.index.made)
        self.watcher.on_plan(0)
        summary = Summary(
            found=self.walked.pictures, skipped=total.ok, failed_before=total.failed, missing=total.missing
        )
        return self._told(summary)

    def go(self, lock: Lock | None) -> Summary:
        """Find out from the album what is to be done, and do it. Without a lock it is only told."""
        if lock is not None and self.mended is None:
            walked_with = self._roots()
            self.album = self._mended(lock)
            if self._is_outdated() or (self.index is None and self._roots() != walked_with):
                self.index = None
                self._walk()
        album = self.album or self._unlocked()
        recipe, made = album.recipe, album.made
        if recipe is not None and made is not None:
            self._check(recipe, made)
        known = plan(
            album,
            self.walked,
            self.index.folders if self.index else {},
            retry_failed=self.settings.retry_failed,
            checksum=self.settings.checksum,
            on_note=self.watcher.on_note,
        )
        if self.settings.rebuild and lock is not None:
            return self._rebuild(album, known, lock)
        if lock is None or not known.candidates:  # else the loaded tower itself is held against the recipe
            _check_model(self.settings, recipe, made)
        summary = Summary(
            found=known.pictures, skipped=known.unchanged, failed_before=known.failed_before,
            to_do=len(known.candidates), missing=len(known.gone), mended=self.mended or 0,
        )  # fmt: skip
        if lock is None:
            from qvsplit.preview import preview

            summary.preview = preview(known.candidates, album, self.folder, self.settings)
            return self._told(summary)
        self.watcher.on_plan(len(known.candidates))
        return self._run(_Run(album, known, self.folder, self.settings, self.watcher, summary, lock))

    def _run(self, run: _Run, *, in_place: bool = True) -> Summary:
        run.summary.stages["scan"] = self.scanned
        began = time.time()
        try:
            run.go()
        except KeyboardInterrupt as interrupt:
            run.summary.interrupted = True
            told = interrupt.qvsplit_summary = self._told(run.summary)  # type: ignore[attr-defined]
            runs.note(self.folder, began, told.to_json())
            raise
        except QvsplitError as error:
            told = error.qvsplit_summary = self._told(run.summary)  # type: ignore[attr-defined]
            runs.note(self.folder, began, told.to_json() | {"error": type(error).__name__})
            raise
        if in_place:
            self._leave_index(run)
        summary = self._told(run.summary)
        if summary.did_anything:
            runs.note(self.folder, began, summary.to_json())
        return summary

    def _rebuild(self, old: Album, found: Plan, lock: Lock) -> Summary:
        """The album anew, beside the old one, which it replaces once it is whole."""
        if old.recipe is None or old.made is None:
            raise UsageError(f"{self.folder} has no shards yet: there is nothing to rebuild; leave --rebuild out")
        outside = rebuild.left_out(old, self.walked.starts)
        if outside:
            raise UsageError(
                f"{self.folder} also holds pictures in {some_of(outside)}, which --rebuild would lose; give that path "
                "too, or take them out with `qvsplit forget`"
            )
        self._refuse_loss(old, found)
        settings = _like(old.recipe, old.made, self.settings)
        lock.announce()
        album = self._staged(settings)
        staging = rebuild.stage(self.folder)
        known = plan(album, self.walked, {}, retry_failed=settings.retry_failed, checksum=settings.checksum)
        summary = Summary(
            found=known.pictures,
            skipped=known.unchanged,
            failed_before=known.failed_before,
            to_do=len(known.candidates),
        )
        self.watcher.on_plan(len(known.candidates))
        run = _Run(album, known, staging, settings, self.watcher, summary, lock, first=next_number(self.folder))
        told = self._run(run, in_place=False)
        if not shards_in(staging):
            raise UsageError("no picture was left to rebuild from; the album is as it was")
        if not told.left:
            with held_back():
                rebuild.put_in_place(self.folder)
            self._leave_index(run)
        return told

    def _refuse_loss(self, old: Album, found: Plan) -> None:
        """UsageError where a rebuild would drop a picture of which nobody has said that it may go."""
        seen = {(one.root, one.path) for listing in self.walked.listings for one in listing.found()}
        seen |= {(one.root, one.path) for one in found.candidates}
        if self.settings.prune:
            seen |= {row.key for row in found.gone if row.key not in found.doubtful}
        lost = [row.path for row in old if row.key not in seen]
        if lost:
            raise UsageError(
                f"{len(lost):,} pictures of the album cannot be seen now ({some_of(lost, 3)}), and --rebuild would "
                "drop them; mount what is not mounted, or give --prune to drop what was deleted"
            )

    def _staged(self, settings: Settings) -> Album:
        """What an unfinished rebuild has already, if it was under these settings; else that is given up."""
        staging = rebuild.stage(self.folder)
        try:
            album = Album([Shard(path) for path in shards_in(staging)])
            _check_settings(settings, album.recipe, self.folder)
            _check_model(replace(settings, rebuild=False), album.recipe, album.made)
        except (AlbumDamaged, RecipeError) as error:
            self.watcher.on_note(f"the unfinished rebuild is given up, and begun anew: {error}")
            rebuild.discard(self.folder)
            return Album([])
        return album

    # ------------------------------------------------------------------------------------------- album and index

    def _rows_of(self) -> Album:
        assert self.album is not None  # read by `scan`, as there was no index
        return self.album

    def _unlocked(self) -> Album:
        """The album as anybody may read it. What is damaged is left out: whoever holds the lock sets it aside."""
        if self.settings.dry_run:
            refuse_half_placed(self.folder)
        with disk_errors(self.folder):
            paths = shards_in(self.folder)
        shards = []
        for path in paths:
            try:
                shards.append(Shard(path))
            except ShardDamaged:
                if self.settings.dry_run:
                    raise
        return Album(shards)

    def _mended(self, lock: Lock) -> Album:
        """The album as it is on disk now that it is locked, what is damaged in it set aside."""
        rebuild.finish(self.folder)
        album, self.mended = mend(self.folder, lock, self.watcher.on_note, model_named=self.settings.model is not None)
        return album

    def _is_outdated(self) -> bool:
        """Whether there was an index, of shards that looked sound from their ends and turned out not to be."""
        return bool(self.mended) and self.index is not None

    def _check(self, recipe: Recipe, made: Made) -> None:
        if not self.settings.rebuild:
            _check_settings(self.settings, recipe, self.folder)

    def _leave_index(self, run: _Run) -> None:
        """What the next run needs to know to have nothing to do, if anything in it has changed."""
        before = self.index.folders if self.index else {}
        recipe, made = run.recipe, run.made or run.album.made
        if recipe is None or made is None:
            return
        tallies = run.tallies(self.walked, before)
        if self.index is not None and tallies == before and not run.summary.shards:
            return
        with disk_errors(self.folder):
            shards = shards_in(self.folder)
        roots = run.album.roots | {root for root, _ in run.written}
        index.write_index(self.folder, shards, Index(recipe, made, tallies, roots))
        leave_rows(self.folder, shards)

    def _told(self, summary: Summary) -> Summary:
        summary.album = str(self.folder)
        summary.stages.setdefault("scan", self.scanned)
        summary.stages = {name: round(seconds, 3) for name, seconds in summary.stages.items()}
        summary.seconds = round(time.perf_counter() - self.started, 3)
        summary.peak_memory_bytes = peak_memory()
        return summary


def _check_settings(settings: Settings, recipe: Recipe | None = None, folder: Path | None = None) -> None:
    """Refuse, before anything is loaded, what no album or not this album can be made with."""
    for option, name, known in (
        ("--dtype", settings.dtype, tuple(DTYPE_BYTES)),
        ("--store", settings.store, STORED_DTYPES),
        ("--kernels", settings.kernels, KERNELS),
    ):
        if name is not None and name not in known:
            raise UsageError(f"{option} {name}: choose one of {', '.join(known)}")
    least = {"--workers": settings.workers, "--patch-budget": settings.patch_budget, "--limit": settings.limit}
    for option, number in least.items():
        if number is not None and number < 1:
            raise UsageError(f"{option} must be at least 1")
    if settings.checksum and (settings.limit is not None or settings.max_runtime is not None):
        raise UsageError("--checksum reads everything again: --limit or --max-runtime would end it at the same place")
    if recipe is None:
        return
    asked = {
        "--dtype": (settings.dtype, recipe.compute_dtype),
        "--store": (settings.store, recipe.stored_dtype),
        "--kernels": (settings.kernels, recipe.kernels),
        "--min-pixels": (settings.min_pixels, recipe.processor.get("min_pixels")),
        "--max-pixels": (settings.max_pixels, recipe.processor.get("max_pixels")),
    }
    wrong = [f"{option} {told} instead of {own}" for option, (told, own) in asked.items() if told not in {None, own}]
    if wrong:
        raise RecipeError(
            f"{folder} was made under another recipe ({some_of(wrong)}); leave that out, choose a new --out, or make "
            "the album anew with --rebuild"
        )


def _like(recipe: Recipe, made: Made, settings: Settings) -> Settings:
    """`settings`, and where they leave it open what the album was made with."""
    model = made.model if made.revision is None else f"{made.model}@{made.revision}"
    store = None if recipe.stored_dtype == recipe.compute_dtype else recipe.stored_dtype
    return replace(
        settings,
        model=settings.model or model,
        dtype=settings.dtype or recipe.compute_dtype,
        store=settings.store or store,
        kernels=settings.kernels or recipe.kernels,
        min_pixels=settings.min_pixels or recipe.processor["min_pixels"],
        max_pixels=settings.max_pixels or recipe.processor["max_pixels"],
    )


def _check_model(settings: Settings, recipe: Recipe | None, made: Made | None) -> None:
    """RecipeError where another model is asked for than the album's, without loading any."""
    if settings.model is None or settings.rebuild or recipe is None or made is None:
        return
    name, _, revision = settings.model.partition("@")
    if made.model in {name, os.path.realpath(settings.model)} and revision in {"", made.revision}:
        return  # nothing is to be encoded, so that not even the hub need be asked for news of it
    checkpoint = open_checkpoint(settings.model, "vision")
    if (checkpoint.name, checkpoint.revision) == (made.model, made.revision):
        return
    from qvsplit.weights import fingerprint

    if fingerprint(checkpoint) != recipe.tower:
        raise RecipeError(
            f"the album was made by another tower than that of {checkpoint.name}; leave --model out, choose a new "
            "--out, or make the album anew with --rebuild"
        )


@dataclass
class _Taken:
    """One candidate on its way: read, and as far as a worker could bring it."""

    found: Found
    sha256: bytes | None = None
    size: int = -1
    mtime_ns: int | None = None
    pixels: int = 0  # that it has of the budget
    vanished: bool = False
    image: npt.NDArray[np.uint8] | None = None  # [height, width, 3]
    patches: Patches | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Batch:
    """Pictures that go through the tower together."""

    pictures: list[_Taken]
    seconds: dict[str, float] = field(default_factory=dict)
    results: list[npt.NDArray[np.uint8] | PictureError] = field(default_factory=list)


class _Lane:
    """One device's thread: batches go through its tower one after the other, and come out as bytes to be stored."""

    def __init__(self, vision: Vision, stored_dtype: str) -> None:
        self.vision = vision
        self.stored_dtype = stored_dtype
        self.waiting = 0  # batches not yet collected
        self._pool = ThreadPoolExecutor(1, "qvsplit-tower")
        self._ended = 0.0

    def submit(self, batch: _Batch) -> Future[_Batch]:
        self.waiting += 1
        return self._pool.submit(self._encode, batch)

    def _encode(self, batch: _Batch) -> _Batch:
        began = time.perf_counter()
        if self._ended:
            batch.seconds["tower idle"] = began - self._ended
        with _Clock(batch.seconds, "forward"):
            results = self.vision.encode([one.patches for one in batch.pictures if one.patches is not None])
        with _Clock(batch.seconds, "copy"):
            batch.results = [
                one if isinstance(one, PictureError) else _as_stored(one, self.stored_dtype) for one in results
            ]
        self._ended = time.perf_counter()
        return batch

    def close(self) -> None:
        """End soon: what is still in the tower is given up."""
        self.vision.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _as_stored(embeds: torch.Tensor, dtype: str) -> npt.NDArray[np.uint8] | PictureError:
    """[n_tokens, hidden_size] as bytes of the stored dtype; PictureError if a value does not fit into it."""
    import torch

    if dtype == "int8":
        return _as_int8(embeds.float())
    stored = embeds.to(getattr(torch, dtype))
    if stored.dtype != embeds.dtype and not bool(torch.isfinite(stored).all()):
        return PictureError(f"has values beyond the range of {dtype}")
    raw: npt.NDArray[np.uint8] = stored.contiguous().cpu().view(torch.uint8).numpy()
    return raw


def _as_int8(embeds: torch.Tensor) -> npt.NDArray[np.uint8]:
    """float32 [n_tokens, hidden_size] to bytes [n_tokens, hidden_size + 4]: each token over its own scale."""
    import torch

    scales = embeds.abs().amax(1, keepdim=True) / 127  # [n_tokens, 1]
    whole = (embeds / scales.where(scales > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    raw: npt.NDArray[np.uint8] = torch.cat([whole.view(torch.uint8), scales.view(torch.uint8)], 1).cpu().numpy()
    return raw


class _Run:
    """One run over the candidates of a plan. What is no lane's and no decoder's happens in the caller's thread."""

    def __init__(
        self,
        album: Album,
        known: Plan,
        folder: Path,
        settings: Settings,
        watcher: Watcher,
        summary: Summary,
        lock: Lock,
        first: int = 1,
    ) -> None:
        self.album = album
        self.plan = known
        self.folder = folder
        self.settings = settings
        self.watcher = watcher
        self.summary = summary
        self.lock = lock
        self.first = first  # the lowest number that a shard of this run may have
        self.vision: Vision | None = None  # the first device's
        self.patch_budget = 0  # known once there is a tower
        self.recipe = album.recipe
        self.hidden_size = album.hidden_size
        self.made: Made | None = None
        self.writer: ShardWriter | None = None
        self.shard_began = 0.0
        self.deadline = time.monotonic() + settings.max_runtime if settings.max_runtime is not None else None
        self.written: dict[tuple[str, str], Row] = {}
        self.new_homes: dict[bytes, Row] = {}  # content encoded by this run
        self.pending: list[_Taken] = []  # the batch being filled
        self.lanes: list[_Lane] = []  # one a device
        self.flying: deque[tuple[_Lane, Future[_Batch]]] = deque()  # batches in the lanes, in order
        # the same bytes, under other names, as a picture that is pending or flying
        self.copies: dict[bytes, list[_Taken]] = {}
        self.lost: dict[bytes | None, list[Row]] = {}  # rows whose file is no longer there: where moves come from
        for row in known.gone:
            if row.status == "ok":
                self.lost.setdefault(row.sha256, []).append(row)
        self.moved: set[tuple[str, str]] = set()
        self.decoders = Decoders(settings.picture_seconds)
        self.budget = PixelBudget(PIXELS_IN_FLIGHT)

    def go(self) -> None:
        self.summary.left = self.summary.to_do
        try:
            self._pictures()
            if not self.summary.stopped:
                self._prune()
        except DiskError:
            if self.writer is not None:  # its rows are redone by the next run
                self.writer.abandon()
                self.writer = None
            raise
        except KeyboardInterrupt:
            with held_back():
                self._collect_finished()
            raise
        finally:
            with held_back():
                for lane in self.lanes:
                    lane.close()
                self._end_shard()
            self._note_gpu_memory()

    # ------------------------------------------------------------------------------------------ the candidates

    def _pictures(self) -> None:
        with closing(self._taken()) as all_taken:
            for taken in all_taken:
                interrupts.check()
                self._file(taken)
                self._collect_finished()
        self._encode()
        while self.flying:
            self._collect()

    def _file(self, taken: _Taken) -> None:
        self._add_seconds(taken.seconds)
        if taken.vanished:
            self.summary.vanished += 1
            self._done(taken.found.path)
        elif taken.error is not None:
            self._fail(taken, taken.error)
        elif self._is_same(taken):
            self._refresh(taken)
        elif taken.sha256 in self.copies:
            self.copies[taken.sha256].append(taken)
        elif (home := self._home(taken)) is not None:
            self._copy(taken, home)
        else:
            self._queue(taken)
        self._release(taken)

    def _done(self, path: str) -> None:
        """One picture more is dealt with."""
        self.summary.left -= 1
        self.watcher.on_picture(path)

    def _taken(self) -> Generator[_Taken, None, None]:
        """The candidates in order, read and decoded by workers, a bounded number ahead.

        Until there is a tower they wait as decoded pictures, which are larger than patches: then fewer wait.
        """
        workers = self.settings.workers or min(8, cpu_count() or 1)
        window: deque[tuple[int, Future[_Taken]]] = deque()
        pool = ThreadPoolExecutor(workers, "qvsplit-decode")
        remaining = enumerate(self.plan.candidates)
        try:
            while True:
                ahead = workers if self.vision is None else 2 * workers
                while len(window) < ahead and (following := self._next(remaining)) is not None:
                    number, found = following
                    window.append((number, pool.submit(self._take, number, found)))
                if not window:
                    return
                number, future = window.popleft()
                self.budget.serve(number)
                with self._clocked("wait for pictures"):
                    taken = future.result()
                yield taken
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.budget.close()
            self.decoders.close()
            self.summary.decoder_memory_bytes = self.decoders.peak_memory()

    def _next(self, remaining: enumerate[Found]) -> tuple[int, Found] | None:
        """The next candidate; None when there is no other, or none is to be begun any more."""
        number, found = next(remaining, (0, None))
        if found is None:
            return None
        if self.deadline is not None and time.monotonic() > self.deadline:
            self._stop("max-runtime")
            return None
        if self.settings.limit is not None and number >= self.settings.limit:
            self._stop("limit")
            return None
        return number, found

    def _stop(self, why: str) -> None:
        self.summary.stopped = self.summary.stopped or why

    def _take(self, number: int, found: Found) -> _Taken:
        """In a worker: read and hash; where the content is not known yet, decode; once there is a tower, prepare."""
        taken = _Taken(found, size=max(found.size, 0))  # without mtime until it was read: else tried again

        def on_file(sha256: bytes, size: int, mtime_ns: int | None) -> bool:
            taken.sha256, taken.size, taken.mtime_ns = sha256, size, mtime_ns
            return self._home(taken) is None

        def may(pixels: int) -> None:
            self._release(taken)  # what a decoder had that died of it
            self.budget.take(number, pixels)
            taken.pixels = pixels

        try:
            with _Clock(taken.seconds, "read and decode"):
                taken.image = self.decoders.mine().look(found, on_file, may)
            if taken.image is not None:
                taken.height, taken.width, _ = taken.image.shape
                if self.vision is not None:
                    self._prepare(taken, self.vision)
        except PictureVanished:
            taken.vanished = True
        except PictureError as error:
            taken.error = str(error)
        finally:
            if taken.image is None:
                self._release(taken)
        return taken

    def _release(self, taken: _Taken) -> None:
        """Its pixels, if it still has any, are no longer needed."""
        taken.image = None
        self.budget.give_back(taken.pixels)
        taken.pixels = 0

    def _prepare(self, taken: _Taken, vision: Vision) -> None:
        assert taken.image is not None
        with _Clock(taken.seconds, "preprocess"):
            taken.patches = vision.prepare(taken.image)
        self._release(taken)

    def _home(self, taken: _Taken) -> Row | None:
        assert taken.sha256 is not None
        return self.new_homes.get(taken.sha256) or self.album.home(taken.sha256)

    def _is_same(self, taken: _Taken) -> bool:
        current = self.album.current(taken.found.root, taken.found.path)
        return (
            current is not None
            and current.status == "ok"
            and current.sha256 == taken.sha256
            and self._home(taken) is not None
        )

    # ------------------------------------------------------------------------------------------------- encoding

    def _queue(self, taken: _Taken) -> None:
        vision = self._loaded()
        if taken.patches is None:  # decoded before there was a tower
            try:
                self._prepare(taken, vision)
            except PictureError as error:
                self._fail(taken, str(error))
                return
        assert taken.patches is not None
        assert taken.sha256 is not None
        if self.pending and self._pending_patches() + taken.patches.count > self.patch_budget:
            self._encode()
        self.pending.append(taken)
        self.copies[taken.sha256] = []
        if self._pending_patches() >= self.patch_budget:
            self._encode()

    def _pending_patches(self) -> int:
        return sum(taken.patches.count for taken in self.pending if taken.patches is not None)

    def _encode(self) -> None:
        """Hand the batch to the lane with the least to do. One in the tower and one behind it are enough."""
        if not self.pending:
            return
        batch, self.pending = _Batch(self.pending), []
        while all(lane.waiting > 1 for lane in self.lanes):
            self._collect()
        lane = min(self.lanes, key=lambda one: one.waiting)
        self.flying.append((lane, lane.submit(batch)))

    def _collect_finished(self) -> None:
        """Write the rows of what has come out of the lanes; what failed there is for `_collect` to raise."""
        while self.flying and self.flying[0][1].done() and self.flying[0][1].exception() is None:
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest batch in the lanes, and write its rows."""
        lane, future = self.flying[0]
        with self._clocked("wait for the tower"):
            batch = future.result()
        self.flying.popleft()
        lane.waiting -= 1
        self._add_seconds(batch.seconds)
        for taken, result in zip(batch.pictures, batch.results, strict=True):
            assert taken.sha256 is not None
            copies = self.copies.pop(taken.sha256)
            if isinstance(result, PictureError):
                for one in (taken, *copies):
                    self._fail(one, str(result))
            else:
                self._embed(taken, result, copies)

    def _add_seconds(self, seconds: Mapping[str, float]) -> None:
        for stage, more in seconds.items():
            self.summary.stages[stage] = self.summary.stages.get(stage, 0.0) + more

    def _embed(self, taken: _Taken, raw: npt.NDArray[np.uint8], copies: list[_Taken]) -> None:
        assert taken.patches is not None
        assert taken.sha256 is not None
        row = self._row(taken, taken.patches.grid_thw, len(raw))
        with held_back():  # the row and its count are one
            self._write(row, raw)
            self.new_homes[taken.sha256] = row
            self.summary.encoded += 1
            self.summary.tokens += len(raw)
            before = self.album.current(*row.key)
            if before is None or before.status == "gone":
                self.summary.new += 1
            elif before.sha256 != row.sha256 and before.status == "ok":
                self.summary.edited += 1
            else:
                self.summary.recovered += 1
        self._done(row.path)
        for copy in copies:
            self._copy(copy, row)

    def _loaded(self) -> Vision:
        """The tower, loaded on first use and held against the album's recipe before anything is encoded."""
        if self.vision is None:
            with held_back():
                self._end_shard()  # then nothing is at stake while libraries and weights are loaded
            with self._clocked("load"), interrupts.at_once():
                self.vision = self._load()
            weights = self.vision.weights
            self.summary.patch_budget = self.patch_budget
            self.summary.tower_bytes, self.summary.weights_bytes_read = weights.tower_bytes, weights.bytes_read
        return self.vision

    def _load(self) -> Vision:
        from qvsplit import devices, hf
        from qvsplit import vision as half
        from qvsplit.weights import stored_dtype

        own, told = self.album.recipe, self.settings
        checkpoint = self._checkpoint()
        with self._clocked("load libraries"):
            places = devices.choose_devices(told.device)  # imports torch
            hf.import_libraries(checkpoint)
        device = places[0]
        dtype = devices.choose_dtype(
            told.dtype or (own.compute_dtype if own else None), device, stored_dtype(checkpoint, "vision")
        )
        limits = own.processor if own else {}
        loaded = {
            place: half.load(
                checkpoint,
                device=place,
                dtype=dtype,
                min_pixels=limits.get("min_pixels") if told.min_pixels is None else told.min_pixels,
                max_pixels=limits.get("max_pixels") if told.max_pixels is None else told.max_pixels,
                kernels=told.kernels or (own.kernels if own else "fused"),
            )
            for place in dict.fromkeys(places)
        }
        devices.keep_freed_activations()
        vision = loaded[device]
        for one in loaded.values():
            self._add_seconds(one.load_seconds)
        recipe = vision.recipe(told.store or (own.stored_dtype if own else devices.dtype_name(dtype)))
        if own is not None and (differences := own.differences(recipe)):
            raise RecipeError(
                f"{self.folder} was made under another recipe ({some_of(differences)}); "
                "use the checkpoint it was made with, choose a new --out, or make the album anew with --rebuild"
            )
        self.recipe, self.hidden_size = recipe, vision.hidden_size
        self.made = Made(checkpoint.name, checkpoint.revision, ", ".join(map(str, loaded)), installed_versions())
        self.lanes = [_Lane(loaded[place], recipe.stored_dtype) for place in places]
        self.patch_budget = told.patch_budget or min(
            half.patch_budget(one, devices.free_memory(place)) // places.count(place) or 1
            for place, one in loaded.items()
        )
        self._note_other_versions()
        if own is None and told.dtype is None and half.would_be_faster_in_bfloat16(vision, checkpoint):
            self.watcher.on_note(
                "this CPU multiplies bfloat16 in hardware: with --dtype bfloat16, the checkpoint's own, a new album is "
                "made faster and is half as large, and its embeddings differ by that dtype's rounding"
            )
        return vision

    def _checkpoint(self) -> Checkpoint:
        own, revision = (self.album.made.model, self.album.made.revision) if self.album.made else ("", None)
        checkpoint = choose_checkpoint(self.settings.model, "vision", own=own, revision=revision)
        self.summary.model = checkpoint.name
        return checkpoint

    def _note_other_versions(self) -> None:
        before = self.album.made.versions if self.album.made else {}
        now = self.made.versions if self.made else {}
        changed = [f"{name} {before[name]} → {now[name]}" for name in before if before[name] != now.get(name, "")]
        changed = [line for line in changed if not line.startswith(("qvsplit ", "python "))]
        if changed:
            self.watcher.on_note(
                f"the album's rows were made with other library versions ({', '.join(changed)}); "
                "`qvsplit verify --sample 3` shows whether they still agree"
            )

    # ------------------------------------------------------------------------------------------------- the rows

    def _copy(self, taken: _Taken, home: Row) -> None:
        """The same bytes under another name: a row that points, by its hash, to the embeddings there are."""
        assert home.grid_thw is not None
        row = replace(
            self._row(taken, home.grid_thw, 0),
            n_tokens=home.n_tokens, has_embeds=False, width=home.width, height=home.height,
        )  # fmt: skip
        old = next(iter(self.lost.get(taken.sha256, ())), None)
        with held_back():
            if old is not None:
                # the old name first: should the run die in between, the next one still finds the file new
                self.lost[taken.sha256].remove(old)
                self._write(gone_row(old), None)
                self.moved.add(old.key)
            self._write(row, None)
            self.summary.moved += old is not None
            self.summary.missing -= old is not None
            self.summary.copied += old is None
        self._done(row.path)

    def _refresh(self, taken: _Taken) -> None:
        """Touched but unchanged: remember the new stat, so that the file need not be read again."""
        current = self.album.current(taken.found.root, taken.found.path)
        assert current is not None
        if taken.mtime_ns is not None and (current.size, current.mtime_ns) != (taken.size, taken.mtime_ns):
            self._write(replace(current, size=taken.size, mtime_ns=taken.mtime_ns, has_embeds=False), None)
        self.summary.touched += 1
        self._done(current.path)

    def _fail(self, taken: _Taken, reason: str) -> None:
        before = self.album.current(taken.found.root, taken.found.path)
        if before is not None and before.status == "failed" and before.sha256 == taken.sha256:
            self.summary.failed_again += 1
        else:
            self.summary.failed += 1
            self.watcher.on_failure(taken.found.path, reason)
        row = replace(self._row(taken, None, 0), status="failed", error=reason, n_tokens=None, has_embeds=False)
        if row != before:
            self._write(row, None)
        self._done(row.path)

    def _prune(self) -> None:
        """Mark rows gone whose file is no longer there, where asked to."""
        if not self.settings.prune:
            return
        doubtful = {key: folder for key, folder in self.plan.doubtful.items() if key not in self.moved}
        for folder in sorted(set(doubtful.values())):
            number = sum(one == folder for one in doubtful.values())
            self.watcher.on_note(
                f"{folder} is empty: the {number:,} pictures that were below it are not pruned, in case a disk is not "
                "mounted there; remove the folder, or take them out with `qvsplit forget`"
            )
        for row in self.plan.gone:
            if row.key not in self.moved and row.key not in doubtful:
                self._write(gone_row(row), None)
                self.summary.gone += 1
                self.summary.missing -= 1

    def _row(self, taken: _Taken, grid: tuple[int, int, int] | None, n_tokens: int) -> Row:
        return Row(
            root=taken.found.root, path=taken.found.path, sha256=taken.sha256, size=taken.size,
            mtime_ns=taken.mtime_ns, kind="image", width=taken.width, height=taken.height, status="ok", error=None,
            grid_thw=grid, n_tokens=n_tokens, has_embeds=True,
        )  # fmt: skip

    def _write(self, row: Row, raw: npt.NDArray[np.uint8] | None) -> None:
        if self.recipe is None or self.hidden_size is None:
            self._loaded()  # a first row without embeddings, too, must say under which recipe it was made
        with self._clocked("store"), held_back():
            if self.writer is None:
                self.writer = self._new_writer()
                self.shard_began = time.monotonic()
            self.writer.add(row, raw)
            self.written[row.key] = row
            full = self.writer.bytes >= SHARD_BYTES or self.writer.rows >= SHARD_ROWS
            if full or time.monotonic() - self.shard_began > SHARD_SECONDS:
                self._end_shard()

    def _new_writer(self) -> ShardWriter:
        assert self.recipe is not None
        assert self.hidden_size is not None
        made = self.made or self.album.made
        assert made is not None
        self.lock.announce()
        with disk_errors(self.folder):
            path = shard_path(self.folder, max(self.first, next_number(self.folder)))
        return ShardWriter(path, recipe=self.recipe, made=made, hidden_size=self.hidden_size)

    def _end_shard(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            self.summary.bytes += writer.finish()
            self.summary.shards += 1

    def tallies(self, walked: Walked, before: Mapping[tuple[str, str], Tally]) -> Mapping[tuple[str, str], Tally]:
        """For the index: the folders, of this walk and of others before it, in which nothing is left to do."""
        missing: dict[tuple[str, str], int] = {}
        for row in self.plan.gone:
            if row.key not in self.written or self.written[row.key].status != "gone":
                missing[row.folder] = missing.get(row.folder, 0) + 1
        touched = {row.folder for row in self.written.values()}
        tallies = {
            (root, path): tally
            for (root, path), tally in before.items()
            if (root, path) not in touched and not walked.covers(root, path)
        }  # of other paths than this run's
        for key in walked.known:
            tallies[key] = replace(before[key], missing=missing.pop(key, 0))
        for listing in walked.listings:
            if (tally := self._tally(listing, missing)) is not None:
                tallies[listing.root, listing.path] = tally
            missing.pop((listing.root, listing.path), None)
        tallies |= {key: Tally("", 0, 0, number) for key, number in missing.items()}
        return tallies | dict.fromkeys(self.plan.unlisted, Tally("unlisted", 0, 0, 0))  # which no listing's digest is

    def _tally(self, listing: folders.Listing, missing: Mapping[tuple[str, str], int]) -> Tally | None:
        """None where something is left to do in that folder, or only some of its files were looked at."""
        if not listing.whole:
            return None
        count = {"ok": 0, "failed": 0}
        for one in listing.found():
            key = one.root, one.path
            row = self.written.get(key) or self.album.current(*key)
            if row is None or not (
                is_known(self.album, row, one)
                or (row.sha256 in self.new_homes and (row.size, row.mtime_ns) == (one.size, one.mtime_ns))
            ):
                return None
            count[row.status] += 1
        if not listing.lines and not missing.get((listing.root, listing.path)):
            return None
        return Tally(listing.digest, count["ok"], count["failed"], missing.get((listing.root, listing.path), 0))

    # --------------------------------------------------------------------------------------------------- clocks

    def _clocked(self, stage: str) -> _Clock:
        return _Clock(self.summary.stages, stage)

    def _note_gpu_memory(self) -> None:
        on_gpus = [lane.vision.device for lane in self.lanes if lane.vision.device.type == "cuda"]
        if on_gpus:
            import torch

            self.summary.peak_gpu_memory_bytes = max(torch.cuda.max_memory_allocated(device) for device in on_gpus)


class _Clock:
    """Adds the block's wall time to `seconds[stage]`."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds = seconds
        self.stage = stage

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.began
