"""What qvsplit runs on: found out whatever is broken, and without names of users."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from importlib import metadata

import pytest

from qvsplit import doctor
from qvsplit.checkpoints.cache import cache_folder
from qvsplit.checkpoints.files import small_files
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ConfigError, DiskError, ModelError, StoreDamaged
from tests.support.checkpoints import write_checkpoint
from tests.support.hub_server import COMMIT, NAME, Hub

GOOD = "facts = {}"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put a package of that name and source before the installed one, for processes that are started."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(textwrap.dedent(source))

    return make


@pytest.fixture
def no_imports(monkeypatch):
    """Every library is importable and says nothing: what is tested is elsewhere."""
    monkeypatch.setattr(doctor, "_ASKED", dict.fromkeys(doctor.NEEDED, GOOD))


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    from huggingface_hub import constants

    def at(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))

    return at


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("raise SystemExit(3)", "ended the process with 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)", "by SIGILL"),
        ("version = None", "AttributeError"),
    ],
)
def test_a_broken_torch_is_reported_and_stops_nothing(package, source, said):
    package("torch", source)
    facts = doctor._part(doctor._ask_library, "torch", doctor._Probes())
    assert said in facts["unknown"]


def test_a_library_that_hangs_is_given_up(package, monkeypatch):
    package("av", "import time\ntime.sleep(60)")
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.5)
    assert doctor._ask_library("av", doctor._Probes()) == {"unknown": "importing it took more than 0.5 s"}


def test_with_a_broken_library_all_else_is_found_out(package, no_imports, monkeypatch):
    package("torch", "raise OSError('no libtorch')")
    monkeypatch.setitem(doctor._ASKED, "torch", "import torch")
    found = doctor.examine()
    assert "no libtorch" in found["imports"]["torch"]
    assert {said for name, said in found["imports"].items() if name != "torch"} == {"ok"}
    assert found["versions"]["pyarrow"]
    assert found["dtype"]["advice"]
    (wrong,) = doctor.problems(found)
    assert isinstance(wrong, ModelError)
    assert "torch" in str(wrong)


def test_a_library_of_a_version_that_is_not_wanted_is_named(no_imports, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda package: ["numpy<1", "torch>=1"])
    found = doctor.examine()
    assert found["bounds"] == {"out of bounds": [f"numpy {metadata.version('numpy')} (<1)"]}
    assert f"bounds      out of bounds     numpy {metadata.version('numpy')} (<1)" in doctor.lines(found)
    assert doctor.problems(found) == []


def test_a_part_that_fails_is_no_others_failure(no_imports, monkeypatch):
    def fails():
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(doctor, "_cpu", fails)
    found = doctor.examine()
    assert found["cpu"] == {"unknown": "RuntimeError: no such thing"}
    assert "unknown" not in found["system"]
    assert doctor.problems(found) == []


def test_what_the_installed_libraries_say():
    assert doctor._ask_library("torch", doctor._Probes())["default threads"] >= 1
    images = doctor._ask_library("PIL.Image", doctor._Probes())
    assert images["JPEG"] is images["PNG"] is True
    assert doctor._ask_library("av", doctor._Probes())["h264"] is True


def test_the_hub_and_what_of_a_model_is_cached(hub_at, hub_checkpoint, tmp_path):
    snapshot = tmp_path / "hub-cache" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    weights = sorted(hub_checkpoint.glob("*.safetensors"))
    with Hub(hub_checkpoint) as hub:
        hub_at(hub.url)
        assert doctor._hub(NAME)["cached"] == "nothing"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
        for file in hub_checkpoint.glob("*.json"):
            shutil.copy(file, snapshot)
        found = doctor._hub(NAME)
        assert (found["reachable"], found["cached"]) == ("yes", "settings and 0 of 2 files of weights")
        shutil.copy(weights[0], snapshot)
        assert doctor._hub(NAME)["cached"] == "settings and 1 of 2 files of weights"
        assert doctor._hub(f"{NAME}@{COMMIT}")["cached"] == "settings and 1 of 2 files of weights"
        kept = cache_folder() / "checkpoints" / NAME.replace("/", "--") / COMMIT / "encoder"
        places = open_checkpoint(hub_checkpoint, "encoder").encoder_places()
        note = {"half": "encoder", "model": NAME, "revision": COMMIT, "left_out": []}
        write_checkpoint(kept, places, small=small_files(snapshot), note=note)
        said = "settings and 1 of 2 files of weights, and the vision encoder alone"
        assert doctor._hub(NAME)["cached"] == said
        assert hub.tokens == {""}
    found = doctor._hub(NAME)
    assert found["reachable"].startswith("no (")
    assert found["endpoint"] == hub.url


def test_a_hub_that_never_answers_is_not_waited_for(hub_at, monkeypatch):
    import socket

    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert doctor._hub(NAME)["reachable"].startswith("no (")


def test_offline_nobody_is_asked(hub_at, monkeypatch, tmp_path):
    from huggingface_hub import constants

    with Hub(tmp_path) as hub:
        hub_at(hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert doctor._hub(NAME)["reachable"] == "not tried: offline"
        assert not hub.tokens


def test_no_names_no_tokens_no_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    told = doctor.without_names(
        {"a": ["/home/ada/x", "/media/ada/disk", "/home/adam", "http://me:hf_abc@h/x", "hf_abc1"]}
    )
    assert told == {"a": ["~/x", "/media/USER/disk", "/home/adam", "http://h/x", "hf_…"]}


@pytest.fixture
def machine(monkeypatch):
    """A process on four CPUs at nice 0, of which a test says what is otherwise."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", doctor.WAIT_POLICY, *doctor.SPINNING_TIMES):
        monkeypatch.delenv(name, raising=False)
    settings = {"affinity": 4, "cpu_quota": None, "usable_cpus": 4, "niceness": 0, "_is_on": False}

    def have(**changes):
        for name, value in (settings | changes).items():
            monkeypatch.setattr(doctor, name, lambda *_, value=value: value)

    have()
    return have


def test_cores_affinity_and_quota(machine):
    machine(cpu_quota=1.5, usable_cpus=2)
    found = doctor._cpu()
    assert {name: found[name] for name in ("affinity", "quota", "usable cores")} == {
        "affinity": "4 cores", "quota": "1.5 cores", "usable cores": 2,
    }  # fmt: skip
    machine()
    assert doctor._cpu()["quota"] == "none"


def test_threads_where_nothing_is_bad(machine):
    told = {"computing": 4, "niceness": 0, "while waiting": "they spin", "advice": "nothing to do"}
    assert doctor._threads({"default threads": 4}) == told
    assert doctor._threads({"default threads": 2})["computing"] == 2
    machine(usable_cpus=1)
    assert doctor._threads({"default threads": 4})["computing"] == 1
    assert doctor._threads({"unknown": "no libtorch"})["computing"] == 1


@pytest.mark.parametrize(
    ("machine_is", "variables", "computing", "waiting", "advice"),
    [
        ({"usable_cpus": 2}, {"OMP_NUM_THREADS": "4"}, 4, "they spin", "torch has 4 threads by OMP_NUM_THREADS"),
        ({"niceness": 19}, {"OMP_NUM_THREADS": "4"}, 4, "they spin", "set OMP_WAIT_POLICY=passive"),
        ({"niceness": 19}, {"OMP_WAIT_POLICY": "Passive"}, 4, "they sleep", None),
        ({}, {"OMP_WAIT_POLICY": "passive"}, 4, "they sleep", "OMP_WAIT_POLICY=passive slows small layers down"),
        ({"niceness": 19}, {"GOMP_SPINCOUNT": "5"}, 4, "as GOMP_SPINCOUNT=5 says", None),
        ({"niceness": 5, "_is_on": True}, {"OMP_WAIT_POLICY": "passive"}, 4, "they sleep", "niceness counts among"),
    ],
)
def test_threads_and_what_to_do(machine, monkeypatch, machine_is, variables, computing, waiting, advice):
    machine(**machine_is)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = doctor._threads({"default threads": 4})
    assert (found["computing"], found["while waiting"]) == (computing, waiting)
    if advice is None:
        assert found["advice"] == "nothing to do"
    else:
        assert len(found["advice"]) == 1
        assert advice in found["advice"][0]


@pytest.mark.parametrize("of_the_user", [False, True])
def test_a_variable_that_qvsplit_set_is_not_called_the_users(machine, monkeypatch, of_the_user):
    from qvsplit.runtime import cpus

    monkeypatch.setattr(cpus, "niceness", lambda: 19)
    monkeypatch.setattr(cpus, "_wait_policy_is_ours", False)
    for name in [name for name in os.environ if name.startswith(cpus.OPENMP_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv(doctor.WAIT_POLICY, "passive")
    if not of_the_user:
        monkeypatch.delenv(doctor.WAIT_POLICY)
    cpus.sleep_while_waiting_if_niced()
    assert (doctor.WAIT_POLICY in doctor._environment()) is of_the_user
    assert doctor._environment()["LANG"] == "de_DE.UTF-8"
    by_us = "they sleep: qvsplit set OMP_WAIT_POLICY=passive, as it is niced"
    assert doctor._waiting() == ("they sleep" if of_the_user else by_us)


@pytest.mark.parametrize(
    ("devices", "advice"),
    [([{"bfloat16": True}], "the checkpoint's own"), ([{"bfloat16": False}], "`dtype=float16`"), ([], "float32")],
)
def test_which_dtype_is_quick(devices, advice):
    assert doctor._dtype_advice({"devices": devices})["advice"].startswith(advice)


def test_what_is_wrong_in_the_order_of_what_it_stops():
    found = {
        "imports": {"torch": "broken", "av": "ok"},
        "store": {"damaged": ["shard-000001.parquet"]},
        "disk": {"folder": "~/x", "writable": False},
    }
    assert [type(one) for one in doctor.problems(found)] == [ModelError, StoreDamaged, DiskError]
    newer = {"unknown": "made by a newer qvsplit", "exit code": ConfigError.exit_code}
    assert [type(one) for one in doctor.problems({"imports": {}, "store": newer})] == [ConfigError]


def test_only_what_is_found_is_imported(no_imports):
    """A start in a quarter of a second, and a report where the import would end the process."""
    import subprocess

    code = "import sys, qvsplit.doctor, qvsplit.commands.doctor; print(sorted({'torch', 'pyarrow', 'av'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_is_json(no_imports, tmp_path):
    found = doctor.examine(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert all(isinstance(line, str) and line.strip() for line in doctor.lines(found))
