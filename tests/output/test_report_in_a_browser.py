"""The report in a real browser: it draws, filters, sorts, and obeys nobody else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import browser
from tests.support.report_pages import clip_row, failed_row, generated, no_row, row_of, scored, written


@pytest.fixture(scope="module")
def window():
    with browser.Browser(browser.required()) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(photos, tmp_path_factory) -> Path:
    """Five cards: four images with two checks, and two images together."""
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
            scored(row, "dog", dog, level="warn", question="Is there a dog?"),
            scored(row, "gun", gun, level="block", question="Is there a weapon?"),
            generated(row, "Is it real?", "", finish_reason="skipped", id="real"),
            generated(row, "What is it?", text, finish_reason="length" if text == "A roof" else "stop"),
        ]
    answers.append(generated((rows[0], rows[1]), "What differs?", "Nearly all."))
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


def test_every_card_is_drawn_with_image_answers_and_verdict(opened):
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
    assert opened.evaluate("[...document.querySelectorAll('.generated dd')].at(3).textContent") == "A roof…"
    assert opened.evaluate("document.querySelector('.card h3').title").endswith("/chelsea.png")
    assert opened.evaluate("document.title") == "Postcards" and "/stores/<postcards>" in opened.evaluate(
        "document.querySelector('#facts').textContent"
    )


def test_verdicts_and_answers_filter_and_the_address_keeps_them(opened, page):
    counts = opened.evaluate("[...document.querySelectorAll('#verdicts button')].map(b => b.textContent)")
    assert counts == ["4images", "1✕ block", "2! warn", "1✓ pass"]
    opened.click("#verdicts [data-verdict='2']")
    assert names(opened) == ["chelsea.png", "rocket.jpg"]
    opened.click("#verdicts [data-verdict='5']")
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


def test_cards_of_what_could_not_be_checked(window, tmp_path):
    answers = [
        scored(no_row("a.jpg"), "dog", 0.1, level="warn"),
        generated(no_row("b.jpg"), "Is it so?", "", id="dog", finish_reason="error", error="features damaged"),
    ]
    window.resize(1280, 900)
    window.media()
    window.open(written(tmp_path / "page.html", answers, failed=[failed_row("torn.jpg", "is cut off")]))
    badges = "[...document.querySelectorAll('.title .badge')].map(b => b.textContent)"
    assert window.evaluate(badges) == ["⊘ error", "✓ pass", "⊘ error"]
    lines = "[...document.querySelectorAll('.line')].map(l => l.innerText.split(/\\s+/).filter(Boolean).join(' '))"
    assert window.evaluate(lines) == ["not encoded ⊘ is cut off", "dog no 90 %", "dog ⊘ features damaged"]
    colours = "[...document.querySelectorAll('.title .badge')].map(b => getComputedStyle(b).color)"
    error, passed, also_error = window.evaluate(colours)
    assert error == also_error != passed
    counts = window.evaluate("[...document.querySelectorAll('#verdicts button')].map(b => b.textContent)")
    assert counts == ["3images", "2⊘ error", "1✓ pass"]
    panel = "[...document.querySelectorAll('.panel p')].map(p => p.textContent)"
    assert window.evaluate(panel) == ["not answered for 1"]
    window.click("#verdicts [data-verdict='4']")
    assert names(window) == ["torn.jpg", "b.jpg"]
    window.open(tmp_path / "page.html", "#sort=verdict")
    assert names(window) == ["torn.jpg", "b.jpg", "a.jpg"]
    window.open(tmp_path / "page.html", "#card=1")
    window.wait("document.querySelector('dialog').open")
    text = window.evaluate("document.querySelector('dialog').innerText")
    assert "Not encoded" in text and "is cut off" in text and "⊘ error" in text
    window.open(tmp_path / "page.html", "#card=3")
    window.wait("document.querySelector('dialog').open")
    assert "features damaged" in window.evaluate("document.querySelector('dialog .text').textContent")
    window.open(tmp_path / "page.html", "#q=cut")
    assert names(window) == ["torn.jpg"] and window.errors == []


@pytest.fixture
def low_mass(window, tmp_path) -> Path:
    """Five cards asked `event`, two of them for nothing, one not at all; of a check with a flag the choice mass may be low, too."""
    answers = []
    for name, event, choice_mass in (("a", 0.6, 0.6), ("b", 0.99, 3e-12), ("c", 0.3, 1.0), ("d", 0.001, 0.0042)):
        answers.append(
            scored(no_row(f"{name}.jpg"), "event", event, choice_mass=choice_mass, question="Is it a wedding?")
        )
        answers.append(scored(no_row(f"{name}.jpg"), "gun", event, choice_mass=choice_mass, level="block"))
    answers.append(scored(no_row("e.jpg"), "other", 0.5))
    page = written(tmp_path / "page.html", answers)
    window.resize(1280, 900)
    window.media()
    window.open(page)
    return page


LITTLE = (
    "he model would rather have said something else than any of the choices (choice mass {}): their probabilities "
    "mean little"
)


def test_an_answer_with_a_low_choice_mass_is_grey_and_marked(window, low_mass):
    lines = window.evaluate(
        "[...document.querySelectorAll('.line')].map(l => {"
        " const s = getComputedStyle(l.querySelector('dd span')), mark = l.querySelector('.unsure');"
        " return {said: l.innerText.split(/\\s+/).filter(Boolean).join(' '), bar: !!l.querySelector('.bar'),"
        " style: s.fontStyle, colour: s.color, whole: getComputedStyle(l).color, title: l.title,"
        " mark: mark && mark.getAttribute('aria-label')} })"
    )
    assert [line["said"] for line in lines] == [
        "event yes 60 %", "gun yes ✕ block 60 %", "event unsure ?", "gun unsure ?",
        "event no 70 %", "gun no 70 %", "event unsure ?", "gun unsure ?", "other yes 50 %",
    ]  # fmt: skip
    for line in lines:
        doubtful = line["said"].endswith("?")
        assert (line["bar"], line["style"]) == ((False, "italic") if doubtful else (True, "normal"))
        assert ("choice mass" in line["title"]) is bool(line["mark"]) is doubtful
        assert (line["colour"] != line["whole"]) is doubtful
    assert "T" + LITTLE.format("3e-12") + "." in lines[2]["title"] and "yes  99.0 %" in lines[2]["title"]
    assert lines[6]["mark"] == "t" + LITTLE.format("0.0042")
    badges = window.evaluate("[...document.querySelectorAll('.title .badge')].map(b => b.textContent)")
    assert badges == ["✕ block", "? uncertain", "✓ pass", "? uncertain"]
    panels = window.evaluate("[...document.querySelectorAll('.panel')].map(p => p.querySelector('p')?.textContent)")
    assert panels == ["2 uncertain", "2 uncertain", None] and window.errors == []


def test_the_large_card_has_every_choice_mass(window, low_mass):
    notes = "[...document.querySelectorAll('dialog .note')].map(n => n.textContent)"
    styles = "[...new Set([...document.querySelectorAll('dialog td')].map(n => getComputedStyle(n).fontStyle))]"
    for card, note, style in (
        (1, "Choice mass 0.6", "normal"), (2, "? T" + LITTLE.format("3e-12") + ".", "italic"),
        (3, "Choice mass >0.999", "normal"), (4, "? T" + LITTLE.format("0.0042") + ".", "italic"),
    ):  # fmt: skip
        window.open(low_mass, f"#card={card}")
        window.wait("document.querySelector('dialog').open")
        assert window.evaluate(notes) == [note, note] and window.evaluate(styles) == [style], card


def test_sorting_puts_a_low_choice_mass_last_either_way(window, low_mass):
    window.open(low_mass, "#sort=p:event:yes")
    assert names(window) == ["a.jpg", "c.jpg", "b.jpg", "d.jpg", "e.jpg"]
    window.open(low_mass, "#sort=p:event:yes&reversed=1")
    assert names(window) == ["c.jpg", "a.jpg", "b.jpg", "d.jpg", "e.jpg"]


@pytest.mark.parametrize("width", [1280, 360])
def test_long_names_have_the_room_they_need_and_no_more(window, tmp_path, width):
    checks = ("dog", "house_colour", "an_identifier_as_long_as_hardly_anyone_would_write_it_in_earnest_or_in_jest")
    answers = [
        scored(no_row(f"{card}.jpg"), id, 0.99, level="block", choice_mass=0.9)
        for card, ids in enumerate((checks[:1], checks[:2], checks))
        for id in ids
    ]
    window.resize(width, 900)
    try:
        window.open(written(tmp_path / "page.html", answers))
        cards = window.evaluate(
            "[...document.querySelectorAll('.card')].map(c => [...c.querySelectorAll('.line')].map(l => {"
            " const t = l.querySelector('dt'), d = l.querySelector('dd'), r = document.createRange();"
            " r.selectNodeContents(t);"
            " return {cut: t.scrollWidth > t.clientWidth, share: t.getBoundingClientRect().width / c.clientWidth,"
            " rows: new Set([...r.getClientRects()].map(x => x.top)).size, at: d.getBoundingClientRect().left,"
            " spilt: d.scrollWidth > d.clientWidth, inside: l.scrollWidth <= l.clientWidth} }))"
        )
        assert not any(line["cut"] or line["spilt"] or not line["inside"] for card in cards for line in card)
        assert [line["rows"] for line in cards[1]] == [1, 1]  # whole
        assert cards[2][2]["rows"] > 1 and 0.35 < cards[2][2]["share"] <= 0.45
        assert cards[0][0]["share"] < cards[1][0]["share"] < cards[2][0]["share"]
        assert all(len({line["at"] for line in card}) == 1 for card in cards)
        assert window.evaluate("document.documentElement.scrollWidth <= innerWidth") and window.errors == []
    finally:
        window.resize(1280, 900)


def test_skipped_answers_are_shown_when_asked_for(opened):
    skipped = "[...document.querySelectorAll('.card .skipped')].map(s => s.textContent)"
    assert opened.evaluate(skipped) == []
    opened.click("#skip")
    assert opened.evaluate(skipped) == ["realskipped"] * 4


def test_a_card_opens_large_by_mouse_and_keys_and_back_closes_it(opened):
    opened.click(".card[data-index='1'] .images")
    opened.wait("document.querySelector('dialog').open")
    text = opened.evaluate("document.querySelector('dialog').innerText")
    assert "Is there a weapon?" in text and "80.0 %" in text and f"ln −{-math.log(0.8) + 0.1:.3f}" in text
    assert "Choice mass 0.905" in text and "/coffee.png" in text
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
        scored(no_row(bad), "<b>" + bad.replace(" ", "_"), 0.9, level="block", question=bad),
        generated(no_row(bad), bad, bad), generated(no_row("__proto__"), "constructor", "__proto__", id="toString"),
        generated(no_row("none.jpg"), "What?", ""),
    ]  # fmt: skip
    window.open(written(tmp_path / "page.html", answers, title=bad, facts={bad: bad}))
    window.click("#questions [data-question='0']")
    assert window.evaluate(CARDS) == 1
    window.click(".card .images")
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


def test_thousands_of_images_and_only_those_in_view_are_drawn(window, tmp_path):
    def many():
        for number in range(5000):
            row = no_row(f"{number % 50}/{number:05}.jpg")
            for check in range(20):
                yield scored(row, f"check-{check}", (number * 7 + check) % 1000 / 1000, level="warn")

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
    answers = [generated(no_row(f"{n}.jpg"), "What?", "word " * (n * 7 % 60)) for n in range(400)]
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
    window.open(written(tmp_path / "page.html", [generated(no_row(f"{n}.jpg"), "What?", "x") for n in range(300)]))
    assert window.evaluate(CARDS) < 100
    window.media(kind="print")
    window.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert window.evaluate(CARDS) == 300
    assert window.evaluate("getComputedStyle(document.querySelector('.tools')).display") == "none"
    window.media()
    window.evaluate("dispatchEvent(new Event('afterprint'))")
    assert window.evaluate(CARDS) < 100


def test_videos_are_shown_by_a_few_frames_with_their_seconds(window, photos, tmp_path):
    whole = clip_row(tmp_path / "film.mp4", range(40))
    parts = [replace(whole, part=n, start=2.0 * n, end=2.0 * n + 2, media=None) for n in range(2)]
    portrait = clip_row(tmp_path / "portrait.mp4", range(40), size=(90, 160))
    photo = row_of(photos / "coffee.png")
    shown = [(part,) for part in parts] + [(portrait,), (photo,), (parts[1], photo)]
    answers = [scored(rows[0], "dog", 0.9) for rows in shown[:4]] + [generated(shown[4], "What differs?", "All.")]
    failed = [replace(failed_row("torn.mp4", "is cut off"), kind="video")]
    window.open(written(tmp_path / "page.html", answers, failed=failed))
    assert names(window) == [
        "torn.mp4", "film.mp4#0", "film.mp4#1", "portrait.mp4", "coffee.png", "film.mp4#1 · coffee.png"
    ]  # fmt: skip
    times = window.evaluate("[...document.querySelectorAll('.card .time')].map(t => t.textContent)")
    assert times == ["0:00 to 0:02 of 0:04", "0:02 to 0:04 of 0:04", "0:04", "0:02 to 0:04 of 0:04"]
    window.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    sizes = window.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes[:3] == [[322, 182], [322, 182], [4 * 90 + 6, 160]]
    boxes = window.evaluate(
        "[...document.querySelectorAll('.card .time, .card img')].every(e => { const r = e.getBoundingClientRect(), "
        "b = e.closest('.images').getBoundingClientRect(); return r.width > 20 && r.left >= b.left && r.right <= b.right "
        "&& r.top >= b.top && r.bottom <= b.bottom + .5 })"
    )
    assert boxes
    assert window.evaluate("document.querySelector('#verdicts button').textContent") == "5items"
    search(window, "0:00")
    assert names(window) == ["film.mp4#0"]
    window.click(".card .images")
    caption = window.evaluate("document.querySelector('figcaption').textContent")
    assert caption.endswith("film.mp4#0  160 × 90  0:00 to 0:02 of 0:04"), caption
    assert window.evaluate("document.querySelector('.sheets img').getBoundingClientRect().height") <= 421
    assert window.errors == []


@pytest.mark.parametrize(
    ("parts", "said"), [((None, None), "2videos"), ((0, 1), "2clips"), ((None,), "1video"), ((0,), "1clip")]
)
def test_a_page_of_videos_counts_videos_or_clips(window, tmp_path, parts, said):
    rows = [
        replace(no_row("a.mp4" if part is not None else f"{number}.mp4"), kind="video", part=part or 0,
                start=None if part is None else 2.0 * part, end=None if part is None else 2.0 * part + 2)
        for number, part in enumerate(parts)
    ]  # fmt: skip
    window.open(written(tmp_path / "page.html", [generated(row, "What?", "x") for row in rows]))
    assert window.evaluate("document.querySelector('#verdicts button').textContent") == said
