"""Memory of the machine and of this process, and glibc's habits."""

from __future__ import annotations

import pytest

from qvsplit.runtime import memory


def test_memory_of_the_machine_and_of_this_process():
    assert memory.machine_memory() > memory.peak_memory() > 10_000_000


def test_activations_are_only_kept_where_the_allocator_is_ours(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_set_limits", lambda limits: calls.append(limits) or True)
    monkeypatch.setattr(memory, "_limits_are_ours", False)
    memory.keep_freed_activations()
    assert not calls
    memory.give_back_freed_memory()
    memory.keep_freed_activations()
    assert len(calls) == 2


def test_a_limit_of_the_container_or_of_the_process_counts(tmp_path, monkeypatch):
    whole = memory.machine_memory()
    monkeypatch.setattr(memory, "_group_limits", lambda: iter([whole + 1, 1 << 30]))
    assert memory.machine_memory() == 1 << 30
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (1 << 29, 1 << 40))
    assert memory.machine_memory() == 1 << 29


def test_limits_of_control_groups_of_either_version_and_of_those_above(tmp_path):
    groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    groups.write_text("4:memory:/a/b\n3:cpu:/a\n0::/service/inner\n")
    for name, text in (
        ("memory/a/b/memory.limit_in_bytes", "7"), ("memory/memory.limit_in_bytes", "9"),
        ("service/inner/memory.max", "max"), ("service/memory.max", "5"), ("cpu/memory.max", "1"),
    ):  # fmt: skip
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text + "\n")
    assert list(memory._group_limits(groups, mounted)) == [7, 9, 5]
    assert list(memory._group_limits(tmp_path / "none", mounted)) == []


@pytest.mark.parametrize(
    ("listed", "files", "free"),
    [
        ("0::/\n", {"memory.max": "9", "memory.current": "2"}, 7),
        ("0::/\n", {"memory.max": "max", "memory.current": "2"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "9", "a/b/memory.current": "2", "a/memory.max": "8", "a/memory.current": "6"}, 2),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "2", "a/memory.max": "8", "a/memory.current": "6"}, 2),
        ("0::/a\n", {"a/memory.max": "5", "a/memory.current": "6"}, 0),
        ("0::/not/seen/here\n", {"memory.max": "9", "memory.current": "2"}, 7),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "9", "memory/a/memory.usage_in_bytes": "4"}, 5),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "9", "memory/memory.usage_in_bytes": "8"}, 1),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9"}, None),
        ("", {"memory.max": "9", "memory.current": "2"}, None),
    ],
)  # fmt: skip
def test_what_control_groups_leave_is_the_least_of_any(tmp_path, listed, files, free):
    groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    groups.write_text(listed)
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text + "\n")
    assert memory.free_in_groups(groups, mounted) == free
