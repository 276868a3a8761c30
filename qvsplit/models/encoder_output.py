"""What an encoder gives for one image, as named tensors [n_tokens, width], whatever form the model's own output has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.model_class import output_problem
from qvsplit.errors import ModelError
from qvsplit.store.features import DEEPSTACK_FEATURES, POOLER_OUTPUT

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an encoder's output for one image.

    Attributes:
        name: The field of the model's output.
        rows: Its values, [n_tokens, width].
        container: What the field holds in the output: one tensor, or a list or tuple of them.
        level: Which of a field's levels it is; None for a field that has none.
        shape: The tensor's shape in the output, where that is not [n_tokens, width].
    """

    name: str
    rows: torch.Tensor
    container: str
    level: int | None = None
    shape: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The name by which `Features` has it."""
        return self.name if self.level is None else f"{self.name}_{self.level}"


def output_tensors(output: Any) -> list[OutputTensor]:
    """Take the output of `get_image_features` for one image apart.

    Raises:
        ModelError: It is none that transformers' models take back as `mm_encoder_outputs`.
    """
    if (problem := output_problem(output)) is not None:
        raise ModelError(f"the model cannot be split: {problem}")
    levels = getattr(output, DEEPSTACK_FEATURES, None) or ()
    return [
        _field(POOLER_OUTPUT, output[POOLER_OUTPUT]),
        *(_field(DEEPSTACK_FEATURES, one, level) for level, one in enumerate(levels)),
    ]


def _field(name: str, value: Any, level: int | None = None) -> OutputTensor:
    import torch

    if isinstance(value, torch.Tensor):
        rows, shape = _rows(value)
        return OutputTensor(name, rows, "tensor", level, shape)
    container = "tuple" if isinstance(value, tuple) else "list"
    if len(value) == 1:
        rows, shape = _rows(value[0])
        return OutputTensor(name, rows, container, level, shape)
    # several for one image, one a tile: the model joins them, so that they may be one
    return OutputTensor(name, torch.cat([_rows(one)[0] for one in value]), container, level)


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Give a tensor as [n_tokens, width], and its shape where that is another."""
    shape = tuple(tensor.shape)
    return tensor.reshape(-1, shape[-1]), None if len(shape) == 2 else shape
