"""The commands as a user meets them: help, output, exit codes, one line for each error."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import run_process

from qvsplit import images
from qvsplit.album import open_album


def one_line(said: str) -> str:
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("qvsplit: ")
    return lines[0]


@pytest.fixture
def album(run_cli, some_photos, checkpoint, tmp_path):
    code, _, said = run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "embeds", "--quiet")
    assert (code, said) == (0, "")
    return tmp_path / "embeds"


# ------------------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize("command", [[], ["extract"], ["ask"], ["inspect"], ["verify"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from qvsplit.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "finally: print(sorted({'torch', 'transformers', 'pyarrow', 'PIL', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage:" in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_run_with_nothing_to_do_imports_no_torch(album, some_photos):
    code = (
        "import sys; from qvsplit.cli import app\n"
        f"try: app(['extract', {str(some_photos)!r}, '--out', {str(album)!r}, '--quiet'])\n"
        "finally: print(sorted({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_version_and_no_command(run_cli):
    assert run_cli("--version")[1].startswith("qvsplit 0.")
    code, out, said = run_cli()
    assert code == 2
    assert "Usage:" in out + said


def test_an_option_that_does_not_exist_is_usage(run_cli):
    assert run_cli("extract", ".", "--nonsense")[0] == 2


# ---------------------------------------------------------------------------------------------------------- extract


def test_extract_tells_what_it_did(run_cli, some_photos, checkpoint, tmp_path):
    (some_photos / "bad.png").write_text("no picture")
    os.utime(some_photos / "bad.png", (1_600_000_000, 1_600_000_000))
    words = ("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e")
    code, out, said = run_cli(*words)
    assert (code, out) == (1, "")
    assert "qvsplit: failed: bad.png is not a picture" in said
    assert "4 new, 1 failed in " in said
    assert "peak memory" in said
    code, out, said = run_cli(*words, "--retry-failed", "--json")
    assert (code, said) == (0, "")
    summary = json.loads(out)
    assert (summary["skipped"], summary["failed"], summary["failed_again"]) == (4, 0, 1)
    assert {"encoded", "moved", "gone", "tokens", "bytes", "seconds", "stages", "peak_memory_bytes"} <= summary.keys()
    assert run_cli(*words, "--quiet") == (0, "", "")
    assert run_cli(*words, "--dry-run")[1].startswith("0 of 5 pictures would be read")


def test_a_dry_run_says_how_many(run_cli, some_photos, checkpoint, tmp_path):
    code, out, _ = run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e", "--dry-run")
    assert code == 0
    assert out.startswith("4 of 4 pictures would be read, 0 are known and unchanged\nat most 969 tokens, about ")
    assert not (tmp_path / "e").exists()


def test_the_bar_is_on_a_terminal_only(some_photos, checkpoint, tmp_path):
    words = ["extract", str(some_photos), "--model", str(checkpoint), "--out", str(tmp_path / "e")]
    said = on_terminal(words, NO_COLOR="1", TERM="xterm")
    assert "pictures" in said
    assert "4/4" in said
    assert "4 new" in said
    quiet = run_process(*words[:-1], tmp_path / "f")
    assert "4/4" not in quiet.stderr
    assert "\x1b" not in quiet.stderr


def on_terminal(words: list[str], typed: str = "", **environment: str) -> str:
    """Run a command on a pseudo-terminal, type `typed` once it asks, and give all that it showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, "-m", "qvsplit", *words])
    shown, remaining = b"", typed.encode()
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            part = os.read(terminal, 4096)
        except OSError as error:
            assert error.errno == errno.EIO  # the other side has closed
            break
        if not part:
            break
        shown += part
        if remaining and shown.rstrip().endswith(b"?"):
            line, _, rest = remaining.partition(b"\n")
            os.write(terminal, line + b"\n")
            remaining = rest
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode("utf-8", "replace")


# -------------------------------------------------------------------------------------------------------------- ask


def test_answers_to_stdout_and_nothing_else(run_cli, album):
    code, out, said = run_cli("ask", "--embeds", album, "--image", "coins.png", "--max-new-tokens", 5, "What is it?")
    assert (code, said) == (0, "")
    assert out.strip()
    code, out, said = run_cli("ask", "--embeds", album, "--max-new-tokens", 5, "What\tis it?", "Day or night?")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, len(rows), said) == (0, 8, "")
    assert {(row[0], row[1]) for row in rows} == {
        (path, question) for path in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")
        for question in ("What is it?", "Day or night?")
    }  # fmt: skip


def test_json_lines(run_cli, album, whole, some_photos):
    from conftest import upright_rgb

    _, out, _ = run_cli("ask", "--embeds", album, "--image", "co*", "--json", "--max-new-tokens", 12, "What is it?")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["path"] for answer in answers] == ["coffee.png", "coins.png"]
    for answer in answers:
        assert {"path", "question", "answer", "tower_check", "finish_reason"} <= answer.keys()
        assert answer["tokens"] == whole.answer([upright_rgb(some_photos / answer["path"])], "What is it?")


def test_questions_from_a_pipe_and_a_file(run_cli, album, tmp_path):
    (tmp_path / "questions.txt").write_text("What is it?\n\nDay or night?\n")
    words = ("ask", "--embeds", album, "--image", "coins.png", "--max-new-tokens", 3, "--json")
    from_file = run_cli(*words, "--questions", tmp_path / "questions.txt")
    from_pipe = run_cli(*words, stdin="What is it?\n\nDay or night?\n")
    assert from_file == from_pipe
    assert [json.loads(line)["question"] for line in from_file[1].splitlines()] == ["What is it?", "Day or night?"]


def test_together(run_cli, album):
    code, out, _ = run_cli(
        "ask", "--embeds", album, "--image", "co*", "--together", "--json", "--max-new-tokens", 3, "Which?"
    )
    assert (code, json.loads(out)["paths"]) == (0, ["coffee.png", "coins.png"])


def test_several_places_and_globs(run_cli, album, some_photos, checkpoint, tmp_path, photos):
    other = tmp_path / "other photos"
    other.mkdir()
    shutil.copyfile(photos / "color.png", other / "color.png")
    run_cli("extract", other, "--model", checkpoint, "--out", tmp_path / "more")
    code, out, _ = run_cli(
        "ask", "--embeds", album / "shard-*.parquet", "--embeds", tmp_path / "more", "--max-new-tokens", 2, "What?"
    )
    assert (code, len(out.splitlines())) == (0, 5)


def test_the_prompt_loop_answers_until_an_empty_line(album):
    shown = on_terminal(
        ["ask", "--embeds", str(album), "--image", "coins.png", "--max-new-tokens", "4"],
        typed="What is it?\nIs it day or night?\n\n",
        TERM="xterm",
    )
    assert "1 pictures; type a question" in shown
    assert shown.count("coins.png") == 2
    assert "Traceback" not in shown


@pytest.mark.parametrize("text", ["می‌خواهم", "👩‍👩‍👧", "é日本", "tab\tline\n"])
def test_answers_in_any_script_are_shown_as_they_are(text, capsys):
    from qvsplit.cli import _Printer

    _Printer(as_json=False, single=True, one_root=True)._grow(text)
    assert capsys.readouterr().out == text


def test_an_answer_cannot_take_over_the_terminal(capsys):
    from qvsplit.cli import _Printer

    _Printer(as_json=False, single=True, one_root=True)._grow("\x1b]0;title\x07 \u202eright to left\u2028")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 \\u202eright to left\\u2028"


def test_a_questions_file_with_a_mark_and_windows_line_ends(run_cli, album, tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeffWhat is it?\r\nOne\u2028line?\r\n".encode())
    _, out, _ = run_cli(
        "ask",
        "--embeds",
        album,
        "--image",
        "coins.png",
        "--questions",
        tmp_path / "q.txt",
        "--json",
        "--max-new-tokens",
        2,
    )
    assert [json.loads(line)["question"] for line in out.strip().split("\n")] == ["What is it?", "One\u2028line?"]


def test_pictures_of_two_roots_can_be_told_apart(run_cli, album, some_photos, checkpoint, tmp_path):
    (tmp_path / "more").mkdir()
    shutil.copyfile(some_photos / "coins.png", tmp_path / "more" / "coins.png")
    run_cli("extract", tmp_path / "more", "--model", checkpoint, "--out", album, "--quiet")
    _, out, _ = run_cli("ask", "--embeds", album, "--image", "coins.png", "--max-new-tokens", 2, "What?")
    assert {line.split("\t")[0] for line in out.splitlines()} == {
        str(some_photos / "coins.png"),
        str(tmp_path / "more" / "coins.png"),
    }


def test_a_name_that_looks_like_a_pattern_can_be_chosen(run_cli, some_photos, checkpoint, tmp_path):
    (some_photos / "coins.png").rename(some_photos / "photo[1].png")
    run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e", "--quiet")
    assert run_cli("ask", "--embeds", tmp_path / "e", "--image", "photo[1].png", "--max-new-tokens", 2, "What?")[0] == 0


def test_sigterm_at_the_prompt_exits_143(album):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "qvsplit", "ask", "--embeds", str(album)])
    shown = b""
    while not shown.rstrip().endswith(b"?"):
        shown += os.read(terminal, 4096)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 143


def test_a_reader_who_has_enough_is_no_error(album):
    command = f"{sys.executable} -m qvsplit ask --embeds {album} --max-new-tokens 3 A B C D E F G H | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_full_disk_behind_stdout_exits_7(album):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qvsplit", "ask", "--embeds", album, "--max-new-tokens", "2", "What?"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 7
    assert "disk is full" in one_line(done.stderr)


# -------------------------------------------------------------------------------------------------- inspect, verify


def test_inspect(run_cli, album, checkpoint):
    code, out, _ = run_cli("inspect", album)
    assert code == 0
    assert "pictures  4 ok (0 of them by another's embeddings), 0 failed, 0 gone, 0 lost" in out
    assert str(checkpoint) in out
    told = json.loads(run_cli("inspect", album, "--json")[1])
    assert (told["pictures"], told["recipe"]["compute_dtype"], told["hidden_size"]) == (4, "float32", 128)
    assert told["tokens"] == sum(row.n_tokens for row in open_album(album))


def test_verify_reads_everything_and_compares_with_the_whole_model(run_cli, album):
    code, out, said = run_cli("verify", album, "--sample", 3, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, said) == (0, "")
    assert lines[0]["error"] is None
    assert len(lines) == 4
    assert all(line["same_tokens"] and line["within_tolerance"] for line in lines[1:])


def test_verify_finds_embeddings_that_are_not_the_models(run_cli, album, monkeypatch):
    """Sealed, sound and wrong: only the whole model can tell."""
    import numpy as np

    from qvsplit import store

    real = store.from_planes

    def other(planes, itemsize):
        values = real(planes, itemsize).view(np.float32).copy()
        return (values * np.float32(1.5)).view(np.uint8)

    monkeypatch.setattr(store, "from_planes", other)
    assert run_cli("verify", album)[0] == 0
    code, _, said = run_cli("verify", album, "--sample", 2)
    assert code == 6
    assert "disagree" in said


def test_verify_says_when_a_picture_cannot_be_compared(run_cli, album, some_photos):
    (some_photos / "chelsea.png").write_bytes(b"changed")
    code, out, _ = run_cli("verify", album, "--sample", 4)
    assert code == 0
    assert "chelsea.png: not compared: its file has changed since" in out
    for file in some_photos.iterdir():
        file.unlink()
    code, _, said = run_cli("verify", album, "--sample", 2)
    assert (code, "nothing could be compared" in one_line(said)) == (2, True)


# ----------------------------------------------------------------------------------------------------------- errors


def no_folder(tmp, album, model):
    return ["extract", tmp / "nowhere", "--model", model], 2, "no file or folder at"


def empty_folder(tmp, album, model):
    (tmp / "empty").mkdir()
    return ["extract", tmp / "empty", "--model", model], 2, "no pictures in"


def no_pictures(tmp, album, model):
    (tmp / "texts").mkdir()
    (tmp / "texts" / "a.txt").write_text("x")
    return ["extract", tmp / "texts", "--model", model], 2, "looked for .apng"


def no_model(tmp, album, model):
    return ["extract", tmp / "photos", "--model", tmp / "nowhere", "--out", tmp / "e"], 3, "no model folder at"


def no_config(tmp, album, model):
    (tmp / "hollow").mkdir()
    return ["extract", tmp / "photos", "--model", tmp / "hollow", "--out", tmp / "e"], 3, "has no config.json"


def hub_unreachable(tmp, album, model):
    return ["extract", tmp / "photos", "--out", tmp / "e"], 3, "Qwen/Qwen2-VL-2B-Instruct is not in the hub's cache"


def missing_shard(tmp, album, model):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    for file in broken.glob("model-0000[345]*"):
        file.unlink()
    return ["extract", tmp / "photos", "--model", broken, "--out", tmp / "e"], 3, "lacks model-00003"


def truncated_weights(tmp, album, model):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    return ["extract", tmp / "photos", "--model", broken, "--out", tmp / "e"], 3, "damaged or cut short"


def broken_config(tmp, album, model):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["depth"] = "three"
    (broken / "config.json").write_text(json.dumps(config))
    return ["extract", tmp / "photos", "--model", broken, "--out", tmp / "e"], 3, "cannot be loaded"


def unknown_architecture(tmp, album, model):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    (broken / "config.json").write_text('{"model_type": "llama"}')
    return ["extract", tmp / "photos", "--model", broken, "--out", tmp / "e"], 3, "'llama' model"


def out_is_a_file(tmp, album, model):
    (tmp / "file").write_text("x")
    return ["extract", tmp / "photos", "--model", model, "--out", tmp / "file"], 7, "cannot be written"


def out_not_writable(tmp, album, model):
    return ["extract", tmp / "photos", "--model", model, "--out", "/proc/embeds"], 7, "cannot be written"


def no_album(tmp, album, model):
    return ["ask", "--embeds", tmp / "nowhere", "What?"], 2, "no album or shard at"


def album_without_shards(tmp, album, model):
    (tmp / "hollow").mkdir()
    return ["ask", "--embeds", tmp / "hollow", "What?"], 2, "holds no shards"


def no_question(tmp, album, model):
    return ["ask", "--embeds", album], 2, "no question"


def no_questions_file(tmp, album, model):
    return ["ask", "--embeds", album, "--questions", tmp / "nowhere.txt"], 2, "questions cannot be read"


def image_matches_nothing(tmp, album, model):
    return ["ask", "--embeds", album, "--image", "*.nef", "What?"], 2, "--image *.nef matches none of the album's 4"


def another_tower(tmp, album, model):
    from make_checkpoint import make_tiny

    make_tiny(tmp / "other", seed=3)
    return ["ask", "--embeds", album, "--model", tmp / "other", "What?"], 4, "another tower (tower: "


def another_width(tmp, album, model):
    other = Path(shutil.copytree(model, tmp / "wide"))
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 256
    (other / "config.json").write_text(json.dumps(config))
    return ["ask", "--embeds", album, "--model", other, "What?"], 4, "hidden_size: 128, not 256"


def csv_as_shard(tmp, album, model):
    (tmp / "table.csv").write_text("path,answer\na,b\n" * 100)
    return ["ask", "--embeds", tmp / "table.csv", "What?"], 6, "not a Parquet file"


def damaged_data(tmp, album, model):
    damage(album, 3000)
    return ["ask", "--embeds", album, "What?"], 6, "is damaged"


def damaged_footer(tmp, album, model):
    damage(album, -100)
    return ["ask", "--embeds", album, "What?"], 6, "its footer"


def damaged_to_verify(tmp, album, model):
    damage(album, 30_000)
    return ["verify", album], 6, "column embeds"


def damaged_to_extract(tmp, album, model):
    damage(album, -100)
    return ["extract", tmp / "photos", "--out", album], 6, "its footer"


def bad_dtype(tmp, album, model):
    return ["ask", "--embeds", album, "--dtype", "float8", "What?"], 2, "--dtype float8"


def other_processor(tmp, album, model):
    other = Path(shutil.copytree(model, tmp / "other mean"))
    config = json.loads((other / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(config))
    return ["ask", "--embeds", album, "--model", other, "What?"], 4, "processor.image_mean: "


def broken_tokenizer(tmp, album, model):
    broken = Path(shutil.copytree(model, tmp / "broken"))
    (broken / "tokenizer.json").write_text("[]")
    return ["ask", "--embeds", album, "--model", broken, "What?"], 3, "cannot be loaded"


def fifo_as_shard(tmp, album, model):
    os.mkfifo(tmp / "fifo")
    return ["inspect", tmp / "fifo"], 6, "not a regular file"


def name_too_long(tmp, album, model):
    return ["inspect", tmp / ("x" * 300)], 2, "cannot be read (File name too long)"


def bad_device(tmp, album, model):
    return ["ask", "--embeds", album, "--device", "abacus", "What?"], 2, "--device abacus"


def damage(album: Path, place: int) -> None:
    (file,) = album.glob("*.parquet")
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


CASES = [no_folder, empty_folder, no_pictures, no_model, no_config, hub_unreachable, missing_shard, truncated_weights,
         broken_config, unknown_architecture, out_is_a_file, out_not_writable, no_album, album_without_shards,
         no_question, no_questions_file, image_matches_nothing, another_tower, another_width, csv_as_shard,
         damaged_data, damaged_footer, damaged_to_verify, damaged_to_extract, bad_device,
         bad_dtype, other_processor, broken_tokenizer, fifo_as_shard, name_too_long]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_error_is_one_line_and_its_own_exit_code(run_cli, case, album, some_photos, checkpoint, tmp_path):
    words, code, said = case(tmp_path, album, checkpoint)
    got, _, line = run_cli(*words)
    assert (got, said in one_line(line)) == (code, True), line


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root")
def test_an_unreadable_picture_and_an_unwritable_folder_as_an_ordinary_user(
    run_cli, album, some_photos, checkpoint, tmp_path, tmp_path_factory, monkeypatch
):
    """`album` has run everything once, so that nothing has to be imported after the change of user."""
    opened = [tmp_path, *tmp_path.parents[:3], checkpoint, checkpoint.parent]
    before = {folder: folder.stat().st_mode for folder in opened}
    for folder in opened:
        folder.chmod(0o755)
    for file in checkpoint.iterdir():
        file.chmod(0o644)
    (some_photos / "coins.png").chmod(0)

    def look(decoder, found, on_file, may):  # in this process: no other may be started by this user
        file = images.read(found)
        return np.array(images.decode(file.data)) if on_file(file.sha256, file.size, file.mtime_ns) else None

    monkeypatch.setattr("qvsplit.decoder.Decoder.look", look)
    (tmp_path / "mine").mkdir()
    os.chown(tmp_path / "mine", 65534, 65534)
    os.seteuid(65534)
    try:
        read = run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "mine" / "embeds")
        written = run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "not mine")
    except ImportError:  # PackageNotFoundError, too
        pytest.skip("Python's packages are out of an ordinary user's reach here")
    finally:
        os.seteuid(0)
        for folder, mode in before.items():
            folder.chmod(mode)
    assert read[0] == 1
    assert "failed: coins.png cannot be opened: Permission denied" in read[2]
    assert written[0] == 7
    assert "cannot be written (Permission denied)" in one_line(written[2])


def test_ctrl_c_while_asking_exits_130(album):
    command = [
        sys.executable,
        "-m",
        "qvsplit",
        "ask",
        "--embeds",
        str(album),
        "--max-new-tokens",
        "2",
        *(f"What is at place {n}?" for n in range(400)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the first answer
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_line(said) == "qvsplit: interrupted"


# ------------------------------------------------------------------------------- ask: checks, tables, pages, sampling


@pytest.fixture(scope="module")
def postcards(tmp_path_factory):
    """The demo's postcards in an album: a model that means what it says."""
    from qvsplit.demo import POSTCARDS
    from qvsplit.extract import Settings, extract_pictures

    folder = tmp_path_factory.mktemp("postcards")
    shutil.copytree(POSTCARDS, folder / "postcards")
    extract_pictures([folder / "postcards"], out=folder / "album", settings=Settings(model="demo"))
    return folder / "album"


def test_choices_give_probabilities(run_cli, postcards):
    words = ("ask", "--embeds", postcards, "--image", "su*", "--choices", "day, night", "Day or night?")
    code, out, _ = run_cli(*words)
    assert (code, out) == (0, "day\t1.000\n")
    _, out, _ = run_cli(*words, "--json")
    told = json.loads(out)
    assert told["answer"] == "day"
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert list(told["probabilities"]) == ["day", "night"]
    assert told["coverage"] > 0.99
    _, out, _ = run_cli(*words, "Is there a dog?", "--logprobs")
    assert [line.split("\t")[:3] for line in out.splitlines()] == [
        ["sunday.jpg", "Day or night?", "day"], ["sunday.jpg", "Is there a dog?", "night"]
    ]  # fmt: skip
    assert all("day=-" in line and "night=-" in line for line in out.splitlines())


def test_checks_give_verdicts_and_an_exit_code(run_cli, postcards):
    examples = Path(__file__).parent.parent / "examples"
    words = ("ask", "--embeds", postcards, "--checks", examples / "moderation.toml")
    code, out, said = run_cli(*words, "--image", "s*.jpg")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    by_name = {(line[0], line[1]): line[2:] for line in lines}
    assert by_name["seaside.jpg", "verdict"] == ["block", "dog"]
    assert by_name["seaside.jpg", "dog"][::2] == ["yes", "block"]
    assert by_name["sunday.jpg", "pack"] == ["", "skipped"]
    assert by_name["sunday.jpg", "verdict"] == ["warn", "crowd"]
    assert said.strip() == "qvsplit: block: 2, warn: 1"
    assert run_cli(*words, "--image", "s*.jpg", "--fail-on", "block", "--quiet")[0] == 8
    assert run_cli(*words, "--image", "sunday.jpg", "--fail-on", "block", "--quiet")[0] == 0
    assert run_cli(*words, "--image", "sunday.jpg", "--fail-on", "warn", "--quiet")[0] == 8
    _, out, _ = run_cli(*words, "--image", "sunday.jpg", "--json")
    assert json.loads(out.splitlines()[-1]) == {
        "path": "sunday.jpg", "root": str(postcards.parent / "postcards"), "verdict": "warn", "raised": ["crowd"]
    }  # fmt: skip


def test_the_album_of_the_examples_asks_what_it_says(run_cli, postcards, tmp_path):
    examples = Path(__file__).parent.parent / "examples"
    code, _, said = run_cli("ask", "--embeds", postcards, "--checks", examples / "album.toml",
                            "--out", tmp_path / "a.jsonl", "--report", tmp_path / "a.html")  # fmt: skip
    assert code == 0
    assert "13 pictures" in said
    assert "event: on 12 of 13 pictures the model would have given none of the answers" in said
    assert "place:" not in said
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    told = {(one["path"], one["id"]): one["answer"] for one in records}
    assert len(told) == 13 * 13
    assert told["seaside.jpg", "place"] == "sea"
    assert told["seaside.jpg", "house_colour"] == "purple"
    assert told["parade.jpg", "water"] is None
    assert told["winter.jpg", "weather"] == "snowy"
    page = (tmp_path / "a.html").read_text()
    thumbnails = page.split('class="thumbnails">')[1].split("</script>")[0]
    assert len(thumbnails.split()) == 12  # one is a copy of another


def test_compare_shows_each_picture_behind_the_reference(run_cli, postcards):
    code, out, _ = run_cli("ask", "--embeds", postcards, "--image", "*.jpg", "--compare", "quiet-night.jpg",
                           "Which picture has more people?", "--json")  # fmt: skip
    assert code == 0
    told = [json.loads(line) for line in out.splitlines()]
    assert all(one["paths"][0] == "quiet-night.jpg" != one["paths"][1] for one in told)
    assert {one["paths"][1]: one["answer"] for one in told}["sunday.jpg"] == "the second"


def test_seeds_and_stop_strings(run_cli, postcards):
    words = ("ask", "--embeds", postcards, "--image", "sunday.jpg", "Describe the picture.")
    drawn = [run_cli(*words, "--temperature", "3", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    _, whole, _ = run_cli(*words)
    _, cut, _ = run_cli(*words, "--stop", " with")
    assert whole.startswith(cut.strip() + " with")
    assert cut == whole.split(" with")[0] + "\n"


def test_any_script_goes_in_and_comes_out(run_cli, album):
    asked = "这是什么？ Что это? ما هذا؟ 👩‍👩‍👧"
    code, out, _ = run_cli("ask", "--embeds", album, "--json", asked, "--system", "ты — кот", "--max-new-tokens", "2")
    assert code == 0
    assert {json.loads(line)["question"] for line in out.splitlines()} == {asked}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-on", "fatal", "?"], "choose one of info, warn, block"),
        (["--fail-on", "warn", "?"], "needs --checks"),
        (["--together", "--compare", "x", "?"], "choose one"),
        (["--compare", "none.jpg", "?"], "matches 0 of"),
        (["--compare", "*", "?"], "matches 4 of"),
        (["--choices", "yes", "?"], "at least two answers"),
        (["--choices", "yes,,no", "?"], "an answer is a text"),
        (["--checks", "none.toml"], "cannot be read from none.toml"),
        (["--json-schema", "none.json", "?"], "no JSON schema can be read"),
        (["--out", "answers.txt", "?"], "must end in"),
        (["--temperature", "0", "?"], "above 0"),
        (["--top-p", "1.5", "?"], "at most 1"),
        (["--top-k", "0", "?"], "at least 1"),
        (["--stop", "", "?"], "must not be empty"),
        (["--token-budget", "0", "?"], "at least 1"),
        (["--report", "none/page.html", "?"], "no folder at"),
        (["--out", "none/a.csv", "?"], "no folder at"),
        (["--report", "page.csv", "?"], "must end in .html"),
        (["--report", "same.html", "--out", "same.html", "?"], "must end in .parquet"),
        (["--json-schema", "none.json", "--stop", "x", "?"], "leave one out"),
    ],
)
def test_what_is_off_is_said_in_one_line(run_cli, album, words, said):
    code, out, told = run_cli("ask", "--embeds", album, *words)
    assert (code, out) == (2, "")
    assert said in one_line(told)


def test_a_question_by_the_name_of_a_check_does_not_displace_it(run_cli, postcards):
    examples = Path(__file__).parent.parent / "examples"
    code, out, said = run_cli("ask", "--embeds", postcards, "--checks", examples / "moderation.toml", "dog")
    assert (code, out) == (2, "")
    assert "two different questions have the name dog" in one_line(said)


def test_a_report_overwrites_only_a_report(run_cli, album, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><title>my own</title>")
    code, out, said = run_cli("ask", "--embeds", album, "?", "--report", mine)
    assert (code, out) == (2, "")
    assert "no page of qvsplit's" in one_line(said)
    assert mine.read_text() == "<!doctype html><title>my own</title>"
    for _ in range(2):
        assert run_cli("ask", "--embeds", album, "?", "--report", tmp_path / "page.html", "--max-new-tokens", 2)[0] == 0


def test_a_table_in_use_and_a_table_that_is_none(run_cli, album, tmp_path):
    from qvsplit.answers import Table

    with Table(tmp_path / "a.csv"):
        code, _, said = run_cli("ask", "--embeds", album, "?", "--out", tmp_path / "a.csv")
        assert code == 5
        one_line(said)
    (tmp_path / "b.csv").write_text("name\nada\n")
    code, _, said = run_cli("ask", "--embeds", album, "?", "--out", tmp_path / "b.csv")
    assert code == 2
    assert "choose another name" in one_line(said)
    assert (tmp_path / "b.csv").read_text() == "name\nada\n"
