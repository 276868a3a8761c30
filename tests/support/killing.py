"""Runs of qvsplit that die: killed after a time or at a step of their writing, or by a power cut.

A server process imports everything once and forks a child for each run, so that a run costs a second and not five. In
the child what touches the disk goes through hooks that count steps: each open for writing, each half of each write,
each sync, rename and removal, before and after. At the step asked for the child kills itself, SIGKILL; or, for a power
cut, first undoes on the disk what was not synced.

A run may also die, or hear a signal, at a moment of its work on videos: with real decoders, at a frame, at a slice in
the encoder, at the end of a part; or its decoder dies there.

    python -m tests.support.killing        serves: one JSON object a line in, one out

The encoder is the fake one: what is tried is the writing.
"""

from __future__ import annotations

import functools
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from tests.support import forked

OLD = 1_600_000_000  # an mtime that can be trusted

# ------------------------------------------------------------------------------------------------------ the client


class Server:
    """Forks runs. Use as a context manager.

    Attributes:
        temporary: The folder of temporary files of every run and its decoders, and of nobody else's.
    """

    def __enter__(self) -> Server:
        self.temporary = Path(tempfile.mkdtemp(prefix="qvsplit-killing-"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.killing"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self.temporary)

    def decoders(self) -> list[int]:
        """The decoder processes of all runs that there are now."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                own = f"TMPDIR={self.temporary}\0".encode() in (place / "environ").read_bytes()
                running, parent = (place / "stat").read_text().rpartition(")")[2].split()[:2]
                own = own and int(parent) != self._process.pid  # which is the one that decoders are forked from
                if own and running != "Z" and b"decoder_process" in (place / "cmdline").read_bytes():
                    found.append(int(place.name))
        return found

    def left_behind(self) -> list[str]:
        """Temporary files, and decoders that do not end within some seconds."""
        deadline = time.monotonic() + 20
        while self.decoders() and time.monotonic() < deadline:
            time.sleep(0.02)
        files = [str(path) for path in self.temporary.rglob("*")]
        return files + [f"decoder {number}" for number in self.decoders()]

    def run(
        self,
        command: str,
        words: dict[str, Any],
        *,
        step: int | None = None,
        after: float | None = None,
        power: str | None = None,
        moment: tuple[str, int, int] | None = None,
        shard_rows: int = 3,
    ) -> dict[str, Any]:
        """One run of `command` (extract, compact, purge; cli, which is qvsplit's command line) with `words`.

        Dies at `step`, or `after` seconds, if it comes to that; `power` is "lost" (nothing unsynced survives) or
        "torn" (renames survive, the bytes behind them do not). At a `moment` (which, the how manieth, signal) it is sent
        a signal; see `_at_moment`. Gives `status` (the exit code, or minus the signal), `steps` taken, `seconds`, and
        the run's `summary`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "command": command, "words": words, "step": step, "after": after, "power": power, "rows": shard_rows,
            "moment": moment,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server that forks runs is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer


# --------------------------------------------------------------------------------------------------- the scenarios


@dataclass(frozen=True)
class Scenario:
    """A run that may die: the store `before` it, and what the store holds once it has been run to its end."""

    name: str
    command: str
    words: dict[str, Any]
    before: Path  # a copy of the store; there is none where this does not exist
    store: Path  # where it is put for each run
    expected: dict[Any, Any]
    steps: int


def photographs_small(folder: Path, number: int, side: int = 64) -> list[Path]:
    """Square pieces of real photographs."""
    from PIL import Image

    from tests.support.photographs import photographs

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    sources = [path for path in photographs() if path.suffix in {".jpg", ".png"}]
    for index in range(number):
        with Image.open(sources[index % len(sources)]) as image:
            shift = 7 * (index // len(sources))
            piece = image.convert("RGB").crop((shift, shift, shift + side, shift + side))
        path = folder / f"{index:03d}.png"
        piece.save(path)
        os.utime(path, (OLD, OLD))
        written.append(path)
    return written


def scenarios(folder: Path, server: Server) -> list[Scenario]:
    """A first run, a second after all sorts of changes, compact, rebuild, purge: each with its uninterrupted end."""
    store, photos = folder / "store", folder / "photos"
    options = {"model": "fake", "patch_budget": 1, "workers": 2}
    names = photographs_small(photos, 10)
    shutil.copy2(names[0], photos / "copy.png")
    (photos / "bad.png").write_bytes(b"no image")
    os.utime(photos / "bad.png", (OLD, OLD))
    untouched = folder / "untouched"  # the others change theirs
    shutil.copytree(photos, untouched)
    first = {"paths": [str(untouched)], "out": str(folder / "first"), "options": options}
    made = [_scenario(server, folder, "first", "extract", first, folder / "first")]
    extract = {"paths": [str(photos)], "out": str(store), "options": options}
    if server.run("extract", extract)["status"]:
        raise RuntimeError("the first run failed")
    later = folder / "later"
    photographs_small(later, 14)
    os.replace(later / "010.png", names[1])  # modified
    os.replace(later / "011.png", photos / "new.png")
    os.rename(names[2], photos / "moved.png")
    shutil.copy2(names[3], photos / "again.png")
    names[4].unlink()
    pruned = extract | {"options": options | {"prune": True, "retry_failed": True}}
    made.append(_scenario(server, folder, "second", "extract", pruned, store))
    made.append(_scenario(server, folder, "compact", "compact", {"out": str(store)}, store))
    rebuilt = extract | {"options": options | {"rebuild": True, "storage_dtype": "bfloat16"}}
    made.append(_scenario(server, folder, "rebuild", "extract", rebuilt, store))
    purged = {"out": str(store), "paths": [str(names[5]), str(photos / "copy.png")]}
    made.append(_scenario(server, folder, "purge", "purge", purged, store))
    made.append(_scenario(server, folder, "videos", "extract", videos_and_photographs(folder), folder / "videos"))
    return made


def videos_and_photographs(folder: Path) -> dict[str, Any]:
    """Words of a run over photographs and real clips: of several parts, twice the same, and one that is bad."""
    from tests.support.clips import make_clip

    mixed = folder / "mixed"
    photographs_small(mixed, 3)
    make_clip(mixed / "a.mp4", 40, codec_options={"qp": "0", "bf": "2", "g": "10"})
    make_clip(mixed / "m.mkv", 12, size=(64, 96))
    shutil.copyfile(mixed / "a.mp4", mixed / "same.mov")
    (mixed / "bad.mp4").write_bytes((mixed / "a.mp4").read_bytes()[:-400])
    make_clip(mixed / "z.webm", 30, codec="libvpx-vp9", codec_options={"lossless": "1", "deadline": "realtime"})
    for path in mixed.iterdir():
        os.utime(path, (OLD, OLD))
    options = {"model": "fake", "patch_budget": 8, "workers": 2, "clip_seconds": 0.4}
    return {"paths": [str(mixed)], "out": str(folder / "videos"), "options": options, "decoders": True}


def _scenario(server: Server, folder: Path, name: str, command: str, words: dict[str, Any], store: Path) -> Scenario:
    before = folder / f"before-{name}"
    if store.exists():
        shutil.copytree(store, before)
    done = server.run(command, words)
    if done["status"]:
        raise RuntimeError(f"{name}: the uninterrupted run failed: {done}")
    return Scenario(name, command, words, before, store, contents(store), done["steps"])


def contents(store: Path) -> dict[Any, Any]:
    """What a reader of a store gets: every current row and its features' bytes."""
    from qvsplit.store.opening import open_store

    opened = open_store(store)
    return {
        (*row.key, row.part): (
            row.status, row.start, row.end, row.error, row.sha256, row.size, row.mtime_ns, row.grid_thw, row.n_tokens,
            opened.features(row).tensors["pooler_output"].raw.tobytes() if row.status == "ok" else None,
        )
        for row in opened.rows
    }  # fmt: skip


def untidy(store: Path) -> list[str]:
    """What should not be in a store at rest: leftovers, and content that is held twice."""
    from qvsplit.store import layout
    from qvsplit.store.opening import open_store

    own = {layout.LOCK, layout.CATALOGUE, layout.HISTORY, layout.WALKED}
    names = [str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()]
    wrong = [
        name
        for name in names
        if layout.shard_number(name) is None and name not in own and not name.startswith(layout.GENERATIONS)
    ]
    held = [row.content for shard in open_store(store).shards for row in shard.rows if row.has_features]
    return wrong + [f"held twice: {content}" for content in set(held) if content and held.count(content) > 1]


def torn(found: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """Videos of which some parts are there, and others not."""
    missing = {key[:2] for key in expected.keys() - found.keys()}
    return sorted({key[1] for key, row in found.items() if key[:2] in missing and row[0] == "ok"})


def survives(
    scenario: Scenario, server: Server, *, step: int | None = None, power: str | None = None,
    moment: tuple[str, int] | None = None,
) -> str:  # fmt: skip
    """Let the run die at `step`, or at a `moment`, then run it to its end.

    Empty if all is as if it had not died, else what is not.
    """
    from qvsplit.errors import StoreInUse, UsageError
    from qvsplit.store.opening import open_store

    shutil.rmtree(scenario.store, ignore_errors=True)
    old = {}
    if scenario.before.exists():
        shutil.copytree(scenario.before, scenario.store)
        old = contents(scenario.store)
    killed = None if moment is None else (*moment, int(signal.SIGKILL))
    died = server.run(scenario.command, scenario.words, step=step, power=power, moment=killed)
    if died["status"] not in {0, -signal.SIGKILL} or (moment and died["status"] == 0):
        return f"it did not die as ordered: {died}"
    try:
        found = contents(scenario.store)
    except UsageError:
        if old:
            return "the store has gone"
    except StoreInUse:
        if scenario.name != "rebuild":
            return "the store says it is in use"
    else:
        partly = scenario.name == "purge" and scenario.expected.items() <= found.items() <= old.items()
        if scenario.name in {"compact", "purge", "rebuild"} and found not in (old, scenario.expected) and not partly:
            return "a reader sees neither what was there nor what was to come"
        if halves := torn(found, scenario.expected):
            return f"some parts of {halves} are there"
        if len({shard.config.storage_dtype for shard in open_store(scenario.store).shards}) > 1:
            return "two extraction configs in one store"
    again = server.run(scenario.command, scenario.words)
    if again["status"] and scenario.name != "purge":  # which has nothing left to purge, and says so
        return f"the next run fails: {again}"
    if contents(scenario.store) != scenario.expected:
        return "the next run's store is another"
    return ", ".join(untidy(scenario.store) + server.left_behind())


# ------------------------------------------------------------------------------------------------------ the server


def serve() -> None:
    """Import, then fork a child for each order."""
    import pandas  # noqa: F401 - pyarrow would import it in every child
    import pyarrow.parquet  # noqa: F401
    import torch

    import qvsplit.extract
    import qvsplit.store.compact  # noqa: F401
    from qvsplit.sources import images
    from tests.support import fake_encoder, forked

    torch.set_num_threads(1)  # before any computation: a forked pool of threads hangs
    fake_encoder.install()
    images._known_formats()
    decoders = forked.server_of(os.getpid(), forked.DECODER)
    gc.freeze()  # what the runs share is not written to
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(reader)
            code = 1
            try:
                _child(order, writer, decoders)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                threading._shutdown()  # type: ignore[attr-defined]  # as a process does at its end: waits for threads
                os._exit(code)
        os.close(writer)
        status = _wait(child, order["after"], began)
        with os.fdopen(reader) as stream:
            said = stream.read()
        lines = said.splitlines()
        summaries = [json.loads(one) for one in lines if one.startswith("{")]
        steps = [one for one in lines if not one.startswith("{")]
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - began,
            "steps": len(steps),
            "last": steps[-1] if steps else "",
            "summary": summaries[0] if summaries else None,
        }
        print(json.dumps(answer), flush=True)


def _wait(child: int, after: float | None, began: float) -> int:
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if after is not None else 0)
        if pid:
            return status
        if after is not None and time.monotonic() - began >= after:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.002)


def _child(order: dict[str, Any], writer: int, decoders: forked.Server) -> None:
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.store import compact, store_writer

    cast(Any, store_writer).SHARD_ROWS = order["rows"]
    words = order["words"]
    folder = Path(words["out"])
    if words.get("decoders"):
        _decode_in_processes(decoders)
    if order["moment"] is not None:
        _at_moment(*order["moment"])
    if order["command"] == "cli":
        _command_line(words["said"], words["argv"])
        return
    _Hooks(writer, order["step"], order["power"], folder).install()
    if order["command"] == "extract":
        summary = extract_files(words["paths"], out=folder, options=ExtractOptions(**words["options"]))
        os.write(writer, (json.dumps(summary.to_json()) + "\n").encode())
        return
    with compact.opened_for_writing(folder) as (storage, lock):
        if order["command"] == "compact":
            compact.compact(storage, lock)
        else:
            compact.purge(storage, words["paths"], lock)


def _decode_in_processes(decoders: forked.Server) -> None:
    from qvsplit.pipeline import runner
    from qvsplit.sources import decoder
    from tests.support.forked import start_decoder

    cast(Any, runner).DecoderPool = decoder.DecoderPool
    cast(Any, decoder)._start_child = functools.partial(start_decoder, server=decoders)


def _command_line(said: str, words: list[str]) -> None:
    """Run qvsplit's command line, which prints into the file `said`."""
    from qvsplit.cli import main

    with open(said, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["qvsplit", *words]
    main()


def _at_moment(which: str, number: int, sent: int) -> None:
    """Have this process send itself a signal the `number`th time that something happens.

    `frame`: a frame of a video came from a decoder; `slice`: one is in the encoder; `part`: all slices of one have come
    out of it; `decoder`: as `frame`, but it is the decoder that is sent the signal.
    """
    from qvsplit.pipeline.parts import Parts
    from qvsplit.sources.decoder import Decoder
    from tests.support.fake_encoder import FakeEncoder

    owner, name = {
        "frame": (Decoder, "_next_frame"), "decoder": (Decoder, "_next_frame"), "slice": (FakeEncoder, "encode"),
        "part": (Parts, "_end_clip"),
    }[which]  # fmt: skip
    plain, times, lock = getattr(owner, name), 0, threading.Lock()

    def counted(self: Any, *words: Any, **more: Any) -> Any:
        nonlocal times
        if which != "slice" or any(one.kind == "video" for one in words[0]):
            with lock:
                times += 1
                now = times == number
            if now:
                child = getattr(self, "_child", None)
                os.kill(child.pid if which == "decoder" and child is not None else os.getpid(), sent)
        return plain(self, *words, **more)

    setattr(owner, name, counted)


class _Hooks:
    """Counts the steps of everything that writes below `folder`, and ends the process at one of them."""

    def __init__(self, writer: int, step: int | None, power: str | None, folder: Path) -> None:
        self.writer = writer
        self.step = step
        self.power = power
        self.folder = folder
        self.steps = 0
        self.synced: dict[int, bytes] = {}  # inode → content on the disk for good
        self.entries: dict[str, dict[str, int]] = {}  # folder → name → inode, on the disk for good
        names = ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "ftruncate", "pwrite")
        self.plain: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in names}
        if power is not None:
            self._remember_all()

    def install(self) -> None:
        """From here on every write counts."""
        plain_open, plain_fsync = Path.open, os.fsync

        def opened(path: Path, mode: str = "r", *words: Any, **more: Any) -> Any:
            if not set(mode) & set("wxa+") or not str(path).startswith(str(self.folder)):
                return plain_open(path, mode, *words, **more)
            self.at(f"open {path.name}")
            stream = plain_open(path, mode, *words, **more)
            self.at(f"opened {path.name}")
            return _Stream(stream, self) if "b" in mode else stream

        def fsync(descriptor: int) -> None:
            self.at("sync")
            plain_fsync(descriptor)
            self._remember(descriptor)
            self.at("synced")

        patched = cast(Any, Path)
        patched.open = opened
        cast(Any, os).fsync = fsync
        for name, plain in self.plain.items():
            setattr(os, name, self._counted(name, plain))

    def _counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **more: Any) -> Any:
            self.at(name)
            result = plain(*words, **more)
            self.at(f"{name} done")
            return result

        return counted

    def at(self, what: str) -> None:
        """One step more; perhaps the last."""
        self.steps += 1
        os.write(self.writer, f"{what}\n".encode())
        if self.steps == self.step:
            if self.power is not None:
                for name, plain in self.plain.items():
                    setattr(os, name, plain)
                self._cut()
            os.kill(os.getpid(), signal.SIGKILL)

    # ---------------------------------------------------------------------------------------------- power cuts

    def _remember_all(self) -> None:
        """What is there when the run begins is on the disk."""
        for place, _, names in os.walk(self.folder):
            self.entries[place] = {name: os.stat(os.path.join(place, name)).st_ino for name in os.listdir(place)}
            for name in names:
                file = os.path.join(place, name)
                self.synced[os.stat(file).st_ino] = Path(file).read_bytes()

    def _remember(self, descriptor: int) -> None:
        if self.power is None:
            return
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(place):
            self.entries[place] = {name: os.stat(os.path.join(place, name)).st_ino for name in os.listdir(place)}
        else:
            self.synced[os.fstat(descriptor).st_ino] = Path(place).read_bytes()

    def _cut(self) -> None:
        """Make the folder what a disk may hold after a power cut."""
        for place, folders, names in list(os.walk(self.folder, topdown=False)):
            now = {name: os.stat(os.path.join(place, name)).st_ino for name in names}
            kept = self.entries.get(place, {}) if self.power == "lost" else now
            content = {
                name: self.synced.get(inode, b"") for name, inode in kept.items() if inode in self.synced or name in now
            }
            for name in names:
                self.plain["unlink"](os.path.join(place, name))
            for name, data in content.items():
                if not os.path.isdir(os.path.join(place, name)):
                    with io.open(os.path.join(place, name), "wb") as stream:  # noqa: UP020 - not the hooked one
                        stream.write(data)
            if self.power == "lost":
                for name in folders:
                    if name not in kept:
                        shutil.rmtree(os.path.join(place, name))


class _Stream:
    """A file whose every write is two, with a chance to die between them."""

    def __init__(self, stream: Any, hooks: _Hooks) -> None:
        self._stream = stream
        self._hooks = hooks

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._hooks.at("write")
        middle = len(view) // 2
        self._stream.write(view[:middle])
        self._stream.flush()
        self._hooks.at("half written")
        self._stream.write(view[middle:])
        return len(view)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if __name__ == "__main__":
    serve()
