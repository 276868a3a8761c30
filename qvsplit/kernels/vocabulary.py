"""The two ends of a language model on a CPU: tokens to rows of the embedding, hidden states to scores.

Both are [vocabulary, width], in many models the same matrix, and the largest of all. It is held once where it is
computed in the dtype in which it is stored. Where it is widened, rows are looked up as they are stored, and the output
layer is laid out for oneDNN in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qvsplit.kernels.packed_linear import ROWS

SLICE_ROWS = 8192  # of the output layer: no more is cast at a time
Cast = Callable[[torch.Tensor, torch.dtype], torch.Tensor]  # gives a tensor in another dtype, in memory used again


class StoredEmbedding(nn.Module):  # type: ignore[misc]
    """`nn.Embedding` with its rows as they are stored, widened as they are looked up, which is exact.

    `weight` is no parameter: a model's dtype is that of its parameters.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Give the rows of tokens: int64 […] to […, width] in the compute dtype."""
        return nn.functional.embedding(ids, self.weight).to(self.dtype)


class OutputLayer(nn.Module):  # type: ignore[misc]
    """An output layer without bias. Its weight is packed in slices, or plain where the embedding has it too."""

    def __init__(self, slices: Sequence[torch.Tensor], plain: torch.Tensor | None) -> None:
        super().__init__()
        self.slices, self.plain = slices, plain

    @classmethod
    def of(cls, stored: torch.Tensor, dtype: torch.dtype, cast: Cast) -> OutputLayer:
        """Pack a weight [vocabulary, width], slice by slice. Nothing of it is kept."""
        pack = torch.ops.mkldnn._reorder_linear_weight
        return cls([pack(cast(part, dtype), ROWS) for part in stored.split(SLICE_ROWS)], None)

    @classmethod
    def beside_the_embedding(cls, rows: torch.Tensor, dtype: torch.dtype, cast: Cast) -> OutputLayer:
        """Take the embedding's rows as they are stored: they are not held twice in the dtype that is computed in."""
        return cls((), rows) if rows.dtype == dtype else cls.of(rows, dtype, cast)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give scores […, vocabulary] of hidden states […, width]."""
        product = torch.ops.mkldnn._linear_pointwise  # faster than torch's own on a plain weight too
        weights = self.slices if self.plain is None else [self.plain]
        scores = [product(hidden, one, None, "none", [], "") for one in weights]
        return scores[0] if len(scores) == 1 else torch.cat(scores, -1)
