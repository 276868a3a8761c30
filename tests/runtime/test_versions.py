"""Versions of packages, also of those whose metadata is missing."""

from __future__ import annotations

from importlib import metadata

from qvsplit.runtime.versions import installed_version
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
