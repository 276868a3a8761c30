"""`--ray` on a real cluster of three nodes on this machine: the store of a plain run, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.extracting import LATER, OLD, add, add_bad, shards
from tests.support.processes import run_process, start_process
from tests.support.ray_cluster import RayCluster
from tests.support.same_store import assert_same, left_over

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.timeout(600)  # it starts some ten processes that import torch

COUNTS = (
    "found", "unchanged", "failed_before", "to_read", "encoded", "new", "modified", "re_encoded", "copied", "moved",
    "metadata_changed", "failed", "failed_again", "disappeared", "remaining", "deleted", "not_found", "videos", "clips",
    "tokens", "stopped", "interrupted",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(3, cpus=2) as cluster:
        yield cluster


@pytest.fixture
def items(tmp_path) -> Path:
    """Images, copies, what is no image."""
    folder = tmp_path / "items"
    for number in range(24):
        add(folder, f"{number:02d}.png", shift=number)
    (folder / "below").mkdir()
    for name in ("copy.png", "below/copy.png", "zz.png"):
        shutil.copyfile(folder / "03.png", folder / name)
        os.utime(folder / name, OLD)
    add_bad(folder, "bad.jpg", "below/bad.png")
    return folder


@pytest.fixture
def both(checkpoint, cluster, tmp_path):
    """Extract into two stores, without Ray and with it; give both summaries, and both exit codes."""

    def run(*words: object) -> list[tuple[dict, int]]:
        ran = []
        for place, ray in (("plain", []), ("ray", ["--ray", cluster.address])):
            done = run_process(
                "extract", *words, "--out", tmp_path / place, "-m", checkpoint, "--json", *ray, env=cluster.environment
            )
            assert "Traceback" not in done.stderr, done.stderr
            summary = json.loads(done.stdout)
            ran.append(({name: summary[name] for name in COUNTS}, done.returncode))
        return ran

    return run


def test_the_life_cycle_is_that_of_one_machine(both, items, tmp_path):
    plain, ray = both(items)
    assert ray == plain
    assert plain[1] == 1 and plain[0]["encoded"] == 24 and plain[0]["copied"] == 3 and plain[0]["failed"] == 2
    assert_same(tmp_path / "ray", tmp_path / "plain")

    add(items, "00.png", "coffee.png")  # modified
    os.utime(items / "00.png", LATER)
    (items / "01.png").rename(items / "below" / "moved.png")
    (items / "02.png").unlink()
    os.utime(items / "04.png", LATER)  # its metadata alone
    shutil.copyfile(items / "05.png", items / "below" / "another.png")
    os.utime(items / "below" / "another.png", OLD)
    add(items, "new.png", shift=77)
    plain, ray = both(items, "--prune", "--retry-failed")
    assert ray == plain
    expected = {
        "new": 1,
        "modified": 1,
        "moved": 1,
        "copied": 1,
        "metadata_changed": 1,
        "deleted": 1,
        "failed_again": 2,
    }
    assert {name: plain[0][name] for name in expected} == expected
    assert_same(tmp_path / "ray", tmp_path / "plain")


def wait_for(condition, process: subprocess.Popen, seconds: float = 200):
    """Wait for something to be there while a process runs, and give it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, "it ended before that"
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_what_dies_costs_nothing(checkpoint, cluster, items, tmp_path):
    for number in range(24, 150):
        add(items, f"{number:03d}.png", shift=number % 100, photo="astronaut.png")
    assert run_process("extract", items, "--out", tmp_path / "plain", "-m", checkpoint).returncode == 1
    words = ("extract", items, "--out", tmp_path / "ray", "-m", checkpoint, "--ray", cluster.address)
    process = start_process(*words, env=cluster.environment)
    for kind in ("ReadItems", "EncodeItems"):
        wait_for(lambda kind=kind: cluster.kill(worker.pid) if (worker := _first(cluster, kind)) else None, process)
    cluster.kill_node(2)
    code = process.wait(300)
    assert cluster.idle()
    cluster.start_node(2)
    assert code == 1  # files that are none
    assert_same(tmp_path / "ray", tmp_path / "plain")

    shutil.rmtree(tmp_path / "ray")
    assert cluster.idle()
    process = start_process(*words, env=cluster.environment)
    wait_for(lambda: _first(cluster, "EncodeItems"), process)
    wait_for(lambda: left_over(tmp_path / "ray"), process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert run_process("extract", items, "--out", tmp_path / "ray", "-m", checkpoint).returncode in (0, 1)
    assert_same(tmp_path / "ray", tmp_path / "plain")


def _first(cluster: RayCluster, kind: str):
    """A worker of this kind."""
    return next(iter(cluster.workers(kind)), None)


def test_limits_and_signals(checkpoint, cluster, items, tmp_path):
    words = ("extract", items, "--out", tmp_path / "ray", "-m", checkpoint, "--ray", cluster.address, "--json")
    limited = run_process(*words, "--limit", 5, env=cluster.environment)
    summary = json.loads(limited.stdout)
    assert summary["stopped"] == "limit" and summary["encoded"] + summary["copied"] + summary["failed"] == 5
    assert summary["remaining"] == summary["to_read"] - 5
    assert len(shards(tmp_path / "ray")) >= 1

    assert cluster.idle()  # what wait_for sees is of the next run
    process = start_process(*words, env=cluster.environment)
    wait_for(lambda: _first(cluster, "EncodeItems"), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 143
    assert json.loads(said)["interrupted"]
    assert left_over(tmp_path / "ray") == []

    late = run_process(*words, "--max-runtime", "0s", env=cluster.environment)
    assert json.loads(late.stdout)["stopped"] == "max-runtime"
    assert run_process("extract", items, "--out", tmp_path / "ray", "-m", checkpoint).returncode in (0, 1)
    assert run_process("extract", items, "--out", tmp_path / "plain", "-m", checkpoint).returncode == 1
    assert_same(tmp_path / "ray", tmp_path / "plain")
