"""Stores that are extracted once a session, and copies of them for tests that write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.demo_run import session_demo

NAMES = ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")


@pytest.fixture(scope="session")
def four_photos(photos, tmp_path_factory) -> Path:
    """Four small photographs. Read only."""
    folder = tmp_path_factory.mktemp("four")
    for name in NAMES:
        shutil.copyfile(photos / name, folder / name)
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))  # not fresh: the stat may be trusted
    return folder


@pytest.fixture(scope="session")
def small_store(four_photos, checkpoint, tmp_path_factory) -> Path:
    """The store of `four_photos`. Read only."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions

    out = tmp_path_factory.mktemp("small") / "embeds"
    extract_files([four_photos], out=out, options=ExtractOptions(model=str(checkpoint)))
    return out


@pytest.fixture
def store(small_store, tmp_path) -> Path:
    """A copy of `small_store` that a test may change."""
    return Path(shutil.copytree(small_store, tmp_path / "embeds"))


@pytest.fixture(scope="session")
def postcards(tmp_path_factory) -> Path:
    """The demo's store: 13 postcards and one failed image, under a model whose answers are right. Read only."""
    return session_demo(tmp_path_factory).store
