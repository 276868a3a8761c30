"""The pipeline: scan → read and decode → prepare → batch → encode → write.

Workers read, hash, decode and prepare pictures, a bounded number ahead, while the tower computes. Rows go to a
shard as soon as they are known. One bad picture becomes a `failed` row; an interrupt keeps every row written so
far. The tower is loaded when the first picture needs it, and not before.
"""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, cpu_count, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit import images, interrupts
from qvsplit.album import Album, Plan, gone_row, locked, next_shard, plan, shards_in
from qvsplit.checkpoint import Checkpoint, choose_checkpoint, open_checkpoint
from qvsplit.errors import DiskError, PictureError, RecipeError, UsageError, some_of
from qvsplit.images import Found
from qvsplit.interrupts import held_back
from qvsplit.recipe import DTYPE_BYTES, Made, Recipe, installed_versions
from qvsplit.store import Row, Shard, ShardWriter, disk_errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL import Image

    from qvsplit.vision import Patches, Vision

# A shard ends at the first of these. The time bounds what a killed run loses on a slow machine.
SHARD_BYTES = 256 << 20
SHARD_ROWS = 10_000
SHARD_SECONDS = 300.0


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
    prune: bool = False
    retry_failed: bool = False
    dry_run: bool = False


@dataclass
class Summary:
    """What a run did. Counts are of pictures; `seconds` and `stages` wall time, workers' stages summed over workers."""

    found: int = 0
    encoded: int = 0
    copied: int = 0  # the same bytes as another picture: nothing encoded, nothing stored twice
    moved: int = 0
    skipped: int = 0  # known and unchanged
    failed: int = 0  # that had not failed before
    failed_again: int = 0
    gone: int = 0  # marked by this run (--prune); a moved file's old name is not counted
    missing: int = 0  # rows whose file is no longer there, left as they are
    to_do: int = 0  # pictures that had to be read (with --dry-run: would have to be)
    tokens: int = 0
    bytes: int = 0  # of shards written
    shards: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    tower_bytes: int = 0  # of the tower in the compute dtype
    weights_bytes_read: int = 0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0
    album: str = ""
    model: str = ""
    interrupted: bool = False

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
    `qvsplit_summary`. Raises QvsplitError where the run cannot go on; what was finished stays.
    """
    settings, watcher = settings or Settings(), watcher or Watcher()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; sizes have our own limit
        folder = Path(out)
        target = os.path.realpath(folder)
        roots = frozenset(map(images.stored_name, images.roots_of(paths)))
        if any(target == os.path.realpath(path) for path in paths):
            raise UsageError(f"--out {fspath(out)} is itself the folder of pictures; give another, it may be inside")
        found = list(images.walk(paths, watcher.on_note, out=target))
        scanned = time.perf_counter() - started
        if not found:
            raise UsageError(
                f"no pictures in {', '.join(fspath(p) for p in paths)} (looked for {some_of(images.SUFFIXES, 40)}); "
                "nothing was changed"
            )
        if settings.dry_run:
            return _finish(Summary(), _plan(_open(folder), found, roots, settings, watcher), folder, started, scanned)
        with locked(folder):
            album = _open(folder)
            made = _plan(album, found, roots, settings, watcher)
            run = _Run(album, made, folder, settings, watcher)
            run.summary.stages["scan"] = scanned
            try:
                run.go()
            except KeyboardInterrupt as interrupt:
                run.summary.interrupted = True
                interrupt.qvsplit_summary = _finish(run.summary, made, folder, started, scanned)  # type: ignore[attr-defined]
                raise
            return _finish(run.summary, made, folder, started, scanned)


def _open(folder: Path) -> Album:
    with disk_errors(folder):
        paths = shards_in(folder)
    return Album([Shard(path) for path in paths])


def _plan(album: Album, found: Sequence[Found], roots: frozenset[str], settings: Settings, watcher: Watcher) -> Plan:
    _check_settings(settings, album.recipe)
    made = plan(album, found, roots, retry_failed=settings.retry_failed, on_note=watcher.on_note)
    if settings.dry_run or not made.candidates:  # else the loaded tower itself is held against the recipe
        _check_model(settings, album)
    watcher.on_plan(len(made.candidates))
    return made


def _check_settings(settings: Settings, recipe: Recipe | None) -> None:
    """Refuse, before anything is loaded, what no album or not this album can be made with."""
    for option, name in (("--dtype", settings.dtype), ("--store", settings.store)):
        if name is not None and name not in DTYPE_BYTES:
            raise UsageError(f"{option} {name}: choose one of {', '.join(DTYPE_BYTES)}")
    for option, number in (("--workers", settings.workers), ("--patch-budget", settings.patch_budget)):
        if number is not None and number < 1:
            raise UsageError(f"{option} must be at least 1")
    if recipe is None:
        return
    asked = {
        "--dtype": (settings.dtype, recipe.compute_dtype),
        "--store": (settings.store, recipe.stored_dtype),
        "--min-pixels": (settings.min_pixels, recipe.processor.get("min_pixels")),
        "--max-pixels": (settings.max_pixels, recipe.processor.get("max_pixels")),
    }
    wrong = [f"{option} {told} instead of {own}" for option, (told, own) in asked.items() if told not in {None, own}]
    if wrong:
        raise RecipeError(
            f"the album was made under another recipe ({some_of(wrong)}); leave that out, or choose a new --out"
        )


def _check_model(settings: Settings, album: Album) -> None:
    """RecipeError where another model is asked for than the album's, without loading any."""
    recipe, made = album.recipe, album.made
    if settings.model is None or recipe is None or made is None:
        return
    checkpoint = open_checkpoint(settings.model, "vision")
    if (checkpoint.name, checkpoint.revision) == (made.model, made.revision):
        return
    from qvsplit.weights import fingerprint

    if fingerprint(checkpoint) != recipe.tower:
        raise RecipeError(
            f"the album was made by another tower than that of {checkpoint.name}; leave --model out, or choose a new "
            "--out"
        )


def _finish(summary: Summary, made: Plan, folder: Path, started: float, scanned: float) -> Summary:
    summary.found = len(made.candidates) + made.skipped
    summary.to_do = len(made.candidates)
    summary.skipped += made.skipped
    summary.missing = len(made.gone) - summary.gone - summary.moved if not summary.interrupted else 0
    summary.album = str(folder)
    summary.stages.setdefault("scan", scanned)
    summary.stages = {name: round(seconds, 3) for name, seconds in summary.stages.items()}
    summary.seconds = round(time.perf_counter() - started, 3)
    summary.peak_memory_bytes = peak_memory()
    return summary


def peak_memory() -> int:
    """The most memory this process ever held, in bytes.

    From the kernel's own account of it; getrusage's, where there is none, is inherited from whoever started us.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class _Taken:
    """One candidate on its way: read, and as far as a worker could bring it."""

    found: Found
    sha256: bytes | None = None
    size: int = -1
    mtime_ns: int | None = None
    image: Image.Image | None = None
    patches: Patches | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class _Run:
    """One run over the candidates of a plan. Everything but `_take` happens in the caller's thread."""

    def __init__(self, album: Album, made: Plan, folder: Path, settings: Settings, watcher: Watcher) -> None:
        self.album = album
        self.plan = made
        self.folder = folder
        self.settings = settings
        self.watcher = watcher
        self.summary = Summary()
        self.vision: Vision | None = None
        self.recipe = album.recipe
        self.hidden_size = album.hidden_size
        self.made: Made | None = None
        self.writer: ShardWriter | None = None
        self.shard_began = 0.0
        self.new_homes: dict[bytes, Row] = {}  # content encoded by this run
        self.pending: list[_Taken] = []  # the batch being filled
        self.copies: dict[bytes, list[_Taken]] = {}  # the same bytes as a pending picture, under other names
        self.lost: dict[bytes | None, list[Row]] = {}  # rows whose file is no longer there: where moves come from
        for row in made.gone:
            if row.status == "ok":
                self.lost.setdefault(row.sha256, []).append(row)
        self.moved: set[tuple[str, str]] = set()

    def go(self) -> None:
        try:
            self._pictures()
            self._prune()
        except DiskError:
            if self.writer is not None:  # its rows are redone by the next run
                self.writer.abandon()
                self.writer = None
            raise
        finally:
            with held_back():
                self._end_shard()
            self._note_gpu_memory()

    # ------------------------------------------------------------------------------------------ the candidates

    def _pictures(self) -> None:
        with closing(self._taken()) as all_taken:
            for taken in all_taken:
                interrupts.check()
                self._file(taken)
        self._encode()

    def _file(self, taken: _Taken) -> None:
        for stage, seconds in taken.seconds.items():
            self.summary.stages[stage] = self.summary.stages.get(stage, 0.0) + seconds
        if taken.error is not None:
            self._fail(taken, taken.error)
        elif self._is_same(taken):
            self._refresh(taken)
        elif taken.sha256 in self.copies:
            self.copies[taken.sha256].append(taken)
        elif (home := self._home(taken)) is not None:
            self._copy(taken, home)
        else:
            self._queue(taken)

    def _taken(self) -> Generator[_Taken, None, None]:
        """The candidates in order, read and decoded by workers, a bounded number ahead.

        Until there is a tower they wait as decoded pictures, which are larger than patches: then fewer wait.
        """
        workers = self.settings.workers or min(8, cpu_count() or 1)
        window: deque[Future[_Taken]] = deque()
        pool = ThreadPoolExecutor(workers, "qvsplit-decode")
        remaining = iter(self.plan.candidates)
        try:
            while True:
                ahead = workers if self.vision is None else 2 * workers
                while len(window) < ahead and (found := next(remaining, None)) is not None:
                    window.append(pool.submit(self._take, found))
                if not window:
                    return
                with self._clocked("wait for pictures"):
                    taken = window.popleft().result()
                yield taken
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, found: Found) -> _Taken:
        """In a worker: read and hash; where the content is not known yet, decode; once there is a tower, prepare."""
        taken = _Taken(found, size=max(found.size, 0))  # without mtime until it was read: else tried again
        try:
            with _Clock(taken.seconds, "read"):
                file = images.read(found)
            taken.sha256, taken.size, taken.mtime_ns = file.sha256, file.size, file.mtime_ns
            if self._home(taken) is None:
                with _Clock(taken.seconds, "decode"):
                    taken.image = images.decode(file.data)
                taken.width, taken.height = taken.image.size
                if self.vision is not None:
                    self._prepare(taken, self.vision)
        except PictureError as error:
            taken.error = str(error)
        return taken

    def _prepare(self, taken: _Taken, vision: Vision) -> None:
        assert taken.image is not None
        with _Clock(taken.seconds, "preprocess"):
            taken.patches = vision.prepare(taken.image)
        taken.image = None

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
        if self.pending and self._pending_patches() + taken.patches.count > self._budget(vision):
            self._encode()
        self.pending.append(taken)
        self.copies[taken.sha256] = []
        if self._pending_patches() >= self._budget(vision):
            self._encode()

    def _pending_patches(self) -> int:
        return sum(taken.patches.count for taken in self.pending if taken.patches is not None)

    def _budget(self, vision: Vision) -> int:
        from qvsplit.vision import default_patch_budget

        return self.settings.patch_budget or default_patch_budget(vision.device)

    def _encode(self) -> None:
        if not self.pending:
            return
        vision, batch, copies = self._loaded(), self.pending, self.copies
        with self._clocked("forward"):
            results = vision.encode([taken.patches for taken in batch if taken.patches is not None])
        for taken, result in zip(batch, results, strict=True):
            assert taken.sha256 is not None
            if isinstance(result, PictureError):
                for one in (taken, *copies[taken.sha256]):
                    self._fail(one, str(result))
                continue
            with self._clocked("copy"):
                raw = self._stored(result)
            self._embed(taken, raw, copies[taken.sha256])
        self.pending, self.copies = [], {}

    def _stored(self, embeds: torch.Tensor) -> npt.NDArray[np.uint8] | None:
        """[n_tokens, hidden_size] as bytes of the stored dtype; None if a value does not fit into it."""
        import torch

        assert self.recipe is not None
        stored = embeds.to(getattr(torch, self.recipe.stored_dtype))
        if stored.dtype != embeds.dtype and not bool(torch.isfinite(stored).all()):
            return None
        raw: npt.NDArray[np.uint8] = stored.contiguous().cpu().view(torch.uint8).numpy()
        return raw

    def _embed(self, taken: _Taken, raw: npt.NDArray[np.uint8] | None, copies: list[_Taken]) -> None:
        assert taken.patches is not None
        assert taken.sha256 is not None
        if raw is None:
            for one in (taken, *copies):
                self._fail(one, f"has values beyond the range of {self.recipe.stored_dtype if self.recipe else ''}")
            return
        row = self._row(taken, taken.patches.grid_thw, len(raw))
        with held_back():  # the row and its count are one
            self._write(row, raw)
            self.new_homes[taken.sha256] = row
            self.summary.encoded += 1
            self.summary.tokens += len(raw)
        self.watcher.on_picture(row.path)
        for copy in copies:
            self._copy(copy, row)

    def _loaded(self) -> Vision:
        """The tower, loaded on first use and held against the album's recipe before anything is encoded."""
        if self.vision is None:
            # no row is at stake before the first one is written
            with self._clocked("load"), interrupts.at_once() if self.writer is None else held_back():
                self.vision = self._load()
            weights = self.vision.weights
            self.summary.tower_bytes, self.summary.weights_bytes_read = weights.tower_bytes, weights.bytes_read
        return self.vision

    def _load(self) -> Vision:
        from qvsplit import devices
        from qvsplit import vision as half
        from qvsplit.weights import stored_dtype

        own, told = self.album.recipe, self.settings
        device = devices.choose_device(told.device)
        checkpoint = self._checkpoint()
        dtype = devices.choose_dtype(
            told.dtype or (own.compute_dtype if own else None), device, stored_dtype(checkpoint, "vision")
        )
        limits = own.processor if own else {}
        vision = half.load(
            checkpoint,
            device=device,
            dtype=dtype,
            min_pixels=limits.get("min_pixels") if told.min_pixels is None else told.min_pixels,
            max_pixels=limits.get("max_pixels") if told.max_pixels is None else told.max_pixels,
        )
        recipe = vision.recipe(told.store or (own.stored_dtype if own else devices.dtype_name(dtype)))
        if own is not None and (differences := own.differences(recipe)):
            raise RecipeError(
                f"{self.folder} was made under another recipe ({some_of(differences)}); "
                "use the checkpoint it was made with, or choose a new --out"
            )
        self.recipe, self.hidden_size = recipe, vision.hidden_size
        self.made = Made(checkpoint.name, checkpoint.revision, str(device), installed_versions())
        self._note_other_versions()
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
            self.summary.copied += old is None
        self.watcher.on_picture(row.path)

    def _refresh(self, taken: _Taken) -> None:
        """Touched but unchanged: remember the new stat, so that the file need not be read again."""
        current = self.album.current(taken.found.root, taken.found.path)
        assert current is not None
        if taken.mtime_ns is not None:
            self._write(replace(current, size=taken.size, mtime_ns=taken.mtime_ns, has_embeds=False), None)
        self.summary.skipped += 1
        self.watcher.on_picture(current.path)

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
        self.watcher.on_picture(row.path)

    def _prune(self) -> None:
        """Mark rows gone whose file is no longer there, where asked to."""
        if not self.settings.prune:
            return
        for row in self.plan.gone:
            if row.key not in self.moved:
                self._write(gone_row(row), None)
                self.summary.gone += 1

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
            full = self.writer.bytes >= SHARD_BYTES or self.writer.rows >= SHARD_ROWS
            if full or time.monotonic() - self.shard_began > SHARD_SECONDS:
                self._end_shard()

    def _new_writer(self) -> ShardWriter:
        assert self.recipe is not None
        assert self.hidden_size is not None
        made = self.made or self.album.made
        assert made is not None
        return ShardWriter(next_shard(self.folder), recipe=self.recipe, made=made, hidden_size=self.hidden_size)

    def _end_shard(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            try:
                self.summary.bytes += writer.finish()
            except BaseException:
                writer.abandon()
                raise
            self.summary.shards += 1

    # --------------------------------------------------------------------------------------------------- clocks

    def _clocked(self, stage: str) -> _Clock:
        return _Clock(self.summary.stages, stage)

    def _note_gpu_memory(self) -> None:
        if self.vision is not None and self.vision.device.type == "cuda":
            import torch

            self.summary.peak_gpu_memory_bytes = torch.cuda.max_memory_allocated(self.vision.device)


class _Clock:
    """Adds the block's wall time to `seconds[stage]`."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds = seconds
        self.stage = stage

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.began
