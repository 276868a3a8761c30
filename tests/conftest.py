"""Checkpoints made once a session, real photographs, and the whole model of transformers as the reference."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for a hub; the hub's tests set their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("QVSPLIT_MODEL", None)
os.environ.pop("HF_ENDPOINT", None)

import torch
from make_checkpoint import make_tiny
from PIL import Image
from sample_photos import photographs

torch.set_num_threads(2)

QUESTIONS = [
    "What is in the picture?",
    "Is it day or night?",
    "How many people are there?",
    "Describe the picture in one sentence.",
    "图片里有什么？",
]
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Fingerprints remembered by one test must not help another."""
    monkeypatch.setenv("QVSPLIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The tiny checkpoint as transformers 5 saves it, in five files."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def hub_checkpoint(tmp_path_factory) -> Path:
    """The same weights in the hub's older layout."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-hub"
    make_tiny(folder, layout="hub", files=2)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Real photographs of many shapes, and the shapes that photographs seldom have, cut from them."""
    folder = tmp_path_factory.mktemp("photos")
    for path in photographs():
        shutil.copyfile(path, folder / path.name)
    with Image.open(folder / "retina.jpg") as retina:
        retina.resize((5500, 3640), Image.Resampling.BICUBIC).save(folder / "twenty_megapixels.jpg", quality=85)
        retina.crop((700, 0, 709, 1350)).save(folder / "tall.png")  # 1:150
        retina.crop((700, 700, 701, 701)).save(folder / "one_pixel.png")
    with Image.open(folder / "china.jpg") as china:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90°
        china.save(folder / "turned.jpg", exif=exif)
    return folder


@pytest.fixture
def some_photos(photos, tmp_path) -> Path:
    """A folder of four small photographs that a test may change."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg"):
        shutil.copyfile(photos / name, folder / name)
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))  # not fresh: the stat may be trusted
    return folder


class WholeModel:
    """The unsplit model with its processor: what every answer is held against."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, max_pixels: int = 1280 * 28 * 28) -> None:
        from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": max_pixels}
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()

    def inputs(self, images, question, system=None):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[text], images=images, return_tensors="pt")

    def answer(self, images, question, system=None, new_tokens=NEW_TOKENS) -> list[int]:
        inputs = self.inputs(images, question, system)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def features(self, images) -> list[torch.Tensor]:
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True)
        return list(output.pooler_output)


@pytest.fixture(scope="session")
def whole(checkpoint) -> WholeModel:
    return WholeModel(checkpoint)


@functools.cache
def upright_rgb(path: Path) -> Image.Image:
    """The reference's picture, decoded here and not by qvsplit: upright, over white, 8-bit RGB."""
    from PIL import ImageOps
    from qwen_vl_utils.vision_process import to_rgb

    with Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


@pytest.fixture(scope="session")
def album_folder(checkpoint, photos, tmp_path_factory) -> Path:
    """All photographs, extracted once with the tiny checkpoint. Read only."""
    from qvsplit.extract import Settings, extract_pictures

    out = tmp_path_factory.mktemp("albums") / "embeds"
    extract_pictures([photos], out=out, settings=Settings(model=str(checkpoint)))
    return out


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Run one command in this process: gives its exit code, stdout and stderr."""
    import io

    from qvsplit.cli import app

    def run(*words: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            app([str(word) for word in words], prog_name="qvsplit", standalone_mode=True)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return code, told.out, told.err

    return run


def run_process(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """Run one command as a process of its own."""
    command = [sys.executable, "-m", "qvsplit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
