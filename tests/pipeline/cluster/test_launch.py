"""What a run on a cluster is asked for, before there is any: addresses, devices and places of a model."""

from __future__ import annotations

import os
import sys

import pytest

from qvsplit.errors import UsageError
from qvsplit.pipeline.cluster.connection import Cluster
from qvsplit.pipeline.cluster.launch import _absolute, _device
from qvsplit.pipeline.options import ExtractOptions, check_options

WITHOUT_GPU = Cluster(1, 2, 0, 2, 1 << 30)
WITH_GPUS = Cluster(2, 16, 4, 8, 1 << 30)


@pytest.fixture
def without_ray(monkeypatch):
    """As if Ray were not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.parametrize(
    ("asked", "cluster", "expected"),
    [
        (None, WITHOUT_GPU, "cpu"), (None, WITH_GPUS, "cuda"), ("cpu", WITH_GPUS, "cpu"), ("cpu", WITHOUT_GPU, "cpu"),
        ("cuda", WITH_GPUS, "cuda"),
    ],
)  # fmt: skip
def test_the_device_of_an_encoder(asked, cluster, expected):
    assert _device(asked, cluster) == expected


@pytest.mark.parametrize("asked", ["cuda:0", "cuda:13", "cpu,cpu", "cuda,cuda", "cuda:0,cuda:1"])
@pytest.mark.parametrize("cluster", [WITHOUT_GPU, WITH_GPUS])
def test_a_device_that_ray_does_not_share_out(asked, cluster):
    with pytest.raises(UsageError, match=f"^`device` {asked}: .*give cpu or cuda, and `ray_encoders`$") as caught:
        _device(asked, cluster)
    assert caught.value.exit_code == 2


def test_a_gpu_of_a_cluster_that_has_none():
    with pytest.raises(UsageError, match="^`device` cuda: the Ray cluster has no GPU; try `device=cpu`$"):
        _device("cuda", WITHOUT_GPU)


def test_a_folder_has_the_same_name_in_every_process(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    assert _absolute("model") == os.path.join(here, "model")
    assert _absolute("./model/../model") == os.path.join(here, "model")
    assert _absolute("org/name") == os.path.join(here, "org", "name")  # a folder goes before a name of the hub
    assert _absolute(str(tmp_path / "model")) == str(tmp_path / "model")
    for name in ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct@main", "file", "nowhere"):
        assert _absolute(name) == name
    assert _absolute(None) is None


@pytest.mark.parametrize("address", ["ray://head:10001", "ray://127.0.0.1:10001"])
def test_a_ray_client_is_refused(address, without_ray):
    with pytest.raises(
        UsageError, match=f"^`ray` {address}: a Ray client is not on a node.*`ray job submit`.*`ray=auto`$"
    ):
        check_options(ExtractOptions(ray=address))


@pytest.mark.parametrize(
    "address", ["", "head", "6379", "Local", "127.0.0.2", "head:", ":6379", "head:port", "head:123456"]
)
def test_an_address_that_is_none_is_refused(address, without_ray):
    with pytest.raises(UsageError, match=f"^`ray` {address}: give local, auto, or HOST:PORT of a cluster's head$"):
        check_options(ExtractOptions(ray=address))


@pytest.mark.parametrize("address", ["local", "auto", "head:6379", "127.0.0.2:6379", "[::1]:6379"])
def test_where_ray_is_not_installed_it_is_said_how_to_install_it(address, without_ray):
    with pytest.raises(UsageError, match=r"^`ray` needs Ray; install it with `pip install 'qvsplit\[ray\]'`$"):
        check_options(ExtractOptions(ray=address))


@pytest.mark.parametrize("address", ["local", "auto", "head:6379"])
def test_an_address_that_may_be_is_not_refused(address, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", sys)  # any module
    check_options(ExtractOptions(ray=address))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("local", "pip install 'qvsplit[ray]'"), ("auto", "pip install 'qvsplit[ray]'"), ("ray://head:1", "ray job submit"),
        ("head", "HOST:PORT"),
    ],
)  # fmt: skip
def test_the_command_ends_with_one_line_and_no_store(run_cli, fake_model, some_photos, out, without_ray, address, said):
    code, told, err = run_cli("extract", some_photos, "--out", out, "--model", "fake", "--ray", address)
    assert (code, told) == (2, "")
    assert said in " ".join(err.splitlines()[-1].split()), err
    assert fake_model.loads == 0
    assert not out.exists()
