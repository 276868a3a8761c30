"""Videos in the local runner: nobody waits for somebody who waits for him, whatever fails and whenever it is closed.

With fakes, in threads, and each run under a limit of time that no run comes near to.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import pytest

from qvsplit.errors import ConfigError, ItemError, ModelError
from qvsplit.models.sampling import Sampling, VideoOptions
from qvsplit.pipeline import reading
from qvsplit.pipeline import runner as runner_module
from qvsplit.pipeline.channel import AHEAD, Channel
from qvsplit.pipeline.items import KNOWN, Result
from qvsplit.pipeline.runner import Load, LocalRunner, RunnerOptions
from qvsplit.sources.decoder import Closed
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.videos import VideoInfo
from tests.support.fake_catalogue import digest
from tests.support.fake_encoder import FakeClipPreparer, FakeEncoder, fake_devices
from tests.support.fake_source import entry

HANGS = 60.0  # seconds: what takes as long hangs
SIDE = 56  # of every frame and image: one token


@dataclass
class Item:
    """What one file is, in memory only: an image, or a video of some frames; `fault` says where it is bad."""

    content: str
    n_frames: int = 0  # none: an image
    fault: str = ""  # "scan", or "frames": in the middle


@dataclass
class Decoders:
    """Decoders of items in memory, one for all threads. As a pool: closed, it gives nothing more."""

    items: dict[str, Item]
    on_frame: Callable[[str, int], None] = lambda path, index: None
    closed: threading.Event = field(default_factory=threading.Event)
    given_up: list[str] = field(default_factory=list)  # whose frames were not taken to their end

    def mine(self):
        if self.closed.is_set():
            raise Closed
        return self

    def read(self, entry):
        item = self.items[entry.path]
        return FileInfo(digest(item.content), 1, 1, "1", "video" if item.n_frames else "image")

    def decode(self, entry, info, on_size):
        on_size(SIDE, SIDE)
        return DecodedImage(np.full((SIDE, SIDE, 3), 200, np.uint8), SIDE, SIDE, None, "PNG")

    def scan(self, entry, info):
        item = self.items[entry.path]
        if item.fault == "scan":
            raise ItemError("holds no frames")
        return VideoInfo(item.n_frames, 1.0, float(item.n_frames), SIDE, SIDE, 0, "fake", "fake", 0, None)

    def frames(self, entry, info, indices):
        item, whole = self.items[entry.path], False
        try:
            for index in indices:
                if self.closed.is_set():
                    raise Closed
                self.on_frame(entry.path, index)
                if item.fault == "frames" and index == item.n_frames // 2:
                    raise ItemError("ends early")
                yield np.full((SIDE, SIDE, 3), index, np.uint8)
            whole = True
        finally:
            if not whole:
                self.given_up.append(entry.path)

    def peak_memory(self):
        return 0

    def close(self):
        self.closed.set()


class Run:
    """One run over `items`, whose names are their numbers. `results` are those that came."""

    def __init__(
        self, monkeypatch, items, *, workers=2, devices=1, patch_budget=4, clip_seconds=None, on_encode=None,
        load_clips=None, limit=None,
    ):  # fmt: skip
        self.items = {f"{number:03d}": item for number, item in enumerate(items)}
        self.decoders = Decoders(self.items)
        monkeypatch.setattr(runner_module, "DecoderPool", lambda timeout, fetch, gifs, max_pixels: self.decoders)
        videos = VideoOptions(Sampling(clip_seconds=clip_seconds))
        self.encoder = FakeEncoder(on_encode=on_encode or (lambda batch: None), videos=videos)
        self.devices = fake_devices(self.encoder, workers=devices, patch_budget=patch_budget)
        load = Load(lambda: self.devices, load_clips or self.encoder.load_clips)
        self.held = set()  # contents of results that were taken, as a recorder knows them
        self.runner = LocalRunner(RunnerOptions(workers=workers, limit=limit), load, self.held.__contains__)
        self.results: list[Result] = []

    def __call__(self, stop_after: int | None = None) -> list[Result]:
        """Run, up to so many results; fails where it hangs, and raises what it raises."""

        def run():
            try:
                with closing(self.runner.run([entry(path) for path in self.items])) as results:
                    while len(self.results) != stop_after and (result := next(results, None)) is not None:
                        self.results.append(result)
                        if isinstance(result.outcome, list):
                            self.held.add(result.content)
            finally:
                self.runner.close()

        within(run)
        return self.results


def within(function: Callable[[], None]) -> None:
    """Call a function, and wait for every thread that it started, so long at the most."""
    before, raised = set(threading.enumerate()), []

    def called():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=called, daemon=True)
    thread.start()
    thread.join(HANGS)
    for one in set(threading.enumerate()) - before:
        one.join(HANGS)
    if left := set(threading.enumerate()) - before:
        faulthandler.dump_traceback(file=sys.__stderr__)
        pytest.fail(f"hangs: {left}")
    if raised:
        raise raised[0]


def values(result: Result) -> list[list[int]]:
    """The frames of each part, as numbers."""
    return [[round(float(value) * 255) for value in part.features["pooler_output"][:, 0]] for part in result.outcome]


def right(result: Result, item: Item, clip_seconds: int | None) -> bool:
    """Whether what became of an item is what had to."""
    if result.outcome is KNOWN:
        return True
    if item.fault:
        return isinstance(result.outcome, ItemError)
    if not item.n_frames:
        return values(result) == [[200]]
    each = clip_seconds or item.n_frames
    return values(result) == [
        list(range(start, min(start + each, item.n_frames))) for start in range(0, item.n_frames, each)
    ]


def mixed(chance: random.Random, number: int) -> list[Item]:
    """Images, videos short and long, bad ones, and several of the same bytes."""
    made: list[Item] = []
    for index in range(number):
        kind = chance.choice(["image", "image", "video", "video", "bad", "same"])
        if kind == "same" and made:
            made.append(chance.choice(made))
        elif kind == "image":
            made.append(Item(str(index)))
        else:
            fault = chance.choice(["scan", "frames"]) if kind == "bad" else ""
            made.append(Item(str(index), chance.choice([1, 2, 3, 9, 30]), fault))
    return made


# --------------------------------------------------------------------------------------------------------- the way


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("pixels", [1, 5 * SIDE * SIDE, 10**9], ids=["one at a time", "few pixels", "many pixels"])
def test_whatever_the_mix_each_has_its_outcome_in_order(monkeypatch, workers, devices, pixels):
    monkeypatch.setattr(reading, "PIXELS_IN_FLIGHT", pixels)
    for seed in range(6):
        chance = random.Random(1000 * workers + 100 * devices + seed)
        items, clip_seconds = mixed(chance, 24), chance.choice([None, 1, 4])
        run = Run(
            monkeypatch, items, workers=workers, devices=devices, patch_budget=chance.choice([1, 8, 40, 10_000]),
            clip_seconds=clip_seconds,
        )  # fmt: skip
        results = run()
        assert Counter(result.entry.path for result in results) == Counter(run.items.keys())
        wrong = [one.entry.path for one in results if not right(one, run.items[one.entry.path], clip_seconds)]
        assert not wrong, (seed, wrong)
        encoded = [one.entry.path for one in results if isinstance(one.outcome, list)]
        assert encoded == sorted(encoded)
        contents = [run.items[path].content for path in encoded]
        assert len(set(contents)) == len(contents)  # none twice
        good = {item.content for item in items if not item.fault}
        assert set(contents) == good
        assert run.runner._reader.budget._free == pixels  # all was given back


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("order", ["vi", "iv", "vvii", "ivvv", "viivvv", "vvvvvvvv", "v=i=v="])
def test_more_videos_than_workers_wherever_they_stand(monkeypatch, workers, order):
    """Each `=` is once more what stands before it, still in flight."""
    items: list[Item] = []
    for index, one in enumerate(order):
        items.append(items[-1] if one == "=" else Item(str(index), 7 if one == "v" else 0))
    run = Run(monkeypatch, items, workers=workers)
    results = run()
    assert len(results) == len(items)
    assert all(right(one, run.items[one.entry.path], None) for one in results)
    assert sum(one.outcome is KNOWN for one in results) == order.count("=")


def test_pixels_of_a_video_are_given_back_once(monkeypatch):
    """One of the same bytes as a video in flight is let go of while its worker still decodes it."""
    first, met = Item("same", 3), threading.Event()
    run = Run(monkeypatch, [first, first], workers=2)
    real = run.runner._reader.release

    def release(item):
        if item.video is not None and threading.current_thread().name.startswith("qvsplit-decode"):
            met.wait(0.2 if item.pixels else 0)  # the other thread comes in between, if it comes at all
        real(item)

    monkeypatch.setattr(run.runner._reader, "release", release)
    taken, real_take = [], run.runner._reader.budget.take

    def take(number, pixels):
        real_take(number, pixels)
        taken.append(pixels)

    given, real_give = [], run.runner._reader.budget.give_back

    def give_back(pixels):
        if pixels and not threading.current_thread().name.startswith("qvsplit-decode"):
            given.append(pixels)
        real_give(pixels)

    monkeypatch.setattr(run.runner._reader.budget, "take", take)
    monkeypatch.setattr(run.runner._reader.budget, "give_back", give_back)
    run()
    assert not given  # by another thread than the one that took them
    assert run.runner._reader.budget._free == reading.PIXELS_IN_FLIGHT


# ----------------------------------------------------------------------------------------------- failures, and ends


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("devices", [1, 2])
def test_an_encoder_that_breaks_while_slices_wait(monkeypatch, workers, devices):
    for broken in range(0, 12, 3):
        batches = count()

        def on_encode(batch, broken=broken, batches=batches):
            if next(batches) == broken:
                raise ModelError("the encoder is broken")

        items = [Item("a", 30), Item("b"), Item("c", 30), Item("d", 30), Item("e")]
        run = Run(monkeypatch, items, workers=workers, devices=devices, on_encode=on_encode)
        with pytest.raises(ModelError, match="broken"):
            run()
        assert run.decoders.closed.is_set()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("order", ["v", "iv", "vvvv", "viv"])
def test_what_videos_need_cannot_be_loaded(monkeypatch, workers, order):
    items = [Item(str(index), 5 if one == "v" else 0) for index, one in enumerate(order)]

    def refuse():
        raise ConfigError("other settings")

    with pytest.raises(ConfigError):
        Run(monkeypatch, items, workers=workers, load_clips=refuse)()
    error = ItemError("is a video, and this model takes none")
    results = Run(monkeypatch, items, workers=workers, load_clips=lambda: error)()
    assert [one.outcome is error for one in sorted(results, key=lambda one: one.entry.path)] == [
        one == "v" for one in order
    ]


@pytest.mark.parametrize("fault", ["prepare", "frames", "outline"])
def test_a_bug_in_a_worker_is_raised(monkeypatch, fault):
    run = Run(monkeypatch, [Item("a"), Item("b", 9), Item("c", 9), Item("d")], workers=2)
    broken = lambda *words: 1 / 0  # noqa: E731
    if fault == "frames":
        run.decoders.on_frame = broken
    else:
        monkeypatch.setattr(FakeClipPreparer, fault, broken)
    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize("fault", [ItemError("does not fit"), MemoryError()])
def test_slices_that_cannot_be_joined_fail_their_video_alone(monkeypatch, fault):
    def join(stage, slices):
        if len(slices) == 9:
            raise fault
        return real(stage, slices)

    real = runner_module.JoinSlices.__call__
    monkeypatch.setattr(runner_module.JoinSlices, "__call__", join)
    for patch_budget in (1, 10_000):  # the last slice comes out before, or after, the worker has said that it is one
        items = [Item("a"), Item("b", 9), Item("c", 8), Item("d", 9), Item("e")]
        results = Run(monkeypatch, items, patch_budget=patch_budget)()
        failed = {one.entry.path: str(one.outcome) for one in results if isinstance(one.outcome, ItemError)}
        assert failed.keys() == {"001", "003"}
        assert all("fit" in reason for reason in failed.values())
        assert len(results) == 5


@pytest.mark.parametrize("workers", [1, 4])
def test_closed_after_any_number_of_results(monkeypatch, workers):
    for stop_after in range(8):
        items = [Item("0", 20), Item("1"), Item("2", 20), Item("3", 20), Item("4"), Item("5", 20), Item("6", 3)]
        run = Run(monkeypatch, items, workers=workers)
        assert len(run(stop_after)) == min(stop_after, 7)


@pytest.mark.parametrize("where", ["put", "pixels", "clips", "frame"])
def test_closed_while_a_worker_waits(monkeypatch, where):
    """For slices to be taken, for pixels, for what videos need, and within its decoder."""
    items = [Item("0"), Item("1", 40), Item("2", 40), Item("3", 40)]
    if where == "pixels":
        monkeypatch.setattr(reading, "PIXELS_IN_FLIGHT", 1)
    waits = threading.Event()
    run = Run(monkeypatch, items, workers=3, patch_budget=1)
    if where == "put":
        real = Channel.put

        def put(self, value):
            if len(self._waiting) == AHEAD:
                waits.set()
            real(self, value)

        monkeypatch.setattr(Channel, "put", put)
    elif where == "pixels":
        real_take = run.runner._reader.budget.take

        def take(number, pixels):
            if number > run.runner._reader.budget._turn:
                waits.set()
            real_take(number, pixels)

        monkeypatch.setattr(run.runner._reader.budget, "take", take)
    elif where == "clips":
        real_wait = run.runner._clips_loaded.wait
        monkeypatch.setattr(run.runner._clips_loaded, "wait", lambda: (waits.set(), real_wait())[1])
    else:

        def on_frame(path, index):
            if path == "001":
                return
            waits.set()
            run.decoders.closed.wait(HANGS)  # as one whose child is killed
            raise Closed

        run.decoders.on_frame = on_frame
    stopped = []

    def interrupted(batch):
        assert waits.wait(HANGS)
        stopped.append(1)

    def load_clips():
        if where == "clips":
            assert waits.wait(HANGS)
            raise KeyboardInterrupt
        return run.encoder.load_clips()

    run.encoder.on_encode = interrupted if where != "clips" else lambda batch: None
    run.runner._load = Load(lambda: run.devices, load_clips)
    if where == "clips":
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run(1)
        assert stopped
    assert waits.is_set()


def test_an_interrupt_leaves_what_is_through_and_no_part_of_a_video(monkeypatch):
    """Its slices that are through the encoder are no item."""
    run = Run(monkeypatch, [Item("0"), Item("1", 30), Item("2")], workers=2, patch_budget=1, clip_seconds=1)
    left = []

    def interrupted():
        try:
            with closing(run.runner.run([entry(path) for path in run.items])) as results:
                next(results)
                left.extend(run.runner.finished())
            left.extend(run.runner.finished())
        finally:
            run.runner.close()

    within(interrupted)
    assert left == []


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_counts_items_and_not_parts(monkeypatch, limit):
    run = Run(monkeypatch, [Item("0", 9), Item("1", 9), Item("2", 9), Item("3")], limit=limit, clip_seconds=1)
    assert [one.entry.path for one in run()] == [f"{number:03d}" for number in range(limit)]
    assert run.runner.stopped == "limit"


def test_nothing_is_left_of_items_that_are_through(monkeypatch):
    run = Run(monkeypatch, mixed(random.Random(3), 20), clip_seconds=4)
    results = run()
    assert len(results) == 20
    assert not run.runner._channels
    assert not run.runner._queue.contents
    assert not any(one.parts or one.image for one in results)


def test_a_clip_in_the_middle_that_cannot_be_joined_fails_its_video(monkeypatch):
    def join(stage, slices):
        raise ItemError("does not fit")

    monkeypatch.setattr(runner_module.JoinSlices, "__call__", join)
    results = Run(monkeypatch, [Item("a"), Item("b", 9), Item("c")], patch_budget=1, clip_seconds=3)()
    assert [isinstance(one.outcome, ItemError) for one in sorted(results, key=lambda one: one.entry.path)] == [
        False, True, False
    ]  # fmt: skip


def test_a_video_takes_the_pixels_of_the_frames_that_are_in_memory(monkeypatch):
    """One in hand, and the next that is decoded meanwhile."""
    run = Run(monkeypatch, [Item("a", 9)])
    taken, real = [], run.runner._reader.budget.take
    monkeypatch.setattr(
        run.runner._reader.budget, "take", lambda number, pixels: (taken.append(pixels), real(number, pixels))
    )
    run()
    assert taken == [2 * SIDE * SIDE]


def test_slices_have_a_budget_of_their_own_and_go_through_alone(monkeypatch):
    batches, asked, real = [], [], FakeClipPreparer.prepare

    def prepare(self, clip, info, frames, patch_budget):
        asked.append(patch_budget)
        return real(self, clip, info, frames, patch_budget)

    monkeypatch.setattr(FakeClipPreparer, "prepare", prepare)
    run = Run(
        monkeypatch, [*(Item(f"{number}") for number in range(8)), Item("a", 9)], patch_budget=16,
        on_encode=lambda batch: batches.append((sum(one.patches for one in batch), batch[-1].kind)),
    )  # fmt: skip
    run.devices = replace(run.devices, slice_budget=8)
    run()
    assert asked == [8]
    assert batches == [(16, "image")] * 2 + [(4, "video")] * 9
