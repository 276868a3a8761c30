"""`ask --checks --fail-on`: the gate fails closed. The model is a fake; what the commands make of its answers is real."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qvsplit import ask
from qvsplit.errors import OutOfMemory
from qvsplit.output.levels import LEVELS
from tests.support.fake_engine import FakeEngine, MemoryStore, question_of, row

CHECKS = """
[[check]]
id = "dog"
question = "Is there a dog?"
choices = ["yes", "no"]
flag = "yes"
level = "warn"

[[check]]
id = "gun"
question = "Is there a gun?"
choices = ["yes", "no"]
flag = "yes"
level = "block"
"""
CLEAN = {"yes": 0.1, "no": 0.9}
REASON = "is a JPEG file that is cut off or damaged"
TORN = row("torn.jpg", status="failed", error=REASON, error_kind="content", has_features=False, grid_thw=None,
           n_tokens=None, placeholder=None)  # fmt: skip


@pytest.fixture
def ask_store(run_cli, tmp_path, monkeypatch):
    """Run `ask` on these rows, answered by this rule; gives exit code, stdout and stderr."""
    (tmp_path / "checks.toml").write_text(CHECKS)

    def run(rows, *words, rule=lambda request: CLEAN, checks=True):
        store = MemoryStore(rows)
        session = ask.Session(store, FakeEngine(rule), checkpoint=SimpleNamespace(name="tiny"))
        monkeypatch.setattr("qvsplit.store.opening.open_store", lambda *places, **_: store)
        monkeypatch.setattr("qvsplit.ask.load_session", lambda *_, **__: session)
        return run_cli("ask", *(["--checks", tmp_path / "checks.toml"] if checks else []), *words)

    return run


@pytest.mark.parametrize("level", LEVELS)
def test_a_failed_image_trips_every_level(ask_store, level):
    code, out, said = ask_store([row("a.jpg"), TORN], "--fail-on", level)
    assert code == 8
    assert ["torn.jpg", "verdict", "error", REASON] in [line.split("\t") for line in out.splitlines()]
    assert ["a.jpg", "verdict", "pass", ""] in [line.split("\t") for line in out.splitlines()]
    assert said.splitlines() == [f"qvsplit: failed: torn.jpg {REASON}", "qvsplit: error: 1, pass: 1"]


@pytest.mark.parametrize("words", [(), ("--together",)])
def test_also_when_nothing_else_is_selected(ask_store, words):
    code, out, said = ask_store([row("a.jpg"), TORN], "--image", "torn*", "--fail-on", "block", *words)
    assert (code, out) == (8, f"torn.jpg\tverdict\terror\t{REASON}\n")
    assert said.splitlines() == [f"qvsplit: failed: torn.jpg {REASON}", "qvsplit: error: 1"]


def test_without_the_gate_that_nothing_could_be_asked_is_an_error(ask_store):
    code, out, said = ask_store([TORN])
    assert (code, out) == (2, f"torn.jpg\tverdict\terror\t{REASON}\n")
    assert said.splitlines()[-1].startswith("qvsplit: none of the selected images and videos can be asked about")


def test_without_the_gate_a_failed_image_is_named_and_the_others_are_answered(ask_store):
    code, out, said = ask_store([row("a.jpg"), TORN], "What is it?", checks=False, rule=lambda request: "a house")
    assert (code, out) == (0, "a.jpg\tWhat is it?\ta house\n")
    assert said == f"qvsplit: failed: torn.jpg {REASON}\n"


def test_a_failed_image_that_is_not_selected_is_not_in_the_verdicts(ask_store):
    code, out, said = ask_store([row("a.jpg"), TORN], "--image", "a.jpg", "--fail-on", "info")
    assert (code, said) == (0, "qvsplit: pass: 1\n")
    assert "torn.jpg" not in out


def test_json(ask_store):
    code, out, _ = ask_store([row("a.jpg"), TORN], "--fail-on", "block", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 8
    assert lines[0] == {"path": "torn.jpg", "root": "/photos", "verdict": "error", "error": REASON}
    assert lines[-1] == {"path": "a.jpg", "root": "/photos", "verdict": "pass", "flagged": []}


def broken_for(path, question="Is there a gun?"):
    """A rule: `question` about one image has no answer."""
    content = row(path).content

    def rule(request):
        failing = question_of(request) == question and tuple(request.features[0]) == content
        return OutOfMemory("it does not fit") if failing else CLEAN

    return rule


@pytest.mark.parametrize("level", LEVELS)
def test_a_question_without_an_answer_trips_every_level(ask_store, level):
    rows = [row("a.jpg"), row("b.jpg")]
    code, out, said = ask_store(rows, "--fail-on", level, rule=broken_for("b.jpg"))
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 8
    assert ["b.jpg", "gun", "", "error", "it does not fit"] in lines
    assert ["b.jpg", "verdict", "error", "it does not fit"] in lines
    assert ["a.jpg", "verdict", "pass", ""] in lines
    assert "qvsplit: not answered: b.jpg: gun: it does not fit" in said
    assert said.splitlines()[-1] == "qvsplit: error: 1, pass: 1"


def test_without_the_gate_the_error_is_the_exit_code_once_all_others_are_answered(ask_store):
    rows = [row("a.jpg"), row("b.jpg"), row("c.jpg")]
    code, out, _ = ask_store(rows, "--json", rule=broken_for("b.jpg"))
    verdicts = {line["path"]: line for line in map(json.loads, out.splitlines()) if "verdict" in line}
    assert code == OutOfMemory.exit_code == 3
    assert {path: line["verdict"] for path, line in verdicts.items()} == {
        "a.jpg": "pass", "b.jpg": "error", "c.jpg": "pass"
    }  # fmt: skip
    assert verdicts["b.jpg"]["error"] == "it does not fit"


def test_an_error_hides_no_flag(ask_store):
    def rule(request):
        return {"yes": 0.9, "no": 0.1} if question_of(request) == "Is there a dog?" else OutOfMemory("no room")

    code, out, _ = ask_store([row("a.jpg")], "--fail-on", "block", "--json", rule=rule)
    assert code == 8
    assert json.loads(out.splitlines()[-1]) == {
        "path": "a.jpg", "root": "/photos", "verdict": "error", "flagged": ["dog"], "error": "no room"
    }  # fmt: skip


def test_with_out_and_report_only_stderr_names_what_failed(ask_store, tmp_path):
    code, out, said = ask_store([row("a.jpg"), TORN], "--fail-on", "warn", "--report", tmp_path / "page.html")
    assert (code, out) == (8, "")
    assert f"qvsplit: failed: torn.jpg {REASON}" in said
    page = (tmp_path / "page.html").read_text()
    assert '"verdicts":["pass","info","warn","block","error"]' in page
    assert REASON in page
    assert "\n[[0],4,[]," in page  # a card of its own, with the last of these verdicts


def test_quiet_says_failures_all_the_same(ask_store):
    code, _, said = ask_store([row("a.jpg"), TORN], "--fail-on", "warn", "--quiet")
    assert (code, said) == (8, f"qvsplit: failed: torn.jpg {REASON}\n")


def test_without_checks_a_quiet_command_names_no_image_that_failed_before(ask_store):
    def rule(request):
        return "a dog"

    assert ask_store([row("a.jpg"), TORN], "What is it?", "--quiet", checks=False, rule=rule)[2] == ""
    assert REASON in ask_store([row("a.jpg"), TORN], "What is it?", checks=False, rule=rule)[2]


def test_levels(ask_store):
    def rule(request):
        return {"yes": 0.9, "no": 0.1} if question_of(request) == "Is there a dog?" else CLEAN

    assert [ask_store([row("a.jpg")], "--fail-on", level, rule=rule)[0] for level in LEVELS] == [8, 8, 0]


def test_a_reference_that_failed_compares_with_nothing(ask_store):
    code, _, said = ask_store([row("a.jpg"), TORN], "--compare", "torn.jpg", "--fail-on", "warn")
    assert code == 2
    assert "torn.jpg matches 0 of" in said


def test_the_failed_behind_a_reference_trip_too(ask_store):
    rows = [row("a.jpg"), row("b.jpg"), TORN]
    code, out, _ = ask_store(rows, "--compare", "a.jpg", "--fail-on", "warn")
    assert code == 8
    assert f"torn.jpg\tverdict\terror\t{REASON}" in out.splitlines()
    assert "a.jpg,b.jpg\tverdict\tpass\t" in out.splitlines()
