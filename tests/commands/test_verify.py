"""`qvsplit verify`: checksums, and the full model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from qvsplit.store import codec, shard_reader
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.clips import make_clip
from tests.support.extracting import PHOTOS, extractor
from tests.support.processes import run_process
from tests.support.terminal import one_line


def test_verify_reads_everything_and_compares_with_the_full_model(run_cli, store):
    code, out, said = run_cli("verify", store, "--sample", 3, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, said) == (0, "")
    assert lines[0]["error"] is None
    assert len(lines) == 4
    assert all(line["same_tokens"] and line["within_tolerance"] for line in lines[1:])


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_verify_says_which_mode_it_compares(run_cli, store, kernels):
    code, out, _ = run_cli("verify", store, "--sample", 1, "--kernels", kernels)
    line = f"features by the fused kernels, answers by the {kernels} kernels"
    assert (code, out.splitlines()[1]) == (0, f"against the full model in float32, one by one: {line}")
    out = run_cli("verify", store, "--sample", 1, "--kernels", kernels, "--json")[1]
    said = json.loads(out.splitlines()[1])
    named = said["dtype"], said["feature_kernels"], said["answer_kernels"]
    assert named == ("float32", "fused", kernels)


def test_verify_says_that_a_store_is_not_damaged(run_cli, small_store):
    code, out, said = run_cli("verify", small_store)
    assert (code, said) == (0, "")
    assert out.endswith("shard-000001.parquet: 4 rows, 969 tokens, no damage\n")


@pytest.mark.parametrize(
    ("given", "named", "them"),
    [
        (["--model", "none"], "--model", "it"), (["--adapter", "none"], "--adapter", "it"),
        (["-m", "none", "--device", "cuda"], "--model and --device", "them"),
    ],
)  # fmt: skip
def test_what_is_for_the_full_model_is_refused_where_none_is_loaded(run_cli, small_store, given, named, them):
    code, out, err = run_cli("verify", small_store, *given)
    assert (code, out) == (2, "")
    assert f"without --sample no model is loaded, and {named} would do nothing; say --sample 3, or leave {them}" in err


def test_verify_finds_features_that_are_not_the_models(run_cli, store, monkeypatch):
    """With a sound checksum, and wrong: only the full model can tell."""
    real = codec.from_planes

    def other(planes, itemsize):
        values = real(planes, itemsize).view(np.float32).copy()
        return (values * np.float32(1.5)).view(np.uint8)

    for module in (codec, shard_reader):
        if hasattr(module, "from_planes"):
            monkeypatch.setattr(module, "from_planes", other)
    assert run_cli("verify", store)[0] == 0
    code, _, said = run_cli("verify", store, "--sample", 2)
    assert code == 6
    assert "disagree" in said


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "paligemma2"])
def test_stores_of_other_families_agree_with_their_full_models(run_cli, some_photos, family_checkpoint, tmp_path, name):
    """Several tensors; another shape; a text model that has no attention by torch's own function."""
    extractor(str(family_checkpoint(name)), tmp_path / "e")(some_photos, kernels="reference")
    code, out, said = run_cli("verify", tmp_path / "e", "--sample", 2)
    assert (code, said) == (0, "")
    assert out.count(": same bits, same tokens\n") == 2


def test_verify_finds_other_values_in_any_tensor(run_cli, some_photos, family_checkpoint, tmp_path, monkeypatch):
    extractor(str(family_checkpoint("qwen3_vl")), tmp_path / "e")(some_photos)
    real = shard_reader.Shard._tensor

    def other(self, spec, row, blob):
        tensor = real(self, spec, row, blob)
        return replace(tensor, raw=tensor.raw[::-1].copy()) if spec.level == 1 else tensor

    monkeypatch.setattr(shard_reader.Shard, "_tensor", other)
    code, out, said = run_cli("verify", tmp_path / "e", "--sample", 1)
    assert (code, "differs by" in out, "disagree" in said) == (6, True, True)


def test_verify_says_when_an_image_cannot_be_compared(run_cli, some_photos, checkpoint, tmp_path):
    assert run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e", "--quiet")[0] == 0
    (some_photos / "chelsea.png").write_bytes(b"changed")
    code, out, _ = run_cli("verify", tmp_path / "e", "--sample", 4)
    assert code == 0
    assert "chelsea.png: not compared: its file has changed since it was encoded" in out
    for file in some_photos.iterdir():
        file.unlink()
    code, _, said = run_cli("verify", tmp_path / "e", "--sample", 2)
    assert (code, "nothing could be compared" in one_line(said)) == (2, True)


def test_parts_of_a_video_are_compared_beside_images(run_cli, family_checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    make_clip(folder / "film.mp4", 125)
    shutil.copyfile(PHOTOS["coffee.png"], folder / "coffee.png")
    small = {"max_pixels": 32 * 32 * 8, "video_max_tokens": 40, "kernels": "reference"}
    extractor(str(family_checkpoint("qwen3_vl")), tmp_path / "e")(folder, clip_seconds=2.5, **small)
    code, out, said = run_cli("verify", tmp_path / "e", "--sample", 9)
    assert (code, said) == (0, "")
    names = ["coffee.png", "film.mp4#0 (0:00 to 0:02.5)", "film.mp4#1 (0:02.5 to 0:05)"]
    assert out.splitlines()[2:] == [f"{name}: same bits, same tokens" for name in names]
    (folder / "film.mp4").write_bytes(b"changed")
    out = run_cli("verify", tmp_path / "e", "--sample", 2)[1]
    assert "film.mp4#0 (0:00 to 0:02.5): not compared: its file has changed since it was encoded\n" in out


NO_POOL = """
import pathlib, pyarrow, pyarrow.parquet
from qvsplit import cli
pyarrow.set_cpu_count(8)

def threads():
    # but those of pyarrow's memory pool, which come and go by themselves
    names = [one.read_text() for one in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum(not name.startswith("jemalloc") for name in names)

before = threads()
code = cli.run(["verify", {store!r}])
print(code, threads() - before)
"""


def test_shards_are_read_without_pyarrows_pool_of_threads(small_store):
    """One of them that still held a Python object when the interpreter ended aborted one run in ten."""
    code = NO_POOL.format(store=str(small_store))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code, more = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0
    assert more <= 2  # our own, which watches the clock, and one that pyarrow's import may start late; the pool has 8


def test_a_process_that_has_read_a_shard_ends_with_its_own_exit_code(small_store):
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # pyarrow's are as many
    assert [run_process("verify", small_store, env=threads).returncode for _ in range(3)] == [0] * 3


def test_a_shard_of_a_newer_version_is_no_damage(run_cli, tmp_path):
    declared = rows.schema()
    newer = replace(declared, config=replace(declared.config, kernels="quantum"))
    rows.ShardWriter(LocalStorage(tmp_path), "shard-000001.parquet", newer).finish()
    code, out, said = run_cli("verify", tmp_path)
    assert (code, out) == (4, "")
    assert "made by a newer qvsplit (the unknown kernels 'quantum'); upgrade this one" in one_line(said)
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["shard-000001.parquet"]
