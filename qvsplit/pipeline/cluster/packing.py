"""Items as rows of Ray Data's blocks: what is known of an item in one column, what is large in another.

So whoever wants to know what became of the items need not read their features. Both are pickles, as all is that Ray
moves from process to process; none is ever read from a file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import QvsplitError
from qvsplit.models.preparing import Prepared
from qvsplit.pipeline.items import Result
from qvsplit.sources.source import Entry
from qvsplit.store.shard_writer import EncodedRow

if TYPE_CHECKING:
    import pyarrow as pa

ITEM, LARGE = "item", "large"


@dataclass(frozen=True)
class Numbered:
    """An item of the plan, by its place in it.

    Attributes:
        number: That place.
        entry: As it was listed.
    """

    number: int
    entry: Entry


class _Pickler(pickle.Pickler):
    """Pickles torch's tensors as arrays, which their own way would make files of, and views of bytes as bytes."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is torch.Tensor and value.device.type == "cpu" and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return (bytes, (bytes(value),)) if type(value) is memoryview else NotImplemented


def numbered_table(items: Sequence[Numbered]) -> pa.Table:
    """Give items of the plan as a block of one row: apart, each would have to name its folder and its classes."""
    return _table(list(items), None)


def result_table(result: Result | QvsplitError, large: Prepared | Sequence[EncodedRow] | None = None) -> pa.Table:
    """Give what a worker knows of one item as a block: what was prepared, or the rows with their features, apart."""
    return _table(result, large)


def _table(item: object, large: object) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {ITEM: pa.array([_pickled(item)], pa.large_binary()), LARGE: pa.array([_pickled(large)], pa.large_binary())}
    )


def numbered_in(block: pa.Table) -> list[Numbered]:
    """Give the items of the plan in a block."""
    (items,) = items_in(block)
    return list(items)


def items_in(block: pa.Table) -> Iterator[Any]:
    """Give the items of a block, without what is large."""
    for value in block[ITEM]:
        yield _unpickled(value)


def rows_in(block: pa.Table) -> Iterator[tuple[Any, Any]]:
    """Give the items of a block with what is large; None where there is nothing."""
    for item, large in zip(block[ITEM], block[LARGE], strict=True):
        yield _unpickled(item), _unpickled(large) if large.is_valid else None


def _unpickled(value: pa.LargeBinaryScalar) -> Any:
    return pickle.loads(value.as_buffer())  # noqa: S301 - of another process of this run


def _pickled(value: object) -> bytes | None:
    if value is None:
        return None
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()
