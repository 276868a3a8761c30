"""What the documents say is so."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.clips import make_clip
from tests.support.demo_run import session_demo
from tests.support.forked import program_in, start_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "docs" / "format.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_lines_of_the_format_page_decode_every_dtype(tmp_path, some_photos, checkpoint):
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.store.opening import open_store

    def extracted(dtype: str) -> tuple[dict, np.ndarray, int]:
        """A row as any Parquet reader has it, its features as the store has them, and their width."""
        extract_files(
            [some_photos], out=tmp_path / dtype, options=ExtractOptions(model=str(checkpoint), storage_dtype=dtype)
        )
        row, store = pq.read_table(tmp_path / dtype).to_pylist()[0], open_store(tmp_path / dtype)
        features = store.features(store.current(row["root"], row["path"]))
        return row, features["pooler_output"], store.width

    lines, lines_of_int8 = blocks(FORMAT, "python")
    for dtype, itemsize, view in (("float32", 4, "<f4"), ("float16", 2, "<f2"), ("bfloat16", 2, None)):
        row, expected, _ = extracted(dtype)
        scope = {"np": np, "row": row, "itemsize": itemsize}
        exec(lines.replace("<f4", view or "<u2"), scope)
        values = scope["values"] if view else (scope["raw"].view("<u2").astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(values.reshape(expected.shape), expected)
    row, expected, width = extracted("int8")
    scope = {"np": np, "row": row, "width": width}
    exec(lines_of_int8, scope)
    assert np.array_equal(scope["values"], expected)


@pytest.fixture
def lived_in(tmp_path, some_photos, checkpoint, monkeypatch) -> Path:
    """A store `embeds` with copies, modified, deleted and failed items, and a shard that stands there twice."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions

    monkeypatch.chdir(tmp_path)
    options = ExtractOptions(model=str(checkpoint), prune=True)
    extract_files([some_photos], out="embeds", options=options)
    shutil.copyfile(some_photos / "coffee.png", some_photos / "copy.png")
    shutil.copyfile(some_photos / "rocket.jpg", some_photos / "chelsea.png")  # modified: now a copy of another
    (some_photos / "coins.png").unlink()
    (some_photos / "torn.jpg").write_bytes((some_photos / "rocket.jpg").read_bytes()[:2000])
    extract_files([some_photos], out="embeds", options=options)
    # as a rewrite leaves them that is killed before it deletes the old shards
    shutil.copyfile("embeds/shard-000002.parquet", "embeds/shard-000003.parquet")
    return tmp_path / "embeds"


def test_the_sql_of_the_format_page_gives_current_rows_and_their_features(lived_in):
    from qvsplit.store.codec import encode
    from qvsplit.store.opening import open_store

    duckdb = pytest.importorskip("duckdb")
    store = open_store(lived_in)
    assert {row.status for row in store.rows} == {"ok", "failed", "deleted"}
    rows_clause, features_clause = blocks(FORMAT, "sql")

    result = duckdb.sql(rows_clause)
    found = [dict(zip(result.columns, values, strict=True)) for values in result.fetchall()]
    found.sort(key=lambda row: (row["root"], row["path"], row["part"]))
    expected = [{name: getattr(row, name) for name in result.columns} for row in store.rows]
    for row in (*found, *expected):
        row.pop("has_features")  # which of two equal rows holds them
        row["grid_thw"] = row["grid_thw"] and tuple(row["grid_thw"])
    assert found == expected

    joined = duckdb.sql(features_clause).fetchall()
    assert len(joined) == len(store) == 4
    for (root, path, part, n_tokens, embeds), row in zip(joined, store, strict=True):
        assert (root, path, part, n_tokens) == (row.root, row.path, row.part, row.n_tokens)
        stored = store.features(row).tensors["pooler_output"]
        assert embeds == encode(stored.raw, stored.dtype)


def test_the_format_page_names_every_file_and_value_of_the_store():
    from qvsplit.errors import ERROR_KINDS
    from qvsplit.runtime.dtypes import DTYPE_BYTES, STORAGE_DTYPES
    from qvsplit.store import layout
    from qvsplit.store.config import KERNELS, ExtractionConfig, Provenance
    from qvsplit.store.features import CONTAINERS, DEEPSTACK_FEATURES, POOLER_OUTPUT, TensorSpec
    from qvsplit.store.row import KINDS, STATUSES

    names = [
        name for name in vars(layout).values() if isinstance(name, str) and name.startswith(layout.OWN_FOLDER + "/")
    ]
    assert len(names) > 8
    for name in names:
        assert f"`{name}" in FORMAT, name
    values = (*ERROR_KINDS, *DTYPE_BYTES, *STORAGE_DTYPES, *KERNELS, *CONTAINERS, *KINDS, *STATUSES)
    fields = (
        *(field.name for cls in (ExtractionConfig, Provenance, TensorSpec) for field in dataclasses.fields(cls)),
        DEEPSTACK_FEATURES, POOLER_OUTPUT, "column", "id",
    )  # fmt: skip
    for value in (*values, *fields):
        assert f"`{value}`" in FORMAT, value


def test_the_python_of_the_readme_runs(tmp_path, some_photos, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QVSPLIT_MODEL", str(checkpoint))
    (lines,) = [block for block in blocks(README, "python") if "load_session" in block]
    make_clip(tmp_path / "clip.mp4")
    exec(lines, {})
    out = capsys.readouterr().out
    assert all(name in out for name in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg"))
    import qvsplit

    shown = [line.strip() for line in (qvsplit.__doc__ or "").splitlines() if line.strip()]
    assert [line.strip() for line in lines.splitlines() if line.strip()] == shown[1 : shown.index("What is here:")]
    listed = {word for line in shown[shown.index("What is here:") :] for word in re.findall(r"\w+(?=,|  )", line)}
    assert set(qvsplit.__all__) <= listed


def test_the_start_of_the_readme_works_without_a_network(tmp_path, tmp_path_factory, monkeypatch, run_cli):
    """Line for line, but for the demo itself, of which there is one run a session."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("the start must not connect to anything")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    (lines,) = [block for block in blocks(README, "") if block.startswith("qvsplit demo")]
    demo, *others = [shlex.split(line, comments=True) for line in lines.splitlines()]
    assert demo == ["qvsplit", "demo"]
    (tmp_path / "qvsplit-demo").mkdir()
    (tmp_path / "qvsplit-demo" / "postcards").symlink_to(session_demo(tmp_path_factory).photos)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    out = {}
    for program, command, *words in others:
        assert program == "qvsplit"
        stdin = "What is in the image?\n" if command == "chat" else ""
        code, out[command], err = run_cli(command, *words, stdin=stdin)
        assert code in (0, 1), err  # one of the postcards is torn
    assert (tmp_path / "demo-embeds" / "shard-000001.parquet").exists()
    assert "two dogs" in out["chat"]
    assert (tmp_path / "album.html").stat().st_size > 10_000


def test_the_command_reference_is_what_the_commands_say():
    code = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r}); import make_docs; print(make_docs.reference(), end='')"
    )
    printed, said = start_program(code).communicate()
    assert printed == (ROOT / "docs" / "commands.md").read_text(), f"run `make docs`\n{said}"


REFERENCE = (ROOT / "docs" / "commands.md").read_text()
OTHER_PROGRAMS = {"--index-url", "--delete", "--include", "--exclude", "--table", "--pictures", "--images", "--now",
                  "--local_dir", "--tokens", "--vllm", "--address", "--head", "--rounds"}  # fmt: skip
HISTORY = {"CHANGELOG.md", "decisions.md"}  # which also name what there was before


def test_every_command_has_its_page():
    from qvsplit.cli import COMMANDS

    for command in COMMANDS:
        assert f"## qvsplit {command}\n" in REFERENCE


def test_the_command_reference_has_every_command_of_the_app_and_every_option_of_each():
    """By what typer itself makes of the app, whatever its help shows."""
    import typer

    from qvsplit.cli import app

    commands = typer.main.get_command(app).commands
    assert [*re.findall(r"(?m)^## qvsplit (\w+)$", REFERENCE)] == list(commands)
    overview = REFERENCE.split("\n## ")[1]
    for name, command in commands.items():
        assert re.search(rf"(?m)^│ {name}  ", overview), name
        page = REFERENCE.split(f"## qvsplit {name}\n")[1].split("\n## ")[0]
        assert len(command.params) > 2
        for option in {one for param in command.params for one in param.opts if one.startswith("-")}:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", page), (name, option)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page):
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", page.read_text())) - OTHER_PROGRAMS:
        assert re.search(rf"(?<![\w-]){option}\b", REFERENCE), option


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_command_that_a_page_shows_exists_and_takes_the_options_it_is_given(page):
    from qvsplit.cli import COMMANDS

    takes = {command: REFERENCE.split(f"## qvsplit {command}\n")[1].split("\n## ")[0] for command in COMMANDS}
    text = page.read_text()
    fenced = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    shown = "\n".join(re.sub(r"(?m)(^|\s)#.*", "", block) for language, block in fenced if language != "python")
    inline = "\n".join(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    for command, words in re.findall(r"\bqvsplit (\w+)((?: [^|;\n]+)?)", f"{shown}\n{inline}"):
        assert command in takes, command
        if page.name != "commands.md":
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", words):
                assert re.search(rf"(?<![\w-]){option}\b", takes[command]), (command, option)


def test_the_architecture_page_names_every_module_and_no_other():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("## The tree")[1].split("```")[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"( +)(\w+\.py|[\w/]+/) +\S", line):
            indent, name = len(match[1]), match[2]
            folder = name if name.endswith("/") else folder
            named |= {("" if indent == 2 else folder) + name} if name.endswith(".py") else set()
    modules = {path.relative_to(ROOT / "qvsplit").as_posix() for path in (ROOT / "qvsplit").rglob("*.py")}
    empty = {name for name in modules if name.endswith("/__init__.py") and name != "demo/__init__.py"}
    assert named == modules - empty


def test_the_architecture_page_names_the_doors_where_they_are():
    import importlib

    page = (ROOT / "docs" / "architecture.md").read_text()
    doors = re.findall(r"(?m)^\| `(\w+)` \| `([\w/]+)\.py` \| ((?:`\w+`, )*`\w+`)[:,]", page)
    assert {name for name, _, _ in doors} == {"Source", "Encoder", "Storage", "Engine"}
    for name, module, methods in doors:
        door = getattr(importlib.import_module(f"qvsplit.{module.replace('/', '.')}"), name)
        assert door._is_protocol
        for method in re.findall(r"`(\w+)`", methods):
            assert hasattr(door, method), (name, method)
    for fake in re.findall(r"`(tests/support/[^`]*)`", page):
        assert (ROOT / fake).exists(), fake


# of the table of words in which everything is written, what can be told from other uses
WORDS_OF_BEFORE = (
    r"towers?|vision half|language half|whole model|unsplit|open_album|Asker|open_asker|extract_pictures|stored_dtype|"
    r"has_embeds|embeddings|severity|coverage|(?<!--)pictures?|likeliest|vanished|recovered|mended|set aside|seal|"
    r"made anew|seen anew|forget|\.qvsplit-\w+"
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_no_page_has_the_words_of_before(page):
    """docs/decisions.md and the changelog may: they say what was."""
    text = re.sub(r"/srv/pictures|Which picture has more|picture\"", "", page.read_text())  # as the demo model is asked
    assert not re.findall(rf"(?<!\w)(?:{WORDS_OF_BEFORE})(?!\w)", text)


def test_every_exit_code_is_in_the_readme():
    from qvsplit import errors

    codes = {k.exit_code for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.QvsplitError)}
    codes |= {errors.ITEMS_FAILED, errors.INTERRUPTED, errors.TERMINATED}
    table = README.split("| code |")[1].split("\n\n")[0]
    assert codes <= {int(number) for number in re.findall(r"\d+", table)}


def test_the_columns_of_the_format_page_are_the_stores_own():
    from qvsplit.store.schema import row_columns

    page = FORMAT.split("## The columns")[1].split("\n**")[0]
    named = [
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert named == list(row_columns())


def test_licence_and_changelog():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


CHINESE = (ROOT / "README.zh-CN.md").read_text()
MIRRORS = re.compile(r"(?ms)^## 下载模型\n.*?(?=^## )")  # the one section that the Chinese page alone has


def commands(text: str) -> list[str]:
    """Everything in code blocks but comments and the tree, one line each."""
    lines = [line for block in re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [bare for line in lines if (bare := re.sub(r"\s+#.*", "", line).rstrip()) and "  " not in bare.strip()]


def links(text: str) -> list[str]:
    """Where the links lead, sorted; one within the page by the number of its heading, as headings are translated."""
    own = {anchor: f"#{number}" for number, anchor in enumerate(anchors(text))}
    found = re.findall(r"\]\(([^)]*)\)", text.replace(".zh-CN", ""))
    return sorted(own[link[1:]] if link.startswith("#") else link for link in found)


def test_the_chinese_readme_has_the_same_commands_figures_and_links():
    chinese, sections = MIRRORS.subn("", CHINESE)
    assert sections == 1
    assert commands(chinese) == commands(README)
    assert len(commands(README)) > 20

    def codes(text: str) -> set[str]:
        return set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))

    assert codes(README) == codes(chinese)
    assert links(README) == links(chinese)
    figures = r"\d+\.\d+(?: GB)?|\d+,\d+"
    assert sorted(re.findall(figures, README)) == sorted(re.findall(figures, chinese))
    assert README.count("\n## ") == chinese.count("\n## ")
    assert re.findall(r"^\| ?\**[\d, ]+", README, re.MULTILINE) == re.findall(r"^\| ?\**[\d, ]+", chinese, re.MULTILINE)


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings in order, as they are made where it is shown."""
    headings = re.findall(r"(?m)^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_links_lead_somewhere():
    for page in [*PAGES, *ROOT.glob("tools/**/*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert link.startswith("http") or target.exists(), (page, link)
            assert not anchor or link.startswith("http") or anchor in anchors(target.read_text()), (page, link, anchor)


def test_the_image_of_the_demo_is_of_today_and_calls_nobody():
    from qvsplit.demo import truths

    image = (ROOT / "docs" / "demo.svg").read_text()
    assert not re.findall(r"https?://(?!www\.w3\.org/)", image)
    text = re.sub(r"<[^>]*>", "", image).replace("&#160;", " ")
    for words in ("by the vision encoder alone", "from the stored features", *truths()[0][:1]):
        assert words in text


def test_the_script_of_the_album_page_runs_as_it_is_written(tmp_path):
    """Twice, as by cron, on the demo's postcards, with other folders, the demo's model, and its checks and their words."""
    from qvsplit.answering.checks import read_checks
    from qvsplit.demo import POSTCARDS

    (script,) = blocks((ROOT / "docs" / "album.md").read_text(), "sh")
    photos, home, programs = tmp_path / "photos", tmp_path / "home", tmp_path / "bin"
    shutil.copytree(POSTCARDS, photos)
    home.mkdir()
    programs.mkdir()
    shutil.copyfile(ROOT / "examples" / "demo" / "album.toml", home / "album.toml")
    program_in(programs)
    checks = read_checks(ROOT / "examples" / "album.toml")
    assert {"dog", "beach"} <= {choice for check in checks for choice in check.spellings}
    for here, there in (
        ("/srv/photos", str(photos)), ("/var/lib/qvsplit", str(home)), ("animal = dog", "animal = yes"),
        ("place = beach", "place = sea"),
    ):  # fmt: skip
        assert here in script
        script = script.replace(here, there)
    environment = os.environ | {
        "PATH": f"{programs}:/usr/bin:/bin", "HOME": str(home), "QVSPLIT_MODEL": "demo", "PYTHONPATH": str(ROOT),
    }  # fmt: skip

    def run() -> str:
        done = subprocess.run(["/bin/sh", "-c", script], env=environment, capture_output=True, text=True, cwd="/")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return done.stderr

    def album() -> set[str]:
        folder = photos / "albums" / "dogs-at-the-beach"
        return {os.path.relpath(link.resolve(), photos) for link in folder.iterdir() if link.is_symlink()}

    assert "torn.jpg" in run()
    expected = {"boats-in-snow.jpg", "copies/seaside (1).jpg", "seaside.jpg"}
    assert album() == expected
    (photos / "seaside.jpg").unlink()
    shutil.copyfile(photos / "boats-in-snow.jpg", photos / "new.jpg")
    assert "new.jpg" not in run()
    assert album() == expected - {"seaside.jpg"} | {"new.jpg"}
