"""The local runner: order, back-pressure, limits, duplicates, interrupts and failures; with fakes, without a model."""

from __future__ import annotations

import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest

from qvsplit.errors import ItemError, ItemNotFound, ModelError
from qvsplit.pipeline import reading
from qvsplit.pipeline import runner as runner_module
from qvsplit.pipeline.items import KNOWN
from qvsplit.pipeline.runner import Load, LocalRunner, RunnerOptions
from qvsplit.runtime.clock import active_seconds
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import DecodedImage
from qvsplit.store.features import Features
from tests.support.fake_catalogue import digest
from tests.support.fake_encoder import FakeEncoder, fake_devices
from tests.support.fake_source import entry


class MemoryDecoders:
    """Decodes images that exist in memory only: each of one colour, which is its content.

    Attributes:
        contents: By path; the path itself where nothing else is said.
        sizes: Width and height by path.
        errors: What reading or decoding an item raises, by path.
        decoded: Paths that were decoded.
    """

    def __init__(self):
        self.contents, self.sizes, self.errors = {}, {}, {}
        self.read_paths, self.decoded = [], []
        self.on_decode = lambda path: None
        self.closed = False

    def mine(self):
        return self

    def read(self, entry):
        self.read_paths.append(entry.path)
        if isinstance(self.errors.get(entry.path), ItemNotFound):
            raise self.errors[entry.path]
        return FileInfo(digest(self.contents.get(entry.path, entry.path)), 1, 1, "1")

    def decode(self, entry, info, on_size):
        width, height = self.sizes.get(entry.path, (28, 28))
        on_size(width, height)
        self.on_decode(entry.path)
        if entry.path in self.errors:
            raise self.errors[entry.path]
        self.decoded.append(entry.path)
        colour = np.frombuffer(bytes.fromhex(info.sha256[:6]), np.uint8)
        return DecodedImage(np.tile(colour, (height, width, 1)), width, height, None, "PNG")

    def peak_memory(self):
        return 4711

    def close(self):
        self.closed = True


@pytest.fixture
def decoders(monkeypatch):
    memory = MemoryDecoders()
    monkeypatch.setattr(runner_module, "DecoderPool", lambda item_timeout, fetch, gifs, max_pixels: memory)
    return memory


def entries(number: int) -> list:
    return [entry(f"{index:03d}.png") for index in range(number)]


class Loader:
    """Loads fake devices, once it is asked to."""

    def __init__(self, on_encode=lambda batch: None, *, workers=1, patch_budget=4):
        self.times = 0
        self.encoder = FakeEncoder(on_encode=on_encode)
        self._devices = fake_devices(self.encoder, workers=workers, patch_budget=patch_budget)

        self.both = Load(self.devices, self.encoder.load_clips)

    def devices(self):
        self.times += 1
        return self._devices


def ran(items, load=None, *, held=(), **options):
    """All results of a run, and the runner."""
    load = load or Loader()
    runner = LocalRunner(RunnerOptions(**options), load.both, lambda content: content in held)
    try:
        with closing(runner.run(items)) as results:
            return list(results), runner
    finally:
        runner.close()


def is_encoded(outcome) -> bool:
    return isinstance(outcome, list) and all(isinstance(part.features, Features) for part in outcome)


def paths(results) -> list[str]:
    return [result.entry.path for result in results]


# ------------------------------------------------------------------------------------------------- order, outcomes


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("patch_budget", [1, 12, 10_000])
def test_encoded_items_come_in_the_order_of_the_entries(decoders, workers, devices, patch_budget):
    """Whichever was decoded first, whatever worker a batch went to, and whichever was done first."""
    pauses = iter([0.02, 0.0, 0.01] * 100)
    decoders.on_decode = lambda path: time.sleep((int(path[:3]) % 3) * 0.002)
    load = Loader(lambda batch: time.sleep(next(pauses)), workers=devices, patch_budget=patch_budget)
    results, runner = ran(entries(20), load, workers=workers)
    assert paths(results) == [f"{number:03d}.png" for number in range(20)]
    assert all(is_encoded(result.outcome) for result in results)
    alone = FakeEncoder()
    for result in results:
        colour = np.frombuffer(bytes.fromhex(digest(result.entry.path)[:6]), np.uint8)
        prepared = alone.preparer.prepare(np.tile(colour, (28, 28, 1)))
        expected = alone.encode([prepared])[0].tensors["pooler_output"].numpy()
        assert np.array_equal(result.outcome[0].features["pooler_output"], expected)
    assert {"forward", "copy", "wait for images", "wait for the encoder"} <= runner.seconds.keys()
    assert runner.decoder_memory_bytes == 4711
    assert decoders.closed


def test_batches_are_filled_by_patches(decoders):
    batches = []
    for index, width in enumerate([60, 60, 200, 500, 60, 60, 60, 1200, 60, 60]):
        decoders.sizes[f"{index:03d}.png"] = (width, 60)
    load = Loader(lambda batch: batches.append([one.patches for one in batch]), patch_budget=24)
    results, _ = ran(entries(10), load)
    assert len(results) == 10
    assert batches == [[4, 4, 16], [36], [4, 4, 4], [84], [4, 4]]  # a large one alone


def test_what_was_read_is_told_of_each(decoders):
    decoders.sizes["000.png"] = (320, 240)
    ((result,), _) = ran(entries(1))
    assert (result.width, result.height, result.format, result.info.size) == (320, 240, "PNG", 1)
    assert result.content == (digest("000.png"), 0)
    assert {"read and decode", "preprocess"} <= result.seconds.keys()
    assert result.image is result.prepared is None  # nothing large is kept


def test_a_bad_item_is_a_value_and_stops_nothing(decoders):
    decoders.errors = {"001.png": ItemError("is bad", "timeout"), "002.png": ItemNotFound("is no longer there")}
    decoders.sizes["003.png"] = (30_000, 30)  # the preparer refuses it
    results, _ = ran(entries(6))
    outcomes = {result.entry.path: result.outcome for result in results}
    assert len(results) == 6
    assert [str(outcomes[name]) for name in ("001.png", "002.png", "003.png")] == [
        "is bad", "is no longer there", "is 30000×30, too slim"
    ]  # fmt: skip
    assert outcomes["001.png"].kind == "timeout"
    assert outcomes["001.png"].__traceback__ is None  # which would keep the pixels
    assert [path for path, outcome in outcomes.items() if is_encoded(outcome)] == [
        "000.png", "004.png", "005.png"
    ]  # fmt: skip


@pytest.mark.parametrize(("patch_budget", "refused"), [(4, [True] * 4), (16, [True, False, False, False])])
def test_an_item_that_the_encoder_refuses_is_a_value(decoders, monkeypatch, patch_budget, refused):
    load = Loader(patch_budget=patch_budget)
    real = load.encoder.encode
    monkeypatch.setattr(load.encoder, "encode", lambda batch: [ItemError("not finite"), *real(batch)[1:]])
    results, _ = ran(entries(4), load)
    assert [isinstance(result.outcome, ItemError) for result in results] == refused


# ------------------------------------------------------------------------------------------------ what need not be


def test_what_is_held_is_read_and_no_more_and_nothing_is_loaded(decoders):
    load = Loader()
    results, _ = ran(entries(5), load, held={(digest(f"{index:03d}.png"), 0) for index in range(5)})
    assert [result.outcome for result in results] == [KNOWN] * 5
    assert (decoders.decoded, load.times) == ([], 0)
    assert all(result.info is not None for result in results)


def test_nothing_is_loaded_for_what_is_bad(decoders):
    decoders.errors = {f"{index:03d}.png": ItemError("is bad") for index in range(5)}
    load = Loader()
    assert len(ran(entries(5), load)[0]) == 5
    assert load.times == 0
    assert ran([], load)[0] == []
    assert load.times == 0


def test_the_devices_are_loaded_once(decoders):
    load = Loader()
    ran(entries(9), load, workers=3)
    assert load.times == 1


@pytest.mark.parametrize("patch_budget", [1, 8, 1000])
def test_the_same_bytes_are_encoded_once_also_while_they_are_in_flight(decoders, patch_budget):
    decoders.contents = {"001.png": "000.png", "003.png": "000.png", "005.png": "004.png"}
    results, _ = ran(entries(6), Loader(lambda batch: time.sleep(0.02), patch_budget=patch_budget), workers=2)
    encoded = [result.entry.path for result in results if result.outcome is not KNOWN]
    assert encoded == ["000.png", "002.png", "004.png"]
    assert sorted(paths(results)) == paths(results_in_order(results))
    assert len(results) == 6


def results_in_order(results):
    return sorted(results, key=lambda result: result.entry.path)


def test_the_same_bytes_once_they_are_held(decoders):
    """What has been written meanwhile is not even decoded."""
    many = 200  # more than are ever decoded ahead, however busy the machine is
    decoders.contents = {f"{index:03d}.png": "same" for index in range(many)}
    held = set()
    runner = LocalRunner(RunnerOptions(workers=1), Loader().both, held.__contains__)
    with closing(runner.run(entries(many))) as results:
        outcomes = []
        for result in results:
            outcomes.append(result.outcome)
            if result.outcome is not KNOWN:
                held.add(result.content)
    runner.close()
    assert [outcome for outcome in outcomes if outcome is not KNOWN] != []
    assert outcomes.count(KNOWN) == many - 1
    assert len(decoders.decoded) < many


# ---------------------------------------------------------------------------------------------------- back-pressure


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("devices", [1, 2])
def test_no_more_than_a_window_is_ahead_of_the_encoder(decoders, workers, devices):
    """One batch in each encoder and one behind it, and two items for each thread that decodes."""
    gate = threading.Event()
    load = Loader(lambda batch: gate.wait(30), workers=devices, patch_budget=1)
    runner = LocalRunner(RunnerOptions(workers=workers), load, lambda content: False)
    results = []

    def consume():
        with closing(runner.run(entries(60))) as run:
            results.extend(run)

    thread = threading.Thread(target=consume)
    thread.start()
    try:
        most = 2 * devices + 2 * workers
        _wait_until(lambda: len(decoders.decoded) >= most)
        time.sleep(0.1)
        assert len(decoders.decoded) == len(decoders.read_paths) == most
    finally:
        gate.set()
        thread.join(30)
        runner.close()
    assert len(results) == 60


def test_no_more_pixels_than_the_budget_are_decoded_at_a_time(decoders, monkeypatch):
    monkeypatch.setattr(reading, "PIXELS_IN_FLIGHT", 10_000)
    for index in range(30):
        decoders.sizes[f"{index:03d}.png"] = (100, 60)  # two are too many
    live, most, lock = set(), [0], threading.Lock()

    def on_decode(path):
        with lock:
            live.add(path)
            most[0] = max(most[0], len(live))
        time.sleep(0.002)

    decoders.on_decode = on_decode
    load = Loader(patch_budget=1)
    devices = load.devices()
    prepare = devices.prepare

    def prepared(image):
        done = prepare(image)
        with lock:
            live.pop()
        return done

    object.__setattr__(devices, "prepare", prepared)
    results, _ = ran(entries(30), load, workers=4)
    assert len(results) == 30
    assert most[0] <= 2  # that whose turn it is gets its memory over the budget


def test_an_image_larger_than_the_budget_goes_through(decoders, monkeypatch):
    monkeypatch.setattr(reading, "PIXELS_IN_FLIGHT", 10)
    results, _ = ran(entries(12), workers=4)
    assert len(results) == 12


def test_results_are_given_while_the_encoder_computes(decoders):
    """The first batch's results are out before the third leaves the encoder, and while the next item is decoded."""
    out, calls = threading.Event(), []

    def on_encode(batch):
        calls.append(batch)
        if len(calls) == 3:
            assert out.wait(30)

    def on_decode(path):
        if path == "001.png":
            time.sleep(0.2)  # by then the first is through the encoder
        if path == "002.png":
            waited.append(out.wait(10))

    waited: list[bool] = []
    decoders.on_decode = on_decode
    runner = LocalRunner(RunnerOptions(workers=1), Loader(on_encode), lambda content: False)
    with closing(runner.run(entries(6))) as results:
        next(results)
        out.set()
        assert len(list(results)) == 5
    runner.close()
    assert len(calls) == 6
    assert waited == [True]


def test_two_devices_work_at_the_same_time(decoders):
    both, calls, met = threading.Barrier(2, timeout=10), [], []

    def on_encode(batch):
        calls.append(1)
        if len(calls) <= 2:
            met.append(both.wait())

    results, _ = ran(entries(6), Loader(on_encode, workers=2))
    assert (len(results), sorted(met)) == (6, [0, 1])


# --------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(("limit", "begun", "stopped"), [(1, 1, "limit"), (5, 5, "limit"), (6, 6, ""), (99, 6, "")])
def test_no_more_items_than_the_limit_are_begun(decoders, limit, begun, stopped):
    results, runner = ran(entries(6), limit=limit, workers=3)
    assert (len(results), len(decoders.read_paths), runner.stopped) == (begun, begun, stopped)


def test_past_the_deadline_no_item_is_begun_and_what_was_begun_is_finished(decoders):
    runner = LocalRunner(RunnerOptions(workers=1, deadline=active_seconds() - 1), Loader(), lambda content: False)
    with closing(runner.run(entries(3))) as results:
        assert list(results) == []
    assert (runner.stopped, decoders.read_paths) == ("max-runtime", [])
    runner.close()
    deadline = active_seconds() + 0.3
    results, runner = ran(entries(400), Loader(lambda batch: time.sleep(0.02)), workers=2, deadline=deadline)
    assert runner.stopped == "max-runtime"
    assert 0 < len(results) == len(decoders.read_paths) < 400
    assert all(is_encoded(result.outcome) for result in results)


def test_a_deadline_that_passes_with_nothing_left_stops_nothing(decoders):
    results, runner = ran(entries(2), Loader(lambda batch: time.sleep(0.1)), deadline=active_seconds() + 0.05)
    assert (len(results), runner.stopped) == (2, "")
    assert ran([], deadline=active_seconds() - 1)[1].stopped == ""


# ------------------------------------------------------------------------------------------- interrupts, failures


@pytest.mark.parametrize("second", ["through", "still in it"])
def test_an_interrupt_leaves_what_is_through_the_encoder_to_be_taken(decoders, second):
    """Batches that had left the encoder when the caller was interrupted are not lost; one still in it is given up."""
    encoded, gate = [], threading.Event()

    def on_encode(batch):
        if not encoded:
            _wait_until(lambda: len(decoders.decoded) >= 6)  # the second batch is behind this one
        elif second == "still in it":
            gate.wait(10)
        encoded.append(len(batch))

    runner = LocalRunner(RunnerOptions(workers=2), Loader(on_encode), lambda content: False)
    results = []
    with suppress(KeyboardInterrupt), closing(runner.run(entries(9))) as run:
        for result in run:
            results.append(result)
            if second == "through":
                _wait_until(lambda: len(encoded) >= 2)
                time.sleep(0.1)
            raise KeyboardInterrupt
    results += runner.finished()
    gate.set()
    runner.close()
    assert paths(results) == (["000.png", "001.png"] if second == "through" else ["000.png"])
    assert decoders.closed


def _wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)


def test_closing_ends_what_is_in_the_encoder_soon(decoders):
    load, calls = Loader(), []

    def on_encode(batch):
        calls.append(1)
        _wait_until(lambda: len(calls) == 1 or load.encoder._cancelled.is_set())

    load.encoder.on_encode = on_encode
    runner = LocalRunner(RunnerOptions(), load, lambda content: False)
    with closing(runner.run(entries(9))) as run:
        next(run)
    began = time.monotonic()
    runner.close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("devices", [1, 2])
def test_what_fails_in_a_device_worker_is_raised_behind_the_results_before_it(decoders, devices):
    third = bytes.fromhex(digest("002.png")[:6])

    def on_encode(batch):
        if bytes(batch[0].values["pixels"][0].tolist()) == third:
            raise ModelError("the encoder is broken")

    runner = LocalRunner(RunnerOptions(), Loader(on_encode, workers=devices), lambda content: False)
    with closing(runner.run(entries(9))) as run:
        assert [next(run).entry.path, next(run).entry.path] == ["000.png", "001.png"]
        with pytest.raises(ModelError, match="broken"):
            next(run)
    runner.close()
    assert list(runner.finished()) == []


def test_what_fails_in_a_decoding_thread_is_raised(decoders):
    def on_decode(path):
        if path == "004.png":
            raise RuntimeError("a bug")

    decoders.on_decode = on_decode
    with pytest.raises(RuntimeError, match="a bug"):
        ran(entries(9), workers=2)
    assert decoders.closed


def test_no_thread_is_left(decoders):
    before = threading.active_count()
    for _ in range(3):
        ran(entries(6), Loader(workers=2), workers=4)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
