"""A hub name: only what the half needs is fetched, through huggingface_hub, from a hub on loopback.

How an encoder is fetched without the rest of its files is in test_ranges.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qvsplit.checkpoints.hub import hub_errors
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import DiskError, ModelError
from tests.support.checkpoints import rewrite
from tests.support.hub_server import COMMIT, NAME, Hub

SMALL = {"chat_template.jinja", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json"}  # fmt: skip
HALVES = ["encoder", "language"]


def run(words: list[str], home: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as users do, in an environment of its own: huggingface_hub reads it when imported."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PATH": "/usr/bin:/bin", "HF_HUB_DISABLE_XET": "1",
                "QVSPLIT_CACHE": str(home / "qvsplit"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "qvsplit", *words],
        env=settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("half", HALVES)
def test_only_the_files_of_the_half_are_fetched(checkpoint, use_hub, tmp_path, monkeypatch, half):
    monkeypatch.setenv("QVSPLIT_RANGES", "0")
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        opened = open_checkpoint(NAME, half)
    assert (opened.name, opened.revision, opened.has(half)) == (NAME, COMMIT, True)
    local = open_checkpoint(checkpoint, "both")
    assert len(local.file_names(half)) < len(local.file_names("both"))
    assert set(hub.fetched) == SMALL | {"model.safetensors.index.json", *local.file_names(half)}
    assert not [asked for asked in hub.asked if asked.range]


def test_a_single_file_is_fetched_where_there_is_no_index(own, use_hub, tmp_path):
    rewrite(own, files=1)
    with Hub(own) as hub:
        use_hub(hub.url, tmp_path)
        assert open_checkpoint(NAME, "language").has("language")
    assert set(hub.fetched) == SMALL | {"model.safetensors"}


def test_a_second_time_comes_from_the_cache_even_offline(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        opened = open_checkpoint(NAME, "language")
        hub.forget()
        assert open_checkpoint(NAME, "language") == opened
        assert hub.asked == []
    use_hub(hub.url, tmp_path, offline=True)
    assert open_checkpoint(NAME, "language") == opened


def test_extract_and_ask_by_name_share_one_revision(checkpoint, use_hub, tmp_path, some_photos, run_cli, monkeypatch):
    extract = ["extract", some_photos, "--model", NAME, "--out"]
    ask = ["ask", "--image", "coins.png", "--json", "What is it?", "--embeds"]
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        code, _, err = run_cli(*extract, tmp_path / "embeds")
        assert code == 0, err
        assert [asked for asked in hub.asked if asked.range]
        # the encoder was fetched alone: name and revision are the evidence
        hub.forget()
        code, out, err = run_cli(*ask, tmp_path / "embeds")
        assert code == 0, err
        encoder = set(open_checkpoint(checkpoint, "both").file_names("encoder"))
        language = set(open_checkpoint(checkpoint, "both").file_names("language"))
        assert json.loads(out)["encoder_check"] == "revision"
        assert encoder - language
        assert not (encoder - language) & set(hub.fetched)
        # where its whole files are at hand it is compared
        monkeypatch.setenv("QVSPLIT_RANGES", "0")
        open_checkpoint(NAME, "encoder")
        code, out, err = run_cli(*ask, tmp_path / "embeds")
        assert json.loads(out)["encoder_check"] == "fingerprint", err


def test_a_download_that_breaks_off_is_one_line(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        hub.breaks = open_checkpoint(checkpoint, "both").file_names("language")[-1]
        use_hub(hub.url, tmp_path)
        with pytest.raises(ModelError, match=f"^{NAME} cannot be fetched from the hub "):
            open_checkpoint(NAME, "language")


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(DiskError, match="the disk is full; make room and run again") as said, hub_errors(NAME):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert said.value.exit_code == 7


@pytest.mark.parametrize("half", HALVES)
def test_a_token_is_sent_and_without_it_a_private_model_is_not_found(checkpoint, use_hub, tmp_path, monkeypatch, half):
    with Hub(checkpoint, private=True) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.raises(ModelError, match=rf"^the hub has no model {NAME} \(or it is private: `hf auth login`\)"):
            open_checkpoint(NAME, half)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert open_checkpoint(NAME, half).has(half)


@pytest.mark.parametrize(
    ("name", "said"),
    [("some/body", "the hub has no model some/body"), (f"{NAME}@nope", "no such revision")],
)
def test_what_the_hub_does_not_have(checkpoint, use_hub, tmp_path, name, said):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.raises(ModelError, match=said):
            open_checkpoint(name, "encoder")


def test_a_revision_is_named_behind_the_name(checkpoint, use_hub, tmp_path):
    with Hub(checkpoint) as hub:
        use_hub(hub.url, tmp_path)
        for half in HALVES:
            opened = open_checkpoint(f"{NAME}@{COMMIT}", half)
            assert (opened.name, opened.revision) == (NAME, COMMIT)


@pytest.mark.parametrize("half", HALVES)
def test_a_model_with_pickled_weights_only(checkpoint, use_hub, tmp_path, half):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")))
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with Hub(folder) as hub:
        use_hub(hub.url, tmp_path)
        with pytest.raises(ModelError, match="pickled weights are never opened"):
            open_checkpoint(NAME, half)
        assert "pytorch_model.bin" not in hub.fetched


@pytest.fixture
def closed() -> str:
    """The URL of a port at which nobody is."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_one_line(closed, use_hub, tmp_path, offline):
    use_hub(closed, tmp_path, offline=offline)
    with pytest.raises(ModelError, match="`model=DIR`") as said:
        open_checkpoint(NAME, "encoder")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_default_model_out_of_reach_names_the_ways_on(closed, tmp_path, some_photos, offline):
    words = ["extract", str(some_photos), "--out", str(tmp_path / "embeds")]
    done = run(words, tmp_path / "home", closed, HF_HUB_OFFLINE=offline)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Qwen/Qwen2-VL-2B-Instruct" in done.stderr
    assert "--model DIR" in done.stderr
    assert "qvsplit demo" in done.stderr
