"""What of a model is known before any of its weights are there."""

from __future__ import annotations

import pytest

from qvsplit.checkpoints import opening, ranges
from qvsplit.checkpoints.opening import open_checkpoint
from tests.support.checkpoints import files_of, rewrite
from tests.support.hub_server import COMMIT, NAME, Hub

GUESS = 4096  # more than any header of the tiny checkpoint's in several files


@pytest.mark.parametrize("files", [5, 1])
def test_looking_at_a_model_on_the_hub_moves_headers_alone(files, own, use_hub, tmp_path, monkeypatch):
    """With an index or without one; where ranges are not served, what they would say is not known."""
    monkeypatch.setattr(ranges, "GUESS_BYTES", GUESS)
    if files == 1:
        rewrite(own, files=1)
    whole = open_checkpoint(own, "both")
    with Hub(own) as hub:
        use_hub(hub.url, tmp_path / "one")
        seen, places = opening.open_headers(NAME)
        sent = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
        assert 0 < sent < sum(file.stat().st_size for file in files_of(own)) / 50
    assert (seen.name, seen.revision, seen.files) == (NAME, COMMIT, whole.files)
    expected = whole.places(list(whole.files))
    assert {name: place.size for name, place in places.items()} == {n: place.size for n, place in expected.items()}
    assert not list(seen.folder.glob("*.safetensors"))
    with Hub(own) as hub:
        hub.wrong = "ignores ranges"
        use_hub(hub.url, tmp_path / "other")
        seen, places = opening.open_headers(NAME)
    assert (seen.files, places) == (whole.files if files > 1 else {}, {})
