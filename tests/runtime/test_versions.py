"""Versions of packages, also of those whose metadata is missing."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import metadata

import pytest

from qvsplit.runtime.versions import VersionWarning, installed_version, out_of_bounds, warn_of_other_versions
from qvsplit.store.config import installed_versions


def test_the_version_is_the_metadatas():
    assert installed_version("numpy") == metadata.version("numpy")


def test_a_package_without_metadata_is_unknown_to_a_store_and_stops_no_extraction(monkeypatch):
    """qvsplit run from a folder of sources; a Pillow of another name."""
    real = metadata.version

    def version(name):
        if name in ("qvsplit", "pillow"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    versions = installed_versions.__wrapped__()
    assert versions["qvsplit"] == versions["pillow"] == "unknown"
    assert versions["torch"] == real("torch")


WANTED = ["numpy<1", "torch>=1", "pandas<0.1; extra == 'dev'", "no-such-package>=3"]


@pytest.fixture
def wanted(monkeypatch):
    """As if the package wanted these."""
    monkeypatch.setattr(metadata, "requires", lambda package: WANTED)
    warn_of_other_versions.cache_clear()
    yield
    warn_of_other_versions.cache_clear()


def test_what_is_installed_outside_of_the_bounds(wanted):
    assert list(map(str, out_of_bounds())) == [f"numpy {metadata.version('numpy')} (<1)"]


def test_nothing_is_out_of_bounds_where_the_package_is_only_sources():
    assert list(out_of_bounds("no-such-package")) == []


def test_another_version_is_warned_of_once(wanted):
    with pytest.warns(VersionWarning, match=r"numpy .* is not one of the versions .* \(<1\): install one"):
        warn_of_other_versions("numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_versions("numpy")
        warn_of_other_versions("torch")


def test_the_command_says_so_in_one_line_and_nothing_of_other_warnings():
    code = (
        "import sys, warnings\n"
        "from importlib import metadata\n"
        "from qvsplit import cli\n"
        "from qvsplit.runtime.versions import warn_of_other_versions\n"
        f"metadata.requires = lambda package: {WANTED!r}\n"
        "cli.run = lambda words: warn_of_other_versions('numpy') or warnings.warn('a remark') or 0\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"qvsplit: numpy {metadata.version('numpy')} is not one of the versions that answers were ")
