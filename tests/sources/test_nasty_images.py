"""A fixed sample of the nasty corpus: nothing in it stops, hangs or kills whoever reads it. All of it: bench/nasty.py."""

from __future__ import annotations

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvsplit.errors import ERROR_KINDS, ItemError
from qvsplit.runtime.names import name_on_disk, stored_name
from qvsplit.sources.decoder import DecoderPool
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


def outcome(pool: DecoderPool, entry: Entry) -> ItemError | None:
    try:
        image = pool.mine().decode(entry, pool.mine().read(entry))
    except ItemError as error:
        return error
    assert image.pixels.shape == (image.height, image.width, 3)
    assert image.format
    return None


def entries_of(folder: Path) -> list[Entry]:
    """Every file, whatever it is called; what lies deeper than a path may be long is not reached this way."""
    return [
        Entry(stored_name(str(folder)), stored_name(os.path.relpath(os.path.join(path, name), folder)), 1, None, None)
        for path, folders, names in os.walk(folder)
        for name in names
    ]


def test_every_file_becomes_pixels_or_an_error_with_a_reason_and_its_kind(corpus):
    folder, counts = corpus
    assert counts.keys() == {"sound", "truncated", "flipped", "bombs", "lying", "special", "names"}
    assert all(counts.values())
    entries = entries_of(folder)
    assert len(entries) > 900
    pool = DecoderPool(item_timeout=3.0, max_image_pixels=LIMIT)
    with ThreadPoolExecutor(2) as threads:
        errors = dict(zip(entries, threads.map(lambda entry: outcome(pool, entry), entries), strict=True))
    pool.close()
    wrong, reasons = [], Counter()
    for entry, error in errors.items():
        certain = expected(name_on_disk(entry.path))
        if certain is not None and (error is None) != certain:
            wrong.append((entry.path, error))
        if error is not None:
            reason = str(error)
            kind = next((kind for pattern, kind in KINDS.items() if re.search(pattern, reason)), "content")
            if not reason or "\n" in reason or "b'" in reason or len(reason) > 200 or error.kind != kind:
                wrong.append((entry.path, reason, error.kind))
            reasons[reason] += 1
    assert not wrong
    assert len(reasons) < 120  # equal causes in equal words
    assert sum(error is None for error in errors.values()) > 250
    assert {error.kind for error in errors.values() if error is not None} <= set(ERROR_KINDS)


def test_no_nasty_image_stops_hangs_or_kills_a_run(corpus, checkpoint, tmp_path):
    """Every file ends as a row that is `ok`, or `failed` with a reason."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.pipeline.summary import ExtractCallbacks
    from qvsplit.sources.folders import LocalFolders
    from qvsplit.store.opening import open_store

    folder, _ = corpus
    heard: list[tuple[str, str]] = []
    options = ExtractOptions(
        model=str(checkpoint), item_timeout=3.0, max_pixels=28 * 28 * 16, workers=2, max_image_pixels=LIMIT
    )
    callbacks = ExtractCallbacks(on_failure=lambda path, reason: heard.append((path, reason)))
    summary = extract_files([folder], out=tmp_path / "embeds", options=options, callbacks=callbacks)
    seen = {entry.path for listing in LocalFolders([folder]).list({}) for entry in listing.entries()}
    rows = {row.path: row for row in open_store(tmp_path / "embeds").rows}
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
    again = extract_files([folder], out=tmp_path / "embeds", options=options)
    assert again.failed == 0
    assert again.encoded <= sum("took longer" in (row.error or "") for row in rows.values())  # on a busy machine
