"""How a run on a cluster begins: what its driver is asked for, and the addresses that are refused before there is one."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from qvsplit.checkpoints.opening import default_model
from qvsplit.errors import DiskError, ModelError, ProcessError, UsageError
from qvsplit.pipeline.cluster import launch as launch_module
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.cluster.launch import _absolute, launch
from qvsplit.pipeline.cluster.runner import Commits
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.options import ExtractOptions, check_options
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime import interrupts
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.loading import CLUSTER, READY
from qvsplit.store.shards import ShardNumbers
from qvsplit.store.staging import Staging
from qvsplit.store.storage import LocalStorage
from tests.support import rows

NOTHING = StoreDeclares("embeds", None, None, None)
DECLARED = messages.Declared(rows.schema(), rows.PROVENANCE, "some/model", ("a note", "another"))


@pytest.fixture
def without_ray(monkeypatch):
    """As if Ray were not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)


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


# --------------------------------------------------------------------------------------------------------- the driver


class FakeDriver:
    """Says what it was given; an exception is raised.

    Attributes:
        heard: What it was told.
        ended: How it was ended, each time.
    """

    def __init__(self, *said):
        self.said, self.heard, self.ended = list(said), [], []
        self.on_end = lambda: None

    def send(self, message):
        self.heard.append(message)

    def receive(self):
        one = self.said.pop(0)
        if isinstance(one, BaseException):
            raise one
        return one

    def end(self, *, at_once=False):
        self.on_end()
        self.ended.append(at_once)


class Launch:
    """What a run begins with, and what is heard of it meanwhile."""

    def __init__(self, monkeypatch, folder, *said):
        self.driver, self.heard = FakeDriver(*said), []
        self.storage = LocalStorage(folder / "store")
        self.staging = Staging(self.storage.folder, "run-7")
        monkeypatch.setattr(launch_module, "DriverProcess", lambda: self.driver)

    def commits(self, declared):
        self.heard.append(declared)
        return Commits(self.storage, ShardNumbers(self.storage), lambda items: None, lambda videos: None)

    def run(self, options=ExtractOptions(ray="auto", model="demo"), bounds=RunnerOptions(), own=NOTHING):  # noqa: B008
        callbacks = ExtractCallbacks(
            on_load=lambda what, done, whole: self.heard.append(what), on_note=lambda note: self.heard.append(note)
        )
        return launch(options, bounds, own, self.staging, 7, self.commits, callbacks)

    @property
    def begin(self) -> messages.Begin:
        (one,) = self.driver.heard
        return one


@pytest.fixture
def begun(monkeypatch, tmp_path):
    return lambda *said: Launch(monkeypatch, tmp_path, *said)


def test_the_driver_is_asked_for_what_the_first_encoder_declares(begun):
    one = begun(None, None, DECLARED)
    runner = one.run()
    assert one.heard == [CLUSTER, "a note", "another", READY, DECLARED]
    assert (one.driver.ended, one.staging.folder.is_dir()) == ([], True)
    assert (one.begin.own, one.begin.generation, one.begin.staging) == (NOTHING, 7, one.staging)
    assert one.begin.options == ExtractOptions(ray="auto", model="demo")
    assert one.begin.bounds.scratch == one.staging.folder and one.staging.folder.is_absolute()
    assert one.begin.seconds_left is None
    runner.close()
    assert one.driver.ended == [False]


def test_what_is_left_of_the_time_is_of_any_clock(begun):
    one = begun(DECLARED)
    one.run(bounds=RunnerOptions(deadline=active_seconds() + 50))
    assert 40 < one.begin.seconds_left <= 50


def test_a_limit_is_the_runners(begun):
    one = begun(DECLARED, messages.Done("", {}))
    runner = one.run(bounds=RunnerOptions(limit=0))
    assert list(runner.run([None])) == [] and runner.stopped == "limit"


def test_folders_are_absolute_and_a_model_is_named_where_the_store_names_none(begun, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    one = begun(DECLARED)
    one.run(ExtractOptions(ray="auto", model="model", adapter="adapter"))
    here = os.getcwd()
    assert (one.begin.options.model, one.begin.options.adapter) == (f"{here}/model", f"{here}/adapter")
    one = begun(DECLARED)
    one.staging.remove()
    one.run(ExtractOptions(ray="auto"))  # what a node has in its environment does not count
    assert one.begin.options.model == default_model()
    one = begun(DECLARED)
    one.staging.remove()
    one.run(ExtractOptions(ray="auto"), own=StoreDeclares("embeds", rows.config(), rows.specs(), rows.PROVENANCE))
    assert one.begin.options.model is None


@pytest.mark.parametrize(
    "error", [UsageError("no such cluster"), ModelError("no such model"), ProcessError("ended")], ids=str
)
def test_what_goes_wrong_at_the_beginning_leaves_nothing(begun, error):
    one = begun(None, error)
    with pytest.raises(type(error)) as caught:
        one.run()
    assert caught.value is error
    assert one.driver.ended == [True]
    assert not one.staging.store.exists()


def test_a_store_that_cannot_be_begun_ends_the_driver(begun, monkeypatch):
    one = begun(DECLARED)

    def commits(declared):
        raise DiskError("the disk is full")

    monkeypatch.setattr(one, "commits", commits)
    with pytest.raises(DiskError):
        one.run()
    assert one.driver.ended == [True]


def test_a_signal_while_it_loads_ends_the_driver_at_once(begun, installed):
    one = begun(None, DECLARED)
    interrupts._arrived.append(signal.SIGTERM)  # and was lost
    with pytest.raises(interrupts.Terminated):
        one.run()
    assert (one.driver.ended, one.staging.store.exists()) == ([True], False)


def test_a_second_signal_waits_until_the_driver_is_ended(begun, installed):
    one = begun(KeyboardInterrupt())
    one.driver.on_end = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(interrupts.Terminated):
        one.run()
    assert one.driver.ended == [True]
