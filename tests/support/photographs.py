"""Real photographs that come with scikit-image and scikit-learn: nothing to download."""

from __future__ import annotations

import shutil
from pathlib import Path

NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "coins.png", "color.png", "hubble_deep_field.jpg", "ihc.png",
    "logo.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg", "camera.png", "page.png",
)  # fmt: skip


def photographs() -> list[Path]:
    """Their paths: photographs of several shapes and modes, two of one size, one with alpha."""
    import skimage
    import sklearn

    data = Path(skimage.__file__).parent / "data"
    images = Path(sklearn.__file__).parent / "datasets" / "images"
    return [*(data / name for name in NAMES), images / "china.jpg", images / "flower.jpg"]


def copy_to(folder: Path) -> None:
    """Copy them all into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in photographs():
        shutil.copyfile(path, folder / path.name)
