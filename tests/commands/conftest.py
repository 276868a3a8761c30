"""Stores that are extracted once a session, and copies of them for tests that write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.demo_run import session_demo
from tests.support.loaded_once import keep_loaded
from tests.support.made_once import made_once

NAMES = ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")


@pytest.fixture
def models_stay_loaded(monkeypatch):
    """For tests of many commands, none of which is about loading."""
    keep_loaded(monkeypatch)


@pytest.fixture(scope="session")
def four_photos(photos, tmp_path_factory) -> Path:
    """Four small photographs. Read only."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in NAMES:
            shutil.copyfile(photos / name, folder / name)
            os.utime(folder / name, (1_600_000_000, 1_600_000_000))  # not fresh: the stat may be trusted

    return made_once(tmp_path_factory, "four", make)


@pytest.fixture(scope="session")
def small_store(four_photos, checkpoint, tmp_path_factory) -> Path:
    """The store of `four_photos`. Read only."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions

    options = ExtractOptions(model=str(checkpoint))
    return made_once(tmp_path_factory, "small", lambda out: extract_files([four_photos], out=out, options=options))


@pytest.fixture
def store(small_store, tmp_path) -> Path:
    """A copy of `small_store` that a test may change."""
    return Path(shutil.copytree(small_store, tmp_path / "embeds"))


@pytest.fixture(scope="session")
def postcards(tmp_path_factory) -> Path:
    """The demo's store: 13 postcards and one failed image, under a model whose answers are right. Read only."""
    return session_demo(tmp_path_factory).store
