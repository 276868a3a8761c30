"""CPUs that may be used, by affinity and quota; and how threads wait in a niced process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from qvsplit.runtime import cpus, devices

# --------------------------------------------------------------------------------------------------- affinity and quota


@pytest.mark.parametrize(
    ("listed", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000", "cpu.max": "300000 100000"}, 2.0),
        ("0::/of/the/host", {"cpu.max": "50000 100000"}, 0.5),  # a container that sees but its own group
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        (
            "3:cpu,cpuacct:/docker/x\n0::/",
            {
                "cpu/docker/x/cpu.cfs_quota_us": "400000", "cpu/docker/x/cpu.cfs_period_us": "100000",
                "cpu/docker/cpu.cfs_quota_us": "75000", "cpu/docker/cpu.cfs_period_us": "50000",
            },
            1.5,
        ),
        ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {"cpu.max": "not to be understood"}, None),
        ("0::/", {}, None),
    ],
)  # fmt: skip
def test_the_least_quota_of_all_groups_counts(tmp_path, listed, files, cores):
    groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    groups.write_text(listed + "\n")
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text + "\n")
    assert cpus.cpu_quota(groups, mounted) == cores


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"), [(8, None, 8), (8, 2.0, 2), (8, 2.1, 3), (1, 2.0, 1), (8, 0.3, 1), (64, 99.0, 64)]
)
def test_cpus_that_can_be_kept_busy(monkeypatch, affinity, quota, usable):
    monkeypatch.setattr(cpus, "affinity", lambda: affinity)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert cpus.usable_cpus() == usable
    assert cpus.default_workers() == min(8, usable)


def test_affinity_is_that_of_the_process():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from qvsplit.runtime import cpus; print(cpus.usable_cpus())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


# ------------------------------------------------------------------------------------------------------ torch's threads


@pytest.fixture
def torch_threads(monkeypatch):
    """A torch with three threads, of which the number that was set is what the test looks at."""
    import torch

    threads = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(cpus, "_threads_are_ours", False)
    for name in cpus.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return threads


@pytest.mark.parametrize(("usable", "set_to"), [(2, [3, 2]), (3, [3]), (4, [3])])
def test_threads_are_lowered_to_the_usable_cpus_and_never_raised(torch_threads, monkeypatch, usable, set_to):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: usable)
    cpus.keep_threads_to_usable_cpus()
    devices.choose_device("cpu")
    devices.choose_device("cpu")
    assert torch_threads == set_to


@pytest.mark.parametrize("name", cpus.THREAD_VARIABLES)
def test_threads_that_the_user_set_are_left_alone(torch_threads, monkeypatch, name):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 1)
    monkeypatch.setenv(name, "3")
    cpus.keep_threads_to_usable_cpus()
    devices.choose_device("cpu")
    assert torch_threads == [3]


def test_threads_of_a_program_that_uses_the_library_are_left_alone(torch_threads, monkeypatch):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 1)
    devices.choose_device("cpu")
    assert torch_threads == [3]


# -------------------------------------------------------------------------------------------------- waiting when niced

TOLD = """
import os
print(os.nice(0), {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))})
raise SystemExit
"""


@pytest.fixture
def told(tmp_path):
    """Run the command niced by so much; gives its niceness and OpenMP's variables as torch finds them when imported."""
    if os.nice(0) > 0:
        pytest.skip("the tests are niced, and only root may take that back")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TOLD)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(cpus.OPENMP_VARIABLES)}

    def run(nice: int, command: list[str], **variables: str) -> tuple[int, dict[str, str]]:
        done = subprocess.run(
            ["nice", "-n", str(nice), sys.executable, *command], capture_output=True, text=True, check=False,
            env=outside | {"PYTHONPATH": str(tmp_path)} | variables,
        )  # fmt: skip
        niceness, _, found = done.stdout.partition(" ")
        return int(niceness), ast.literal_eval(found.splitlines()[0])

    return run


@pytest.fixture
def extraction(tmp_path, some_photos):
    return ["-m", "qvsplit", "extract", str(some_photos), "--model", "demo", "--out", str(tmp_path / "store")]


@pytest.mark.parametrize("nice", [1, 19])
def test_in_a_niced_process_threads_sleep_while_they_wait(told, extraction, nice):
    assert told(nice, extraction) == (nice, {"OMP_WAIT_POLICY": "passive"})


def test_else_they_wait_as_they_do(told, extraction):
    assert told(0, extraction) == (0, {})


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "KMP_BLOCKTIME"])
def test_what_the_user_says_of_openmp_is_left_alone(told, extraction, variable):
    assert told(19, extraction, **{variable: "1"}) == (19, {variable: "1"})


def test_a_program_that_uses_the_library_waits_as_it_does(told):
    code = "import qvsplit\nfrom qvsplit.runtime import devices\ndevices.choose_device('cpu')"
    assert told(19, ["-c", code]) == (19, {})


def test_nothing_asks_for_cpus_while_it_is_imported():
    code = (
        "import importlib, pkgutil\nfrom qvsplit.runtime import cpus\n"
        "def asked(*given): raise AssertionError('asked')\n"
        "cpus.usable_cpus = cpus.cpu_quota = cpus.affinity = asked\nimport qvsplit.output, qvsplit.commands\n"
        "for package in (qvsplit.output, qvsplit.commands):\n"
        "    for found in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'{package.__name__}.{found.name}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_system_without_niceness_has_none(monkeypatch):
    monkeypatch.delattr(os, "nice")
    environment: dict[str, str] = {}
    cpus.sleep_while_waiting_if_niced(environment)
    assert (cpus.niceness(), environment) == (0, {})
