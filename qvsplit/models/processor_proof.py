"""Prove that prompts made from stored placeholders are the processor's own, on small images.

What differs between families is not known here: how a placeholder is expanded, whether an image's place is written
beside it, whether the text is changed around images, which types every token gets. So the processor is called on
pixels once, and its tokens are held against ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.checkpoints import hf
from qvsplit.errors import ModelError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

PROOF_SIZES = ((160, 120), (500, 260))  # width and height: one that is small, one that families with tiles cut up
TOKEN_TYPES = "token_type_ids"  # how the names end by which models take what a processor says of tokens
MAX_BEGINNING = 1  # tokens: a BOS
_QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Proof:
    """What the processor's own call showed.

    Attributes:
        types: How each of its token types comes about, by name: "items", by its own method; "text", all 0.
        beginning: The tokens that it puts in front of what the chat template gives, where they are not there yet.
        inputs: The names of the small inputs that it gives the model for an image, beside tokens and their types.
    """

    types: Mapping[str, str]
    beginning: tuple[int, ...] = ()
    inputs: frozenset[str] = frozenset()

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
    model_takes: frozenset[str]

    def proof_prompt(self, texts: Sequence[str], question: str) -> list[int]:
        """Give the tokens of a question about images; `texts` is what stands for each of them in a prompt."""


def small_images(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Make grey images of these widths and heights."""
    from PIL import Image

    return [Image.new("RGB", size, (90 + 20 * number, 120, 150)) for number, size in enumerate(sizes)]


def template_options(processor: Any, *, thinking: bool) -> dict[str, bool]:
    """Give the switch of reasoning where a chat template has one; transformers warns where it has none."""
    return {"enable_thinking": thinking} if "enable_thinking" in str(processor.chat_template) else {}


def prove(maker: PromptMaker, *, several: bool) -> Proof:
    """Hold prompts made from placeholders against the processor's own call.

    Raises:
        ModelError: They differ.
        UsageError: They differ only where several images stand together.
    """
    shown = [small_images(PROOF_SIZES)] if several else [[image] for image in small_images(PROOF_SIZES)]
    types: dict[str, str] = {}
    beginnings: set[tuple[int, ...]] = set()
    inputs: set[str] = set()
    for images in shown:
        alone = [hf.process_image(maker.processor, image) for image in images]
        ours = maker.proof_prompt([text for _, text in alone], _QUESTION)
        theirs = processor_call(maker.processor, images, _QUESTION, where=maker.folder)
        ids = _flat(theirs["input_ids"])
        same = ids[-len(ours) :] == ours and len(ids) - len(ours) <= MAX_BEGINNING
        beginnings.add(tuple(ids[: -len(ours)]))
        if several and not (same and _same_pixels([processed for processed, _ in alone], theirs)):
            raise UsageError(
                f"{maker.folder}: its processor prepares an image in another way where others stand beside it, and "
                "features are of images that stand alone; ask about one image at a time"
            )
        if not same or len(beginnings) > 1:
            raise ModelError(
                f"{maker.folder} cannot be split: its processor's prompts cannot be made from placeholders, without "
                "pixels"
            )
        shown_types = _types_shown(maker, theirs)
        made = {"input_ids", "attention_mask", "labels", *shown_types, *alone[0][0]}  # labels are for training
        if missing := sorted((maker.model_takes & theirs.keys()) - made):
            raise ModelError(
                f"{maker.folder} cannot be split: its model takes {' and '.join(missing)}, which cannot be made from a "
                "prompt's tokens"
            )
        types |= shown_types
        inputs |= {name for name in maker.model_takes & alone[0][0].keys() if "pixel" not in name}
    (beginning,) = beginnings
    return Proof(types, beginning, frozenset(inputs))


def processor_call(processor: Any, images: Sequence[Image.Image], question: str, *, where: object) -> Mapping[str, Any]:
    """Give what a processor makes of images and a question about them, as tensors: the full model's inputs.

    Raises:
        ModelError: It cannot; `where` says whose it is.
    """
    try:
        if processor.chat_template:
            content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
            return dict(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                    return_tensors="pt", **template_options(processor, thinking=False),
                )
            )  # fmt: skip
        text = processor.image_token * len(images) + question
        return dict(processor(text=[text], images=list(images), return_tensors="pt"))
    except Exception as error:  # a template and a processor are programs of the checkpoint's: they may raise anything
        raise ModelError(f"{where} has no usable chat template ({error}); download it again") from None


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
        one_by_one = torch.cat([torch.as_tensor(one[name]).flatten() for one in alone]).sort().values
        both = torch.as_tensor(together[name]).flatten().sort().values
        if len(both) == len(one_by_one):
            if not torch.equal(both, one_by_one):
                return False
        elif not torch.allclose(both.abs().sum(), one_by_one.abs().sum(), rtol=1e-3):
            return False
    return True


def _flat(ids: Any) -> list[int]:
    values = ids[0] if getattr(ids, "ndim", 1) == 2 or (isinstance(ids, list) and isinstance(ids[0], list)) else ids
    return [int(value) for value in values]
