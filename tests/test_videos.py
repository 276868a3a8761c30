"""Video files end to end: `extract`, then answers, held against the full model of transformers on every frame.

The reference decodes the whole file with plain PyAV, and gives all frames to the checkpoint's own processor in one call,
which samples, resizes and cuts them itself; the full model then encodes them in one pass and generates.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from qvsplit.answering.options import AskOptions
from qvsplit.answering.requests import PromptItems
from qvsplit.ask import load_session
from qvsplit.encode import load_encoder
from qvsplit.models.sampling import Sampling, VideoOptions
from qvsplit.store.opening import open_store
from tests.support.clips import plain_frames
from tests.support.extracting import OLD, PHOTOS, extractor

FAMILIES = ["qwen2_vl", "qwen3_vl"]  # of all six it is held by tests/models/test_matrix.py
QUESTIONS = ["What happens?", "Which colour is seen first, and which one last?", "Count."]
SHOWN = [
    ["short.mp4"], ["long.mkv"], ["two.mov"], ["short.mp4", "long.mkv"], ["photo.png", "short.mp4"],
    ["long.mkv", "photo.png"],
]  # fmt: skip
NEW_TOKENS = 8
RATE = 25
LIMITS = {"video_max_tokens": 200, "video_max_pixels": 32 * 32 * 8}  # few tokens: the tiny models are slow in numbers


def film(path: Path, photo: str, count: int, size: tuple[int, int], *, rate: int = RATE) -> Path:
    """Pan over a photograph: real pictures in H.264, as a phone makes them."""
    import av

    width, height = size
    with Image.open(PHOTOS[photo]) as opened:
        picture = opened.convert("RGB").resize((width * 2, height * 2), Image.Resampling.BICUBIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(count):
            left, top = (round(span * number / max(count - 1, 1)) for span in size)
            seen = picture.crop((left, top, left + width, top + height))
            frame = av.VideoFrame.from_image(seen).reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.utime(path, OLD)
    return path


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """A short clip, a longer one of more frames than rows and columns, one of two frames; and a photograph."""
    folder = tmp_path_factory.mktemp("films")
    film(folder / "short.mp4", "coffee.png", 50, (160, 96))
    film(folder / "long.mkv", "chelsea.png", 400, (96, 64))
    film(folder / "two.mov", "rocket.jpg", 2, (64, 96))
    with Image.open(PHOTOS["astronaut.png"]) as photo:
        photo.resize((120, 90)).save(folder / "photo.png")
    os.utime(folder / "photo.png", OLD)
    return folder


@dataclass
class Whole:
    """The full model on whole files, with the limits of a store in force."""

    reference: object
    processor: object
    folder: Path

    def item(self, name: str):
        if name.endswith(".png"):
            return Image.open(self.folder / name).convert("RGB")
        frames = plain_frames(self.folder / name)
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    def inputs(self, names: list[str], question: str):
        items = [self.item(name) for name in names]
        clips = [item for item in items if torch.is_tensor(item)]
        shown = [{"type": "video"} if torch.is_tensor(item) else {"type": "image"} for item in items]
        chat = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False)
        metadata = [VideoMetadata(len(clip), fps=float(RATE), duration=len(clip) / RATE) for clip in clips]
        return self.processor(
            text=[text], images=[item for item in items if not torch.is_tensor(item)] or None, videos=clips or None,
            videos_kwargs={"video_metadata": metadata, "do_sample_frames": True, "fps": 2.0} if clips else {},
            return_tensors="pt",
        )  # fmt: skip

    def answer(self, names: list[str], question: str) -> list[int]:
        inputs = self.inputs(names, question)
        with torch.inference_mode():
            out = self.reference.model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def features(self, name: str) -> torch.Tensor:
        inputs = self.inputs([name], "?")
        with torch.inference_mode():
            output = self.reference.model.model.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
            )
        pooled = output.pooler_output
        return pooled if torch.is_tensor(pooled) else torch.cat(list(pooled))


@pytest.fixture(scope="session")
def split(family_checkpoint, family_reference, films, tmp_path_factory):
    """A family's store of the films, and the full model beside it."""
    made = {}

    def of(name: str):
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "embeds"
            extractor(str(family_checkpoint(name)), out)(films, kernels="reference", **LIMITS)
            store = open_store(out)
            processor = copy.deepcopy(AutoProcessor.from_pretrained(family_checkpoint(name)))
            settings, own = store.config.videos["settings"], processor.video_processor
            own.size, own.max_video_tokens = settings["size"], settings["max_video_tokens"]
            own.cap_pixels_per_frame = True
            limits = store.config.processor
            processor.image_processor.size = {
                "shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]
            }  # fmt: skip
            made[name] = store, Whole(family_reference(name), processor, films)
        return made[name]

    return of


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_full_models_to_the_bit(name, split):
    store, whole = split(name)
    for row in store:
        if row.kind == "video":
            expected = whole.features(row.path)
            assert torch.equal(store.features(row).flat_torch()["pooler_output"], expected)
            theirs = whole.inputs([row.path], "?")
            assert list(row.grid_thw) == theirs["video_grid_thw"][0].tolist()
            assert row.n_tokens == len(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_the_full_models_token_for_token(name, split):
    """One question, and many behind one prefix; a video alone, several, and videos beside images in both orders."""
    store, whole = split(name)
    session = load_session(store, AskOptions(max_new_tokens=NEW_TOKENS))
    for shown in SHOWN:
        got = [answer.tokens for answer in session.answers(shown, QUESTIONS)]
        expected = [whole.answer(shown, question) for question in QUESTIONS]
        assert got == expected, shown
    alone = session.answer("long.mkv", QUESTIONS[0]).tokens
    assert alone == whole.answer(["long.mkv"], QUESTIONS[0])


def test_the_long_film_has_more_frames_than_rows_and_columns(split):
    store, _ = split("qwen2_vl")
    t, h, w = store["long.mkv"].grid_thw
    assert t > max(h, w) // 2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_fused_kernels_agree_within_rounding(name, split, family_checkpoint, films, tmp_path):
    store, whole = split(name)
    extractor(str(family_checkpoint(name)), tmp_path / "embeds")(films, **LIMITS)
    fused = open_store(tmp_path / "embeds")
    assert (fused.config.kernels, store.config.kernels) == ("fused", "reference")
    for row in fused:
        mine, theirs = (one.features(one[row.path]).flat_torch() for one in (fused, store))
        assert mine.keys() == theirs.keys()
        assert all(float((mine[key] - rows).abs().max() / rows.abs().max()) < 1e-5 for key, rows in theirs.items())
    session = load_session(fused, AskOptions(max_new_tokens=NEW_TOKENS))
    assert session.answer("short.mp4", QUESTIONS[0]).tokens == whole.answer(["short.mp4"], QUESTIONS[0])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_slices_make_no_difference(name, split, family_checkpoint, films, tmp_path):
    """One temporal step at a time: the same bits as in one pass."""
    store, _ = split(name)
    one_step = {"patch_budget": 1, "kernels": "reference"}
    extractor(str(family_checkpoint(name)), tmp_path / "embeds")(films / "long.mkv", **one_step, **LIMITS)
    sliced = open_store(tmp_path / "embeds")
    mine, theirs = (one.features(one["long.mkv"]) for one in (sliced, store))
    assert (mine.grid_thw, mine.placeholder, mine.inputs) == (theirs.grid_thw, theirs.placeholder, theirs.inputs)
    for key, tensor in theirs.tensors.items():
        assert np.array_equal(mine.tensors[key].raw, tensor.raw)


def test_parts_have_the_times_of_the_video(family_checkpoint, films, tmp_path):
    """Qwen3-VL writes times into the prompt: of a part, those of the video."""
    extractor(str(family_checkpoint("qwen3_vl")), tmp_path / "embeds")(films / "long.mkv", clip_seconds=4, **LIMITS)
    store = open_store(tmp_path / "embeds")
    rows = store.matching("long.mkv")
    assert [(row.part, row.start, row.end) for row in rows] == [(n, 4.0 * n, 4.0 * n + 4) for n in range(4)]
    for row in rows:
        text = "".join(run for run, _ in row.placeholder_runs)
        times = [float(time) for time in re.findall(r"<([0-9.]+) seconds>", text)]
        assert times
        assert all(row.start <= time <= row.end for time in times)
    answers = load_session(store, AskOptions(max_new_tokens=NEW_TOKENS)).survey(rows, QUESTIONS[:1])
    assert len({tuple(answer.tokens) for answer in answers}) > 1


def test_an_encoder_without_a_store_encodes_the_same(split, family_checkpoint, films):
    store, _ = split("qwen3_vl")
    videos = VideoOptions(Sampling(), LIMITS["video_max_pixels"], LIMITS["video_max_tokens"])
    with load_encoder(family_checkpoint("qwen3_vl"), videos=videos, kernels="reference") as encoder:
        (features,) = encoder.encode_video(films / "short.mp4")
    stored = store.features(store["short.mp4"])
    assert features.config == store.config
    assert (features.grid_thw, features.placeholder, features.kind) == (stored.grid_thw, stored.placeholder, "video")
    for key, tensor in stored.tensors.items():
        assert np.array_equal(features.tensors[key].raw, tensor.raw)


def test_compare_and_together(split):
    store, whole = split("qwen3_vl")
    session = load_session(store, AskOptions(max_new_tokens=NEW_TOKENS))
    rows = tuple(store[name] for name in ("short.mp4", "photo.png", "two.mov"))
    (answer,) = session.survey([PromptItems(rows, shared=1)], QUESTIONS[:1])
    assert answer.tokens == whole.answer([row.path for row in rows], QUESTIONS[0])
