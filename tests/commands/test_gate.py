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


NOTED = (
    "qvsplit: /photos does not exist on this machine, or holds no images any more; what is new or changed in it is not "
    "known"
)


def verdicts(out):
    """By path below the root, the verdict and its reason, as tab-separated lines have them."""
    lines = [line.split("\t") for line in out.splitlines()]
    assert {len(line) for line in lines} <= {8}
    return {line[1].removeprefix("/photos/"): (line[6], line[7]) for line in lines if line[0] == "verdict"}


@pytest.fixture
def ask_store(run_cli, tmp_path, monkeypatch):
    """Run `ask` on these rows, answered by this rule; gives exit code, stdout and stderr."""
    (tmp_path / "checks.toml").write_text(CHECKS)

    def run(rows, *words, rule=lambda request: CLEAN, checks=True):
        store = MemoryStore(rows)
        session = ask.Session(store, FakeEngine(rule), checkpoint=SimpleNamespace(name="tiny", label="tiny"))
        monkeypatch.setattr("qvsplit.store.opening.open_store", lambda *places, **_: store)
        monkeypatch.setattr("qvsplit.ask.load_session", lambda *_, **__: session)
        return run_cli("ask", *(["--checks", tmp_path / "checks.toml"] if checks else []), *words)

    return run


@pytest.mark.parametrize("level", LEVELS)
def test_a_failed_image_trips_every_level(ask_store, level):
    code, out, said = ask_store([row("a.jpg"), TORN], "--fail-on", level)
    assert code == 8
    assert verdicts(out) == {"torn.jpg": ("error", REASON), "a.jpg": ("pass", "")}
    assert said.splitlines() == [NOTED, f"qvsplit: failed: torn.jpg {REASON}", "qvsplit: error: 1, pass: 1"]


@pytest.mark.parametrize("words", [(), ("--together",)])
def test_also_when_nothing_else_is_selected(ask_store, words):
    code, out, said = ask_store([row("a.jpg"), TORN], "--image", "torn*", "--fail-on", "block", *words)
    assert (code, verdicts(out)) == (8, {"torn.jpg": ("error", REASON)})
    assert said.splitlines() == [f"qvsplit: failed: torn.jpg {REASON}", "qvsplit: error: 1"]


def test_without_the_gate_that_nothing_could_be_asked_is_an_error(ask_store):
    code, out, said = ask_store([TORN])
    assert (code, verdicts(out)) == (2, {"torn.jpg": ("error", REASON)})
    assert said.splitlines()[-1].startswith("qvsplit: none of the selected images and videos can be asked about")


def test_without_the_gate_a_failed_image_is_named_and_the_others_are_answered(ask_store):
    code, out, said = ask_store([row("a.jpg"), TORN], "What is it?", checks=False, rule=lambda request: "a house")
    assert (code, verdicts(out)) == (0, {"torn.jpg": ("error", REASON)})
    assert "answer\t/photos/a.jpg\t\tWhat is it?\ta house\t\t\t" in out.splitlines()
    assert said == f"qvsplit: failed: torn.jpg {REASON}\n"


def test_a_failed_image_that_is_not_selected_is_not_in_the_verdicts(ask_store):
    code, out, said = ask_store([row("a.jpg"), TORN], "--image", "a.jpg", "--fail-on", "info")
    assert (code, said.splitlines()) == (0, [NOTED, "qvsplit: pass: 1"])
    assert "torn.jpg" not in out


def test_json(ask_store):
    code, out, _ = ask_store([row("a.jpg"), TORN], "--fail-on", "block", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 8
    assert lines[0] == {
        "type": "verdict", "file": "/photos/torn.jpg", "path": "torn.jpg", "root": "/photos", "verdict": "error",
        "flagged": [], "uncertain": [], "error": REASON,
    }  # fmt: skip
    assert lines[-1] == {
        "type": "verdict", "file": "/photos/a.jpg", "path": "a.jpg", "root": "/photos", "verdict": "pass",
        "flagged": [], "uncertain": [],
    }  # fmt: skip


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
    assert ["answer", "/photos/b.jpg", "", "gun", "", "", "error", "it does not fit"] in lines
    assert verdicts(out) == {"a.jpg": ("pass", ""), "b.jpg": ("error", "it does not fit")}
    assert "qvsplit: not answered: b.jpg: gun: it does not fit" in said
    assert said.splitlines()[-1] == "qvsplit: error: 1, pass: 1"


def test_without_the_gate_the_error_is_the_exit_code_once_all_others_are_answered(ask_store):
    rows = [row("a.jpg"), row("b.jpg"), row("c.jpg")]
    code, out, _ = ask_store(rows, "--json", rule=broken_for("b.jpg"))
    verdicts = {line["path"]: line for line in map(json.loads, out.splitlines()) if line["type"] == "verdict"}
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
    last = json.loads(out.splitlines()[-1])
    assert (last["verdict"], last["flagged"], last["error"]) == ("error", ["dog"], "no room")


def test_with_out_and_report_only_stderr_names_what_failed(ask_store, tmp_path):
    code, out, said = ask_store([row("a.jpg"), TORN], "--fail-on", "warn", "--report", tmp_path / "page.html")
    assert (code, out) == (8, "")
    assert f"qvsplit: failed: torn.jpg {REASON}" in said
    page = (tmp_path / "page.html").read_text()
    assert '"verdicts":["pass","info","warn","uncertain","error","block"]' in page
    assert REASON in page
    assert "\n[[0],4,[]," in page  # a card of its own, with the verdict error


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
    assert verdicts(out) == {"torn.jpg": ("error", REASON), "a.jpg,/photos/b.jpg": ("pass", "")}


def unknown_event(request):
    """A rule: to one question the model would have said something else than yes or no."""
    return {"yes": 1e-34, "no": 1e-38} if question_of(request) == "Is there a gun?" else CLEAN


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_model_would_not_have_said_trips_every_level(ask_store, level):
    code, out, said = ask_store([row("a.jpg")], "--fail-on", level, rule=unknown_event)
    assert (code, verdicts(out)) == (8, {"a.jpg": ("uncertain", "gun")})
    assert "answer\t/photos/a.jpg\t\tgun\tunsure\t0.9999\tuncertain\t" in out.splitlines()
    assert "qvsplit: gun: uncertain for 1 of 1 image: the model would rather have said something else" in said
    assert said.splitlines()[-1] == "qvsplit: uncertain: 1"


def test_what_is_allowed_does_not_trip(ask_store):
    rows = [row("a.jpg"), TORN]
    tripped = {
        allowed: ask_store(rows, "--fail-on", "info", "--allow", allowed, rule=unknown_event)[0]
        for allowed in ("uncertain", "error", "error,uncertain")
    }
    assert tripped == {"uncertain": 8, "error": 8, "error,uncertain": 0}

    def flagged(request):
        return {"yes": 0.9, "no": 0.1} if question_of(request) == "Is there a dog?" else unknown_event(request)

    code, out, _ = ask_store([row("a.jpg")], "--fail-on", "warn", "--allow", "uncertain", rule=flagged)
    assert (code, verdicts(out)) == (8, {"a.jpg": ("uncertain", "dog,gun")})  # no flag is let through


def test_an_error_that_is_allowed_is_no_exit_code_either(ask_store):
    words = ("--fail-on", "block", "--allow", "error")
    assert ask_store([row("a.jpg"), row("b.jpg")], *words, rule=broken_for("b.jpg"))[0] == 0
    assert ask_store([TORN], *words)[0] == 0
    assert ask_store([TORN], "--fail-on", "block", "--allow", "uncertain")[0] == 8


def test_allow_and_paths_need_a_gate(ask_store):
    code, _, said = ask_store([row("a.jpg")], "--allow", "error")
    assert (code, said) == (2, "qvsplit: --allow says what does not trip --fail-on LEVEL; give that, too\n")
    code, _, said = ask_store([row("a.jpg")], "--fail-on", "warn", "--allow", "block")
    assert (code, said) == (2, "qvsplit: --allow block: give uncertain or error\n")
    code, _, said = ask_store([row("a.jpg")], "What?", "--format", "paths", checks=False)
    assert code == 2
    assert "--format paths gives the items that did not pass" in said


def test_the_usual_forms_of_a_choice_count(ask_store):
    def rule(request):
        assert {"Yes.", "No.", " no"} <= set(request.forms)
        return {"yes": 0.01, "no": 0.01, "Yes.": 0.9, "No.": 0.01}

    code, out, _ = ask_store([row("a.jpg")], "--fail-on", "warn", "--json", rule=rule)
    answer = json.loads(out.splitlines()[0])
    assert code == 8
    assert (answer["answer"], answer["choice_form"], answer["verdict"]) == ("yes", "Yes.", "warn")
    assert answer["choice_mass"] == pytest.approx(0.93)


def test_paths_are_those_of_what_did_not_pass(ask_store):
    rows = [row("a.jpg"), row("b.jpg"), TORN]
    code, out, _ = ask_store(rows, "--fail-on", "block", "--format", "paths", rule=broken_for("b.jpg"))
    assert (code, out.splitlines()) == (8, ["/photos/torn.jpg", "/photos/b.jpg"])
