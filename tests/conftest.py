"""Checkpoints made once a session, real photographs, and the full model of transformers as the reference.

Fixtures import what is heavy: `pytest -n` reads this file in the process that only hands out tests, too.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.made_once import made_once

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for a hub; the hub's tests set their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models on busy cores: two threads wait for each other
os.environ.pop("QVSPLIT_MODEL", None)
os.environ.pop("HF_ENDPOINT", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process under test would compile the package anew
sys.dont_write_bytecode = False

if TYPE_CHECKING:
    from tests.support.extracting import Ran
    from tests.support.fake_encoder import FakeModel
    from tests.support.families.reference import Reference
    from tests.support.full_model import FullModel

# The same examples every time, however busy the machine is; HYPOTHESIS_PROFILE=explore looks for new ones
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# A shell that starts the suite in the background, or nohup, leaves signals ignored, and the processes under test would
# rightly leave them so.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Half a million objects of torch, transformers and the tests themselves stay to the end: none is garbage.

    While they are made, nothing looks through them for any.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure():
    """At the end of the process it is garbage like any other: libraries count what they leave behind."""
    gc.unfreeze()


_folders = itertools.count()  # pytest would look through all folders for the next number


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Fingerprints remembered by one test must not help another."""
    monkeypatch.setenv("QVSPLIT_CACHE", str(tmp_path_factory.mktemp(f"cache-{next(_folders)}", numbered=False)))


@pytest.fixture
def tmp_path(tmp_path_factory, request) -> Path:
    """A folder for each test, as pytest's own."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    return tmp_path_factory.mktemp(f"{name}-{next(_folders)}", numbered=False)


@pytest.fixture(autouse=True)
def _one_thread():
    """Where threads share a product of few rows, it is rounded in another way: what one test sets, no other has."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _decoders_are_forked():
    """Decoders are processes, but Python does not start anew for each; see `real_decoders`."""
    from qvsplit.sources import decoder
    from tests.support.forked import start_decoder

    with pytest.MonkeyPatch.context() as patch:
        started_anew = decoder._start_child
        patch.setattr(decoder, "_start_child", start_decoder)
        yield started_anew


@pytest.fixture
def real_decoders(monkeypatch, _decoders_are_forked):
    """For a test of how decoders start: Python starts anew for each, as it does for users."""
    monkeypatch.setattr("qvsplit.sources.decoder._start_child", _decoders_are_forked)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The tiny checkpoint as transformers 5 saves it, in five files."""
    from tests.support.checkpoints import make_tiny

    return made_once(tmp_path_factory, "tiny", make_tiny)


@pytest.fixture(scope="session")
def hub_checkpoint(tmp_path_factory) -> Path:
    """The same weights in the hub's older layout."""
    from tests.support.checkpoints import make_tiny

    return made_once(tmp_path_factory, "tiny-hub", lambda folder: make_tiny(folder, layout="hub", files=2))


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, made once. Read only."""
    from tests.support.families import make_checkpoint

    @functools.cache
    def made(name: str) -> Path:
        return made_once(tmp_path_factory, f"families/{name}", lambda folder: make_checkpoint(name, folder))

    return made


@pytest.fixture(scope="session")
def family_reference(family_checkpoint) -> Callable[[str], Reference]:
    """The full model of a family's tiny checkpoint, loaded once by transformers alone."""
    from tests.support.families.reference import Reference

    return functools.cache(lambda name: Reference(family_checkpoint(name)))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Real photographs of many shapes, and the shapes that photographs seldom have, cut from them. Read only."""
    return made_once(tmp_path_factory, "photos", _make_photos)


def _make_photos(folder: Path) -> None:
    from PIL import Image

    from tests.support.photographs import photographs

    folder.mkdir()
    for path in photographs():
        shutil.copyfile(path, folder / path.name)
    with Image.open(folder / "retina.jpg") as retina:
        retina.resize((5500, 3640), Image.Resampling.BICUBIC).save(folder / "twenty_megapixels.jpg", quality=85)
        retina.crop((700, 0, 709, 1350)).save(folder / "tall.png")  # 1:150
        retina.crop((700, 700, 701, 701)).save(folder / "one_pixel.png")
    with Image.open(folder / "china.jpg") as china:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90°
        china.save(folder / "turned.jpg", exif=exif)


@pytest.fixture
def some_photos(tmp_path) -> Path:
    """A folder of four small photographs that a test may change."""
    from tests.support.extracting import OLD, PHOTOS

    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg"):
        shutil.copyfile(PHOTOS[name], folder / name)
        os.utime(folder / name, OLD)  # not fresh: the stat may be trusted
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """Where a test's store goes."""
    return tmp_path / "embeds"


@pytest.fixture
def fake_model(monkeypatch) -> FakeModel:
    """Have every extraction use a fake encoder, and decode in its own threads; the model's name is `fake`."""
    from tests.support.fake_encoder import FakeModel
    from tests.support.fake_source import InThreadDecoders

    model = FakeModel()
    monkeypatch.setattr("qvsplit.pipeline.execution.load_devices", model.load_devices)
    monkeypatch.setattr("qvsplit.pipeline.runner.DecoderPool", InThreadDecoders)
    return model


@pytest.fixture
def extract(fake_model, out) -> Callable[..., Ran]:
    """Extract paths into `out` with the fake encoder."""
    from tests.support.extracting import extractor

    return extractor("fake", out)


@pytest.fixture
def extract_with_model(checkpoint, out) -> Callable[..., Ran]:
    """Extract paths into `out` with the tiny checkpoint's own encoder."""
    from tests.support.extracting import extractor

    return extractor(str(checkpoint), out)


@pytest.fixture(scope="session")
def whole(checkpoint) -> FullModel:
    """The full model of the tiny checkpoint."""
    from tests.support.full_model import FullModel

    return FullModel(checkpoint)


@pytest.fixture(scope="session")
def store_folder(checkpoint, photos, tmp_path_factory) -> Path:
    """All photographs, extracted once with the tiny checkpoint. Read only."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions

    options = ExtractOptions(model=str(checkpoint))
    return made_once(tmp_path_factory, "embeds", lambda out: extract_files([photos], out=out, options=options))


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Run one command in this process: gives its exit code, stdout and stderr."""
    import io

    from qvsplit import cli

    def run(*words: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = cli.run([str(word) for word in words])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return code, told.out, told.err

    return run


@pytest.fixture
def installed():
    """Handle signals as the command line does, in this process, and as before afterwards."""
    from qvsplit.runtime import interrupts

    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.install()
    yield
    interrupts.clear()
    interrupts._installed = False
    for number, handler in before.items():
        signal.signal(number, handler)
