"""A hub name: only what the half needs is fetched, through huggingface_hub, from a hub on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qvsplit.checkpoints.opening import open_checkpoint
from tests.support.checkpoints import rewrite
from tests.support.hub_server import COMMIT, NAME, Hub

SMALL = {"chat_template.jinja", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json"}  # fmt: skip


def run(code: str, home: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its environment when imported: hence a process for each test."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PATH": "/usr/bin:/bin", "HF_HUB_DISABLE_XET": "1",
                "QVSPLIT_CACHE": str(home / "qvsplit"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code],
        env=settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


OPEN = """
import sys
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError
try:
    c = open_checkpoint({name!r}, {half!r})
    print(c.name, c.revision, c.has({half!r}))
except ModelError as error:
    print("ModelError", error)
"""


@pytest.mark.parametrize("half", ["encoder", "language"])
def test_only_the_files_of_the_half_are_fetched(checkpoint, tmp_path, half):
    with Hub(checkpoint) as hub:
        done = run(OPEN.format(name=NAME, half=half), tmp_path, hub.url)
    assert done.stdout.split() == [NAME, COMMIT, "True"], done.stderr
    local = open_checkpoint(checkpoint, "both")
    assert len(local.file_names(half)) < len(local.file_names("both"))
    assert set(hub.fetched) == SMALL | {"model.safetensors.index.json", *local.file_names(half)}


def test_a_single_file_is_fetched_where_there_is_no_index(tmp_path, checkpoint):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    rewrite(folder, files=1)
    with Hub(folder) as hub:
        done = run(OPEN.format(name=NAME, half="encoder"), tmp_path / "home", hub.url)
    assert done.stdout.split() == [NAME, COMMIT, "True"], done.stderr
    assert set(hub.fetched) == SMALL | {"model.safetensors"}


def test_a_second_time_comes_from_the_cache_even_offline(checkpoint, tmp_path):
    with Hub(checkpoint) as hub:
        run(OPEN.format(name=NAME, half="encoder"), tmp_path, hub.url)
        hub.fetched.clear()
        again = run(OPEN.format(name=NAME, half="encoder"), tmp_path, hub.url)
        assert hub.fetched == []
    offline = run(OPEN.format(name=NAME, half="encoder"), tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert again.stdout == offline.stdout == f"{NAME} {COMMIT} True\n"


def test_extract_and_ask_by_name_share_one_revision(checkpoint, tmp_path, some_photos):
    code = """
import sys
from qvsplit.cli import main
sys.argv = ["qvsplit", *{words!r}]
main()
"""
    with Hub(checkpoint) as hub:
        words = ["extract", str(some_photos), "--out", str(tmp_path / "embeds"), "--model", NAME]
        done = run(code.format(words=words), tmp_path / "home", hub.url)
        assert done.returncode == 0, done.stderr
        words = ["ask", "--embeds", str(tmp_path / "embeds"), "--image", "coins.png", "--json", "What is it?"]
        done = run(code.format(words=words), tmp_path / "home", hub.url)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["encoder_check"] == "fingerprint"
        # a machine that only asks has no encoder: name and revision are the evidence
        hub.fetched.clear()
        done = run(code.format(words=words), tmp_path / "other home", hub.url)
        encoder = set(open_checkpoint(checkpoint, "both").file_names("encoder"))
        language = set(open_checkpoint(checkpoint, "both").file_names("language"))
        assert json.loads(done.stdout)["encoder_check"] == "revision", done.stderr
        assert encoder - language
        assert not (encoder - language) & set(hub.fetched)


def test_a_download_that_breaks_off_is_one_line(checkpoint, tmp_path):
    with Hub(checkpoint) as hub:
        hub.breaks = open_checkpoint(checkpoint, "both").file_names("encoder")[-1]
        done = run(OPEN.format(name=NAME, half="encoder"), tmp_path, hub.url, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert done.stdout.startswith("ModelError"), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1


def test_a_token_is_sent_and_without_it_a_private_model_is_not_found(checkpoint, tmp_path):
    with Hub(checkpoint, private=True) as hub:
        refused = run(OPEN.format(name=NAME, half="encoder"), tmp_path / "a", hub.url)
        allowed = run(OPEN.format(name=NAME, half="encoder"), tmp_path / "b", hub.url, HF_TOKEN="hf_secret")
    assert refused.stdout.startswith(f"ModelError the hub has no model {NAME} (or it is private: `hf auth login`)")
    assert allowed.stdout.split() == [NAME, COMMIT, "True"], allowed.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("some/body", "the hub has no model some/body"), (f"{NAME}@nope", "no such revision"), (f"{NAME}@{COMMIT}", NAME)],
)
def test_what_the_hub_does_not_have(checkpoint, tmp_path, name, said):
    with Hub(checkpoint) as hub:
        done = run(OPEN.format(name=name, half="encoder"), tmp_path, hub.url)
    assert said in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_model_with_pickled_weights_only(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")))
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with Hub(folder) as hub:
        done = run(OPEN.format(name=NAME, half="encoder"), tmp_path / "home", hub.url)
    assert "pickled weights are never opened" in done.stdout
    assert "pytorch_model.bin" not in hub.fetched


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, offline):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = run(OPEN.format(name=NAME, half="encoder"), tmp_path, url, HF_HUB_OFFLINE=offline)
    assert done.stdout.startswith("ModelError"), done.stderr
    assert "`model=DIR`" in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_default_model_out_of_reach_names_the_ways_on(tmp_path, some_photos, offline):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin",
                "HF_HUB_OFFLINE": offline}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "qvsplit", "extract", str(some_photos), "--out", str(tmp_path / "embeds")],
        env=settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Qwen/Qwen2-VL-2B-Instruct" in done.stderr
    assert "--model DIR" in done.stderr
    assert "qvsplit demo" in done.stderr
