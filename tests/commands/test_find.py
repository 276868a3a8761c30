"""`qvsplit find`: paths that open, links, sidecars, by a table that no model has made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvsplit.output.table import Table
from tests.support.answer_records import answer, check
from tests.support.terminal import on_terminal, one_line

CHOICES = {"animal": ("yes", "no"), "place": ("sea", "city")}
ITEMS = {  # animal, place, caption
    "a/IMG_1.jpg": ("yes", "sea", "A dog at the sea."),
    "b/IMG_1.jpg": ("yes", "sea", "Two dogs."),
    "odd-\udcff\n.jpg": ("yes", "city", "A dog in the city."),
    "night.jpg": ("no", "unsure", ""),
    "film.mp4#0": ("no", "sea", "The sea."),
    "film.mp4#1": ("yes", "sea", "A dog runs."),
    "film.mp4#2": ("yes", "city", "A street."),
}


def records(root: Path) -> list[dict]:
    made = []
    for name, (*checks, caption) in ITEMS.items():
        path, _, part = name.partition("#")
        item = {"root": str(root), "kind": "video" if part else "image"}
        if part:
            item |= {"part": int(part), "start": 10.0 * int(part), "end": 10.0 * int(part) + 10}
        stored = path.replace("\udcff", "//xff")
        for name_of, text in zip(CHOICES, checks, strict=True):
            choices = [{"choice": one, "form": one, "probability": 0.5, "logprob": -0.7} for one in CHOICES[name_of]]
            made.append(answer(stored, name_of, text, **item, choices=choices, choice_probability=0.75))
        made.append(answer(stored, "caption", caption, **item))
    return made


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with `photos` and `answers.parquet` in it."""
    monkeypatch.chdir(tmp_path)
    for name in ITEMS:
        file = tmp_path / "photos" / name.partition("#")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with Table(tmp_path / "answers.parquet") as table:
        for record in records(tmp_path / "photos"):
            table.put(record)
    return tmp_path


@pytest.fixture
def find(run_cli, here):
    return lambda *words: run_cli("find", "answers.parquet", *words)


def test_paths_that_open_sorted_one_a_line_and_a_video_once(find, here, monkeypatch):
    code, out, said = find("animal = yes and place = sea")
    assert (code, out, said) == (0, "photos/a/IMG_1.jpg\nphotos/b/IMG_1.jpg\nphotos/film.mp4\n", "")
    assert all(Path(line).exists() for line in out.splitlines())
    code, out, _ = find("animal = yes", "--absolute")
    assert out.splitlines()[0] == str(here / "photos/a/IMG_1.jpg")
    assert out.splitlines()[-1] == str(here / "photos/odd-\\udcff\\x0a.jpg")
    assert out.count("film.mp4") == 1
    monkeypatch.chdir(here / "photos" / "a")
    _, out, _ = find_from("../../answers.parquet", "place = sea and animal = yes and path = a/IMG_1.jpg")
    assert out == "IMG_1.jpg\n"


def find_from(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit", "find", *words], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_names_of_any_bytes_for_other_programs(here):
    for words in (["-0"], ["--print0"], ["--format", "paths0"]):
        done = subprocess.run(
            [sys.executable, "-m", "qvsplit", "find", "answers.parquet", "place = city", *words],
            capture_output=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, check=True,
        )  # fmt: skip
        names = done.stdout.split(b"\0")
        assert names == [b"photos/film.mp4", b"photos/odd-\xff\n.jpg", b""]
        assert all(os.path.exists(name) for name in names[:-1])


def test_the_other_formats(find, here):
    code, out, _ = find("animal = yes and place_score > 0.5 and kind = video", "--json")
    items = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(one["type"], one["file"], one["part"], one["answers"]["place"]) for one in items] == [
        ("item", "photos/film.mp4", 1, "sea"), ("item", "photos/film.mp4", 2, "city"),
    ]  # fmt: skip
    assert items[0]["path"] == "film.mp4" and items[0]["root"] == str(here / "photos")
    assert items[0]["scores"] == {"animal": 0.75, "place": 0.75}
    _, out, _ = find("animal = yes and place_score > 0.5 and kind = video", "--format", "tsv")
    assert [line.split("\t") for line in out.splitlines()][:2] == [
        ["item", "photos/film.mp4", "1", "animal", "yes", "0.75", "", ""],
        ["item", "photos/film.mp4", "1", "place", "sea", "0.75", "", ""],
    ]
    _, out, _ = find("path = night.jpg", "--format", "tsv")
    assert out == "item\tphotos/night.jpg\t\t\t\t\t\t\n"
    _, out, _ = find("animal = yes and kind = video", "--format", "text")
    assert out == "film.mp4#1 (0:10 to 0:20)  animal: yes\nfilm.mp4#2 (0:20 to 0:30)  animal: yes\n"


def test_the_probability_is_that_of_the_most_probable_choice(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Table(tmp_path / "a.jsonl") as table:
        table.put(check("low.jpg"))  # `yes` would be flagged, and has 0.2
        table.put(check("unsure.jpg", verdict="uncertain"))
    _, out, _ = run_cli("find", "a.jsonl", "dog = no or dog = unsure", "--format", "tsv")
    assert out == "item\t/r/low.jpg\t\tdog\tno\t0.8\tpass\t\nitem\t/r/unsure.jpg\t\tdog\tunsure\t0.9\tuncertain\t\n"


def test_of_several_runs_the_one_asked_last_is_taken_and_another_by_name(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Table(tmp_path / "a.jsonl") as table:
        for record in (check("a.jpg", run="two", at=3), check("a.jpg", run="one", verdict="warn"), answer("a.jpg")):
            table.put(record)
    words = ("find", "a.jsonl", "dog = no")
    told = "qvsplit: answers of several runs: taken are those of dog two, not one; --run RUN takes others\n"
    assert run_cli(*words) == (0, "/r/a.jpg\n", told)
    assert run_cli(*words, "--quiet") == (0, "/r/a.jpg\n", "")
    told = told.replace("two, not one", "one, not two")
    assert run_cli(*words, "--run", "one") == (0, "", told)
    assert run_cli("find", "a.jsonl", "dog = yes and caption = 'A dog.'", "--run", "one")[1] == "/r/a.jpg\n"
    code, out, said = run_cli(*words, "--run", "none")
    assert (code, out, said) == (2, "", "qvsplit: --run none: the table has no such run; it has one, two\n")


def test_nothing_found_is_no_error(find, here):
    assert find("animal = no and place = city") == (0, "", "")
    shown = on_terminal(["find", "answers.parquet", "animal = no and place = city"])
    assert shown.strip() == "qvsplit: find: none of 7 items in answers.parquet"


def test_mistakes(find, run_cli):
    code, out, said = find("animal =")
    assert (code, out) == (2, "")
    assert one_line(said) == "qvsplit: find: expected a value after =: animal = ^"
    assert one_line(find("anmal = yes")[2]).startswith("qvsplit: find: there is no column anmal (did you mean animal?")
    code, out, said = find("place = se")
    assert (code, out) == (0, "")
    assert one_line(said) == "qvsplit: find: place is never se (did you mean sea?): it is one of sea, city, unsure"
    assert run_cli("find", "none.parquet", "animal = yes")[0] == 2
    for words in (
        ["--keyword", "a"], ["--caption", "caption"], ["--relative-links"], ["-0", "--json"],
        ["--xmp", "--keyword", "a=b"], ["--xmp", "--keyword", " "], ["--xmp", "--caption", "animal"],
        ["--xmp", "--caption", "caption", "--keyword", "a"],
    ):  # fmt: skip
        code, out, said = find("animal = yes", *words)
        assert (code, out) == (2, ""), words
        one_line(said)


def test_links_in_step_and_quiet_where_nothing_changes(find, here):
    code, out, said = find("animal = yes", "--link-to", "album")
    assert (code, out) == (0, "")
    assert one_line(said) == "qvsplit: 4 links made, 0 removed, 0 kept; album"
    targets = sorted(os.readlink(here / "album" / name) for name in os.listdir("album") if name[0] != ".")
    assert targets == sorted(
        str(here / "photos" / name) for name in ("a/IMG_1.jpg", "b/IMG_1.jpg", "film.mp4", "odd-\udcff\n.jpg")
    )
    assert find("animal = yes", "--link-to", "album") == (0, "", "")
    (here / "photos" / "film.mp4").unlink()
    code, out, said = find("animal = yes", "--link-to", "album", "--quiet", "--format", "paths")
    assert (code, len(out.splitlines())) == (0, 4)
    assert one_line(said) == f"qvsplit: 1 file does not exist and has no link: {here}/photos/film.mp4"
    code, _, said = find("place = sea", "--link-to", "album", "--relative-links")
    assert code == 0
    assert {os.readlink(here / "album" / name) for name in os.listdir("album") if name[0] != "."} == {
        "../photos/a/IMG_1.jpg", "../photos/b/IMG_1.jpg",
    }  # fmt: skip
    code, _, said = find("place = sea", "--link-to", "photos")
    assert code == 2
    assert "has files that qvsplit did not make" in one_line(said)


def test_extract_leaves_the_links_out(here, find):
    from qvsplit.sources.folders import LocalFolders

    def listed() -> int:
        return sum(listing.number for listing in LocalFolders([here / "photos"]).list({}))

    before = listed()
    find("animal = yes", "--link-to", "photos/album")
    assert len(os.listdir("photos/album")) == 6
    assert listed() == before == 5
    (here / "photos/album/.qvsplitignore").unlink()
    os.unlink(here / "photos/album/IMG_1.jpg")
    (here / "photos/album/new.jpg").symlink_to(here / "answers.parquet")
    assert listed() > before  # without the file they would be found


def keywords(file: Path) -> list[str]:
    from tests.output.test_xmp import words

    return words(file.read_bytes()) if file.exists() else []


def test_sidecars(find, here):
    from tests.output.test_xmp import DC, words

    code, out, said = find("animal = yes or place = unsure or path = night.jpg", "--xmp")
    assert (code, out) == (0, "")
    assert one_line(said) == "qvsplit: 5 sidecars written, 0 right as they were"
    photos = here / "photos"
    assert keywords(photos / "a/IMG_1.jpg.xmp") == ["animal=yes", "place=sea"]
    assert words((photos / "a/IMG_1.jpg.xmp").read_bytes(), DC, "description") == ["A dog at the sea."]
    assert keywords(photos / "night.jpg.xmp") == ["animal=no"]  # unsure is no answer
    assert keywords(photos / "film.mp4.xmp") == ["animal=yes", "place=sea", "place=city"]  # of all parts found
    assert keywords(photos / "odd-\udcff\n.jpg.xmp") == ["animal=yes", "place=city"]
    assert find("animal = yes", "--xmp", "--xmp-for", "lightroom")[0] == 0
    assert keywords(photos / "a/IMG_1.xmp") == ["animal=yes", "place=sea"]


def test_an_albums_keyword_goes_where_a_file_is_not_found_any_more(find, here):
    photos = here / "photos"
    find("animal = yes and kind = image", "--xmp")
    find("animal = yes and kind = image", "--xmp", "--keyword", "dogs")
    assert keywords(photos / "odd-\udcff\n.jpg.xmp") == ["animal=yes", "place=city", "dogs"]
    _, _, said = find("animal = yes and place = sea", "--xmp", "--keyword", "dogs")
    assert one_line(said) == "qvsplit: 2 sidecars written, 2 right as they were"  # the film's is new
    assert keywords(photos / "odd-\udcff\n.jpg.xmp") == ["animal=yes", "place=city"]
    assert keywords(photos / "film.mp4.xmp") == ["dogs"]
    assert not (photos / "night.jpg.xmp").exists()


def test_a_broken_sidecar_is_left_and_the_others_are_written(find, here):
    broken = here / "photos" / "a" / "IMG_1.jpg.xmp"
    broken.write_text("<x:xmpmeta")
    (here / "photos" / "film.mp4").unlink()
    code, _, said = find("animal = yes", "--xmp")
    assert code == 6
    assert "qvsplit: left as it is: " in said and "no well-formed XML" in said
    assert "1 file does not exist and has no sidecar" in said
    assert broken.read_text() == "<x:xmpmeta"
    assert keywords(here / "photos" / "b" / "IMG_1.jpg.xmp") == ["animal=yes", "place=sea"]
