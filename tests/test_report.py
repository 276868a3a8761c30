"""The report: one page that asks nobody for anything, shows what was answered about, and obeys in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image

from qvsplit import images, report
from qvsplit.ask import Answer
from qvsplit.errors import DiskError, UsageError
from qvsplit.report import write_report
from qvsplit.store import Row

TOLD = {"Model": "demo", "Album": "/albums/<postcards>"}


def row_of(file: Path, root: Path | None = None, **changes) -> Row:
    data = file.read_bytes()
    root = root or file.parent
    try:
        width, height = images.decode(data).size
    except images.PictureError:
        width = height = 1
    return replace(
        Row(str(root), file.relative_to(root).as_posix(), hashlib.sha256(data).digest(), len(data), 0, "image",
            width, height, "ok", None, (1, 2, 2), 1, True),
        **changes,
    )  # fmt: skip


def no_row(name: str) -> Row:
    """Of a picture that is nowhere."""
    return Row("/nowhere", name, b"0" * 32, 10, 0, "image", 4, 3, "ok", None, (1, 2, 2), 1, True)


def said(rows: Row | tuple[Row, ...], question: str, text: str, **changes) -> Answer:
    shown = (rows,) if isinstance(rows, Row) else rows
    return replace(Answer(shown, question, text, [1], 9, "stop", "fingerprint"), **changes)


def scored(
    rows: Row, id: str, yes: float, *, severity: str | None = None, question: str = "Is it so?",
    coverage: float = math.exp(-0.1),
) -> Answer:  # fmt: skip
    probabilities = {"yes": yes, "no": 1 - yes}
    logprobs = {name: math.log(p) + math.log(coverage) if p else -math.inf for name, p in probabilities.items()}
    return Answer(
        (rows,), question, "yes" if yes >= 0.5 else "no", [], 9, "scored", "fingerprint", id=id, severity=severity,
        flagged=None if severity is None else yes >= 0.5, logprobs=logprobs, probabilities=probabilities,
    )  # fmt: skip


def data_of(page: Path) -> dict:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(content)


def thumbnails_of(page: Path) -> list[bytes]:
    blocks = re.findall(r'<script type="text/plain" class="thumbnails">(.*?)</script>', page.read_text(), re.DOTALL)
    return [base64.b64decode(line) for block in blocks for line in block.split()]


def written(file: Path, answers, **told) -> Path:
    write_report(file, answers, **{"title": "Postcards", "told": TOLD} | told)
    return file


# --------------------------------------------------------------------------------------------------------- the file


def test_the_page_names_no_other_place_and_forbids_all_but_its_own(tmp_path, some_photos):
    rows = [row_of(file) for file in sorted(some_photos.iterdir())]
    page = written(tmp_path / "page.html", [said(row, "What?", "https:// is only text") for row in rows]).read_text()
    code = re.sub(r'<script type="(application/json|text/plain)".*?</script>', "", page, flags=re.DOTALL)
    assert "//" not in re.sub(r"^\s*//.*|  //.*", "", code, flags=re.MULTILINE).replace("file://", "")
    assert not re.findall(r"""\b(src|href|action|data|poster|srcset)\s*=\s*["']""", code)
    assert not re.findall(
        r"url\(|@import|\bfetch\(|XMLHttp|WebSocket|innerHTML|insertAdjacent|\beval\(|Function\(", code
    )
    assert " style=" not in code and " onclick" not in code
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_texts_cannot_leave_their_place(tmp_path):
    hostile = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&\u2028\u2029\u202e\udc80\0\"'"
    page = written(
        tmp_path / "page.html", [said(no_row(hostile), hostile, hostile, id="x")],
        title=hostile, told={hostile: hostile},
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and "<img" not in text
    assert not re.search("[\u2028\u2029\u202a-\u202e\x00]", text)
    data = data_of(page)
    shown = hostile.replace("\0", "\\x00").replace("\u2028\u2029\u202e\udc80", "\\u2028\\u2029\\u202e\\udc80")
    assert data["title"] == shown and data["told"] == [[shown, shown]] and shown in data["texts"]
    assert data["pictures"][0][0] == shown and data["questions"][0][1] == shown


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    page = written(tmp_path / "page.html", [said(no_row("a.jpg"), "What?", "old")])
    old = page.read_bytes()

    def breaking():
        yield said(no_row("a.jpg"), "What?", "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(page, breaking())
    monkeypatch.setattr(report.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DiskError, match=r"page\.html: the disk is full"):
        written(page, [said(no_row("a.jpg"), "What?", "new")])
    monkeypatch.undo()
    assert page.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    written(page, [said(no_row("a.jpg"), "What?", "new")])
    assert "new" in data_of(page)["texts"]
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_the_page_is_not_there_before_it_is_synced(tmp_path, monkeypatch):
    steps = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(report.os, name, lambda *a, name=name: (steps.append(name), real[name](*a))[1])
    written(tmp_path / "page.html", [])
    assert steps == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_places_where_no_page_can_be_are_told_before_any_answer(tmp_path):
    def unasked():
        raise AssertionError("asked")
        yield

    with pytest.raises(UsageError, match="no folder at"):
        written(tmp_path / "missing" / "page.html", unasked())
    with pytest.raises(UsageError, match="is not a file"):
        written(tmp_path, unasked())
    with pytest.raises(DiskError, match="cannot be written"):
        written(Path("/proc/self/page.html"), unasked())


def test_a_link_is_followed_and_a_left_over_is_no_hindrance(tmp_path):
    target = tmp_path / "real.html"
    (tmp_path / "link.html").symlink_to(target)
    written(tmp_path / "link.html", [])
    assert target.is_file() and (tmp_path / "link.html").is_symlink()


# ------------------------------------------------------------------------------------------------------- thumbnails


def colours(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((24, 24), Image.Resampling.BOX)).astype(int)


def test_thumbnails_are_small_and_upright_like_what_was_answered_about(tmp_path, photos):
    names = ("turned.jpg", "china.jpg", "retina.jpg", "logo.png", "camera.png", "tall.png", "one_pixel.png")
    rows = [row_of(photos / name) for name in names]
    turned = tmp_path / "cmyk.jpg"
    with Image.open(photos / "china.jpg") as china:
        china.convert("CMYK").save(turned, exif=b"Exif\0\0" + Image.Exif().tobytes())
    rows.append(row_of(turned))
    heard = []
    page = written(tmp_path / "page.html", [said(row, "What?", "x") for row in rows], on_picture=heard.append)
    made = thumbnails_of(page)
    assert len(made) == len(rows) and heard == [row.path for row in rows]
    for row, data in zip(rows, made, strict=True):
        thumbnail, whole = Image.open(io.BytesIO(data)), images.open_file(Path(row.root) / row.path)
        assert max(thumbnail.size) == min(192, max(whole.size)) and len(data) < 16_000
        assert abs(thumbnail.width * whole.height - thumbnail.height * whole.width) <= 1.01 * max(whole.size) or (
            min(thumbnail.size) == 1
        )
        assert np.abs(colours(thumbnail) - colours(whole)).mean() < 8, row.path


def test_a_large_jpeg_is_decoded_small(photos, monkeypatch):
    sizes = []
    real = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda image: (sizes.append(image.size), real(image))[1])
    report._small((photos / "twenty_megapixels.jpg").read_bytes())
    assert sizes == [(688, 455)]  # an eighth


def test_what_is_not_the_bytes_that_were_answered_about_is_not_shown(tmp_path, some_photos):
    files = {file.stem: file for file in some_photos.iterdir()}
    broken = some_photos / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff" + b"junk" * 40)
    rows = [row_of(file) for file in [*files.values(), broken]]
    video = row_of(files["rocket"], kind="video", path="film.mp4")
    files["chelsea"].unlink()
    edited = bytearray(files["coffee"].read_bytes())
    edited[-1] ^= 1  # the same size
    files["coffee"].write_bytes(edited)
    files["coins"].write_bytes(b"shorter")
    page = written(tmp_path / "page.html", [said(row, "What?", "x") for row in [*rows, video]])
    why = {Path(picture[0]).stem: picture[3] for picture in data_of(page)["pictures"]}
    assert why == {
        "chelsea": "is no longer there",
        "coffee": "was changed since it was answered about",
        "coins": "was changed since it was answered about",
        "rocket": "",
        "broken": "is a JPEG file that is cut off or damaged",
        "film": "is a video",
    }
    assert len(thumbnails_of(page)) == 1


def test_equal_bytes_are_in_the_page_once_and_rows_once(tmp_path, some_photos):
    shutil.copyfile(some_photos / "coffee.png", some_photos / "copy.png")
    coffee, copy = row_of(some_photos / "coffee.png"), row_of(some_photos / "copy.png")
    others = [row_of(some_photos / name) for name in ("coins.png", "rocket.jpg")]
    shown = [(coffee,), (others[0],), (copy,), (coffee, others[1], coffee)]
    page = written(tmp_path / "page.html", [said(rows, q, "x") for rows in shown for q in ("a", "b")])
    data = data_of(page)
    assert len(thumbnails_of(page)) == 3
    assert [(p[0], p[2]) for p in data["pictures"]] == [
        ("coffee.png", 0), ("coins.png", 1), ("copy.png", 0), ("rocket.jpg", 2)
    ]  # fmt: skip
    assert [(card[0], len(card[2])) for card in data["cards"]] == [([0], 2), ([1], 2), ([2], 2), ([0, 3, 0], 2)]


def test_thumbnails_come_in_blocks_in_their_order(tmp_path):
    rows = []
    for number in range(report.BLOCK + 3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(row_of(tmp_path / f"{number}.png"))
    page = written(tmp_path / "page.html", [said(row, "What?", "x") for row in rows])
    assert page.read_text().count('class="thumbnails">') == 2
    reds = [Image.open(io.BytesIO(data)).convert("RGB").getpixel((4, 4))[0] for data in thumbnails_of(page)]
    assert all(abs(red - number) <= 6 for number, red in enumerate(reds))
    assert [picture[2] for picture in data_of(page)["pictures"]] == list(range(len(rows)))


# ------------------------------------------------------------------------------------------------------- in the data


def test_verdicts_and_marks_and_figures(tmp_path):
    a, b, c, d = (no_row(f"{name}.jpg") for name in "abcd")
    page = written(tmp_path / "page.html", [
        scored(a, "dog", 0.9, severity="warn"), scored(a, "gun", 0.97, severity="block"),
        scored(b, "dog", 0.1, severity="warn"), said(b, "Which?", "", finish_reason="skipped", id="gun"),
        said(c, "What?", "A long st", finish_reason="length"),
        scored(d, "dog", 1.0, severity="info"),
    ])  # fmt: skip
    data = data_of(page)
    assert [data["verdicts"][card[1]] if card[1] >= 0 else None for card in data["cards"]] == [
        "block", "pass", None, "info"
    ]  # fmt: skip
    first = data["cards"][0][2][0]
    assert first[:4] == [0, data["texts"].index("yes"), report._FLAGGED, data["verdicts"].index("warn")]
    assert first[4] == [0.9, 0.1] and first[5] == [round(math.log(0.9) - 0.1, 6), round(math.log(0.1) - 0.1, 5)]
    assert data["cards"][1][2][1][2] == report._SKIPPED and data["cards"][2][2][0][2] == report._CUT
    assert data["cards"][3][2][0][5] == [-0.1, None]  # JSON has no infinity
    assert data["questions"][0] == ["dog", "Is it so?", [data["texts"].index("yes"), data["texts"].index("no")]]


def test_coverage_is_in_the_data_and_marks_answers_that_mean_little(tmp_path):
    row, shown = no_row("a.jpg"), (0.9, 0.0100001, 0.0099999, 3.21987e-12, 0.99999)
    answers = [scored(row, f"check-{number}", 0.9, coverage=coverage) for number, coverage in enumerate(shown)]
    answers += [
        scored(row, "raised", 0.9, coverage=1e-5, severity="warn"),
        replace(scored(row, "unknown", 0.9), logprobs=None),
        said(row, "What?", "x"),
    ]
    told = data_of(written(tmp_path / "page.html", answers))["cards"][0][2]
    assert [answer[6] for answer in told[:7]] == [0.9, 0.01, 0.01, 3.22e-12, 1.0, 1e-5, None]
    few = report._UNCOVERED
    assert [answer[2] for answer in told] == [0, 0, few, few, 0, few + report._FLAGGED, 0, 0]


def test_the_data_is_compact(tmp_path):
    def many():
        for number in range(200):
            for check in range(20):
                yield scored(no_row(f"{number}.jpg"), f"check-{check}", number / 200, severity="warn")

    assert written(tmp_path / "page.html", many()).stat().st_size < 70_000 + 200 * 20 * 50


# ----------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def window():
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser at hand ({', '.join(browser.NAMES)})")
    with browser.Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(photos, tmp_path_factory) -> Path:
    """Five cards: four pictures with two checks, and two pictures together."""
    rows = [row_of(photos / name) for name in ("chelsea.png", "coffee.png", "rocket.jpg", "turned.jpg")]
    answers = []
    for row, dog, gun, text in zip(
        rows,
        (0.9, 0.2, 0.7, 0.05),
        (0.1, 0.8, 0.3, 0.01),
        ("A cat.", "Ein Kaffee in Übersee", "火箭", "A roof"),
        strict=True,
    ):
        answers += [
            scored(row, "dog", dog, severity="warn", question="Is there a dog?"),
            scored(row, "gun", gun, severity="block", question="Is there a weapon?"),
            said(row, "Is it real?", "", finish_reason="skipped", id="real"),
            said(row, "What is it?", text, finish_reason="length" if text == "A roof" else "stop"),
        ]
    answers.append(said((rows[0], rows[1]), "What differs?", "Nearly all."))
    return written(tmp_path_factory.mktemp("reports") / "page.html", answers)


NAMES = "[...document.querySelectorAll('.card h3')].map(h => h.textContent)"
CARDS = "document.querySelectorAll('.card').length"


def names(window) -> list[str]:
    return window.evaluate(NAMES)


@pytest.fixture
def opened(window, page):
    window.media()
    window.open(page)
    yield window
    assert window.errors == []
    assert [url for url in window.requests if not url.startswith(("data:image/", "file:"))] == []
    assert len([url for url in window.requests if url.startswith("file:")]) == 1


def search(window, text: str) -> None:
    window.evaluate("(() => { const s = document.querySelector('#search'); s.focus(); s.select() })()")
    window.type(text)
    window.wait(f"new URLSearchParams(location.hash.slice(1)).get('q') === {json.dumps(text)}")


def test_every_card_is_drawn_with_picture_answers_and_verdict(opened):
    alone = ["chelsea.png", "coffee.png", "rocket.jpg", "turned.jpg"]
    assert names(opened) == [*alone, "chelsea.png · coffee.png"]
    opened.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    sizes = opened.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    assert len(sizes) == 6 and all(max(size) == 192 for size in sizes)
    assert sizes[3][0] < sizes[3][1]  # turned upright
    badges = opened.evaluate("[...document.querySelectorAll('.title .badge')].map(b => b.textContent)")
    assert badges == ["! warn", "✕ block", "! warn", "✓ pass"]
    line = opened.evaluate("document.querySelector('.line').innerText.split(/\\s+/).filter(Boolean).join(' ')")
    assert line == "dog yes ! warn 90 %"
    assert "Is there a dog?\n\nyes  90.0 %\nno  10.0 %" in opened.evaluate("document.querySelector('.line').title")
    assert opened.evaluate("[...document.querySelectorAll('.said dd')].at(3).textContent") == "A roof…"
    assert opened.evaluate("document.querySelector('.card h3').title").endswith("/chelsea.png")
    assert opened.evaluate("document.title") == "Postcards" and "/albums/<postcards>" in opened.evaluate(
        "document.querySelector('#told').textContent"
    )


def test_verdicts_and_answers_filter_and_the_address_keeps_them(opened, page):
    counts = opened.evaluate("[...document.querySelectorAll('#verdicts button')].map(b => b.textContent)")
    assert counts == ["4pictures", "1✕ block", "2! warn", "1✓ pass"]
    opened.click("#verdicts [data-verdict='2']")
    assert names(opened) == ["chelsea.png", "rocket.jpg"]
    opened.click("#verdicts [data-verdict='3']")
    assert names(opened) == ["chelsea.png", "coffee.png", "rocket.jpg"]
    opened.click("#questions [data-question='0'][title^='yes']")
    assert names(opened) == ["chelsea.png", "rocket.jpg"]
    assert (
        opened.evaluate("document.querySelector('#questions [data-question]').getAttribute('aria-pressed')") == "true"
    )
    assert opened.evaluate("document.querySelector('#count').textContent") == "2 of 5"
    address = opened.evaluate("location.hash")
    opened.evaluate("history.back()")
    opened.wait(f"{CARDS} === 3")
    opened.evaluate("history.back()")
    opened.wait(f"{CARDS} === 2")
    opened.open(page, address)
    assert names(opened) == ["chelsea.png", "rocket.jpg"]
    opened.click("#chips .chip:last-child")
    assert len(names(opened)) == 5 and opened.evaluate("location.hash") == ""


def test_search_finds_names_answers_and_questions_in_any_script(opened):
    for text, found in (
        ("ROCKET", ["rocket.jpg"]), ("übersee", ["coffee.png"]), ("火", ["rocket.jpg"]),
        ("cat chelsea", ["chelsea.png"]), ("cat rocket", []), ("differs", ["chelsea.png · coffee.png"]),
        ("weapon", ["chelsea.png", "coffee.png", "rocket.jpg", "turned.jpg"]), ("real", []),
    ):  # fmt: skip
        search(opened, text)
        assert names(opened) == found, text
    assert opened.evaluate("document.querySelector('#nothing').hidden") is False
    search(opened, "cat")
    assert opened.evaluate("document.querySelector('.card mark').textContent") == "cat"
    opened.evaluate("history.back()")  # a search is one entry, however many letters
    opened.wait(f"{CARDS} === 5")


def test_sorting_by_name_verdict_and_probability(opened):
    def sort(value: str) -> None:
        opened.evaluate(
            f"(() => {{ const s = document.querySelector('#sort'); s.value = {json.dumps(value)};"
            " s.dispatchEvent(new Event('change')) })()"
        )

    sort("verdict")
    assert names(opened)[:2] == ["coffee.png", "chelsea.png"]
    sort("p0")
    assert names(opened) == ["chelsea.png", "rocket.jpg", "coffee.png", "turned.jpg", "chelsea.png · coffee.png"]
    opened.click("#direction")
    assert names(opened) == ["turned.jpg", "coffee.png", "rocket.jpg", "chelsea.png", "chelsea.png · coffee.png"]
    opened.evaluate(
        "(() => { const s = document.querySelector('#sort-answer'); s.selectedIndex = 1;"
        " s.dispatchEvent(new Event('change')) })()"
    )
    assert names(opened)[0] == "chelsea.png" and "sort=p%3Adog%3Ano" in opened.evaluate("location.hash")
    sort("name")
    opened.click("#direction")
    assert names(opened)[0] == "turned.jpg"


@pytest.fixture
def uncovered(window, tmp_path) -> Path:
    """Five cards asked `event`, two of them for nothing, one not at all; a raised check is not covered either."""
    answers = []
    for name, event, coverage in (("a", 0.6, 0.5), ("b", 0.99, 3e-12), ("c", 0.3, 1.0), ("d", 0.001, 0.0042)):
        answers.append(scored(no_row(f"{name}.jpg"), "event", event, coverage=coverage, question="Is it a wedding?"))
        answers.append(scored(no_row(f"{name}.jpg"), "gun", event, coverage=coverage, severity="block"))
    answers.append(scored(no_row("e.jpg"), "other", 0.5))
    page = written(tmp_path / "page.html", answers)
    window.resize(1280, 900)
    window.media()
    window.open(page)
    return page


LITTLE = "he model would have said none of these answers by itself (coverage {}): their probabilities mean little"


def test_an_answer_that_is_not_covered_is_grey_and_marked(window, uncovered):
    lines = window.evaluate(
        "[...document.querySelectorAll('.line')].map(l => {"
        " const s = getComputedStyle(l.querySelector('dd span')), mark = l.querySelector('.unsure');"
        " return {said: l.innerText.split(/\\s+/).filter(Boolean).join(' '), bar: !!l.querySelector('.bar'),"
        " style: s.fontStyle, colour: s.color, whole: getComputedStyle(l).color, title: l.title,"
        " mark: mark && mark.getAttribute('aria-label')} })"
    )
    assert [line["said"] for line in lines] == [
        "event yes 60 %", "gun yes ✕ block 60 %", "event yes ?", "gun yes ✕ block ?",
        "event no 70 %", "gun no 70 %", "event no ?", "gun no ?", "other yes 50 %",
    ]  # fmt: skip
    for line in lines:
        doubtful = line["said"].endswith("?")
        assert (line["bar"], line["style"]) == ((False, "italic") if doubtful else (True, "normal"))
        assert ("coverage" in line["title"]) is bool(line["mark"]) is doubtful
        assert (line["colour"] != line["whole"]) is (doubtful and "block" not in line["said"])  # grey, or the verdict's
    assert lines[1]["colour"] == lines[3]["colour"]
    assert "T" + LITTLE.format("3e-12") + "." in lines[2]["title"] and "yes  99.0 %" in lines[2]["title"]
    assert lines[6]["mark"] == "t" + LITTLE.format("0.0042")
    badges = window.evaluate("[...document.querySelectorAll('.title .badge')].map(b => b.textContent)")
    assert badges == ["✕ block", "✕ block", "✓ pass", "✓ pass"]
    panels = window.evaluate("[...document.querySelectorAll('.panel')].map(p => p.querySelector('p')?.textContent)")
    assert panels == ["2 not covered", "2 not covered", None] and window.errors == []


def test_the_large_card_has_every_coverage(window, uncovered):
    notes = "[...document.querySelectorAll('dialog .note')].map(n => n.textContent)"
    styles = "[...new Set([...document.querySelectorAll('dialog td')].map(n => getComputedStyle(n).fontStyle))]"
    for card, note, style in (
        (1, "Coverage 0.5", "normal"), (2, "? T" + LITTLE.format("3e-12") + ".", "italic"),
        (3, "Coverage >0.999", "normal"), (4, "? T" + LITTLE.format("0.0042") + ".", "italic"),
    ):  # fmt: skip
        window.open(uncovered, f"#card={card}")
        window.wait("document.querySelector('dialog').open")
        assert window.evaluate(notes) == [note, note] and window.evaluate(styles) == [style], card


def test_sorting_puts_what_is_not_covered_behind_either_way(window, uncovered):
    window.open(uncovered, "#sort=p:event:yes")
    assert names(window) == ["a.jpg", "c.jpg", "b.jpg", "d.jpg", "e.jpg"]
    window.open(uncovered, "#sort=p:event:yes&reversed=1")
    assert names(window) == ["c.jpg", "a.jpg", "b.jpg", "d.jpg", "e.jpg"]


@pytest.mark.parametrize("width", [1280, 360])
def test_long_names_have_the_room_they_need_and_no_more(window, tmp_path, width):
    checks = ("dog", "house_colour", "an_identifier_as_long_as_hardly_anyone_would_write_it_in_earnest_or_in_jest")
    answers = [
        scored(no_row(f"{card}.jpg"), id, 0.99, severity="block", coverage=0.9)
        for card, ids in enumerate((checks[:1], checks[:2], checks))
        for id in ids
    ]
    window.resize(width, 900)
    try:
        window.open(written(tmp_path / "page.html", answers))
        told = window.evaluate(
            "[...document.querySelectorAll('.card')].map(c => [...c.querySelectorAll('.line')].map(l => {"
            " const t = l.querySelector('dt'), d = l.querySelector('dd'), r = document.createRange();"
            " r.selectNodeContents(t);"
            " return {cut: t.scrollWidth > t.clientWidth, share: t.getBoundingClientRect().width / c.clientWidth,"
            " rows: new Set([...r.getClientRects()].map(x => x.top)).size, at: d.getBoundingClientRect().left,"
            " spilt: d.scrollWidth > d.clientWidth, inside: l.scrollWidth <= l.clientWidth} }))"
        )
        assert not any(line["cut"] or line["spilt"] or not line["inside"] for card in told for line in card)
        assert [line["rows"] for line in told[1]] == [1, 1]  # whole
        assert told[2][2]["rows"] > 1 and 0.35 < told[2][2]["share"] <= 0.45
        assert told[0][0]["share"] < told[1][0]["share"] < told[2][0]["share"]
        assert all(len({line["at"] for line in card}) == 1 for card in told)
        assert window.evaluate("document.documentElement.scrollWidth <= innerWidth") and window.errors == []
    finally:
        window.resize(1280, 900)


def test_skipped_answers_are_shown_when_asked_for(opened):
    skipped = "[...document.querySelectorAll('.card .skipped')].map(s => s.textContent)"
    assert opened.evaluate(skipped) == []
    opened.click("#skip")
    assert opened.evaluate(skipped) == ["realskipped"] * 4


def test_a_card_opens_large_by_mouse_and_keys_and_back_closes_it(opened):
    opened.click(".card[data-index='1'] .pictures")
    opened.wait("document.querySelector('dialog').open")
    text = opened.evaluate("document.querySelector('dialog').innerText")
    assert "Is there a weapon?" in text and "80.0 %" in text and f"ln −{-math.log(0.8) + 0.1:.3f}" in text
    assert "Coverage 0.905" in text and "/coffee.png" in text
    opened.key("ArrowRight")
    assert opened.evaluate("document.querySelector('#dialog-title').textContent") == "rocket.jpg"
    assert opened.evaluate("location.hash") == "#card=3"
    opened.key("Escape")
    opened.wait("!document.querySelector('dialog').open && location.hash === ''")
    assert opened.evaluate("document.activeElement.dataset.index") == "2"  # where one was last
    opened.key("ArrowLeft")
    opened.key("Enter")
    opened.wait("document.querySelector('dialog').open && location.hash === '#card=2'")
    opened.evaluate("history.back()")
    opened.wait("!document.querySelector('dialog').open")
    opened.key("/")
    assert opened.evaluate("document.activeElement.id") == "search"


def test_an_address_of_nonsense_is_taken_calmly(opened, page):
    opened.open(page, "#q=&v=constructor,,warn&a=%25E0%25A4%25A&a=dog:never&a=:::&sort=p:dog:&card=-7&card=1e9&x=%")
    assert names(opened) == ["chelsea.png", "rocket.jpg"]
    opened.open(page, "#card=5")
    opened.wait("document.querySelector('dialog').open")
    assert opened.evaluate("document.querySelector('#dialog-title').textContent") == "chelsea.png · coffee.png"


def test_hostile_texts_run_nothing(window, tmp_path):
    bad = (
        "</script><script>hit=1</script><img src=x onerror='hit=2'><svg onload=hit=3>\"'`${hit=4}\u202eabc\u2028\udc80"
    )
    answers = [
        scored(no_row(bad), "<b>" + bad.replace(" ", "_"), 0.9, severity="block", question=bad),
        said(no_row(bad), bad, bad), said(no_row("__proto__"), "constructor", "__proto__", id="toString"),
        said(no_row("none.jpg"), "What?", ""),
    ]  # fmt: skip
    window.open(written(tmp_path / "page.html", answers, title=bad, told={bad: bad}))
    window.click("#questions [data-question='0']")
    assert window.evaluate(CARDS) == 1
    window.click(".card .pictures")
    window.wait("document.querySelector('dialog').open")
    assert window.evaluate("typeof hit") == "undefined" and window.errors == []
    assert window.evaluate("document.querySelectorAll('svg, main img, b b, script:not([type])').length") == 1  # its own
    shown = bad.replace("\u202e", "\\u202e").replace("\u2028", "\\u2028").replace("\udc80", "\\udc80")
    assert shown in window.evaluate("document.querySelector('dialog').textContent")
    assert window.evaluate("document.querySelector('h1').textContent") == shown
    window.open(tmp_path / "page.html", "#a=toString:__proto__")
    assert names(window) == ["__proto__"] and window.errors == []


def test_the_policy_stops_what_is_not_the_pages_own(window, tmp_path):
    page = written(tmp_path / "page.html", [])
    page.write_text(
        page.read_text().replace("<main>", "<main><script>hit=1</script><img src='https://example.org/x.png'>")
    )
    window.open(page)
    assert window.evaluate("typeof hit") == "undefined" and len(window.errors) >= 2
    assert "There are no answers" in window.evaluate("document.querySelector('#nothing').textContent")


def test_thousands_of_pictures_and_only_those_in_view_are_drawn(window, tmp_path):
    def many():
        for number in range(5000):
            row = no_row(f"{number % 50}/{number:05}.jpg")
            for check in range(20):
                yield scored(row, f"check-{check}", (number * 7 + check) % 1000 / 1000, severity="warn")

    window.resize(1280, 900)
    window.open(written(tmp_path / "page.html", many()))
    assert 0 < window.evaluate(CARDS) < 100
    frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    for _ in range(3):
        window.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        window.evaluate(frames)
    assert 0 < window.evaluate(CARDS) < 100 and names(window)[-1] == "04999.jpg"
    bottom = "document.querySelector('#cards .row:last-child').getBoundingClientRect().bottom"
    assert window.evaluate(f"{bottom} <= innerHeight && {bottom} > innerHeight - 200")
    window.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    window.evaluate(frames)
    inside = (
        "document.elementsFromPoint(innerWidth / 3, 600).some(e => e.closest('.card'))"
        " && [...document.querySelectorAll('.card')].length < 100"
    )
    assert window.evaluate(inside)
    search(window, "0432")
    assert names(window) == [f"{n:05}.jpg" for n in range(5000) if "0432" in f"{n % 50}/{n:05}.jpg"]
    search(window, "9")
    found = sum("9" in f"{n % 50}/{n:05}.jpg" for n in range(5000))
    assert window.evaluate("document.querySelector('#count').textContent") == f"{found:,} of 5,000"
    assert window.evaluate(CARDS) < 100 and window.errors == []


def test_cards_stay_where_they_are_while_one_scrolls(window, tmp_path):
    """Heights are estimates until a row is drawn: those above must not push what is in view."""
    answers = [said(no_row(f"{n}.jpg"), "What?", "word " * (n * 7 % 60)) for n in range(400)]
    window.open(written(tmp_path / "page.html", answers))
    seen = (
        "[...document.querySelectorAll('.card')].map(c => [c.dataset.index, c.getBoundingClientRect().top])"
        ".find(([, top]) => top > 100)"
    )
    window.evaluate("scrollTo(0, 9000)")
    window.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    for _ in range(12):
        index, before = window.evaluate(seen)
        window.evaluate("scrollBy(0, -300)")
        window.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        after = window.evaluate(f"document.querySelector('[data-index=\"{index}\"]').getBoundingClientRect().top")
        assert after - before == pytest.approx(300, abs=2)


def test_on_a_phone_nothing_is_wider_than_the_screen(window, page):
    window.resize(360, 740)
    try:
        window.open(page)
        assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (
            window.evaluate(
                "new Set([...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().x)).size"
            )
            == 1
        )
    finally:
        window.resize(1280, 900)


def test_on_paper_all_cards_are_drawn(window, tmp_path):
    window.open(written(tmp_path / "page.html", [said(no_row(f"{n}.jpg"), "What?", "x") for n in range(300)]))
    assert window.evaluate(CARDS) < 100
    window.media(kind="print")
    window.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert window.evaluate(CARDS) == 300
    assert window.evaluate("getComputedStyle(document.querySelector('.tools')).display") == "none"
    window.media()
    window.evaluate("dispatchEvent(new Event('afterprint'))")
    assert window.evaluate(CARDS) < 100
