"""Prove that prompts made from stored placeholders are the processor's own, on small images and clips.

What differs between families is not known here: how a placeholder is expanded, whether an item's place is written
beside it, whether the text is changed around items, which types every token gets. So the processor is called on
pixels once for every kind of prompt, and its tokens are held against ours: of one image, of one video, of several, and
of both together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.model_class import encoders_alone
from qvsplit.errors import ModelError, RequestError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image

    Item: TypeAlias = "Image.Image | SampledClip"

KINDS = ("image", "video")
PROOF_SIZES = ((160, 120), (500, 260))  # width and height: one that is small, one that families with tiles cut up
PROOF_CLIPS = ((4, 96, 64), (6, 128, 160))  # frames, width and height
PROOF_FPS = 4.0  # of the clips, of which every second frame is shown
TOKEN_TYPES = "token_type_ids"  # how the names end by which models take what a processor says of tokens
MAX_BEGINNING = 1  # tokens: a BOS
_QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class SampledClip:
    """Frames of a video that were sampled.

    Attributes:
        frames: uint8 [frames, 3, height, width].
        metadata: transformers' `VideoMetadata`, with the `frames_indices` of these frames.
    """

    frames: torch.Tensor
    metadata: Any


@dataclass(frozen=True)
class Proof:
    """What the processor's own call showed.

    Attributes:
        types: How each of its token types comes about, by name: "items", by its own method; "text", all 0.
        beginning: The tokens that it puts in front of what the chat template gives, where they are not there yet.
        inputs: By the kind of an item, the names of the small inputs that it gives the model for it, beside grids.
    """

    types: Mapping[str, str]
    beginning: tuple[int, ...] = ()
    inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def token_types(self, processor: Any, ids: Sequence[int]) -> dict[str, list[int]]:
        """Give the types of a prompt's tokens, by the names of the model's inputs."""
        return {name: _types(name, how, processor, ids) for name, how in self.types.items()}

    def missing_beginning(self, ids: Sequence[int]) -> list[int]:
        """Give the tokens that the processor would put in front of a prompt."""
        return [] if tuple(ids[: len(self.beginning)]) == self.beginning else list(self.beginning)


class PromptMaker(Protocol):
    """What makes prompts from placeholders."""

    processor: Any
    folder: Path
    model_class: Any
    model_takes: frozenset[str]

    def proof_prompt(self, shown: Sequence[tuple[str, str]], question: str) -> list[int]:
        """Give the tokens of a question about items: of each its kind, and the text that stands for it in a prompt."""


def small_images(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Make grey images of these widths and heights."""
    from PIL import Image

    return [Image.new("RGB", size, (90 + 20 * number, 120, 150)) for number, size in enumerate(sizes)]


def small_clips(shapes: Sequence[tuple[int, int, int]]) -> list[SampledClip]:
    """Make grey clips of so many frames of these widths and heights."""
    import torch
    from transformers.video_utils import VideoMetadata

    clips = []
    for number, (frames, width, height) in enumerate(shapes):
        metadata = VideoMetadata(
            total_num_frames=2 * frames, fps=PROOF_FPS, duration=2 * frames / PROOF_FPS, width=width, height=height,
            frames_indices=list(range(0, 2 * frames, 2)),
        )  # fmt: skip
        pixels = torch.full((frames, 3, height, width), 90 + 20 * number, dtype=torch.uint8)
        clips.append(SampledClip(pixels, metadata))
    return clips


def kind_of(item: Item) -> str:
    """Say whether an item is an `image` or a `video`."""
    return "video" if isinstance(item, SampledClip) else "image"


def samples(kind: str) -> Sequence[Item]:
    """Give the small items of a kind that processors are tried with."""
    return small_images(PROOF_SIZES) if kind == "image" else small_clips(PROOF_CLIPS)


def process(processor: Any, item: Item, *, where: object) -> tuple[Mapping[str, Any], str]:
    """Give what a processor makes of one item, and the text that stands for it in a prompt.

    Raises:
        ModelError: It makes no such text; `where` says whose it is.
        RequestError: It takes no clips, or refuses one that others take.
    """
    if not isinstance(item, SampledClip):
        return hf.process_image(processor, item)
    try:
        with hf.quiet_transformers():
            return hf.process_video(processor, item.frames, item.metadata)
    except ModelError as error:
        raise RequestError(f"{where} cannot answer about videos: {error}") from None
    except Exception as error:  # a processor may raise anything
        raise RequestError(f"{where} cannot answer about videos: its processor refuses one ({error!r})") from None


def template_options(processor: Any, *, thinking: bool) -> dict[str, bool]:
    """Give the switch of reasoning where a chat template has one; transformers warns where it has none."""
    return {"enable_thinking": thinking} if "enable_thinking" in str(processor.chat_template) else {}


def prove(maker: PromptMaker, images: int, videos: int) -> Proof:
    """Hold prompts made from placeholders against the processor's own call.

    Args:
        maker: Makes the prompts.
        images: How many images such a prompt shows: none, one, or 2 for several.
        videos: How many videos, likewise.

    Raises:
        ModelError: They differ.
        UsageError: They differ only where several items stand together.
    """
    types: dict[str, str] = {}
    beginnings: set[tuple[int, ...]] = set()
    inputs: dict[str, frozenset[str]] = {}
    unread = encoders_alone(maker.model_class)
    for items in _shown(images, videos):
        alone = [process(maker.processor, item, where=maker.folder) for item in items]
        texts = [(kind_of(item), text) for item, (_, text) in zip(items, alone, strict=True)]
        ours = maker.proof_prompt(texts, _QUESTION)
        theirs = _call_or_refuse(maker, items)
        ids = _flat(theirs["input_ids"])
        same = ids[-len(ours) :] == ours and len(ids) - len(ours) <= MAX_BEGINNING
        beginnings.add(tuple(ids[: -len(ours)]))
        processed = [one for one, _ in alone]
        small = {name for one in processed for name in maker.model_takes & one.keys() if "pixel" not in name}
        alike = same and _same_pixels(processed, theirs) and _same_inputs(small - unread, processed, theirs)
        if len(items) > 1 and not alike:
            raise UsageError(f"{maker.folder}: {_refusal(items)}")
        if not same or len(beginnings) > 1:
            cannot = "answer about videos" if videos else "be split"
            raise ModelError(
                f"{maker.folder} cannot {cannot}: its processor's prompts cannot be made from placeholders, without "
                "pixels"
            )
        shown_types = _types_shown(maker, theirs)
        made = {"input_ids", "attention_mask", "labels", *shown_types}.union(*processed)  # labels are for training
        if missing := sorted((maker.model_takes & theirs.keys()) - made):
            raise ModelError(
                f"{maker.folder} cannot be split: its model takes {' and '.join(missing)}, which cannot be made from a "
                "prompt's tokens"
            )
        types |= shown_types
        for item, one in zip(items, processed, strict=True):
            kind = kind_of(item)
            names = small & one.keys() - {f"{kind}_grid_thw"}
            inputs[kind] = inputs.get(kind, frozenset()) | names
    (beginning,) = beginnings
    return Proof(types, beginning, inputs)


def _shown(images: int, videos: int) -> list[list[Item]]:
    """Give the items of prompts that show so many: one of them at a time, or several in every order that matters."""
    found, clips = list(samples("image")), list(samples("video")) if videos else []
    if images + videos == 1:
        return [[item] for item in (found if images else clips)]
    both = found[:images], clips[:videos]
    # as mixed as can be, and where there are as many of both, beginning with either
    orders = [(one, other) for one, other in (both, both[::-1]) if len(one) >= len(other)]
    return [[item for pair in zip_longest(*order) for item in pair if item is not None] for order in orders]


def _call_or_refuse(maker: PromptMaker, items: Sequence[Item]) -> Mapping[str, Any]:
    """Give the processor's own call. UsageError where it refuses several items, each of which it takes alone."""
    if len(items) == 1:
        return processor_call(maker.processor, items, _QUESTION, where=maker.folder)
    try:
        return _call(maker.processor, items, _QUESTION)
    except Exception as error:  # as of `processor_call`
        raise UsageError(f"{maker.folder}: {_refusal(items)} ({' '.join(str(error).split())})") from None


def _refusal(items: Sequence[Item]) -> str:
    kinds = sorted({kind_of(item) for item in items})
    if len(kinds) > 1:
        return (
            "its processor prepares images and videos in another way where they stand side by side, and features are "
            "of items that stand alone; ask about one at a time"
        )
    (kind,) = kinds
    a = "an" if kind == "image" else "a"
    return (
        f"its processor prepares {a} {kind} in another way where others stand beside it, and features are of {kind}s "
        f"that stand alone; ask about one {kind} at a time"
    )


def processor_call(processor: Any, items: Sequence[Item], question: str, *, where: object) -> Mapping[str, Any]:
    """Give what a processor makes of items and a question about them, as tensors: the full model's inputs.

    Raises:
        ModelError: It cannot; `where` says whose it is.
    """
    try:
        return _call(processor, items, question)
    except Exception as error:  # a template and a processor are programs of the checkpoint's: they may raise anything
        raise ModelError(f"{where} has no usable chat template ({error}); download it again") from None


def _call(processor: Any, items: Sequence[Item], question: str) -> Mapping[str, Any]:
    clips = [item for item in items if isinstance(item, SampledClip)]
    options: dict[str, Any] = {}
    if clips:  # copies: some processors lengthen a clip's list of frames
        metadata = [copy.deepcopy(clip.metadata) for clip in clips]
        options["videos_kwargs"] = {"video_metadata": metadata, "do_sample_frames": False} | _rate(processor)
    if processor.chat_template:
        shown = [
            {"type": "video", "video": item.frames}
            if isinstance(item, SampledClip)
            else {"type": "image", "image": item}
            for item in items
        ]
        with hf.quiet_transformers():
            return dict(
                processor.apply_chat_template(
                    [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}],
                    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                    processor_kwargs=options, **template_options(processor, thinking=False),
                )
            )  # fmt: skip
    text = "".join(getattr(processor, f"{kind_of(item)}_token") for item in items) + question
    images = [item for item in items if not isinstance(item, SampledClip)]
    given: dict[str, Any] = {"images": images or None, "videos": [clip.frames for clip in clips] or None}
    with hf.quiet_transformers():
        return dict(processor(text=[text], return_tensors="pt", **given, **options))


def _rate(processor: Any) -> dict[str, Any]:
    """Give the frames a second that a processor must be told: an Omni's does not read them off its settings."""
    from transformers.processing_utils import OmniModalProcessorMixin

    return {"fps": processor.video_processor.fps} if isinstance(processor, OmniModalProcessorMixin) else {}


def _types_shown(maker: PromptMaker, theirs: Mapping[str, Any]) -> dict[str, str]:
    """Say how each of the processor's token types comes about. ModelError for one that does in no way known."""
    ids = _flat(theirs["input_ids"])
    shown: dict[str, str] = {}
    for name in theirs:
        if name.endswith(TOKEN_TYPES):
            wanted = _flat(theirs[name])
            ways = [how for how in ("text", "items") if _types_or_none(name, how, maker.processor, ids) == wanted]
            if ways:
                shown[name] = ways[0]
    return shown


def _types_or_none(name: str, how: str, processor: Any, ids: Sequence[int]) -> list[int] | None:
    try:
        return _types(name, how, processor, ids)
    except TypeError:  # a processor that would have to know more than the tokens
        return None


def _types(name: str, how: str, processor: Any, ids: Sequence[int]) -> list[int]:
    if how == "text":
        return [0] * len(ids)
    create = getattr(processor, f"create_{name}", processor.create_mm_token_type_ids)
    return list(create([list(ids)])[0])


def _same_pixels(alone: Sequence[Mapping[str, Any]], together: Mapping[str, Any]) -> bool:
    """Say whether images prepared one by one have the pixels of those prepared together, but for padding."""
    import torch

    names = [name for name in together if name.startswith("pixel_values")]
    for name in names:
        # sorted: families lay images out one behind the other, or side by side
        mine = [torch.as_tensor(one[name]).flatten() for one in alone if name in one]
        one_by_one = torch.cat(mine).sort().values
        both = torch.as_tensor(together[name]).flatten().sort().values
        if len(both) == len(one_by_one):
            if not torch.equal(both, one_by_one):
                return False
        elif not torch.allclose(both.abs().sum(), one_by_one.abs().sum(), rtol=1e-3):
            return False
    return True


def _same_inputs(names: set[str], alone: Sequence[Mapping[str, Any]], together: Mapping[str, Any]) -> bool:
    """Say whether the small inputs of items are those of the items one by one, one behind the other."""
    import torch

    for name in names & together.keys():
        mine = [torch.as_tensor(one[name]) for one in alone if name in one]
        theirs = torch.as_tensor(together[name])
        if len({one.shape[1:] for one in mine}) > 1 or not torch.equal(torch.cat(mine), theirs):
            return False
    return True


def _flat(ids: Any) -> list[int]:
    values = ids[0] if getattr(ids, "ndim", 1) == 2 or (isinstance(ids, list) and isinstance(ids[0], list)) else ids
    return [int(value) for value in values]
