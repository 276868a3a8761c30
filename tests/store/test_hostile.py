"""Shards made by a hostile hand: whatever they say, a refusal that names the file, in bounded memory and time.

The files are those of tests/support/fuzz.py, which reads them in children under limits.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import fuzz, rows

RANDOM_CASES = 250
AGAIN = f"""
import dataclasses, json, sys
from tests.support import fuzz
for result in fuzz.results(lambda number: fuzz.random_case(number, 20), {RANDOM_CASES}):
    print(json.dumps(dataclasses.asdict(result)))
"""


def lines(*words: str) -> list[dict]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def named() -> dict[tuple[str, str], dict]:
    """What came of every lie, oddity and bomb, by its kind and name."""
    return {(one["kind"], one["name"]): one for one in lines("-m", "tests.support.fuzz", "--lies")}


def refused(one: dict) -> bool:
    return (
        one["what"] == "refused"
        and one["exit_code"] in {4, 6}
        and fuzz.FILE in one["message"]
        and one["seconds"] < fuzz.SECONDS
        and one["mib"] << 20 < fuzz.MEMORY
    )


def names(kind: dict, *, may_be_read: bool = False) -> list[str]:
    return [name for name in kind if (name in fuzz.MAY_BE_READ) == may_be_read]


def test_a_lie_is_refused_as_damage(named):
    for name in names(fuzz.LIES):
        one = named["lie", name]
        assert refused(one) and one["exit_code"] == 6, one


def test_a_forged_file_is_refused(named):
    for name in names(fuzz.FORGED):
        assert refused(named["forged", name]), named["forged", name]


def test_a_bomb_is_refused_before_it_takes_memory(named):
    for name in names(fuzz.BOMBS):
        assert refused(named["bomb", name]), named["bomb", name]


def test_what_is_strange_does_no_harm(named):
    for name in sorted(fuzz.MAY_BE_READ):
        one = next(one for (_, other), one in named.items() if other == name)
        assert refused(one) or (one["what"] == "read" and one["mib"] << 20 < fuzz.MEMORY), one


def test_what_is_odd_yet_true_is_read(named):
    for name in fuzz.ODD:
        assert named["odd", name]["what"] == "read", named["odd", name]


def test_what_only_a_newer_version_knows_is_a_config_error(named):
    for name in fuzz.NEWER:
        one = named["newer", name]
        assert refused(one) and one["exit_code"] == 4, one
        assert "made by a newer qvsplit" in one["message"]
        assert "damaged" not in one["message"]


def test_whatever_is_done_to_a_shard_is_noticed_or_changes_nothing():
    """A few hundred of the fuzzer's own, of every kind."""
    got = lines("-c", AGAIN)
    assert len(got) == RANDOM_CASES
    assert {one["kind"] for one in got} == set(fuzz._WEIGHTS)
    assert [one for one in got if one["outcome"]["failure"]] == []


def test_a_case_is_always_the_same():
    for number in range(0, 60, 3):
        assert fuzz.random_case(number, 5).data == fuzz.random_case(number, 5).data


@pytest.mark.parametrize("number", range(7))
def test_a_shard_taken_apart_and_put_together_is_the_same(number):
    seed = fuzz.seeds()[number]
    whole = fuzz.anatomy(seed.data)
    assert fuzz.with_footer(whole.before, fuzz.unparse(whole.footer)) == seed.data


def test_the_fuzzer_sees_what_a_reader_lets_pass(tmp_path, monkeypatch):
    """Without the reader's own checks its cases must count as failures: else it would pass anything."""
    monkeypatch.setattr("qvsplit.store.codec.all_finite", lambda *args: True)
    case = fuzz.Case("lie", "infinite", fuzz.written(fuzz.LIES["embeds infinite"]()), None)
    assert fuzz.outcome(case, tmp_path / fuzz.FILE).what == "inconsistent"
    one, two = fuzz.seeds()[0], fuzz.seeds()[1]
    assert fuzz.outcome(fuzz.Case("splice", "swapped", two.data, (one,)), tmp_path / fuzz.FILE).what == "different"


@pytest.mark.parametrize("name", ["grid odd", "hash of other letters", "path leads up", "part negative"])
def test_the_fuzzer_sees_rows_that_a_reader_lets_pass(tmp_path, monkeypatch, name):
    monkeypatch.setattr("qvsplit.store.shard_reader.row_error", lambda *args: None)
    case = fuzz.Case("lie", name, fuzz.written(fuzz.LIES[name]()), None)
    assert fuzz.outcome(case, tmp_path / fuzz.FILE).what == "inconsistent"


@pytest.mark.parametrize(
    ("harm", "what"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crash"), ("while True: pass", "time")],
)
def test_a_case_that_kills_or_hangs_is_counted_and_the_next_is_read(harm, what):
    code = AGAIN.replace("for result", f"""
import pathlib, tempfile
fuzz.KEPT = pathlib.Path(tempfile.mkdtemp())
fuzz.SECONDS = 0.5
real = fuzz.outcome
def outcome(case, file):
    if case.name == "20-3":
        exec({harm!r})
    return real(case, file)
fuzz.outcome = outcome
for result""").replace(f" {RANDOM_CASES})", " 6)")  # fmt: skip
    got = lines("-c", code)
    assert [one["number"] for one in got] == list(range(6))
    assert [one["number"] for one in got if one["outcome"]["what"] == what] == [3]


def test_seeds_are_of_every_sort():
    dtypes = {seed.schema.config.storage_dtype for seed in fuzz.seeds()}
    assert dtypes == set(rows.DTYPES)
    assert any(len(seed.schema.tensors) > 1 for seed in fuzz.seeds())
