"""Real photographs that come with scikit-image and scikit-learn: nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

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


def same_rgb(a: Image.Image, b: Image.Image) -> bool:
    """Whether both are RGB and every pixel is the same."""
    return a.mode == b.mode == "RGB" and a.size == b.size and bool(np.array_equal(np.asarray(a), np.asarray(b)))
