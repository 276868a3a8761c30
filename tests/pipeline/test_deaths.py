"""Runs that die at a step of their writing, or by a power cut: the next run's store is as if they had not.

Some steps of each; `bench/deaths.py` takes every one, and moments at random.
"""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from tests.support.clips import make_clip
from tests.support.killing import OLD, Server, contents, photographs_small, scenarios, survives, untidy

EACH = ("first", "second", "compact", "rebuild", "purge", "videos")
DEATHS = 2  # of each scenario under each kind of death


@pytest.fixture(scope="module")
def server():
    with Server() as one:
        yield one


@pytest.fixture(scope="module")
def all_scenarios(server, tmp_path_factory):
    return {scenario.name: scenario for scenario in scenarios(tmp_path_factory.mktemp("deaths"), server)}


def test_the_scenarios_are_what_they_say(all_scenarios):
    assert {row[0] for row in all_scenarios["first"].expected.values()} == {"ok", "failed"}
    assert {row[0] for row in all_scenarios["second"].expected.values()} == {"ok", "failed", "deleted"}
    assert all_scenarios["compact"].expected == all_scenarios["second"].expected
    assert len(all_scenarios["purge"].expected) == len(all_scenarios["rebuild"].expected) - 2
    videos = all_scenarios["videos"].expected
    parts = {path: sum(name == path for _, name, _ in videos) for _, path, _ in videos}
    assert {path: parts[path] for path in ("a.mp4", "same.mov", "m.mkv", "z.webm", "bad.mp4", "000.png")} == {
        "a.mp4": 4, "same.mov": 4, "m.mkv": 2, "z.webm": 3, "bad.mp4": 1, "000.png": 1
    }  # fmt: skip
    assert {path: row[0] for (_, path, _), row in videos.items() if row[0] != "ok"} == {"bad.mp4": "failed"}


@pytest.mark.parametrize("power", [None, "lost", "torn"], ids=["killed", "power cut", "power cut, torn"])
@pytest.mark.parametrize("name", EACH)
def test_a_run_that_died_costs_nothing(all_scenarios, server, name, power):
    scenario = all_scenarios[name]
    assert scenario.steps > DEATHS
    shift = [None, "lost", "torn"].index(power)  # so that the three do not die at the same steps
    stride = scenario.steps // DEATHS
    for step in range(1 + shift * stride // 3, scenario.steps + 1, stride):
        wrong = survives(scenario, server, step=step, power=power)
        assert not wrong, (name, step, wrong)


# ------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    "moment",
    [("frame", 23), ("frame", 60), ("slice", 30), ("part", 3), ("part", 12)],
    ids=lambda moment: f"{moment[0]} {moment[1]}",
)
def test_a_run_that_is_killed_in_the_middle_of_a_video_costs_nothing(all_scenarios, server, moment):
    """While it is decoded, while its slices are encoded, between its parts: none of them is there without the others."""
    assert not (wrong := survives(all_scenarios["videos"], server, moment=moment)), wrong


@pytest.mark.parametrize("frame", [1, 20])
def test_a_decoder_that_is_killed_in_the_middle_of_a_clip_costs_nothing(all_scenarios, server, frame):
    scenario = all_scenarios["videos"]
    shutil.rmtree(scenario.store, ignore_errors=True)
    done = server.run("extract", scenario.words, moment=("decoder", frame, signal.SIGKILL))
    assert done["status"] == 0
    assert contents(scenario.store) == scenario.expected
    assert untidy(scenario.store) + server.left_behind() == []


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [(signal.SIGINT, 130, "frame"), (signal.SIGTERM, 143, "slice"), (signal.SIGHUP, 143, "frame")],
)
def test_an_interrupt_in_the_middle_of_a_long_video_ends_it_and_says_what_is_kept(
    server, tmp_path, number, code, where
):
    photographs_small(tmp_path / "mixed", 3)
    make_clip(tmp_path / "mixed" / "a.mp4", 30)
    make_clip(tmp_path / "mixed" / "long.mp4", 400)
    for path in (tmp_path / "mixed").iterdir():
        os.utime(path, (OLD, OLD))
    said, out = tmp_path / "said", tmp_path / "embeds"
    words = ["extract", tmp_path / "mixed", "--out", out, "--model", "fake", "--patch-budget", 1, "--clip-seconds", 1]
    order = {"argv": [str(word) for word in words], "said": str(said), "out": str(out), "decoders": True}
    ended = server.run("cli", order, moment=(where, 100, number))
    lines = said.read_text().splitlines()
    assert (ended["status"], lines[-1]) == (code, "qvsplit: interrupted")
    assert any("1 remaining" in line for line in lines)
    assert {(path, part) for _, path, part in contents(out)} == {
        ("000.png", 0), ("001.png", 0), ("002.png", 0), ("a.mp4", 0), ("a.mp4", 1)
    }  # fmt: skip
    assert untidy(out) + server.left_behind() == []
    assert server.run("cli", order)["status"] == 0
    assert sum(path == "long.mp4" for _, path, _ in contents(out)) == 16
