"""Every model family's videos through the whole way, held against its full model: rows of docs/models.md.

Small clips in files are extracted, and asked about. The full model is given every frame of the file, which plain PyAV
decodes, and its own processor samples them itself, in one call.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from qvsplit.answering.options import AskOptions
from qvsplit.ask import PromptItems, Session, load_session
from qvsplit.encode import load_encoder
from qvsplit.extract import extract_files
from qvsplit.models.encoder_output import output_tensors
from qvsplit.models.sampling import FPS, VideoOptions
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.store.features import Features
from qvsplit.store.store import Store
from qvsplit.verify import check_items
from tests.support.clips import make_clip, plain_frames
from tests.support.columns import NAMES, NEW_TOKENS, QUESTIONS, REFUSED, SWITCHES, MeasuredRow, count
from tests.support.extracting import PHOTOS
from tests.support.families.reference import Clip, Item, Made, Reference, make_reference

RATE = 25
SHORT, LONG, PHOTO = "short.mp4", "long.mkv", "photo.png"
# frames, width and height: the long one has more frames sampled than rows and columns of tokens
CLIPS = {SHORT: (50, (160, 96)), LONG: (400, (96, 64))}
NO, NOTHING = "no", "–"


@dataclass(frozen=True)
class VideoRow(MeasuredRow):
    """What came of one family's videos: `no` and why, in the first column, where it takes none."""

    family: str = field(**NAMES)
    features: str
    stored: str = NOTHING
    short: str = NOTHING
    long: str = NOTHING
    fan_out: str = NOTHING
    several: str = NOTHING
    mixed: str = NOTHING
    passes: str = field(default=NOTHING, **NAMES)


def video_row(name: str, folder: Path, made: Made | None = None) -> VideoRow:
    """Run videos through the whole way of a family's tiny checkpoint, in the new `folder`; `made` there unless given."""
    model, reference = made or make_reference(name, folder / "model")
    files = make_files(folder / "files")
    refused: dict[str, str] = {}
    options = ExtractOptions(model=str(model), kernels="reference")
    extract_files(
        [files], out=folder / "store", options=options, callbacks=ExtractCallbacks(on_failure=refused.__setitem__)
    )
    if refused:
        (reason,) = set(refused.values())
        return VideoRow(name, _no(reason))
    session = load_session(folder / "store", AskOptions(model=str(model), max_new_tokens=NEW_TOKENS))
    videos = session.store.config.videos
    assert videos is not None
    reference = copy.copy(reference)
    reference.processor = AutoProcessor.from_pretrained(model)  # of our own: its settings are changed
    as_extracted(reference.processor, videos["settings"])
    items = {path.name: item_of(path) for path in files.iterdir()}
    asking = _Asking(session, reference, items)
    own = {name: output_tensors(reference.features(items[name])) for name in CLIPS}
    with load_encoder(model, kernels="reference", videos=VideoOptions()) as encoder:
        at_hand = {name: encoder.encode_video(files / name)[0] for name in CLIPS}
    return VideoRow(
        family=name,
        features=count(_same(at_hand, own)),
        stored=count(_stored(session.store, own)),
        short=asking.single(SHORT),
        long=asking.single(LONG),
        fan_out=count(
            answer.tokens == asking.expected([LONG], answer.question) for answer in session.answers(LONG, QUESTIONS)
        ),
        several=asking.together([SHORT, LONG], [LONG, SHORT]),
        mixed=asking.together([PHOTO, SHORT], [LONG, PHOTO]),
        passes="in temporal slices" if videos["in_slices"] else "whole",
    )


def make_files(folder: Path) -> Path:
    """Make two clips and a photograph in the new `folder`."""
    folder.mkdir()
    for name, (frames, size) in CLIPS.items():
        make_clip(folder / name, frames, size=size, rate=RATE)
    with Image.open(PHOTOS["astronaut.png"]) as photo:
        photo.convert("RGB").resize((130, 90)).save(folder / PHOTO)
    return folder


def item_of(path: Path) -> Item:
    """What the full model's processor is given of a file: of a clip, every frame."""
    if path.name not in CLIPS:
        return Image.open(path).convert("RGB")
    frames = torch.from_numpy(np.stack(plain_frames(path))).permute(0, 3, 1, 2).contiguous()
    count, _, height, width = frames.shape
    return Clip(frames, VideoMetadata(count, fps=float(RATE), duration=count / RATE, width=width, height=height))


def as_extracted(processor: Any, settings: Mapping[str, Any]) -> None:
    """Have a processor take as many frames, as large ones, as an extraction did."""
    own = processor.video_processor
    own.fps, own.num_frames = FPS, None
    limits = {name: settings[name] for name in ("size", "max_video_tokens", "cap_pixels_per_frame") if name in settings}
    of_calls = getattr(processor, "videos_kwargs", None) or {}
    for name, value in limits.items():
        setattr(own, name, value)
        if name in of_calls:
            of_calls[name] = value


def _no(reason: str) -> str:
    """Give what a refused clip's `reason` says of the model, where it says more than that it takes no videos."""
    why = re.sub(r"^is a video: (/\S+ takes no videos: )?", "", reason).partition(";")[0]
    return NO if re.fullmatch(r"\w+ models take no videos", why) else f"{NO}: {why}"


def _same(features: Mapping[str, Features], own: Mapping[str, Any]) -> Iterator[bool]:
    """Hold features of each clip against the full model's, bit for bit."""
    for name, tensors in own.items():
        mine, theirs = features[name].flat_torch(), {one.key: one.rows for one in tensors}
        yield mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)


def _stored(store: Store, own: Mapping[str, Any]) -> Iterator[bool]:
    """Hold what was read back against the full model's own features, bit for bit; and as `verify --sample` does it."""
    for check in check_items(store, [store[name] for name in own]):
        yield check.skipped is None and check.same_bits and check.same_tokens
    yield from _same({name: store.features(store[name]) for name in own}, own)


@dataclass
class _Asking:
    """Questions to a session, and the full model's answers."""

    session: Session
    reference: Reference
    items: Mapping[str, Item]

    def expected(self, shown: Sequence[str], question: str) -> list[int]:
        items = [self.items[name] for name in shown]
        return self.reference.answer(items, question, new_tokens=NEW_TOKENS, **SWITCHES)

    def single(self, name: str) -> str:
        """Ask one question at a time, each behind a prefix of its own."""
        found = []
        for question in QUESTIONS[:2]:
            self.session.engine.prefix_cache.clear()
            found.append(self.session.answer(name, question).tokens == self.expected([name], question))
        return count(found)

    def together(self, *prompts: Sequence[str]) -> str:
        """Ask about several items at once; the first of the last prompt's is compared, so that its prefix is shared."""
        found = []
        for number, shown in enumerate(prompts):
            rows = tuple(self.session.store[name] for name in shown)
            for answer in self.session.survey([PromptItems(rows, shared=number)], QUESTIONS[:2]):
                if answer.error is not None:
                    return f"{REFUSED}: {_why_refused(answer.error)}"
                found.append(answer.tokens == self.expected(shown, answer.question))
        return count(found)


def _why_refused(error: str) -> str:
    """Give what an answer's `error` says of the model, without the checkpoint's name and the advice."""
    return re.split(r"[,;(]", error.partition(": ")[2])[0].strip()
