"""The control groups of a process, over trees made up as kernels and containers show them."""

from __future__ import annotations

import pytest

from qvsplit.runtime.control_groups import group_folders


@pytest.mark.parametrize(
    ("listed", "folders"),
    [
        ("0::/\n", [(2, "")]),
        ("0::/system.slice/x.service\n", [(2, "system.slice/x.service"), (2, "system.slice"), (2, "")]),
        ("4:memory:/a\n3:cpu:/b\n", [(1, "cpu/b"), (1, "cpu")]),
        ("5:cpuset:/a\n3:cpuacct,cpu:/\n0::/s\n", [(1, "cpu"), (2, "s"), (2, "")]),
        ("1:name=systemd:/x:cpu\n", []),
        ("", []),
    ],
)
def test_groups_of_either_version_inner_ones_first(tmp_path, listed, folders):
    (tmp_path / "cgroup").write_text(listed)
    found = group_folders("cpu", tmp_path / "cgroup", tmp_path / "mounted")
    assert list(found) == [(version, tmp_path / "mounted" / folder) for version, folder in folders]


def test_without_groups_there_are_none(tmp_path):
    assert list(group_folders("cpu", tmp_path / "none", tmp_path)) == []
