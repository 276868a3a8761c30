"""Runs that die at a step of their writing, or by a power cut: the next run's store is as if they had not.

Some steps of each; `bench/deaths.py` takes every one, and moments at random.
"""

from __future__ import annotations

import pytest

from tests.support.killing import Server, scenarios, survives

EACH = ("first", "second", "compact", "rebuild", "purge")
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
