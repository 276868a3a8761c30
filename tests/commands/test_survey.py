"""The table says what stdout says: also where nothing could be asked, and behind an earlier wording."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qvsplit.output.table import read_records

CHECKS = """
min_choice_mass = 0

[[check]]
id = "dog"
question = "{question}"
choices = ["yes", "no"]
flag = "yes"
threshold = 1
level = "block"
"""


@pytest.fixture
def album(run_cli, some_photos, checkpoint, tmp_path, monkeypatch):
    """A folder that was extracted into ./embeds and asked about, with the answers in a.parquet and w.parquet."""
    monkeypatch.chdir(tmp_path)
    Path("checks.toml").write_text(CHECKS.format(question="Is there a dog?"))
    Path("other.toml").write_text(CHECKS.format(question="Do you see a dog?"))
    assert run_cli("extract", some_photos, "--model", checkpoint, "--quiet")[0] == 0
    assert asked(run_cli)[0] == 0
    return some_photos


def asked(run_cli, *words, checks="checks.toml"):
    return run_cli("ask", "--checks", checks, "--out", "a.parquet", "--wide", "w.parquet", "--fail-on", "block", *words)


def verdicts() -> list[set[str | None]]:
    """What the table and the wide table have."""
    return [{one["verdict"] for one in read_records(Path("a.parquet"))},
            {row["verdict"] for row in pq.read_table("w.parquet").to_pylist()}]  # fmt: skip


def test_where_all_items_failed_the_table_says_so(run_cli, album, monkeypatch):
    assert verdicts() == [{"pass"}, {"pass"}]
    images = sorted(album.iterdir())
    for image in images:
        image.write_bytes(b"torn" + image.read_bytes())
    monkeypatch.setattr("qvsplit.answering.local_engine.LocalEngine.language", property(no_model))
    for _ in range(2):
        code, out, said = asked(run_cli, "--format", "tsv")
        assert (code, {line.split("\t")[6] for line in out.splitlines()}) == (8, {"error"})
        assert f"0 asked; {len(images)} in a.parquet" in said
        assert verdicts() == [{"error"}, {"error"}]
    assert run_cli("extract", "--quiet", album)[0] == 1
    assert asked(run_cli)[0] == 8
    assert verdicts() == [{"error"}, {"error"}]


def no_model(*_: object, **__: object) -> None:
    raise AssertionError("the language model was loaded")


def test_files_of_no_store_that_all_failed_leave_the_table(run_cli, album):
    before = Path("a.parquet").read_bytes()
    Path("embeds").rename("elsewhere")
    Path("torn.jpg").write_bytes(b"torn")
    code, _, said = asked(run_cli, "--image", "torn.jpg")
    assert code == 8
    assert "a.parquet is as it was" in said
    assert Path("a.parquet").read_bytes() == before


def test_an_earlier_wording_is_the_newest_again(run_cli, album):
    seen = []
    for checks in ("checks.toml", "other.toml", "checks.toml"):
        assert asked(run_cli, checks=checks)[0] == 0
        seen.append(pq.read_table("w.parquet").to_pylist())
        assert run_cli("answers", "a.parquet", "--wide", "--out", "all.parquet")[0] == 0
        assert pq.read_table("all.parquet").to_pylist() == seen[-1]
    assert seen[0] == seen[2]
    assert seen[0][0]["dog_score"] != seen[1][0]["dog_score"]
    before = Path("a.parquet").read_bytes()
    asked(run_cli)
    assert Path("a.parquet").read_bytes() == before
    assert "several runs" in run_cli("find", "a.parquet", "dog = no")[2]
