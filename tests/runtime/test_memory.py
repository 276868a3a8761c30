"""Memory of the machine and of this process, and glibc's habits."""

from __future__ import annotations

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
