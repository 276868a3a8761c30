"""docs/output.md is a contract: formats, columns, types of JSON lines, and paths that open."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from qvsplit import doctor
from qvsplit.output.printer import COLUMNS

pytestmark = pytest.mark.usefixtures("models_stay_loaded")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "output.md").read_text()
CHECKS = ROOT / "examples" / "demo" / "moderation.toml"


@pytest.fixture(scope="module")
def made(postcards, tmp_path_factory):
    """The demo's postcards below one folder, with their store under the name that is the default."""
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions

    folder = tmp_path_factory.mktemp("album")
    shutil.copytree(postcards.parent / "postcards", folder / "postcards")
    extract_files(folder / "postcards", out=folder / "embeds", options=ExtractOptions(model="demo"))
    return folder


@pytest.fixture
def album(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def types_of(out: str) -> list[str]:
    return [json.loads(line)["type"] for line in out.splitlines()]


def test_the_page_names_the_columns_in_their_order():
    rows = re.findall(r"^\| (\d) (\w+) \|", PAGE, re.MULTILINE)
    assert rows == [(str(number), name) for number, name in enumerate(COLUMNS, 1)]


def test_every_json_line_has_a_type_that_the_page_names(run_cli, album, monkeypatch):
    monkeypatch.setattr(doctor, "_ASKED", dict.fromkeys(doctor.NEEDED, "facts = {}"))  # which imports them all anew
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE))))
    asked = ("--checks", CHECKS, "--image", "s*.jpg", "--json")
    commands = {
        ("extract", album / "postcards", "--json"): {"summary"},
        ("extract", album / "postcards", "--json", "--dry-run"): {"preview"},
        ("extract", album / "postcards", "--json", "--dtype", "float16"): {"error"},
        ("ask", *asked): {"answer", "verdict"},
        ("ask", *asked, "--out", "a.jsonl"): {"answer", "verdict"},
        ("gate", album / "postcards" / "sunday.jpg", "--checks", CHECKS, "--embeds", "embeds", "--json"): {"verdict"},
        ("find", "a.jsonl", "dog = yes", "--format", "jsonl"): {"item"},
        ("answers", "a.jsonl", "--format", "jsonl"): {"answer"},
        ("answers", "a.jsonl", "--wide", "--format", "jsonl"): {"item"},
        ("inspect", "--json"): {"store"},
        ("verify", "--sample", "1", "--json"): {"shard", "sample"},
        ("purge", album / "postcards" / "sunday.jpg", "--embeds", "copy", "--dry-run", "--json"): {"preview"},
        ("purge", album / "postcards" / "sunday.jpg", "--embeds", "copy", "--json"): {"summary"},
        ("compact", "copy", "--dry-run", "--json"): {"preview"},
        ("compact", "copy", "--json"): {"summary"},
        ("doctor", "copy", "--json"): {"doctor"},
    }
    shutil.copytree("embeds", "copy")
    for words, wanted in commands.items():
        _, out, said = run_cli(*words)
        assert set(types_of(out)) == wanted, (words, said)
        assert wanted <= named, words


def test_the_page_names_the_types_of_tab_separated_lines(run_cli, album):
    (first,) = re.findall(r"^\| 1 type \| (.*) \|$", PAGE, re.MULTILINE)
    run_cli("ask", "--checks", CHECKS, "--image", "s*.jpg", "--out", "lines.jsonl")
    _, asked, _ = run_cli("ask", "--checks", CHECKS, "--image", "s*.jpg", "--format", "tsv")
    _, found, _ = run_cli("find", "lines.jsonl", "dog = yes", "--format", "tsv")
    assert {line.split("\t")[0] for line in [*asked.splitlines(), *found.splitlines()]} == set(
        re.findall(r"`(\w+)`", first)
    )


@pytest.mark.parametrize("words", [("--image", "seaside.jpg"), ("--image", "s*"), ("--image", "s*", "--image", "p*")])
@pytest.mark.parametrize("questions", [("Is there a dog?",), ("Is there a dog?", "What is in the image?")])
def test_tab_separated_lines_have_eight_columns_and_paths_that_open(run_cli, album, words, questions):
    code, out, _ = run_cli("ask", *words, *questions, "--format", "tsv", "--max-new-tokens", "3")
    lines = [line.split("\t") for line in out.splitlines()]
    assert (code, {len(line) for line in lines}) == (0, {8})
    files = {line[1] for line in lines}
    assert all(Path(file).is_file() and not os.path.isabs(file) for file in files)
    code, out, _ = run_cli("ask", *words, *questions, "--absolute", "--max-new-tokens", "3")
    assert {line.split("\t")[1] for line in out.splitlines()} == {str(album / file) for file in files}


def test_paths_go_into_another_program(run_cli, album, monkeypatch):
    code, out, _ = run_cli("ask", "--checks", CHECKS, "--fail-on", "block", "--format", "paths0", "--quiet")
    names = out.split("\0")
    assert (code, names.pop()) == (8, "")
    assert all(Path(name).is_file() for name in names)
    assert {"postcards/seaside.jpg", "postcards/torn.jpg"} <= set(names)
    assert "postcards/red-houses.png" not in names
    monkeypatch.chdir(album / "postcards")
    _, again, _ = run_cli("ask", "--embeds", "../embeds", "--checks", CHECKS, "--format", "paths", "--quiet")
    assert again.splitlines() == [name.removeprefix("postcards/") for name in names]
