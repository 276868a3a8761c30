"""The report: one page that loads nothing from anywhere and shows what was answered about."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvsplit.errors import DiskError, UsageError
from qvsplit.output import report, thumbnails
from qvsplit.output.levels import VERDICTS
from qvsplit.sources import images, pixels
from tests.support.report_pages import data_of, failed_row, generated, no_row, row_of, scored, thumbnails_of, written

# --------------------------------------------------------------------------------------------------------- the file


def test_the_page_names_no_other_place_and_forbids_all_but_its_own(tmp_path, some_photos):
    rows = [row_of(file) for file in sorted(some_photos.iterdir())]
    page = written(
        tmp_path / "page.html", [generated(row, "What?", "https:// is only text") for row in rows]
    ).read_text()
    code = re.sub(r'<script type="(application/json|text/plain)".*?</script>', "", page, flags=re.DOTALL)
    code = re.sub(r"'sha256-[\w+/=]*'", "", code)  # of which any may have // in it
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
        tmp_path / "page.html", [generated(no_row(hostile), hostile, hostile, id="x")],
        title=hostile, facts={hostile: hostile},
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and "<img" not in text
    assert not re.search("[\u2028\u2029\u202a-\u202e\x00]", text)
    data = data_of(page)
    shown = hostile.replace("\0", "\\x00").replace("\u2028\u2029\u202e\udc80", "\\u2028\\u2029\\u202e\\udc80")
    assert data["title"] == shown and data["facts"] == [[shown, shown]] and shown in data["texts"]
    assert data["items"][0][0] == shown and data["questions"][0][1] == shown


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    page = written(tmp_path / "page.html", [generated(no_row("a.jpg"), "What?", "old")])
    old = page.read_bytes()

    def breaking():
        yield generated(no_row("a.jpg"), "What?", "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(page, breaking())
    monkeypatch.setattr(report.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DiskError, match=r"page\.html: the disk is full"):
        written(page, [generated(no_row("a.jpg"), "What?", "new")])
    monkeypatch.undo()
    assert page.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    written(page, [generated(no_row("a.jpg"), "What?", "new")])
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


def colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((24, 24), Image.Resampling.BOX)).astype(int)


def test_thumbnails_are_small_and_upright_like_what_was_answered_about(tmp_path, photos):
    names = ("turned.jpg", "china.jpg", "retina.jpg", "logo.png", "camera.png", "tall.png", "one_pixel.png")
    rows = [row_of(photos / name) for name in names]
    turned = tmp_path / "cmyk.jpg"
    with Image.open(photos / "china.jpg") as china:
        china.convert("CMYK").save(turned, exif=b"Exif\0\0" + Image.Exif().tobytes())
    rows.append(row_of(turned))
    noted = []
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in rows], on_item=noted.append)
    thumbnails_in_page = thumbnails_of(page)
    assert len(thumbnails_in_page) == len(rows) and noted == [row.path for row in rows]
    for row, data in zip(rows, thumbnails_in_page, strict=True):
        thumbnail, whole = Image.open(io.BytesIO(data)), images.open_file(Path(row.root) / row.path)
        assert max(thumbnail.size) == min(192, max(whole.size)) and len(data) < 16_000
        assert abs(thumbnail.width * whole.height - thumbnail.height * whole.width) <= 1.01 * max(whole.size) or (
            min(thumbnail.size) == 1
        )
        assert np.abs(colours(thumbnail) - colours(whole)).mean() < 8, row.path


def test_a_large_jpeg_is_decoded_small(photos, monkeypatch):
    sizes = []
    real = pixels.to_rgb
    monkeypatch.setattr(pixels, "to_rgb", lambda image: (sizes.append(image.size), real(image))[1])
    thumbnails.small_image((photos / "twenty_megapixels.jpg").read_bytes())
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
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in [*rows, video]])
    why = {Path(image[0]).stem: image[3] for image in data_of(page)["items"]}
    assert why == {
        "chelsea": "was not found",
        "coffee": "has changed since it was encoded",
        "coins": "has changed since it was encoded",
        "rocket": "",
        "broken": "is a JPEG file that is cut off or damaged",
        "film": "was not found",
    }
    assert len(thumbnails_of(page)) == 1


def test_equal_bytes_are_in_the_page_once_and_rows_once(tmp_path, some_photos):
    shutil.copyfile(some_photos / "coffee.png", some_photos / "copy.png")
    coffee, copy = row_of(some_photos / "coffee.png"), row_of(some_photos / "copy.png")
    others = [row_of(some_photos / name) for name in ("coins.png", "rocket.jpg")]
    shown = [(coffee,), (others[0],), (copy,), (coffee, others[1], coffee)]
    page = written(tmp_path / "page.html", [generated(rows, q, "x") for rows in shown for q in ("a", "b")])
    data = data_of(page)
    assert len(thumbnails_of(page)) == 3
    assert [(p[0], p[2]) for p in data["items"]] == [
        ("coffee.png", 0), ("coins.png", 1), ("copy.png", 0), ("rocket.jpg", 2)
    ]  # fmt: skip
    assert [(card[0], len(card[2])) for card in data["cards"]] == [([0], 2), ([1], 2), ([2], 2), ([0, 3, 0], 2)]


def test_thumbnails_come_in_blocks_in_their_order(tmp_path):
    rows = []
    for number in range(thumbnails.BLOCK + 3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(row_of(tmp_path / f"{number}.png"))
    page = written(tmp_path / "page.html", [generated(row, "What?", "x") for row in rows])
    assert page.read_text().count('class="thumbnails">') == 2
    reds = [Image.open(io.BytesIO(data)).convert("RGB").getpixel((4, 4))[0] for data in thumbnails_of(page)]
    assert all(abs(red - number) <= 6 for number, red in enumerate(reds))
    assert [image[2] for image in data_of(page)["items"]] == list(range(len(rows)))


# ------------------------------------------------------------------------------------------------------- in the data


def test_verdicts_and_marks_and_figures(tmp_path):
    a, b, c, d = (no_row(f"{name}.jpg") for name in "abcd")
    page = written(tmp_path / "page.html", [
        scored(a, "dog", 0.9, level="warn"), scored(a, "gun", 0.97, level="block"),
        scored(b, "dog", 0.1, level="warn"), generated(b, "Which?", "", finish_reason="skipped", id="gun"),
        generated(c, "What?", "A long st", finish_reason="length"),
        scored(d, "dog", 1.0, level="info"),
    ])  # fmt: skip
    data = data_of(page)
    assert [data["verdicts"][card[1]] if card[1] >= 0 else None for card in data["cards"]] == [
        "block", "pass", None, "info"
    ]  # fmt: skip
    first = data["cards"][0][2][0]
    assert first[:4] == [0, data["texts"].index("yes"), report.FLAGGED, data["verdicts"].index("warn")]
    assert first[4] == [0.9, 0.1] and first[5] == [round(math.log(0.9) - 0.1, 6), round(math.log(0.1) - 0.1, 5)]
    assert data["cards"][1][2][1][2] == report.SKIPPED and data["cards"][2][2][0][2] == report.CUT
    assert data["cards"][3][2][0][5] == [-0.1, None]  # JSON has no infinity
    assert data["questions"][0] == ["dog", "Is it so?", [data["texts"].index("yes"), data["texts"].index("no")]]


def test_the_reasoning_of_an_answer_is_in_its_card(tmp_path):
    thinking = generated(no_row("a.jpg"), "What?", "A cat.", reasoning="Is it\na cat?")
    page = written(tmp_path / "page.html", [thinking, generated(no_row("b.jpg"), "What?", "A cat.")])
    data = data_of(page)
    (with_thought,), (without,) = (card[2] for card in data["cards"])
    text, thought = (data["texts"].index(one) for one in ("A cat.", "Is it\na cat?"))
    assert with_thought == [0, text, 0, None, None, None, None, thought]
    assert without == with_thought[:3]


def test_what_could_not_be_checked_never_reads_as_pass(tmp_path):
    answers = [
        scored(no_row("a.jpg"), "dog", 0.1, level="warn"),
        generated(
            no_row("a.jpg"), "Is there a gun?", "", id="gun", finish_reason="error", error="the features are damaged"
        ),
        generated(no_row("b.jpg"), "What?", "", finish_reason="error", error="no memory"),
        scored(no_row("c.jpg"), "dog", 0.1, level="warn"),
    ]
    page = written(tmp_path / "page.html", answers, failed=[failed_row("torn.jpg", "is cut off")])
    data = data_of(page)
    assert [data["verdicts"][card[1]] for card in data["cards"]] == ["error", "error", "error", "pass"]
    assert [data["items"][card[0][0]][0] for card in data["cards"]] == ["torn.jpg", "a.jpg", "b.jpg", "c.jpg"]
    assert data["cards"][0][2] == [] and data["texts"][data["cards"][0][3]] == "is cut off"
    assert data["items"][0][3] == "is cut off"  # in place of a thumbnail
    failed = data["cards"][1][2][1]
    assert (failed[2], data["texts"][failed[1]], len(failed)) == (report.FAILED, "the features are damaged", 3)


def test_a_page_says_reasons_as_it_is_told_to(tmp_path):
    answers = [generated(no_row("a.jpg"), "What?", "", finish_reason="error", error="`fps` is low")]
    failed = [failed_row("b.jpg", "`limit` allows more")]
    page = tmp_path / "page.html"
    report.write_report(
        page, answers, title="t", facts={}, failed=failed, worded=lambda text: text.replace("`", "--", 1)
    )
    data = data_of(page)
    assert {"--fps` is low", "--limit` allows more"} <= set(data["texts"])
    assert data["items"][0][3] == "--limit` allows more"


def test_an_image_that_was_read_under_a_higher_limit_has_a_thumbnail(tmp_path, some_photos, monkeypatch):
    row = replace(row_of(some_photos / "coins.png"), width=40_000, height=30_000)
    limits, decode = [], images.decode
    monkeypatch.setattr(
        images, "decode", lambda data, **more: limits.append(more["max_pixels"]) or decode(data, **more)
    )
    page = written(tmp_path / "page.html", [generated(row, "What?", "x")])
    assert data_of(page)["items"][0][2:4] == [0, ""]
    assert limits == [1_200_000_000]


def test_what_failed_is_not_decoded_again_in_this_process(tmp_path, some_photos):
    """It may be the file that crashes its decoder, in a child process."""
    row = row_of(some_photos / "coins.png", status="failed", error="crashes its decoder (SIGSEGV)")
    page = written(tmp_path / "page.html", [], failed=[row])
    assert data_of(page)["items"][0][2:4] == [-1, "crashes its decoder (SIGSEGV)"] and thumbnails_of(page) == []


def test_choice_mass_is_in_the_data_and_marks_answers_that_mean_little(tmp_path):
    row, shown = no_row("a.jpg"), (0.9, 0.500001, 0.499999, 3.21987e-12, 0.99999)
    answers = [scored(row, f"check-{number}", 0.9, choice_mass=choice_mass) for number, choice_mass in enumerate(shown)]
    answers += [
        scored(row, "flagged", 0.9, choice_mass=1e-5, level="warn"),
        replace(scored(row, "unknown", 0.9), logprobs=None),
        generated(row, "What?", "x"),
    ]
    answers_in_page = data_of(written(tmp_path / "page.html", answers))["cards"][0][2]
    assert [answer[6] for answer in answers_in_page[:7]] == [0.9, 0.5, 0.5, 3.22e-12, 1.0, 1e-5, None]
    few = report.UNCERTAIN
    assert [answer[2] for answer in answers_in_page] == [0, 0, few, few, 0, few, 0, 0]
    uncertain = VERDICTS.index("uncertain")
    assert [answer[3] for answer in answers_in_page[:7]] == [0, 0, uncertain, uncertain, 0, uncertain, 0]


def test_the_data_is_compact(tmp_path):
    def many():
        for number in range(200):
            for check in range(20):
                yield scored(no_row(f"{number}.jpg"), f"check-{check}", number / 200, level="warn")

    assert written(tmp_path / "page.html", many()).stat().st_size < 70_000 + 200 * 20 * 50
