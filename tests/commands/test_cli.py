"""The program as a whole: help, version, what is imported, exit codes, one line for each error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qvsplit.errors import ModelError
from qvsplit.models.language import LanguageModel
from tests.support.forked import command, start_program
from tests.support.terminal import one_line

# ----------------------------------------------------------------------------------------------- help and imports


@pytest.mark.parametrize("command", ["", "extract", "ask", "inspect", "verify", "compact", "purge", "demo"])
def test_help(run_cli, command):
    code, out, said = run_cli(*command.split(), "--help")
    assert (code, said) == (0, "")
    assert "Usage:" in out


HEAVY = ("torch", "transformers", "pyarrow", "PIL", "numpy", "rich.progress", "rich.console")


def imported_by(words: list[str], heavy: tuple[str, ...]) -> tuple[int, str, str]:
    """Run a command; gives exit code, what it said and which of the `heavy` modules it imported."""
    code = (
        "import sys; from qvsplit.cli import app\n"
        f"try: app({words!r})\n"
        f"finally: print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    *said, imported = done.stderr.strip().splitlines()
    return done.returncode, done.stdout + "\n".join(said), imported


@pytest.mark.parametrize("command", [[], ["extract"], ["ask"], ["demo"]])
def test_help_imports_nothing_heavy_but_rich(command):
    code, out, imported = imported_by([*command, "--help"], (*HEAVY, "pydantic"))
    assert "Usage:" in out
    assert (code, imported) == (0, "['rich.console']")


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--version"], {}),
        ([], {"_QVSPLIT_COMPLETE": "complete_bash", "COMP_WORDS": "qvsplit ask --to", "COMP_CWORD": "2"}),
        (["extract", "--emebds", "x"], {}),
        (["ask", "--dtype", "bf17"], {}),
    ],
)
def test_what_needs_no_help_imports_nothing_heavy(words, environment):
    code = (
        "import sys\nfrom qvsplit import cli\n"
        f"code = cli.run({words!r})\n"
        f"print(code, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.stderr.splitlines()[-1].split(" ", 1)[1] == "[]"


def test_a_run_with_nothing_to_do_imports_nothing_heavy(store, four_photos):
    words = ["extract", str(four_photos), "--out", str(store), "--quiet"]
    assert imported_by(words, ("torch", "transformers", "pyarrow", "PIL", "rich.progress")) == (0, "", "[]")


def test_version_and_no_command(run_cli):
    assert run_cli("--version")[1].startswith("qvsplit 0.")
    code, out, said = run_cli()
    assert (code, said) == (2, "")
    assert "Usage:" in out


def test_an_option_that_does_not_exist_is_usage(run_cli):
    assert run_cli("extract", ".", "--nonsense")[0] == 2


def test_a_store_is_named_the_same_way_everywhere(run_cli, small_store, tmp_path, monkeypatch):
    """An argument or --embeds, and `embeds` where nothing is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embeds").symlink_to(small_store)
    for name in ("inspect", "verify"):
        by_default = run_cli(name)
        assert by_default[0] == 0
        assert run_cli(name, "embeds") == run_cli(name, "--embeds", "embeds") == by_default
        code, _, said = run_cli(name, "embeds", "--embeds", "other")
        assert (code, "two stores are given" in one_line(said)) == (2, True)


# ------------------------------------------------------------------------------------------- how a program may end


def test_a_bug_has_a_traceback_and_an_exit_code_of_its_own(monkeypatch, capsys):
    from qvsplit.cli import app

    def broken(*places, **options):
        raise ValueError("a bug")

    monkeypatch.setattr("qvsplit.store.opening.open_store", broken)
    with pytest.raises(SystemExit) as end:
        app(["inspect", "embeds"], prog_name="qvsplit", standalone_mode=True)
    assert end.value.code == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("ValueError: a bug\n")


def test_a_full_disk_behind_stdout_exits_7(small_store):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qvsplit", "inspect", str(small_store)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 7
    assert "disk is full" in one_line(done.stderr)


def test_a_reader_who_has_enough_is_no_error(small_store):
    ask = f"{sys.executable} -m tests.support.made_up ask --embeds {small_store} $(seq 1 600)"  # more than a pipe holds
    command = f"{ask} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_ctrl_c_while_asking_exits_130(small_store):
    questions = [f"What is at place {n}?" for n in range(400)]
    process = start_program(command("ask", "--embeds", small_store, "--max-new-tokens", 2, *questions))
    process.stdout.readline()  # the first answer
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_line(said) == "qvsplit: interrupted"


# ----------------------------------------------------------------------------------------------------------- errors


def no_folder(tmp, store, model, photos):
    return ["extract", tmp / "nowhere", "--model", model], 2, "no file or folder at"


def empty_folder(tmp, store, model, photos):
    (tmp / "empty").mkdir()
    return ["extract", tmp / "empty", "--model", model], 2, "no images or videos in"


def no_images(tmp, store, model, photos):
    (tmp / "texts").mkdir()
    (tmp / "texts" / "a.txt").write_text("x")
    return ["extract", tmp / "texts", "--model", model], 2, "looked for .3g2, .3gp, .apng"


def no_model(tmp, store, model, photos):
    return ["extract", photos, "--model", tmp / "nowhere", "--out", tmp / "e"], 3, "no model folder at"


def no_config(tmp, store, model, photos):
    (tmp / "hollow").mkdir()
    return ["extract", photos, "--model", tmp / "hollow", "--out", tmp / "e"], 3, "has no config.json"


def hub_unreachable(tmp, store, model, photos):
    return ["extract", photos, "--out", tmp / "e"], 3, "Qwen/Qwen2-VL-2B-Instruct is not in the hub's cache"


def missing_shard(tmp, store, model, photos):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    for file in broken.glob("model-0000[345]*"):
        file.unlink()
    return ["extract", photos, "--model", broken, "--out", tmp / "e"], 3, "lacks model-00003"


def truncated_weights(tmp, store, model, photos):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    return ["extract", photos, "--model", broken, "--out", tmp / "e"], 3, "damaged or cut short"


def broken_config(tmp, store, model, photos):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["depth"] = "three"
    (broken / "config.json").write_text(json.dumps(config))
    return ["extract", photos, "--model", broken, "--out", tmp / "e"], 3, "cannot be loaded"


def unknown_architecture(tmp, store, model, photos):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    (broken / "config.json").write_text('{"model_type": "llama"}')
    return ["extract", photos, "--model", broken, "--out", tmp / "e"], 3, "'llama' model"


def out_is_a_file(tmp, store, model, photos):
    (tmp / "file").write_text("x")
    return ["extract", photos, "--model", model, "--out", tmp / "file"], 7, "cannot be written"


def out_not_writable(tmp, store, model, photos):
    return ["extract", photos, "--model", model, "--out", "/proc/embeds"], 7, "cannot be written"


def no_store(tmp, store, model, photos):
    return ["ask", "--embeds", tmp / "nowhere", "What?"], 2, "no store or shard at"


def store_without_shards(tmp, store, model, photos):
    (tmp / "hollow").mkdir()
    return ["ask", "--embeds", tmp / "hollow", "What?"], 2, "holds no shards"


def no_question(tmp, store, model, photos):
    return ["ask", "--embeds", store], 2, "no question"


def no_questions_file(tmp, store, model, photos):
    return ["ask", "--embeds", store, "--questions", tmp / "nowhere.txt"], 2, "questions cannot be read"


def image_matches_nothing(tmp, store, model, photos):
    return ["ask", "--embeds", store, "--image", "*.nef", "What?"], 2, "--image *.nef matches none of the store's 4"


def another_encoder(tmp, store, model, photos):
    from tests.support.checkpoints import make_tiny

    make_tiny(tmp / "other", seed=3)
    return ["ask", "--embeds", store, "--model", tmp / "other", "What?"], 4, "another encoder (encoder: "


def another_width(tmp, store, model, photos):
    other = Path(shutil.copytree(model, tmp / "wide"))
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] = 256
    (other / "config.json").write_text(json.dumps(config))
    return ["ask", "--embeds", store, "--model", other, "What?"], 4, "hidden_size: 128, not 256"


def csv_as_shard(tmp, store, model, photos):
    (tmp / "table.csv").write_text("path,answer\na,b\n" * 100)
    return ["ask", "--embeds", tmp / "table.csv", "What?"], 6, "not a Parquet file"


def damaged_footer(tmp, store, model, photos):
    damage(store, -100)
    return ["ask", "--embeds", store, "What?"], 6, "its footer"


def damaged_to_verify(tmp, store, model, photos):
    damage(store, 30_000)
    return ["verify", store], 6, "is damaged: features"


def damaged_to_extract(tmp, store, model, photos):
    damage(store, -100)
    return ["extract", photos, "--out", store], 6, "its footer"


def bad_dtype(tmp, store, model, photos):
    return ["ask", "--embeds", store, "--dtype", "float8", "What?"], 2, "--dtype float8"


def other_processor(tmp, store, model, photos):
    other = Path(shutil.copytree(model, tmp / "other mean"))
    config = json.loads((other / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(config))
    return ["ask", "--embeds", store, "--model", other, "What?"], 4, "processor.image_mean: "


def broken_tokenizer(tmp, store, model, photos):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    (broken / "tokenizer.json").write_text("[]")
    return ["ask", "--embeds", store, "--model", broken, "What?"], 3, "cannot be loaded"


def fifo_as_shard(tmp, store, model, photos):
    os.mkfifo(tmp / "fifo")
    return ["inspect", tmp / "fifo"], 6, "not a regular file"


def name_too_long(tmp, store, model, photos):
    return ["inspect", tmp / ("x" * 300)], 2, "cannot be read (File name too long)"


def bad_device(tmp, store, model, photos):
    return ["ask", "--embeds", store, "--device", "abacus", "What?"], 2, "--device abacus"


def damage(store: Path, place: int) -> None:
    (file,) = store.glob("*.parquet")
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


CASES = [no_folder, empty_folder, no_images, no_model, no_config, hub_unreachable, missing_shard, truncated_weights,
         broken_config, unknown_architecture, out_is_a_file, out_not_writable, no_store, store_without_shards,
         no_question, no_questions_file, image_matches_nothing, another_encoder, another_width, csv_as_shard,
         damaged_footer, damaged_to_verify, damaged_to_extract, bad_device,
         bad_dtype, other_processor, broken_tokenizer, fifo_as_shard, name_too_long]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_error_is_one_line_and_its_own_exit_code(run_cli, case, store, four_photos, checkpoint, tmp_path):
    words, code, said = case(tmp_path, store, checkpoint, four_photos)
    got, _, line = run_cli(*words)
    assert (got, said in one_line(line)) == (code, True), line


def test_damaged_features_are_said_of_each_image_and_are_the_exit_code(run_cli, store):
    damage(store, 3000)
    code, out, said = run_cli("ask", "--embeds", store, "What?", "Where?", "--image", "co*", "--json")
    assert code == 6
    assert [json.loads(line)["finish_reason"] for line in out.splitlines() if "answer" in line][:4] == ["error"] * 4
    assert len(said.splitlines()) == 2  # one an image, however many questions
    assert "not answered: coffee.png: What?, Where?: " in said
    assert "is damaged: features of row" in said


def test_what_is_wrong_with_the_model_ends_the_run_and_is_in_no_table(run_cli, store, tmp_path, monkeypatch):
    def refusing(self, *_, **__):
        raise ModelError("its attention is not supported")

    monkeypatch.setattr(LanguageModel, "prefill", refusing)
    code, out, said = run_cli("ask", "--embeds", store, "What?", "Where?", "--out", tmp_path / "answers.csv")
    assert (code, out, said) == (3, "", "qvsplit: its attention is not supported\n")
    assert not (tmp_path / "answers.csv").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root")
def test_an_unreadable_image_and_an_unwritable_folder_as_an_ordinary_user(
    run_cli, store, some_photos, checkpoint, tmp_path, tmp_path_factory, monkeypatch
):
    """`store` has run everything once, so that nothing has to be imported after the change of user."""
    from qvsplit.sources.files import read
    from qvsplit.sources.images import DecodedImage, decode

    def decode_here(decoder, entry, info, on_size=None):
        image = decode(read(entry).data)
        return DecodedImage(np.array(image), image.width, image.height, None, "")

    opened = [tmp_path, *tmp_path.parents[:3], checkpoint, checkpoint.parent]
    before = {folder: folder.stat().st_mode for folder in opened}
    for folder in opened:
        folder.chmod(0o755)
    for file in checkpoint.iterdir():
        file.chmod(0o644)
    (some_photos / "coins.png").chmod(0)

    # in this process: no other may be started by this user
    monkeypatch.setattr("qvsplit.sources.decoder.Decoder.read", lambda decoder, entry: read(entry).info)
    monkeypatch.setattr("qvsplit.sources.decoder.Decoder.decode", decode_here)
    (tmp_path / "mine").mkdir()
    os.chown(tmp_path / "mine", 65534, 65534)
    os.seteuid(65534)
    try:
        unreadable = run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "mine" / "embeds")
        unwritable = run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "not mine")
    except ImportError:  # PackageNotFoundError, too
        pytest.skip("Python's packages are out of an ordinary user's reach here")
    finally:
        os.seteuid(0)
        for folder, mode in before.items():
            folder.chmod(mode)
    assert unreadable[0] == 1
    assert "failed: coins.png cannot be opened: Permission denied" in unreadable[2]
    assert unwritable[0] == 7
    assert "cannot be written (Permission denied)" in one_line(unwritable[2])


def test_an_interrupt_while_a_class_is_made_is_an_interrupt_like_any_other(store_folder, tmp_path):
    """CPython ends a `python -m` by SIGINT once KeyboardInterrupt has passed through exec() of a text, handled or not."""
    (tmp_path / "interrupted.py").write_text(
        "import sys, qvsplit.verify\nfrom qvsplit.cli import main\n"
        "qvsplit.verify.describe = lambda store: exec('raise KeyboardInterrupt')\n"
        f"sys.argv = ['qvsplit', 'inspect', {str(store_folder)!r}]\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (130, "qvsplit: interrupted\n")
