"""Checkpoints of a test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.hub_server import point_at


@pytest.fixture
def own(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture
def use_hub(monkeypatch) -> Iterator[Callable[..., None]]:
    """Point huggingface_hub in this process at a hub on loopback, with caches in a folder; it waits for nothing."""
    from huggingface_hub.utils import disable_progress_bars

    monkeypatch.setattr("qvsplit.checkpoints.ranges.FIRST_WAIT", 0)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    with disable_progress_bars():
        yield partial(point_at, monkeypatch)
