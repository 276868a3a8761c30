"""What the tests of the sources share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo(photos: Path) -> Image.Image:
    """One photograph, as RGB. Not to be changed in place."""
    with Image.open(photos / "coffee.png") as image:
        return image.convert("RGB")
