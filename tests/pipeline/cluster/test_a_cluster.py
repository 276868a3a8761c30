"""`--ray` on a real cluster of three nodes on this machine: the store of a plain run, whatever dies meanwhile.

Few runs, as each starts some ten processes that import torch: `bench/ray_kills.py` makes many.
"""

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
from tests.support.same_store import differences, left_over

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.timeout(600)

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
    for number in range(60):
        add(folder, f"{number:02d}.png", shift=number)
    (folder / "below").mkdir()
    for name in ("copy.png", "below/copy.png", "zz.png"):
        shutil.copyfile(folder / "03.png", folder / name)
        os.utime(folder / name, OLD)
    add_bad(folder, "bad.jpg", "below/bad.png")
    return folder


def _counts(said: str) -> dict:
    summary = json.loads(said)  # one object, whatever Ray prints
    return {name: summary[name] for name in COUNTS}


def _worker(cluster: RayCluster, kind: str, process: subprocess.Popen) -> int:
    """Wait for a worker of this kind, and give its process."""
    end = time.monotonic() + 200
    while not (found := cluster.workers(kind)):
        assert process.poll() is None, f"it ended before that: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.02)
    return found[0].pid


def test_the_life_cycle_is_that_of_one_machine_also_where_workers_and_a_node_die(checkpoint, cluster, items, tmp_path):
    def words(place: str, *more: object) -> tuple[object, ...]:
        return ("extract", items, "--out", tmp_path / place, "-m", checkpoint, "--json", *more)

    plain = run_process(*words("plain"))
    process = start_process(*words("ray", "--ray", cluster.address), env=cluster.environment)
    for kind in ("ReadItems", "EncodeItems"):
        assert cluster.kill(_worker(cluster, kind, process))
    cluster.kill_node(2)
    said, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors
    assert process.returncode == plain.returncode == 1  # files that are no images
    assert _counts(said) == _counts(plain.stdout)
    expected = {"encoded": 60, "copied": 3, "failed": 2}
    assert {name: _counts(said)[name] for name in expected} == expected
    assert differences(tmp_path / "ray", tmp_path / "plain") == []
    cluster.start_node(2)

    add(items, "00.png", "coffee.png")  # modified
    os.utime(items / "00.png", LATER)
    (items / "01.png").rename(items / "below" / "moved.png")
    (items / "02.png").unlink()
    os.utime(items / "04.png", LATER)  # its metadata alone
    shutil.copyfile(items / "05.png", items / "below" / "another.png")
    os.utime(items / "below" / "another.png", OLD)
    add(items, "new.png", shift=77)
    again = "--prune", "--retry-failed"
    plain = run_process(*words("plain", *again))
    ray = run_process(*words("ray", "--ray", cluster.address, *again), env=cluster.environment)
    assert ray.returncode == plain.returncode == 0
    assert _counts(ray.stdout) == _counts(plain.stdout)
    expected = {
        "new": 1,
        "modified": 1,
        "moved": 1,
        "copied": 1,
        "metadata_changed": 1,
        "deleted": 1,
        "failed_again": 2,
    }
    assert {name: _counts(ray.stdout)[name] for name in expected} == expected
    assert differences(tmp_path / "ray", tmp_path / "plain") == []


def test_a_limit_a_signal_and_a_death_leave_the_rest_to_the_next_run(checkpoint, cluster, items, tmp_path):
    plain = ("extract", items, "--out", tmp_path / "ray", "-m", checkpoint, "--json")
    words = (*plain, "--ray", cluster.address)
    limited = run_process(*words, "--limit", 5, env=cluster.environment)
    summary = _counts(limited.stdout)
    assert (summary["stopped"], summary["remaining"]) == ("limit", summary["to_read"] - 5)
    assert summary["encoded"] + summary["copied"] + summary["failed"] == 5
    assert len(shards(tmp_path / "ray")) >= 1

    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        assert cluster.idle()  # what is met is of the next run
        process = start_process(*words, env=cluster.environment)
        _worker(cluster, "EncodeItems", process)
        process.send_signal(number)
        said, _ = process.communicate(timeout=100)
        assert process.returncode == code
        if number == signal.SIGTERM:
            assert _counts(said)["interrupted"]
            assert left_over(tmp_path / "ray") == []
    assert cluster.idle()
    assert run_process(*plain).returncode in (0, 1)
    assert run_process("extract", items, "--out", tmp_path / "plain", "-m", checkpoint).returncode == 1
    assert differences(tmp_path / "ray", tmp_path / "plain") == []
