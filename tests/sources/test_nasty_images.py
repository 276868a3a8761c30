"""A fixed sample of the nasty corpus: nothing in it stops, hangs or kills whoever reads it. All of it: bench/nasty.py."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from qvsplit.errors import ERROR_KINDS, ItemError
from qvsplit.runtime.names import name_on_disk, stored_name
from qvsplit.sources.decoder import Decoder, DecoderPool
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.source import Entry
from tests.support.nasty_images import LIMIT, TOO_SLIM, expected, make_corpus, remove_corpus

# What every failure of the corpus is by its reason; all others are of the content
KINDS = {
    r"needs pillow-heif|has no decoder|of a variant that|layout that is not supported": "reader-missing",
    r"took longer than": "timeout",
    r"cannot be (opened|read):": "permission",
    r"not (fit into|enough) memory|over the limit of": "memory",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("nasty") / "corpus"
    counts = make_corpus(folder, flips=150, sample=True)
    yield folder, counts
    remove_corpus(folder)


@pytest.fixture
def outcomes(monkeypatch) -> dict[tuple[str, str], ItemError | None]:
    """What comes of each file that decoders of this process are given, by root and path: None is pixels."""
    came = {}

    def heard(step):
        @functools.wraps(step)
        def listening(decoder, entry, *more):
            try:
                result = step(decoder, entry, *more)
            except ItemError as error:
                came[entry.root, entry.path] = error
                raise
            if isinstance(result, DecodedImage):
                assert result.pixels.shape == (result.height, result.width, 3)
                assert result.format
                came[entry.root, entry.path] = None
            return result

        return listening

    for step in (Decoder.read, Decoder.decode):
        monkeypatch.setattr(Decoder, step.__name__, heard(step))
    return came


def decode(pool: DecoderPool, entry: Entry) -> None:
    with suppress(ItemError):
        pool.mine().decode(entry, pool.mine().read(entry))


def entries_of(folder: Path) -> list[Entry]:
    """Every file, whatever it is called; what lies deeper than a path may be long is not reached this way."""
    return [
        Entry(stored_name(str(folder)), stored_name(os.path.relpath(os.path.join(path, name), folder)), 1, None, None)
        for path, folders, names in os.walk(folder)
        for name in names
    ]


def test_no_nasty_image_stops_hangs_or_kills_a_run_and_each_is_read_or_has_a_reason_and_its_kind(
    corpus, checkpoint, tmp_path, outcomes
):
    """Those files as well that a run does not list, or whose bytes it has already."""
    folder, counts = corpus
    assert counts.keys() == {"sound", "truncated", "flipped", "bombs", "lying", "special", "names"}
    assert all(counts.values())
    run_over(folder, checkpoint, tmp_path / "embeds")
    in_the_run = len(outcomes)
    assert in_the_run > 800
    left = [entry for entry in entries_of(folder) if (entry.root, entry.path) not in outcomes]
    pool = DecoderPool(item_timeout=3.0, max_image_pixels=LIMIT)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(functools.partial(decode, pool), left))
    pool.close()
    assert len(outcomes) == in_the_run + len(left) > 900
    wrong, reasons = [], Counter()
    for (_, path), error in outcomes.items():
        certain = expected(name_on_disk(path))
        if certain is not None and (error is None) != certain:
            wrong.append((path, error))
        if error is not None:
            reason = str(error)
            kind = next((kind for pattern, kind in KINDS.items() if re.search(pattern, reason)), "content")
            if not reason or "\n" in reason or "b'" in reason or len(reason) > 200 or error.kind != kind:
                wrong.append((path, reason, error.kind))
            reasons[reason] += 1
    assert not wrong
    assert len(reasons) < 120  # equal causes in equal words
    assert sum(error is None for error in outcomes.values()) > 250
    assert {error.kind for error in outcomes.values() if error is not None} <= set(ERROR_KINDS)


def run_over(folder: Path, checkpoint: Path, out: Path) -> None:
    """Every file ends as a row that is `ok`, or `failed` with a reason."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.pipeline.summary import ExtractCallbacks
    from qvsplit.sources.folders import LocalFolders
    from qvsplit.store.opening import open_store

    heard: list[tuple[str, str]] = []
    options = ExtractOptions(
        model=str(checkpoint), item_timeout=3.0, max_pixels=28 * 28 * 16, workers=2, max_image_pixels=LIMIT
    )
    callbacks = ExtractCallbacks(on_failure=lambda path, reason: heard.append((path, reason)))
    summary = extract_files([folder], out=out, options=options, callbacks=callbacks)
    seen = {entry.path for listing in LocalFolders([folder]).list({}) for entry in listing.entries()}
    rows = {row.path: row for row in open_store(out).rows}
    assert rows.keys() == seen
    assert summary.failed == len(heard)
    wrong = []
    for path, row in rows.items():
        on_disk = name_on_disk(path)
        certain = expected(on_disk)
        slim = any(Path(on_disk).match(pattern) for pattern in TOO_SLIM)
        if certain is not None and (row.status == "ok") != (certain and not slim):
            wrong.append((path, row.status, row.error))
        if row.status == "failed" and (not row.error or "\n" in row.error or "b'" in row.error or len(row.error) > 200):
            wrong.append((path, row.error))
        if (row.error_kind in ERROR_KINDS) != (row.status == "failed"):
            wrong.append((path, row.error_kind))
    assert not wrong
    assert len({row.error for row in rows.values() if row.status == "failed"}) < 120
    assert summary.encoded > 250
    again = extract_files([folder], out=out, options=options)
    assert again.failed == 0
    assert again.encoded <= sum("took longer" in (row.error or "") for row in rows.values())  # on a busy machine
