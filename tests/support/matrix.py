"""Every model family through the whole way, held against its full model: the rows of docs/models.md.

    python -m tests.support.matrix {print|write} [--only {images|videos|minutes}] [FAMILY …]

makes each family's tiny checkpoint, runs it, and prints its rows: of images, of videos (video_matrix.py), and what a
minute of video costs (video_costs.py); `write` puts the rows also into docs/models.md. Tests run the same and hold them
against what stands there.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qvsplit.answering.engine import FeatureRef, Request
from qvsplit.answering.options import AskOptions
from qvsplit.ask import PromptItems, Session, load_session
from qvsplit.checkpoints.families import FAMILIES as LISTED
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import WeightsError
from qvsplit.extract import extract_files
from qvsplit.models.encoder_output import output_tensors
from qvsplit.models.prompt import question_messages
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.verify import check_items
from qvsplit.weights import load_encoder_weights, load_language_model
from tests.support.columns import NAMES, NEW_TOKENS, QUESTIONS, REFUSED, SWITCHES, MeasuredRow, count
from tests.support.extracting import PHOTOS
from tests.support.fake_source import InThreadDecoders
from tests.support.families import ALL
from tests.support.families.reference import Made, Reference, make_reference
from tests.support.video_costs import minute_row
from tests.support.video_matrix import NO, VideoRow, video_row

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
SIZES = {"coffee.png": (300, 200), "chelsea.png": (140, 220), "rocket.jpg": (260, 180)}
NEEDS_TIMM = {"gemma3n", "perception_lm", "fast_vlm"}
SPLIT = [name for name, one in ALL.items() if one.model_type in LISTED and name not in NEEDS_TIMM]
CHOICES = ("yes", "no", "a grey house", "a grey", "yes.")  # some begin with others


def _lose(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _leave_over(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.surplus"] = tensors[name].clone()


def _misshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].flatten()[1:].clone()


WRONG = (_lose, _leave_over, _misshape)


@dataclass(frozen=True)
class MatrixRow(MeasuredRow):
    """What came of one family's images."""

    family: str = field(**NAMES)
    model_class: str = field(**NAMES)
    images: str
    several_images: str
    fan_out: str
    prefixes: str
    choices: str
    stored: str
    strict: str
    way: str = field(**NAMES)


def matrix_row(name: str, folder: Path, made: Made | None = None) -> MatrixRow:
    """Run the tiny checkpoint of a family through the whole way, in the new `folder`; `made` there unless given."""
    model, reference = made or make_reference(name, folder / "model")
    photos = folder / "photos"
    photos.mkdir()
    images = {}
    for photo, size in SIZES.items():
        path = (photos / photo).with_suffix(".png")
        with Image.open(PHOTOS[photo]) as image:
            image.convert("RGB").resize(size).save(path)
        images[path.name] = Image.open(path).convert("RGB")
    with mock.patch("qvsplit.pipeline.runner.DecoderPool", InThreadDecoders):
        options = ExtractOptions(model=str(model), kernels="reference")
        extract_files([photos], out=folder / "store", options=options)
    session = load_session(folder / "store", AskOptions(model=str(model), max_new_tokens=NEW_TOKENS))
    expected = {
        (shown, question): reference.answer([images[shown]], question, new_tokens=NEW_TOKENS, **SWITCHES)
        for shown in images
        for question in QUESTIONS
    }
    first, *others = images
    checkpoint = open_checkpoint(model, "both")
    return MatrixRow(
        family=name,
        model_class=type(reference.model).__name__,
        images=count(_single(session, expected)),
        several_images=_several(session, reference, images),
        fan_out=count(
            answer.tokens == expected[first, answer.question] for answer in session.answers(first, QUESTIONS)
        ),
        prefixes=count(
            answer.tokens == expected[answer.rows[0].path, answer.question]
            for answer in session.survey([[first], *([one] for one in others)], QUESTIONS)
        ),
        choices=count(_scored(session, reference, images)),
        stored=count(_stored(session, reference, images)),
        strict=count(_refusals(checkpoint.folder, folder / "wrong")),
        way=session.engine.language.way,
    )


def _single(session: Session, expected: dict[tuple[str, str], list[int]]) -> Iterator[bool]:
    """Ask one question at a time, each behind a prefix of its own."""
    for (shown, question), tokens in expected.items():
        if question in QUESTIONS[:2]:
            session.engine.prefix_cache.clear()
            yield session.answer(shown, question).tokens == tokens


def _several(session: Session, reference: Reference, images: dict[str, Image.Image]) -> str:
    """Ask about two images at once, and about one that is compared with others: its prefix is then shared."""
    one, other, third = images
    found = []
    for shared, shown in enumerate(([one, other], [other, one], [other, third])):
        items = PromptItems(tuple(session.store[name] for name in shown), shared=shared and 1)
        for answer in session.survey([items], QUESTIONS[:2]):
            if answer.error is not None:
                assert "where others stand beside it" in answer.error
                return REFUSED
            pictures = [images[name] for name in shown]
            tokens = reference.answer(pictures, answer.question, new_tokens=NEW_TOKENS, **SWITCHES)
            found.append(answer.tokens == tokens)
    return count(found)


def _scored(session: Session, reference: Reference, images: dict[str, Image.Image]) -> Iterator[bool]:
    """Score answers of one token and of several, and hold them against plain forward passes of the full model."""
    for name, image in images.items():
        ref = FeatureRef(*session.store[name].content)
        requests = [
            Request(question, tuple(question_messages(question, ["image"])), (ref,), choices=CHOICES)
            for question in QUESTIONS[:2]
        ]
        for completion in session.engine.answer(requests):
            expected = {
                choice: reference.logprob(
                    [image], completion.id, session.engine.language.prompter.text_tokens(choice), **SWITCHES
                )
                for choice in CHOICES
            }
            yield completion.logprobs == pytest.approx(expected, rel=1e-4, abs=1e-4)


def _stored(session: Session, reference: Reference, images: dict[str, Image.Image]) -> Iterator[bool]:
    """Hold what was read back against the full model's own features, bit for bit; and as `verify --sample` does it."""
    for check in check_items(session.store, list(session.store)):
        yield check.same_bits and check.same_tokens
    for name, image in images.items():
        stored = session.store.features(session.store[name]).flat_torch()
        own = {one.key: one.rows for one in output_tensors(reference.features(image))}
        yield stored.keys() == own.keys() and all(torch.equal(stored[key], own[key]) for key in own)


def _refusals(folder: Path, copy: Path) -> Iterator[bool]:
    """Load each half of checkpoints of which one tensor is lost, left over or of another shape."""
    for half, change in itertools.product(("encoder", "language"), WRONG):
        shutil.copytree(folder, copy)
        opened = open_checkpoint(copy, "both")
        name = next(n for n in opened.tensor_names(half) if n.endswith("weight") and n in _of_one_half(opened))
        tensors = load_file(copy / opened.files[name])
        change(tensors, name)
        save_file(tensors, copy / opened.files[name], metadata={"format": "pt"})
        opened = open_checkpoint(copy, "both")
        try:
            if half == "encoder":
                load_encoder_weights(opened, device=torch.device("cpu"), dtype=torch.float32)
            else:
                load_language_model(opened, dtype=torch.float32)
            yield False
        except WeightsError:
            yield True
        shutil.rmtree(copy)


def _of_one_half(checkpoint: Any) -> set[str]:
    return set(checkpoint.encoder_names) ^ set(checkpoint.language_names)


# ------------------------------------------------------------------------------------------------------------- docs


NO_VIDEOS = "No videos: "
# parts of docs/models.md, and what makes a row of each
PARTS: dict[str, Callable[[str, Path], Any]] = {"images": matrix_row, "videos": video_row, "minutes": minute_row}


def rows_in_docs(part: str) -> dict[str, str]:
    """The rows that a part of docs/models.md has, by family."""
    lines = _around(part)[1].splitlines()
    rows = {line.split(" ")[1]: line for line in lines if line.startswith("| ")}
    for line in lines:
        if line.startswith(NO_VIDEOS):
            names = line.removeprefix(NO_VIDEOS).rstrip(".").split(", ")
            rows |= {name.strip("`"): str(VideoRow(name.strip("`"), NO)) for name in names}
    return rows


def families_in_docs(part: str) -> list[str]:
    """The families that are to have a row in a part: no minute costs anything where there are no videos."""
    if part != "minutes":
        return SPLIT
    rows = rows_in_docs("videos")
    return [name for name in SPLIT if name in rows and not rows[name].startswith(f"| {name} | {NO}")]


def _around(part: str) -> tuple[str, str, str]:
    """Give what stands before, in and behind a part that is written here."""
    begin, end = f"<!-- {part}: python -m tests.support.matrix write -->\n", f"<!-- end of {part} -->"
    before, _, rest = DOCS.read_text().partition(begin)
    inside, found, after = rest.partition(end)
    assert found, f"{DOCS} has no part {part}"
    return before + begin, inside, end + after


def _write(part: str, rows: Mapping[str, str]) -> None:
    """Put rows into a part, one a family; those that take no videos share a line."""
    ordered = {name: rows[name] for name in families_in_docs(part) if name in rows}
    without = [name for name, row in ordered.items() if row == str(VideoRow(name, NO))]
    lines = [row for name, row in ordered.items() if name not in without]
    if without:
        lines += ["", NO_VIDEOS + ", ".join(f"`{name}`" for name in without) + "."]
    before, _, after = _around(part)
    DOCS.write_text(before + "\n".join(lines) + "\n" + after)


def main() -> None:
    """Run families, print their rows, and put them into the docs if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["print", "write"])
    parser.add_argument("families", nargs="*", default=SPLIT)
    parser.add_argument("--only", choices=list(PARTS), help="one part of the page")
    told = parser.parse_args()
    torch.set_num_threads(1)
    for part in [told.only] if told.only else PARTS:
        rows: dict[str, str] = {}
        for name in told.families:
            if name in families_in_docs(part):
                with tempfile.TemporaryDirectory() as folder:
                    rows[name] = str(PARTS[part](name, Path(folder)))
                print(rows[name], flush=True)
        if told.what == "write":
            _write(part, rows_in_docs(part) | rows)


if __name__ == "__main__":
    main()
