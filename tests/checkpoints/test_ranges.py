"""The encoder alone, fetched in ranges from a hub on loopback, whatever the hub, the network and the disk do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from qvsplit import cli
from qvsplit.checkpoints import opening, ranges
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import FAMILIES
from qvsplit.checkpoints.files import INDEX_FILE, NOTE_FILE
from qvsplit.checkpoints.fingerprint import encoder_fingerprint
from qvsplit.checkpoints.hub import fetch_files, fetch_small_files
from qvsplit.checkpoints.opening import choose_checkpoint, open_checkpoint, open_headers
from qvsplit.checkpoints.tensors import read_header
from qvsplit.checkpoints.writing import write_safetensors
from qvsplit.errors import DiskError, ModelError
from tests.support.checkpoints import files_of, rewrite
from tests.support.hub_server import COMMIT, NAME, Hub

GUESS = 4096  # more than any header of the tiny checkpoint's, and little beside its tensors


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """The tiny checkpoint is to be as a large one is to these."""
    monkeypatch.setattr(ranges, "GUESS_BYTES", GUESS)
    monkeypatch.setattr(ranges, "SYNC_BYTES", 1 << 16)


@pytest.fixture
def single(own) -> Path:
    """The tiny checkpoint in one file, without an index."""
    rewrite(own, files=1)
    return own


def size_of(folder: Path) -> int:
    """Bytes of the encoder's tensors."""
    return sum(place.size for place in open_checkpoint(folder, "encoder").encoder_places().values())


def moved(hub: Hub) -> int:
    """Bytes sent of safetensors files."""
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))


def kept_in(home: Path) -> Path:
    return home / "qvsplit" / "checkpoints" / NAME.replace("/", "--") / COMMIT


def assert_same_encoder(opened: Checkpoint, folder: Path) -> None:
    """Name and revision are the hub's, all else is as in `folder`."""
    whole = open_checkpoint(folder, "encoder")
    assert (opened.name, opened.revision, opened.has("encoder")) == (NAME, COMMIT, True)
    assert sorted(opened.files) == sorted(whole.encoder_names)
    assert encoder_fingerprint(opened) == encoder_fingerprint(whole)


@pytest.mark.parametrize("redirects", ["", "host", "path"])
def test_only_the_encoder_s_bytes_are_moved(checkpoint, use_hub, tmp_path, monkeypatch, redirects):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub(checkpoint, private=True, redirects=redirects) as hub:
        use_hub(hub.url, tmp_path)
        opened = open_checkpoint(NAME, "encoder")
        assert_same_encoder(opened, checkpoint)
        files = open_checkpoint(checkpoint, "encoder").file_names("encoder")
        assert moved(hub) == size_of(checkpoint) + len(files) * GUESS
        assert {asked.name for asked in hub.asked if asked.range} == set(files)
        assert not [asked for asked in hub.asked if asked.name.endswith(".safetensors") and not asked.range]
        assert "Bearer hf_secret" in hub.tokens
        assert hub.other_tokens == {"": set(), "host": {""}, "path": {"Bearer hf_secret"}}[redirects]
        hub.forget()
        again = open_checkpoint(NAME, "encoder")
        assert (again, hub.asked) == (opened, [])
    assert opened.folder == kept_in(tmp_path) / "encoder"
    note = json.loads((opened.folder / NOTE_FILE).read_text())
    assert note.pop("left_out") and note == {"half": "encoder", "model": NAME, "revision": COMMIT}
    small = {path.name for path in checkpoint.iterdir() if path.suffix in (".json", ".jinja")} - {INDEX_FILE}
    assert {path.name for path in opened.folder.iterdir()} == small | {"model.safetensors", NOTE_FILE}


def test_of_a_single_file_whose_header_is_longer_than_the_guess(single, use_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "GUESS_BYTES", 1000)
    with Hub(single) as hub:
        use_hub(hub.url, tmp_path)
        assert_same_encoder(open_checkpoint(NAME, "encoder"), single)
        header, rest, _ = [asked.range for asked in hub.asked if asked.range]
        length = 8 + struct.unpack("<Q", (single / "model.safetensors").read_bytes()[:8])[0]
        assert (header, rest) == ("bytes=0-999", f"bytes=1000-{length - 1}")
        assert moved(hub) == size_of(single) + length


@pytest.mark.parametrize("indexed", [True, False])
def test_of_a_family_that_only_a_dry_run_knows(family_checkpoint, use_hub, tmp_path, monkeypatch, indexed):
    listed = opening.FAMILIES["minicpmv4_6"]
    monkeypatch.setattr(opening, "FAMILIES", {name: one for name, one in FAMILIES.items() if name != "minicpmv4_6"})
    folder = Path(shutil.copytree(family_checkpoint("minicpmv4_6"), tmp_path / "model"))
    if indexed:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
        for file in set(weight_map.values()):
            save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with Hub(folder) as hub:
        use_hub(hub.url, tmp_path)
        opened = open_checkpoint(NAME, "encoder")
        assert_same_encoder(opened, folder)
        assert opened.family == open_checkpoint(folder, "encoder").family != listed
        assert (
            moved(hub)
            <= size_of(folder) + 2 * ranges.GUESS_BYTES + 20_000
            < sum(file.stat().st_size for file in files_of(folder))
        )
        hub.forget()
        assert (open_checkpoint(NAME, "encoder"), hub.asked) == (opened, [])


def test_whole_files_that_are_at_hand_are_used(checkpoint, single, use_hub, tmp_path, monkeypatch):
    for number, (folder, off) in enumerate(((checkpoint, "0"), (single, "False"))):
        home = tmp_path / str(number)
        with Hub(folder) as hub:
            use_hub(hub.url, home)
            monkeypatch.setenv("QVSPLIT_RANGES", off)
            whole = open_checkpoint(NAME, "encoder")
            assert not [asked for asked in hub.asked if asked.range]
            monkeypatch.delenv("QVSPLIT_RANGES")
            hub.forget()
            assert open_checkpoint(NAME, "encoder") == whole
            assert hub.asked == []
        assert whole.folder.is_relative_to(home / "hub")


def test_of_files_of_which_some_are_here_whole_the_others_are_fetched_whole(checkpoint, use_hub, tmp_path):
    files = open_checkpoint(checkpoint, "encoder").file_names("encoder")
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        fetch_files(NAME, files[:1], fetch_small_files(NAME, None).name)
        hub.forget()
        assert open_checkpoint(NAME, "encoder").folder.is_relative_to(tmp_path / "hub")
        assert [(asked.name, asked.range) for asked in hub.asked] == [(name, None) for name in files[1:]]


def test_where_ranges_would_save_little_whole_files_are_fetched(checkpoint, own, use_hub, tmp_path):
    language = [name for file in files_of(own) for name in load_file(file) if not name.startswith("visual.")]
    for file in files_of(own):
        tensors = {
            name: t if name == language[0] or name not in language else t[:1] for name, t in load_file(file).items()
        }
        save_file(tensors, file)
    with Hub(own) as hub, warnings.catch_warnings():
        warnings.simplefilter("error")
        use_hub(hub.url, tmp_path)
        assert open_checkpoint(NAME, "encoder").folder.is_relative_to(tmp_path / "hub")
        assert {asked.name for asked in hub.asked if asked.range} < set(hub.fetched)
    assert [path.name for path in kept_in(tmp_path).iterdir()] == ["encoder.lock"]


def test_offline_the_kept_encoder_is_used_and_without_it_the_hub_is_missed(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        opened = open_checkpoint(NAME, "encoder")
    use_hub(hub.url, tmp_path, offline=True)
    assert open_checkpoint(NAME, "encoder") == opened
    shutil.rmtree(kept_in(tmp_path))
    with pytest.raises(ModelError, match=f"^{NAME} is not in the hub's cache and the hub cannot be reached; give a "):
        open_checkpoint(NAME, "encoder")


def test_where_the_cache_cannot_be_written_whole_files_are_fetched(checkpoint, use_hub, tmp_path):
    (tmp_path / "qvsplit").write_text("no folder")
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.warns(ranges.RangesWarning, match=r"alone \(.* cannot be written\): fetching the whole files"):
            opened = open_checkpoint(NAME, "encoder")
        assert not [asked for asked in hub.asked if asked.range]
    assert opened.has("encoder")


def test_a_kept_encoder_that_was_cut_is_fetched_anew(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        kept = open_checkpoint(NAME, "encoder").folder
        os.truncate(kept / "model.safetensors", 100_000)
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_kept_encoder_of_other_tensors_is_fetched_anew(checkpoint, single, use_hub, tmp_path, indexed):
    """As rules may change: of a family here, or of transformers for one that is not listed."""
    with Hub(checkpoint if indexed else single) as hub:
        use_hub(hub.url, tmp_path)
        kept = open_checkpoint(NAME, "encoder").folder
        places = read_header(kept / "model.safetensors")
        gone = places.popitem()[0]
        write_safetensors(kept / "model.safetensors", places)
        note = json.loads((kept / NOTE_FILE).read_text())
        (kept / NOTE_FILE).write_text(json.dumps(note | {"left_out": sorted([*note["left_out"], gone])}))
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 0)])
def test_small_files_that_the_kept_encoder_lacks_are_copied_again(checkpoint, use_hub, tmp_path, damage):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        kept = open_checkpoint(NAME, "encoder").folder
        damage(kept / "config.json")
        hub.forget()
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert hub.asked == []
    assert (kept / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_what_ended_just_before_it_was_whole_is_not_fetched_again(checkpoint, use_hub, tmp_path, monkeypatch):
    rename = os.rename

    def end(source: Path, target: Path) -> None:
        if Path(source).name == "encoder.part":
            raise KeyboardInterrupt
        rename(source, target)

    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", end)
            with pytest.raises(KeyboardInterrupt):
                open_checkpoint(NAME, "encoder")
        hub.forget()
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert moved(hub) == 3 * GUESS


# ------------------------------------------------------------------------------------------------------ what breaks off


def break_off(hub: Hub, home: Path) -> int:
    """Fetch from a hub that never sends the last bytes; gives how many bytes of tensors are then kept."""
    last = open_checkpoint(hub.folder, "encoder").file_names("encoder")[-1]
    hub.breaks_at = {last: (hub.folder / last).stat().st_size // 2}
    with pytest.raises(ModelError, match="cannot be fetched from the hub: the connection breaks off .* run again") as e:
        open_checkpoint(NAME, "encoder")
    assert e.value.exit_code == 3
    hub.breaks_at = {}
    return (kept_in(home) / "encoder.part" / "model.safetensors").stat().st_size - header_bytes(hub.folder)


def header_bytes(folder: Path) -> int:
    return len(ranges.header_of(open_checkpoint(folder, "encoder").encoder_places()))


def test_a_connection_that_breaks_off_is_one_line_and_the_next_run_goes_on(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        kept = break_off(hub, tmp_path)
        assert len([asked for asked in hub.asked if asked.range]) == 3 + 3 + ranges.RETRIES
        assert 0 < kept < size_of(checkpoint)
        hub.forget()
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert moved(hub) == size_of(checkpoint) - kept + 3 * GUESS


def test_connections_that_break_off_are_taken_up_where_they_ended(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        hub.breaks_after = dict.fromkeys(open_checkpoint(checkpoint, "encoder").file_names("encoder"), 50_000)
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert moved(hub) == size_of(checkpoint) + 3 * GUESS


def test_of_connections_that_break_off_within_headers_these_are_put_together(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        hub.breaks_after = dict.fromkeys(open_checkpoint(checkpoint, "encoder").file_names("encoder"), 1000)
        for name in hub.breaks_after:
            found = ranges._Hub(NAME, COMMIT).file(name)
            assert found.places.keys() == read_header(checkpoint / name).keys()
        assert moved(hub) == 3 * GUESS
        hub.breaks_after = dict.fromkeys(hub.breaks_after, 0)
        with pytest.raises(ModelError, match=r"the hub: the connection breaks off \(.*\); run again$"):
            open_headers(NAME)


KILLED = """
import sys
from qvsplit.checkpoints import opening, ranges
ranges.GUESS_BYTES, ranges.SYNC_BYTES = {guess}, {sync}
opening.open_checkpoint({name!r}, "encoder")
"""


def test_a_killed_process_has_kept_what_is_surely_on_the_disk(checkpoint, use_hub, tmp_path):
    last = open_checkpoint(checkpoint, "encoder").file_names("encoder")[-1]
    code = KILLED.format(guess=GUESS, sync=1 << 16, name=NAME)
    with Hub(checkpoint) as hub:
        hub.holds_at = {last: (checkpoint / last).stat().st_size // 2}
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin",
                       "QVSPLIT_CACHE": str(tmp_path / "qvsplit"), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
        assert hub.held.wait(60)
        part = kept_in(tmp_path) / "encoder.part"
        wanted = size_of(checkpoint) // 2
        while json.loads((part / "fetched.json").read_text())["synced"] < wanted:
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        hub.holds_at = {}
        synced = json.loads((part / "fetched.json").read_text())["synced"]
        with (part / "model.safetensors").open("r+b") as stream:  # as a power cut may leave it
            stream.truncate(synced)
            stream.truncate(synced + 1_000_000)
        hub.forget()
        use_hub(hub.url, tmp_path)
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert moved(hub) == size_of(checkpoint) - (synced - header_bytes(checkpoint)) + 3 * GUESS


@pytest.mark.parametrize("change", ["header", "note", "no note", "too short", "another file"])
def test_what_was_kept_of_something_else_is_not_gone_on_with(checkpoint, use_hub, tmp_path, change):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        break_off(hub, tmp_path)
        part = kept_in(tmp_path) / "encoder.part"
        if change == "header":
            with (part / "model.safetensors").open("r+b") as stream:
                stream.seek(20)
                stream.write(b"#")
        elif change == "another file":
            hub.etags = {open_checkpoint(checkpoint, "encoder").file_names("encoder")[0]: ["another"]}
        elif change == "too short":
            os.truncate(part / "model.safetensors", 10_000)
        elif change == "note":
            (part / "fetched.json").write_text('{"synced": 100000}')
        else:
            (part / "fetched.json").unlink()
        hub.forget()
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert moved(hub) == size_of(checkpoint) + 3 * GUESS


def test_two_at_once_fetch_it_once(checkpoint, use_hub, tmp_path, monkeypatch):
    last = open_checkpoint(checkpoint, "encoder").file_names("encoder")[-1]
    looked = threading.Semaphore(0)

    def kept_encoder(*of: Any, small: Path) -> Path | None:
        looked.release()
        return ranges.kept_encoder(*of, small=small)

    monkeypatch.setattr(opening, "kept_encoder", kept_encoder)
    found: list[Checkpoint] = []
    threads = [threading.Thread(target=lambda: found.append(open_checkpoint(NAME, "encoder"))) for _ in range(2)]
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        hub.holds_at = {last: (checkpoint / last).stat().st_size // 2}
        threads[0].start()
        assert hub.held.wait(60)
        threads[1].start()
        assert looked.acquire(timeout=60) and looked.acquire(timeout=60)
        hub.holds_at = {}
        hub.go.set()
        for thread in threads:
            thread.join(60)
        assert moved(hub) == size_of(checkpoint) + 3 * GUESS
    assert len(found) == 2 and found[0] == found[1]


FULL = (
    "encoder.part: the disk is full; what has been fetched is kept; make room and run again, or set QVSPLIT_CACHE to "
)


def test_on_a_full_disk_what_was_fetched_is_kept(checkpoint, use_hub, tmp_path, monkeypatch):
    synced = iter(range(100))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        fsync(descriptor)
        if next(synced) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DiskError, match=FULL):
                open_checkpoint(NAME, "encoder")
        synced_bytes = json.loads((kept_in(tmp_path) / "encoder.part" / "fetched.json").read_text())["synced"]
        hub.forget()
        assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
        assert moved(hub) == size_of(checkpoint) - (synced_bytes - header_bytes(checkpoint)) + 3 * GUESS


# -------------------------------------------------------------------------------------------- servers that are otherwise

WRONG = {
    "ignores ranges": "answers 200", "refuses ranges": "answers 416", "says none": "Accept-Ranges: none",
    "shifted": "another range", "says nothing": "another range", "longer": "another length",
    "shorter": "another length", "compressed": "compressed", "no etag": "no ETag",
}  # fmt: skip
REFUSED = {"forbids ranges": "answers 403", "knows no ranges": "answers 501"}


@pytest.mark.parametrize("wrong", [*WRONG, *REFUSED])
def test_of_a_server_that_serves_no_ranges_whole_files_are_fetched_and_it_is_said(
    checkpoint, use_hub, tmp_path, capsys, wrong
):
    with Hub(checkpoint) as hub, warnings.catch_warnings():
        cli.print_warnings()
        use_hub(hub.url, tmp_path)
        hub.wrong = wrong
        opened = open_checkpoint(NAME, "encoder")
        asked = [asked.name for asked in hub.asked if asked.range]
        assert len(asked) == 1  # the first answer is enough
        wanted = set(open_checkpoint(checkpoint, "encoder").file_names("encoder"))
        assert {asked.name for asked in hub.asked if not asked.range} >= wanted
    assert opened.folder.is_relative_to(tmp_path / "hub")
    assert encoder_fingerprint(opened) == encoder_fingerprint(open_checkpoint(checkpoint, "encoder"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"qvsplit: {NAME}: its vision encoder cannot be fetched alone (the server ")
    assert (WRONG | REFUSED)[wrong] in said
    assert [path.name for path in kept_in(tmp_path).iterdir()] == ["encoder.lock"]


@pytest.mark.parametrize(("wrong", "wanted"), [("", "0"), *((wrong, "1") for wrong in ["ignores ranges", *REFUSED])])
def test_headers_that_cannot_or_shall_not_be_read_alone_are_left_out(
    checkpoint, use_hub, tmp_path, monkeypatch, wrong, wanted
):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        monkeypatch.setenv("QVSPLIT_RANGES", wanted)
        hub.wrong = wrong
        opened, places = open_headers(NAME)
        assert opened.files and not places
        assert bool([asked for asked in hub.asked if asked.range]) == (wanted == "1")


def test_what_the_hub_says_to_be_of_another_commit_is_one_line(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        hub.wrong = "another commit"
        with pytest.raises(
            ModelError, match=f"^{NAME}: the hub was asked for commit {COMMIT} and sends {'0' * 40}; run"
        ):
            open_checkpoint(NAME, "encoder")
    assert [path.name for path in kept_in(tmp_path).iterdir()] == ["encoder.lock"]


def test_of_a_server_that_serves_no_ranges_any_more_nothing_unfinished_is_left(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        break_off(hub, tmp_path)
        hub.wrong = "ignores ranges"
        with pytest.warns(ranges.RangesWarning):
            opened = open_checkpoint(NAME, "encoder")
    assert opened.folder.is_relative_to(tmp_path / "hub")
    assert [path.name for path in kept_in(tmp_path).iterdir()] == ["encoder.lock"]


def test_a_refusal_of_what_was_begun_says_nothing_of_ranges(checkpoint, use_hub, tmp_path):
    name = open_checkpoint(checkpoint, "encoder").file_names("encoder")[0]
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        remote = ranges._Hub(NAME, COMMIT)
        file = remote.file(name)
        hub.wrong = "forbids ranges"
        with pytest.raises(HfHubHTTPError, match="403"):
            next(remote.read({name: file}, [(name, 2000, 300_000)]))


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_server_sends_that_was_not_asked_for_is_never_written(checkpoint, use_hub, tmp_path, wrong):
    name = open_checkpoint(checkpoint, "encoder").file_names("encoder")[-1]
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        remote = ranges._Hub(NAME, COMMIT)
        file = remote.file(name)
        hub.wrong = wrong
        read = remote.read({name: file}, [(name, 2000, 300_000)])
        with pytest.raises(ranges.RangesNotServed, match=WRONG[wrong]):
            next(read)


def test_a_large_file_that_is_sent_instead_of_a_range_is_not_read(use_hub, tmp_path):
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as stream:
        stream.truncate(100 << 30)
    with Hub(tmp_path / "model") as hub:
        use_hub(hub.url, tmp_path)
        hub.wrong = "ignores ranges"
        with pytest.raises(ranges.RangesNotServed):
            ranges._Hub(NAME, COMMIT).file("model.safetensors")
    assert hub.sent["model.safetensors"] < 64 << 20  # what lies in the system's buffers


@pytest.mark.parametrize("redirects", ["", "host"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_changes_meanwhile_is_begun_anew_once(checkpoint, use_hub, tmp_path, times, redirects):
    name = open_checkpoint(checkpoint, "encoder").file_names("encoder")[-1]
    with Hub(checkpoint, redirects=redirects) as hub:
        use_hub(hub.url, tmp_path)
        hub.etags = {name: ["first", "second", *(["third", "fourth"] if times == 2 else [])]}
        if times == 1:
            assert_same_encoder(open_checkpoint(NAME, "encoder"), checkpoint)
            headers = [asked for asked in hub.asked if asked.name == name and asked.range == f"bytes=0-{GUESS - 1}"]
            assert len(headers) == 2
        else:
            with pytest.warns(
                ranges.RangesWarning, match=rf"alone \({name} has changed on the hub while it was fetched\)"
            ):
                assert open_checkpoint(NAME, "encoder").folder.is_relative_to(tmp_path / "hub")
            assert [path.name for path in kept_in(tmp_path).iterdir()] == ["encoder.lock"]


# ---------------------------------------------------------------------------------------------------------- bad headers


def entry(start: int, end: int, *, dtype: str = "F32", shape: tuple[int, ...] | None = None) -> str:
    shape = shape or ((end - start) // 4,)
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


ONE, TWO = '"visual.a"', '"visual.b"'
HOSTILE = {
    "negative": f"{{{ONE}:{entry(-8, 0)},{TWO}:{entry(0, 400)}}}",
    "overlap": f"{{{ONE}:{entry(0, 400)},{TWO}:{entry(200, 600)}}}",
    "hole": f"{{{ONE}:{entry(0, 400)},{TWO}:{entry(800, 1000)}}}",
    "beyond": f"{{{ONE}:{entry(0, 4000)}}}",
    "too little": f"{{{ONE}:{entry(0, 400)}}}",
    "shape": f"{{{ONE}:{entry(0, 1000, shape=(2**62, 2**62))}}}",
    "dtype": f"{{{ONE}:{entry(0, 1000, dtype='F31')}}}",
    "twice": f"{{{ONE}:{entry(0, 1000)},{ONE}:{entry(0, 1000)}}}",
    "no object": "[" * 3000,
    "no json": "{{",
}


@pytest.mark.parametrize("how", [*HOSTILE, "huge", "longer than the file", "empty"])
def test_a_hostile_header_is_one_line_before_anything_is_fetched(single, use_hub, tmp_path, how):
    header = HOSTILE.get(how, "{}").encode()
    length = {"huge": 1 << 63, "longer than the file": 2000}.get(how, len(header))
    content = length.to_bytes(8, "little") + header + bytes(1000) if how != "empty" else bytes(7)
    (single / "model.safetensors").write_bytes(content)
    with Hub(single) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.raises(ModelError, match=rf"^{NAME}: model.safetensors is damaged on the hub \(.*\); name another"):
            open_checkpoint(NAME, "encoder")
        assert [asked.range for asked in hub.asked if asked.name == "model.safetensors"] == [f"bytes=0-{GUESS - 1}"]
    assert [path.name for path in kept_in(tmp_path).iterdir()] == ["encoder.lock"]


@pytest.mark.parametrize("claimed", [10**12, 10**17, 10**30])
def test_a_size_that_is_not_the_file_s_is_one_line(single, use_hub, tmp_path, claimed):
    with Hub(single) as hub:
        use_hub(hub.url, tmp_path)
        hub.claims = claimed
        with pytest.raises(ModelError, match=rf"^{NAME}: model.safetensors is damaged on the hub \(.*\); name another"):
            open_checkpoint(NAME, "encoder")


def test_without_a_folder_for_temporary_files_it_is_one_line(single, use_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with Hub(single) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.raises(
            DiskError, match=r"^the folder for temporary files: cannot be written \(.*\); name another "
        ):
            open_checkpoint(NAME, "encoder")


def test_an_index_that_names_tensors_which_are_not_there(own, use_hub, tmp_path):
    index = json.loads((own / INDEX_FILE).read_text())
    file = open_checkpoint(own, "encoder").file_names("encoder")[0]
    index["weight_map"]["visual.more.weight"] = file
    (own / INDEX_FILE).write_text(json.dumps(index))
    with Hub(own) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.raises(
            ModelError, match=rf"{NAME}: its files on the hub lack visual\.more\.weight, which its index"
        ):
            open_checkpoint(NAME, "encoder")
        assert moved(hub) == 3 * GUESS


# ---------------------------------------------------------------------------------------------- the kept encoder's folder


def test_the_kept_encoder_is_a_model_folder_and_has_no_language_model(
    checkpoint, use_hub, tmp_path, some_photos, run_cli
):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        kept = open_checkpoint(NAME, "encoder").folder
    code, _, err = run_cli("extract", some_photos, "--out", tmp_path / "embeds", "--model", kept)
    assert code == 0, err
    wanted = f"{kept} holds no language model; it is the vision encoder of {NAME} alone: name that, or "
    wanted += "the folder of its language model, as --model"
    code, _, err = run_cli("ask", "--embeds", tmp_path / "embeds", "What is it?")
    assert (code, err) == (3, f"qvsplit: the store was made with {kept}: {wanted}\n")
    code, _, err = run_cli("ask", "--embeds", tmp_path / "embeds", "--model", kept, "What is it?")
    assert (code, err) == (3, f"qvsplit: {wanted}\n")
    (kept / NOTE_FILE).unlink()
    with pytest.raises(ModelError, match="holds no language model; name a checkpoint that has one as `model`"):
        choose_checkpoint(str(kept), "both", own="", revision=None)


def test_progress_is_shown_as_the_hub_s_library_shows_it(monkeypatch):
    from huggingface_hub.utils import tqdm

    shown = sys.modules[tqdm.__module__].progress_bar_states
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(shown, "_global", True)
    with ranges._bar(NAME, 100, 40) as bar:
        assert isinstance(bar, tqdm)
        assert (bar.n, bar.total, bool(bar.disable)) == (40, 100, False)
    monkeypatch.setitem(shown, "_global", False)
    with ranges._bar(NAME, 100, 40) as bar:
        assert bar.disable
