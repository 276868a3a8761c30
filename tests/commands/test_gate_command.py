"""`qvsplit gate`: a verdict a file, and an exit code that opens for nothing that is not known. The demo's model judges."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import qvsplit
from qvsplit import judging
from qvsplit.answering.checks import Question
from qvsplit.ask import Session
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.demo import POSTCARDS
from qvsplit.errors import OutOfMemory
from qvsplit.extract import extract_files
from qvsplit.output.verdicts import trips
from qvsplit.pipeline.options import ExtractOptions
from tests.support.clips import make_clip
from tests.support.extracting import OLD
from tests.support.fake_engine import FakeEngine, question_of
from tests.support.forked import start_program
from tests.support.processes import wait_for

CHECKS = """
[[check]]
id = "dog"
question = "Can you see a dog?"
choices = ["yes", "no"]
flag = "yes"
level = "block"

[[check]]
id = "house"
question = "How many houses can you see?"
choices = ["none", "one", "two", "three", "four"]
flag = "three"
level = "info"

[[check]]
id = "night"
question = "Is this day or night?"
choices = ["day", "night"]

[[check]]
id = "occasion"
question = "Is there a wedding?"
choices = ["wedding", "funeral"]
only_if = "night = night"
"""
TORN = "is a JPEG file that is cut off or damaged"
UNSUPPORTED = "is not an image or a video that can be read (by its content, whatever its name)"


@dataclass(frozen=True)
class Case:
    """One row of the truth table: a file, the verdict on it, and what a gate over it exits with for each --allow."""

    what: str
    file: str
    verdict: str
    reason: str
    codes: tuple[int, int, int, int]  # without --allow, with uncertain, with error, with both


ALLOWED = ((), ("uncertain",), ("error",), ("uncertain", "error"))
TABLE = [
    Case("nothing flagged", "good.jpg", "pass", "", (0, 0, 0, 0)),
    Case("flagged", "dogs.jpg", "block", "dog", (8, 8, 8, 8)),
    Case("flagged below `--fail-on`", "houses.png", "info", "house", (0, 0, 0, 0)),
    Case("choice mass below `min_choice_mass`", "night.jpg", "uncertain", "occasion", (8, 0, 8, 0)),
    Case("several frames or pages", "moving.gif", "uncertain", "frames", (8, 0, 8, 0)),
    Case("damaged", "torn.jpg", "error", TORN, (8, 8, 0, 0)),
    Case("no such file", "missing.jpg", "error", "there is no such file", (8, 8, 0, 0)),
    Case("no image or video", "text.jpg", "error", UNSUPPORTED, (8, 8, 0, 0)),
    Case("changed on disk meanwhile", "changing.jpg", "error", judging.CHANGED, (8, 8, 0, 0)),
    Case("flagged, and changed on disk meanwhile", "changing dogs.jpg", "block", f"dog; {judging.CHANGED}", (8,) * 4),
]
MADE_FROM = {
    "good.jpg": "family.jpg", "dogs.jpg": "seaside.jpg", "houses.png": "red-houses.png", "night.jpg": "quiet-night.jpg",
    "torn.jpg": "torn.jpg", "changing.jpg": "sunday.jpg", "changing dogs.jpg": "winter.jpg",
}  # fmt: skip
STORES = ("none", "has them", "has others")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of the table, and the checks. Tests that change a file put it back."""
    folder = tmp_path_factory.mktemp("gate")
    for name, postcard in MADE_FROM.items():
        shutil.copyfile(POSTCARDS / postcard, folder / name)
    (folder / "text.jpg").write_text("a text")
    with Image.open(folder / "good.jpg") as still, Image.open(folder / "dogs.jpg") as unseen:
        still.save(folder / "moving.gif", save_all=True, append_images=[unseen])
    for file in folder.iterdir():
        os.utime(file, OLD)
    (folder / "checks.toml").write_text(CHECKS)
    return folder


@pytest.fixture(scope="module")
def stores(folder, tmp_path_factory) -> dict[str, Path | None]:
    """No store; one that has all that can be encoded; one that has another image."""
    places: dict[str, Path | None] = {"none": None}
    other = tmp_path_factory.mktemp("other") / "boats.jpg"
    shutil.copyfile(POSTCARDS / "boats-in-snow.jpg", other)
    options = ExtractOptions(model="demo")
    for name, paths in (("has them", [folder]), ("has others", [other])):
        places[name] = tmp_path_factory.mktemp("stores") / "embeds"
        extract_files(paths, out=places[name], options=options)
    return places


@pytest.fixture(scope="module")
def judged(folder, stores):
    """Judge all files of the table at once, beside each store; two of them are written to meanwhile."""

    def change(answer):
        for name in ("changing.jpg", "changing dogs.jpg"):
            os.utime(folder / name, (OLD[0], OLD[1] + 1))

    found = {}
    for name, store in stores.items():
        found[name] = qvsplit.gate(
            [folder / case.file for case in TABLE], folder / "checks.toml", embeds=store, model="demo", fail_on="block",
            callbacks=qvsplit.GateCallbacks(on_answer=change),
        )  # fmt: skip
        for file in ("changing.jpg", "changing dogs.jpg"):
            os.utime(folder / file, OLD)
    return found


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("number", range(len(TABLE)), ids=[case.what for case in TABLE])
def test_the_truth_table(judged, store, number):
    case, item = TABLE[number], judged[store].verdicts[number]
    assert (item.rows[0].path, item.verdict, item.reason) == (case.file, case.verdict, case.reason)
    assert tuple(8 if trips([item], "block", allowed) else 0 for allowed in ALLOWED) == case.codes


def test_all_together_fail(judged):
    assert not any(judgement.passed for judgement in judged.values())


def test_the_table_is_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "checks.md").read_text(encoding="utf-8")
    for case in TABLE:
        cells = " | ".join(map(str, case.codes))
        assert f"| {case.what} | `{case.verdict}` | {cells} |" in text, case.what


@pytest.fixture
def gate(run_cli, folder, monkeypatch):
    """Run `qvsplit gate` among the files of the table; gives exit code, the lines of stdout, and stderr."""
    monkeypatch.chdir(folder)

    def run(*words, **more):
        code, out, said = run_cli("gate", *words, "--model", "demo", "--checks", "checks.toml", **more)
        return code, [line.split("\t") for line in out.splitlines()], said

    return run


def test_files_that_pass(gate):
    code, lines, said = gate("good.jpg")
    assert (code, said) == (0, "qvsplit: pass: 1\n")
    assert lines == [["verdict", "good.jpg", "", "", "", "", "pass", ""]]


def test_what_makes_exact_answers_inexact_is_said(gate, stores):
    words = ("good.jpg", "--embeds", stores["has them"], "--kernels", "reference", "--device", "cpu")
    code, _, said = gate(*words)
    noted, verdicts = said.splitlines()
    assert (code, verdicts) == (0, "qvsplit: pass: 1")
    assert noted.startswith("qvsplit: the store's features were computed by the fused kernels: answers are those of")
    assert "`" not in noted.replace("`--kernels reference`", "")
    assert gate(*words, "--quiet")[2] == ""


def test_a_line_a_file_in_the_order_given_and_one_of_them_trips(gate):
    given = ["night.jpg", "dogs.jpg", "torn.jpg", "dogs.jpg", "missing.jpg", "good.jpg"]
    code, lines, said = gate(*given)
    assert code == 8
    assert [line[1] for line in lines] == given
    assert [line[6] for line in lines] == ["uncertain", "block", "error", "block", "error", "pass"]
    assert said == "qvsplit: block: 2, error: 2, uncertain: 1, pass: 1\n"


def test_what_was_not_looked_at_is_said(gate):
    seen = "only the first of 2 frames was looked at"
    code, lines, said = gate("moving.gif")
    assert (code, said) == (8, f"qvsplit: uncertain: moving.gif: {seen}\nqvsplit: uncertain: 1\n")
    assert lines == [["verdict", "moving.gif", "", "", "", "", "uncertain", "frames"]]
    ((line,),) = gate("moving.gif", "--format", "text")[1]
    assert line.endswith(f"moving.gif  uncertain  frames  {seen}")
    assert gate("moving.gif", "--allow", "uncertain")[0] == 0


def test_ask_says_it_too(run_cli, stores, folder):
    words = ("--embeds", stores["has them"], "--image", "moving.gif", "--checks", folder / "checks.toml")
    code, out, said = run_cli("ask", *words, "--model", "demo", "--fail-on", "block", "--json")
    (item,) = [line for line in map(json.loads, out.splitlines()) if line["type"] == "verdict"]
    assert (code, item["verdict"], item["uncertain"]) == (8, "uncertain", ["frames"])
    assert "qvsplit: uncertain: moving.gif: only the first of 2 frames was looked at\n" in said


@pytest.mark.parametrize(
    ("file", "words", "code"),
    [
        ("houses.png", [], 8),  # whatever is flagged
        ("houses.png", ["--fail-on", "warn"], 0),
        ("night.jpg", ["--allow", "error"], 8),
        ("night.jpg", ["--allow", "uncertain"], 0),
        ("torn.jpg", ["--allow", "error,uncertain"], 0),
    ],
)
def test_what_trips(gate, file, words, code):
    assert gate(file, *words, "--quiet")[::2] == (code, "")


def test_without_anything_to_ask_about_no_model_is_loaded(gate, monkeypatch):
    def nobody(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("qvsplit.judging.session_over", nobody)
    monkeypatch.setattr("qvsplit.on_demand.load_devices", nobody)
    assert gate("missing.jpg")[0] == 8


def test_a_list_of_files_from_the_pipe_and_from_a_file(gate, tmp_path, monkeypatch):
    import io

    listed = tmp_path / "list"
    listed.write_bytes(b"torn.jpg\0missing\n1.jpg\0")
    assert [line[1] for line in gate("--files-from", listed)[1]] == ["torn.jpg", r"missing\x0a1.jpg"]
    pipe = io.TextIOWrapper(io.BytesIO(b"torn.jpg\nmissing.jpg\n"))
    monkeypatch.setattr("io.StringIO", lambda text: pipe)
    assert [line[1] for line in gate("text.jpg", "--files-from", "-")[1]] == ["text.jpg", "torn.jpg", "missing.jpg"]


def test_json_and_paths(gate, run_cli, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = ("gate", "torn.jpg", "good.jpg", "--model", "demo", "--checks", "checks.toml", "--quiet")
    lines = [json.loads(line) for line in run_cli(*words, "--json")[1].splitlines()]
    assert lines == [
        {"type": "verdict", "file": "torn.jpg", "path": "torn.jpg", "root": str(folder.resolve()), "verdict": "error",
         "flagged": [], "uncertain": [], "error": TORN},
        {"type": "verdict", "file": "good.jpg", "path": "good.jpg", "root": str(folder.resolve()), "verdict": "pass",
         "flagged": [], "uncertain": []},
    ]  # fmt: skip
    assert run_cli(*words, "--format", "paths", "--absolute")[1] == f"{folder.resolve()}/torn.jpg\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checks", "checks.toml"], "no file; give some"),
        (["good.jpg"], "--checks FILE is needed"),
        ([".", "--checks", "checks.toml"], ". is a folder; give the files in it"),
        (["good.jpg", "--checks", "flagless.toml"], "a gate needs a check that has a flag"),
        (["good.jpg", "--checks", "none.toml"], "checks cannot be read from none.toml"),
        (["good.jpg", "--checks", "checks.toml", "--embeds", "none"], "none"),
        (["good.jpg", "--checks", "checks.toml", "--files-from", "none"], "the list of files cannot be read from none"),
        (["good.jpg", "--checks", "checks.toml", "--allow", "block"], "--allow"),
    ],
)
def test_what_is_no_gate(run_cli, folder, monkeypatch, tmp_path, words, said):
    shutil.copyfile(folder / "good.jpg", tmp_path / "good.jpg")
    (tmp_path / "checks.toml").write_text(CHECKS)
    (tmp_path / "flagless.toml").write_text('[[check]]\nid = "a"\nquestion = "A?"\nchoices = ["yes", "no"]\n')
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("gate", *words, "--model", "demo")
    assert (code, out) == (2, "")
    assert said in err


def test_a_store_of_another_model_is_refused(gate, stores, family_checkpoint, run_cli, folder):
    words = ("gate", folder / "good.jpg", "--checks", folder / "checks.toml", "--embeds", stores["has others"])
    code, out, said = run_cli(*words, "--model", family_checkpoint("qwen2_5_vl"))
    assert (code, out) == (4, "")
    assert len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- clips


def judge_clips(monkeypatch, file, store, rule):
    """Judge a video beside a store of its clips; a fake engine answers by the number of the clip."""

    def session(hand, options, on_load):
        engine = FakeEngine(lambda request: rule(request.features[0].part, question_of(request)))
        return Session(hand, engine, checkpoint=open_checkpoint(hand.provenance.model, "language"))

    monkeypatch.setattr(judging, "session_over", session)
    checks = [
        Question("A dog?", "dog", ["yes", "no"], "yes", level="block"),
        Question("A cat?", "cat", ["yes", "no"], "yes", level="info"),
    ]
    return qvsplit.gate([file], checks, embeds=store).verdicts


@pytest.fixture(scope="module")
def film(tmp_path_factory, checkpoint) -> tuple[Path, Path]:
    """A video of three seconds, and its store, in clips of a second. Read only."""
    file, out = tmp_path_factory.mktemp("film") / "film.mp4", tmp_path_factory.mktemp("film") / "embeds"
    make_clip(file, 75)
    extract_files([file], out=out, options=ExtractOptions(model=str(checkpoint), clip_seconds=1.0, max_frames=4))
    return file, out


YES, NO, OTHER = {"yes": 0.9, "no": 0.1}, {"yes": 0.1, "no": 0.9}, {"yes": 1e-9, "no": 1e-9}


@pytest.mark.parametrize(
    ("answers", "verdict", "reason"),
    [
        ({}, "pass", ""),
        ({(2, "A cat?"): YES}, "info", "cat#2"),
        ({(2, "A cat?"): YES, (1, "A dog?"): OTHER}, "uncertain", "cat#2,dog#1"),
        ({(0, "A dog?"): YES, (1, "A dog?"): OTHER, (2, "A dog?"): YES}, "block", "dog#0,dog#2,dog#1"),
        ({(1, "A dog?"): OutOfMemory("no room")}, "error", "#1: no room"),
    ],
)
def test_a_video_in_clips_has_one_verdict_the_gravest_of_theirs(monkeypatch, film, answers, verdict, reason):
    (item,) = judge_clips(monkeypatch, *film, lambda part, question: answers.get((part, question), NO))
    assert (item.rows[0].name, item.verdict, item.reason) == ("film.mp4", verdict, reason)


# ------------------------------------------------------------------------------------------------------------- dying

SLOWLY = """
import pathlib, sys, time
from qvsplit import on_demand
from qvsplit.answering.local_engine import LocalEngine
from qvsplit.pipeline.encoding import DeviceWorker
on_demand.IN_MEMORY_BYTES = 0
def slow(kind, name, mark):
    before = getattr(kind, name)
    def slowly(self, *given, **more):
        pathlib.Path(mark).touch()
        time.sleep(1.5)
        return before(self, *given, **more)
    setattr(kind, name, slowly)
slow(DeviceWorker, "_run", {encoding!r})
slow(LocalEngine, "_answer_whole", {asking!r})
from qvsplit.cli import main
sys.argv = {argv!r}
main()
"""


@pytest.mark.parametrize(
    ("name", "step"), [("INT", "encoding"), ("INT", "asking"), ("TERM", "encoding"), ("KILL", "asking")]
)
def test_one_that_is_ended_leaves_no_process_and_no_file(step, name, folder, tmp_path):
    scratch, marks = tmp_path / "scratch", {step: str(tmp_path / step) for step in ("encoding", "asking")}
    scratch.mkdir()
    argv = ["qvsplit", "gate", "good.jpg", "dogs.jpg", "--model", "demo", "--checks", "checks.toml"]
    code, environment = SLOWLY.format(**marks, argv=argv), os.environ | {"TMPDIR": str(scratch)}
    process = start_program(code, folder=str(folder), environment=environment, session=True)
    before = sorted(folder.iterdir())
    wait_for(Path(marks[step]).exists, process)
    os.kill(process.pid, signal.Signals[f"SIG{name}"])
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == ({"INT": 130, "TERM": 143, "KILL": -9}[name], "")
    assert said == ("" if name == "KILL" else "qvsplit: interrupted\n")
    assert group_ends(process.pid)
    assert list(scratch.iterdir()) == []
    assert sorted(folder.iterdir()) == before


def group_ends(leader: int) -> bool:
    """Wait until no process of a group is left; those of one that was killed need a moment to hear of it."""
    import time

    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_the_verdict_on_a_file_names_the_option_for_people_and_as_python_has_it_for_programs(
    run_cli, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    words = ["gate", "good.jpg", "--model", "demo", "--checks", "checks.toml", "--max-image-pixels", 10]
    for format, name in (("text", "; --max-image-pixels allows more"), ("jsonl", "; `max_image_pixels` allows more")):
        code, out, _ = run_cli(*words, "--format", format)
        assert (code, out.count(name)) == (8, 1)
