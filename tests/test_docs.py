"""What the documents say is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def embeds(tmp_path, album_folder, monkeypatch):
    """A folder with an `embeds` album in it, as a user of the README would have."""
    (tmp_path / "embeds").symlink_to(album_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "embeds"


def test_the_numpy_lines_decode_a_row(embeds):
    from qvsplit.album import open_album

    (lines,) = [block for block in blocks(README, "python") if "planes" in block]
    scope: dict[str, object] = {}
    exec(lines, scope)
    row = scope["row"]
    album = open_album(embeds)
    expected = album.embeds(album.current(row["root"], row["path"])).numpy()
    assert np.array_equal(scope["values"], expected)
    assert np.abs(scope["values"]).max() > 0
    assert scope["recipe"]["stored_dtype"] == "float32"


def test_the_lines_of_the_format_page_decode_every_dtype(tmp_path, some_photos, checkpoint):
    from qvsplit.album import open_album
    from qvsplit.extract import Settings, extract_pictures

    lines, lines_of_int8 = blocks((ROOT / "docs" / "format.md").read_text(), "python")
    for dtype, itemsize, view in (("float32", 4, "<f4"), ("float16", 2, "<f2"), ("bfloat16", 2, None)):
        extract_pictures([some_photos], out=tmp_path / dtype, settings=Settings(model=str(checkpoint), store=dtype))
        row = pq.read_table(tmp_path / dtype).to_pylist()[0]
        scope = {"np": np, "row": row, "itemsize": itemsize}
        exec(lines.replace("<f4", view or "<u2"), scope)
        values = scope["values"] if view else (scope["raw"].view("<u2").astype(np.uint32) << 16).view(np.float32)
        album = open_album(tmp_path / dtype)
        expected = album.embeds(album.current(row["root"], row["path"])).numpy()
        assert np.array_equal(values.reshape(expected.shape), expected)
    extract_pictures([some_photos], out=tmp_path / "int8", settings=Settings(model=str(checkpoint), store="int8"))
    row, album = pq.read_table(tmp_path / "int8").to_pylist()[0], open_album(tmp_path / "int8")
    scope = {"np": np, "row": row, "hidden_size": album.hidden_size}
    exec(lines_of_int8, scope)
    assert np.array_equal(scope["values"], album.embeds(album.current(row["root"], row["path"])).numpy())


def test_the_python_of_the_readme_runs(tmp_path, some_photos, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QVSPLIT_MODEL", str(checkpoint))
    (lines,) = [block for block in blocks(README, "python") if "open_asker" in block]
    exec(lines, {})
    out = capsys.readouterr().out
    assert all(name in out for name in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg"))
    import qvsplit

    told = [line.strip() for line in (qvsplit.__doc__ or "").splitlines() if line.strip()]
    assert [line.strip() for line in lines.splitlines() if line.strip()] == told[1:-1]


def test_the_command_reference_is_what_the_commands_say():
    done = subprocess.run(
        [sys.executable, "-c", "import make_docs; print(make_docs.reference(), end='')"],
        cwd=ROOT / "tools", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == (ROOT / "docs" / "commands.md").read_text(), "run `make docs`"


def test_every_option_in_the_readme_exists():
    reference = (ROOT / "docs" / "commands.md").read_text()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert re.search(rf"(?<![\w-]){option}\b", reference), option


def test_the_tree_names_every_room():
    rooms = {path.name for path in (ROOT / "qvsplit").glob("*.py")}
    assert rooms <= set(re.findall(r"[\w]+\.py", README))
    for folder in ("demo", "bench", "docs", "tests", "tools"):
        assert f"{folder}/" in README


def test_every_exit_code_is_in_the_readme():
    from qvsplit import errors

    codes = {k.exit_code for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.QvsplitError)}
    codes |= {errors.PICTURES_FAILED, errors.INTERRUPTED, errors.TERMINATED}
    table = README.split("| code |")[1].split("\n\n")[0]
    assert codes <= {int(number) for number in re.findall(r"\d+", table)}


def test_the_columns_of_the_format_page_are_the_stores_own():
    from qvsplit.store import _columns

    page = (ROOT / "docs" / "format.md").read_text().split("## The columns")[1].split("## The embeddings")[0]
    named = [
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert named == list(_columns())


def test_licence_and_changelog():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


CHINESE = (ROOT / "README.zh-CN.md").read_text()


def commands(text: str) -> list[str]:
    """Everything in code blocks but comments and the tree, one line each."""
    told = [line for block in re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [bare for line in told if (bare := re.sub(r"\s+#.*", "", line).rstrip()) and "  " not in bare.strip()]


def test_the_chinese_readme_has_the_same_commands_figures_and_links():
    assert commands(CHINESE) == commands(README)
    assert len(commands(README)) > 20

    def codes(text: str) -> set[str]:
        return set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))

    assert codes(README) == codes(CHINESE)
    assert sorted(re.findall(r"\]\(([^)]*)\)", README.replace(".zh-CN", ""))) == sorted(
        re.findall(r"\]\(([^)]*)\)", CHINESE.replace(".zh-CN", ""))
    )
    figures = r"\d+\.\d+(?: GB)?|\d+,\d+"
    assert sorted(re.findall(figures, README)) == sorted(re.findall(figures, CHINESE))
    assert README.count("\n## ") == CHINESE.count("\n## ")
    assert re.findall(r"^\| ?\**[\d, ]+", README, re.MULTILINE) == re.findall(r"^\| ?\**[\d, ]+", CHINESE, re.MULTILINE)


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tools/**/*.md")]:
        for link in re.findall(r"\]\(([^)#]*)[^)]*\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page, link)


def test_the_picture_of_the_demo_is_of_today_and_calls_nobody():
    from qvsplit.demo import truths

    picture = (ROOT / "docs" / "demo.svg").read_text()
    assert not re.findall(r"https?://(?!www\.w3\.org/)", picture)
    text = re.sub(r"<[^>]*>", "", picture).replace("&#160;", " ")
    for words in ("computed", "not again", "seen once, by the vision half alone", *truths()[0][:1]):
        assert words in text
