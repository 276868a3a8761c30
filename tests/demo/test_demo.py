"""What the package ships, and `qvsplit demo`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from qvsplit import demo
from qvsplit.checkpoints.opening import DEMO_FOLDER, open_checkpoint
from qvsplit.errors import ModelError, OutOfMemory
from qvsplit.extract import extract_files
from qvsplit.models.language import LanguageModel
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from tests.support.demo_run import session_demo


@pytest.fixture(scope="session")
def outcome(tmp_path_factory) -> demo.DemoOutcome:
    """This session's demo. Its folders are read only."""
    return session_demo(tmp_path_factory)


def test_the_checkpoint_is_a_real_one_and_small():
    checkpoint = open_checkpoint("demo", "both")
    assert checkpoint.name == "demo"
    assert checkpoint.config["model_type"] == "qwen2_vl"
    size = sum(path.stat().st_size for path in demo.HERE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert size < 12e6
    assert not list(demo.HERE.rglob("*.bin"))
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(DEMO_FOLDER)
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
        assert len(processor.tokenizer(token)["input_ids"]) == 1


def test_everything_of_it_is_in_the_wheel():
    import tomllib
    from pathlib import Path

    root = Path(demo.HERE).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["qvsplit"]
    packed = {path for pattern in patterns for path in (root / "qvsplit").glob(pattern)}
    files = {path for path in demo.HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} <= packed


def test_a_folder_called_demo_is_not_the_demo(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "demo")
    assert open_checkpoint("demo", "both").folder == DEMO_FOLDER
    assert open_checkpoint("./demo", "both").folder == tmp_path / "demo"


def test_the_samples_are_as_they_were_drawn(tmp_path):
    from train_demo import samples

    samples.write(tmp_path)
    assert json.loads((tmp_path / "truth.json").read_text()) == json.loads((demo.HERE / "truth.json").read_text())
    mine = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    theirs = {path.relative_to(demo.HERE) for path in demo.POSTCARDS.rglob("*") if path.is_file()}
    assert mine - {(tmp_path / "truth.json").relative_to(tmp_path)} == theirs
    for name in demo.truths()[1]:
        with Image.open(tmp_path / "postcards" / name) as drawn, Image.open(demo.POSTCARDS / name) as shipped:
            assert drawn.size == shipped.size
            assert drawn.getexif().get(0x0112) == shipped.getexif().get(0x0112)
            pixels = [np.asarray(image.convert("RGBA")).astype(int) for image in (drawn, shipped)]
            assert np.abs(pixels[0] - pixels[1]).mean() < 2  # another JPEG library may round otherwise


def test_the_samples_are_of_many_sorts():
    asked, answers = demo.truths()
    assert len(answers) >= 12
    assert all(len(right) == len(asked) for right in answers.values())
    sizes, turned, alpha = set(), 0, 0
    for name in answers:
        with Image.open(demo.POSTCARDS / name) as image:
            sizes.add(image.size)
            turned += image.getexif().get(0x0112, 1) != 1
            alpha += image.mode == "RGBA"
    assert len(sizes) >= 8
    assert turned >= 2
    assert alpha == 1
    bytes_of = [(demo.POSTCARDS / name).read_bytes() for name in answers]
    assert len(set(bytes_of)) == len(bytes_of) - 1
    (broken,) = [
        path for path in demo.POSTCARDS.rglob("*.*") if path.relative_to(demo.POSTCARDS).as_posix() not in answers
    ]
    with Image.open(broken) as image, pytest.raises(OSError, match="truncated"):
        image.load()


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_demo_prints_the_truth_and_what_it_did(tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = run_cli("demo", tmp_path / "d")
    assert code == 0
    asked, answers = demo.truths()
    assert out.count("question") == len(answers) + 1  # a heading each, and one word of the last lines
    assert all(name in out for name in ("seaside.jpg", "turned-left.jpg", "red-houses.png"))
    assert "12 images once, by the vision encoder alone" in out
    assert ", 1 a copy of another, 1 damaged and recorded as failed" in out
    assert f"{len(asked) * len(answers)} questions by the language model alone" in out
    assert "extract ~/Pictures --model Qwen/Qwen2-VL-2B-Instruct" in out
    assert "failed: torn.jpg" in err
    assert "\x1b" not in out
    again, out, err = run_cli("demo", tmp_path / "d")
    assert again == 0
    assert "nothing: 13 images unchanged, the vision encoder was not even loaded" in out
    assert "torn.jpg" not in err


def test_the_demo_is_right(outcome):
    asked, answers = demo.truths()
    assert {(one.path, one.question): one.truth for one in outcome.answers} == {
        (path, question): truth for path, right in answers.items() for question, truth in zip(asked, right, strict=True)
    }
    assert outcome.right == sum(one.answer == one.truth for one in outcome.answers) > 0.9 * len(outcome.answers)
    assert outcome.store_bytes > outcome.tokens > 0


def test_the_store_of_the_demo_is_like_any_other(outcome, run_cli):
    words = ("ask", "--embeds", outcome.store, "--image", "seaside.jpg", "--format", "text", "Day or night?")
    code, out, err = run_cli(*words)
    assert (code, out.strip()) == (0, "day"), err
    code, out, _ = run_cli("verify", outcome.store, "--sample", 2)
    assert code == 0
    assert out.count("same tokens") == 2
    code, out, _ = run_cli("inspect", outcome.store)
    assert "model       demo" in out


def test_an_image_of_ones_own_among_the_postcards(tmp_path, run_cli):
    (tmp_path / "d" / "postcards").mkdir(parents=True)
    for name in ("mine.png", "seaside.jpg"):  # one under the name of a postcard
        Image.new("RGB", (300, 200), "red").save(tmp_path / "d" / "postcards" / name)
    code, out, _ = run_cli("demo", tmp_path / "d", "--json")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert all(one.keys() == {"path", "question", "answer", "truth"} for one in answers)
    for name, truth in (
        ("mine.png", {None}),
        ("seaside.jpg", {None}),
        ("family.jpg", {*demo.truths()[1]["family.jpg"]}),
    ):
        assert {one["truth"] for one in answers if one["path"] == name} == truth


def test_answers_that_are_errors_are_said_and_are_the_exit_code(tmp_path, run_cli, monkeypatch):
    prefill = LanguageModel.prefill

    def cramped(self, prompt, features, **more):
        if features[0].n_tokens == 36:  # of two postcards
            raise OutOfMemory("it does not fit")
        return prefill(self, prompt, features, **more)

    monkeypatch.setattr(LanguageModel, "prefill", cramped)
    code, out, err = run_cli("demo", tmp_path / "d", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    failed = [one for one in answers if "error" in one]
    assert code == OutOfMemory.exit_code
    assert 0 < len(failed) < len(answers)
    assert {(one["answer"], one["error"]) for one in failed} == {("", "it does not fit")}
    assert f"qvsplit: not answered: {len(failed)} questions: it does not fit\n" in err
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run_cli("demo", tmp_path / "d")
    assert code == OutOfMemory.exit_code
    assert out.count("not answered: it does not fit") == len(failed)
    assert f"answered     {len(answers) - len(failed)} questions" in out
    assert "not answered: " in err


def test_a_model_that_cannot_answer_ends_the_demo_in_one_line(tmp_path, run_cli, monkeypatch):
    def refusing(self, *_, **__):
        raise ModelError("its attention is not supported")

    monkeypatch.setattr(LanguageModel, "prefill", refusing)
    code, out, err = run_cli("demo", tmp_path / "d", "--quiet")
    assert (code, out, err.splitlines()[-1]) == (3, "", "qvsplit: its attention is not supported")


def test_thumbnails_where_there_are_colours(tmp_path):
    from rich.console import Console

    from qvsplit.demo.table import postcard_tables

    photos = demo.copy_postcards(tmp_path / "d")
    answers = [
        demo.DemoAnswer("turned-left.jpg", "Day or night?", "day", "day"),
        demo.DemoAnswer("lost.jpg", "Day?", "no", "day"),
    ]
    with (tmp_path / "out").open("w") as stream:
        console = Console(file=stream, force_terminal=True, color_system="truecolor", width=100, legacy_windows=False)
        for table in postcard_tables(answers, photos, console):
            console.print(table)
    out = (tmp_path / "out").read_text()
    assert out.count("▀") > 100
    assert "cannot be shown" in out
    assert "✓" in out
    assert "✗" in out
    with (tmp_path / "plain").open("w") as stream:
        console = Console(file=stream, force_terminal=True, color_system="truecolor", width=100, no_color=True)
        for table in postcard_tables(answers, photos, console):
            console.print(table)
    assert "▀" not in (tmp_path / "plain").read_text()


def test_a_file_in_the_way(tmp_path, run_cli):
    (tmp_path / "d").write_text("mine")
    code, _, err = run_cli("demo", tmp_path / "d")
    assert code == 2
    assert err.count("\n") == 1
    assert "is a file" in err
    assert (tmp_path / "d").read_text() == "mine"


@pytest.mark.parametrize("where", ["file/below", "n" * 300])
def test_a_folder_that_cannot_be_made(tmp_path, run_cli, where):
    (tmp_path / "file").write_text("mine")
    code, _, err = run_cli("demo", tmp_path / where)
    assert code == 7
    assert err.count("\n") == 1
    assert "cannot be written" in err
    assert "give another FOLDER" in err


def test_a_folder_whose_name_is_not_text(tmp_path, run_cli):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
    code, out, err = run_cli("demo", folder)
    assert code == 0, err
    assert "\\udcff" in out


def test_the_store_of_another_model_in_the_way(tmp_path, run_cli, checkpoint):
    """As where a later version of the package brings a better model."""
    photos = demo.copy_postcards(tmp_path / "d")
    extract_files([photos], out=tmp_path / "d" / "store", options=ExtractOptions(model=str(checkpoint)))
    code, _, err = run_cli("demo", tmp_path / "d", "--quiet")
    assert code == 4
    assert err.count("\n") == 1
    assert "give another FOLDER, or remove it" in err


def test_no_network(tmp_path):
    """A listener stands where the hub would be, and nobody calls."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(0.5)
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HOME": str(tmp_path / "home"),
                    "PATH": "/usr/bin:/bin", "QVSPLIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "qvsplit", "demo", str(tmp_path / "d"), "--json"],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with pytest.raises(TimeoutError):
            hub.accept()


def test_an_interrupted_demo_can_be_run_again(tmp_path, run_cli):
    process = subprocess.Popen(
        [sys.executable, "-m", "qvsplit", "demo", str(tmp_path / "d")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "d" / "store").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert run_cli("demo", tmp_path / "d", "--quiet")[0] == 0
    assert len(open_store(tmp_path / "d" / "store")) == 13
