"""Shards made by a hostile hand: whatever they say, a refusal that names the file, in bounded memory and time.

The files are those of bench/fuzz.py, which reads them in children under limits.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent.parent / "bench" / "fuzz.py"
RANDOM_CASES = 400
AGAIN = f"""
import dataclasses, json, sys
sys.path.insert(0, {str(FUZZ.parent)!r})
import fuzz
for result in fuzz.results(lambda number: fuzz.random_case(number, 20), {RANDOM_CASES}):
    print(json.dumps(dataclasses.asdict(result)))
"""


def load():
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


fuzz = load()


def lines(*words: str) -> list[dict]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def named() -> dict[str, dict]:
    """What came of every lie, oddity and bomb, by its name."""
    return {one["name"]: one for one in lines(str(FUZZ), "--lies")}


def refused(one: dict) -> bool:
    return (
        one["what"] == "refused"
        and one["exit_code"] in {4, 6}
        and fuzz.FILE in one["message"]
        and one["seconds"] < fuzz.SECONDS
        and one["mib"] << 20 < fuzz.MEMORY
    )


@pytest.mark.parametrize("name", [name for name in (*fuzz.LIES, *fuzz.FORGED) if name not in fuzz.MAY_BE_READ])
def test_a_lie_is_refused(named, name):
    assert refused(named[name]), named[name]


@pytest.mark.parametrize("name", [name for name in fuzz.BOMBS if name not in fuzz.MAY_BE_READ])
def test_a_bomb_is_refused_before_it_goes_off(named, name):
    assert refused(named[name]), named[name]


@pytest.mark.parametrize("name", sorted(fuzz.MAY_BE_READ))
def test_what_is_strange_does_no_harm(named, name):
    one = named[name]
    assert refused(one) or (one["what"] == "read" and one["mib"] << 20 < fuzz.MEMORY), one


@pytest.mark.parametrize("name", fuzz.ODD)
def test_what_is_odd_yet_true_is_read(named, name):
    assert named[name]["what"] == "read", named[name]


def test_a_newer_format_is_another_matter_than_damage(named):
    assert named["recipe of a newer format"]["exit_code"] == 4
    assert named["tokens too many"]["exit_code"] == 6


def test_whatever_is_done_to_a_shard_is_noticed_or_changes_nothing():
    """A few hundred of the fuzzer's own, of every kind."""
    got = lines("-c", AGAIN)
    assert len(got) == RANDOM_CASES
    assert {one["kind"] for one in got} == set(fuzz._WEIGHTS)
    assert [one for one in got if one["outcome"]["failure"]] == []


def test_a_case_is_always_the_same():
    for number in range(0, 60, 3):
        assert fuzz.random_case(number, 5).data == fuzz.random_case(number, 5).data


@pytest.mark.parametrize("number", range(6))
def test_a_shard_taken_apart_and_put_together_is_the_same(number):
    seed = fuzz.seeds()[number]
    whole = fuzz.anatomy(seed.data)
    assert fuzz.sealed(whole.before, fuzz.unparse(whole.footer)) == seed.data


def test_the_fuzzer_sees_what_a_reader_lets_pass(tmp_path, monkeypatch):
    """Without the reader's own checks its cases must count as failures: else it would pass anything."""
    monkeypatch.setattr(fuzz.store, "check_embeds", lambda *args, **kwargs: None)
    monkeypatch.setattr(fuzz.store, "all_finite", lambda *args: True)
    case = fuzz.Case("lie", "infinite", fuzz.written(fuzz.LIES["embeds infinite"]()), None)
    assert fuzz.outcome(case, tmp_path / "s.parquet").what == "inconsistent"
    one, two = fuzz.seeds()[0], fuzz.seeds()[1]
    assert fuzz.outcome(fuzz.Case("splice", "swapped", two.data, (one,)), tmp_path / "s.parquet").what == "different"


@pytest.mark.parametrize(
    ("harm", "what"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crash"), ("while True: pass", "time")],
)
def test_a_case_that_kills_or_hangs_is_counted_and_the_next_is_read(harm, what):
    code = AGAIN.replace("for result", f"""
fuzz.SECONDS = 0.5
real = fuzz.outcome
def outcome(case, file):
    if case.name == "20-3":
        exec({harm!r})
    return real(case, file)
fuzz.outcome = outcome
for result""").replace(f" {RANDOM_CASES})", " 6)")  # fmt: skip
    code = code.replace(
        "import fuzz\n", "import fuzz, pathlib, tempfile\nfuzz.KEPT = pathlib.Path(tempfile.mkdtemp())\n"
    )
    got = lines("-c", code)
    assert [one["number"] for one in got] == list(range(6))
    assert [one["number"] for one in got if one["outcome"]["what"] == what] == [3]
