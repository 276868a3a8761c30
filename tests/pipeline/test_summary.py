"""Who hears what of a run."""

from __future__ import annotations

from qvsplit.pipeline.summary import ExtractCallbacks, Progress, Summary, with_progress


def test_progress_counts_items_and_names_what_failed():
    heard, said = [], []
    callbacks = ExtractCallbacks(
        on_plan=lambda to_read: said.append(to_read), on_item=said.append, on_note=said.append, on_end=said.append,
        on_failure=lambda path, reason: said.append((path, reason)),
    )  # fmt: skip
    both = with_progress(callbacks, heard.append)
    both.on_plan(3)
    both.on_item("a.jpg")
    both.on_failure("b.jpg", "is empty (0 bytes)")
    both.on_item("b.jpg")
    both.on_note("a note")
    both.on_item("c.jpg")
    summary = Summary()
    both.on_end(summary)
    assert heard == [
        Progress(1, 3, "a.jpg"), Progress(2, 3, "b.jpg", "is empty (0 bytes)"), Progress(3, 3, "c.jpg"),
    ]  # fmt: skip
    # and the callbacks go on hearing what they did
    assert said == [3, "a.jpg", ("b.jpg", "is empty (0 bytes)"), "b.jpg", "a note", "c.jpg", summary]
