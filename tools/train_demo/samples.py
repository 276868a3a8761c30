"""Draw the sample postcards that lie in the package, and write down what is true of them.

    python -m train_demo.samples [FOLDER]    # FOLDER/postcards/… and FOLDER/truth.json; demo-samples by default

Several sizes and shapes, two turned by EXIF, one PNG with alpha, one WebP, the same bytes under two names, and one
file that was cut short. The scenes were chosen for their looks, before any model saw them; the questions are in
wordings that training never uses.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from train_demo.postcards import Scene, draw, make_scene
from train_demo.questions import truth

# name: number of the scene, width in pixels
CARDS = {
    "boats-in-snow.jpg": (11, 480),
    "city-lights.jpg": (6, 1200),
    "family.jpg": (50, 640),
    "kite-dogs.webp": (46, 900),
    "parade.jpg": (49, 720),
    "red-houses.png": (24, 800),
    "seaside.jpg": (31, 1280),
    "sunday.jpg": (45, 427),
    "turned-left.jpg": (16, 1024),
    "turned-right.jpg": (10, 600),
    "winter.jpg": (41, 360),
    "quiet-night.jpg": (23, 320),
}
TURNS = {"turned-right.jpg": (6, Image.Transpose.ROTATE_90), "turned-left.jpg": (8, Image.Transpose.ROTATE_270)}
TWICE = ("seaside.jpg", "copies/seaside (1).jpg")
TORN = ("city-lights.jpg", "torn.jpg")
QUESTIONS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Is this day or night?", "day or night", {}),
    ("How many houses can you see?", "how many", {"kind": "house"}),
    ("Can you see a dog?", "is there", {"kind": "dog"}),
    ("List everything you see.", "list", {}),
    ("Describe what you see in one sentence.", "describe", {}),
)


def write(folder: Path) -> None:
    """All cards and `truth.json` into `folder`."""
    cards, known = folder / "postcards", {}
    for name, (number, width) in CARDS.items():
        scene = make_scene(f"sample {number}")
        (cards / name).parent.mkdir(parents=True, exist_ok=True)
        (cards / name).write_bytes(_file(name, scene, width))
        known[name] = [truth(scene, kind, about) for _, kind, about in QUESTIONS]
    (cards / TWICE[1]).parent.mkdir(exist_ok=True)
    (cards / TWICE[1]).write_bytes((cards / TWICE[0]).read_bytes())
    known[TWICE[1]] = known[TWICE[0]]
    whole = (cards / TORN[0]).read_bytes()
    (cards / TORN[1]).write_bytes(whole[: len(whole) * 2 // 5])
    told = {"questions": [text for text, _, _ in QUESTIONS], "answers": known}
    (folder / "truth.json").write_text(json.dumps(told, indent=1) + "\n")


def _file(name: str, scene: Scene, width: int) -> bytes:
    """The bytes of one card's file."""
    picture = draw(scene, width, round(width / scene.aspect), smooth=3)
    stream, exif = io.BytesIO(), Image.Exif()
    if name in TURNS:
        exif[0x0112], turn = TURNS[name]
        picture = picture.transpose(turn)
    if name.endswith(".png"):
        corners = Image.new("L", picture.size, 0)
        ImageDraw.Draw(corners).rounded_rectangle((0, 0, width - 1, picture.height - 1), width // 24, fill=255)
        picture.putalpha(corners)
        picture.save(stream, "PNG", optimize=True)
    elif name.endswith(".webp"):
        picture.save(stream, "WEBP", quality=82)
    else:
        picture.save(stream, "JPEG", quality=86, exif=exif)
    return stream.getvalue()


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-samples"))
