"""Features at hand, without a store: what the engine reads of them, and the rows that stand for them in answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from qvsplit.answering.engine import FeatureRef
from qvsplit.errors import StoreDamaged, UsageError
from qvsplit.store.features import Features
from qvsplit.store.row import Row, placeholder_json, row_error


class FeaturesAtHand:
    """Gives an engine the features of the call in progress, by their content."""

    def __init__(self) -> None:
        self._held: dict[FeatureRef, tuple[Row, Features]] = {}

    def hold(self, given: Sequence[Features]) -> tuple[Row, ...]:
        """Hold these features, in place of those of the call before, and give a row for each.

        Raises:
            UsageError: They are none that an encoder makes.
        """
        rows = tuple(_row(features, number) for number, features in enumerate(given))
        self._held = {_ref(row): (row, features) for row, features in zip(rows, given, strict=True)}
        return rows

    def row(self, ref: FeatureRef) -> Row:
        """Give the row that stands for these features."""
        return self._of(ref)[0]

    def features(self, ref: FeatureRef) -> Features:
        """Give the features."""
        return self._of(ref)[1]

    def _of(self, ref: FeatureRef) -> tuple[Row, Features]:
        if ref not in self._held:
            raise StoreDamaged("features of an earlier call are no longer held")
        return self._held[ref]


def _ref(row: Row) -> FeatureRef:
    assert row.content is not None
    return FeatureRef(*row.content)


def _row(features: Features, number: int) -> Row:
    """Give a row as a store would have it. It has no file: its name is its place, its hash that of its content."""
    specs = {name: (tensor.dtype, list(tensor.raw.shape)) for name, tensor in features.tensors.items()}
    row = Row(
        root="", path=f"{features.kind} {number + 1}", kind=features.kind, sha256=_content_hash(features),
        size=sum(tensor.raw.nbytes for tensor in features.tensors.values()), status="ok", grid_thw=features.grid_thw,
        n_tokens=features.n_tokens, placeholder=placeholder_json(features.placeholder),
        inputs=json.dumps(features.inputs, sort_keys=True), has_features=True,
    )  # fmt: skip
    wrong = row_error(row, features.config)
    if wrong is None and any(shape[0] != features.n_tokens for _, shape in specs.values()):
        wrong = "has tensors of different numbers of tokens"
    if wrong is not None:
        raise UsageError(f"features[{number}] {wrong}: no encoder makes such features")
    return row


def _content_hash(features: Features) -> str:
    """Hash all that decides an answer: what was changed in place has another hash, and another cached prefix."""
    import numpy as np

    digest = hashlib.sha256()
    about = [features.config.to_json(), features.kind, features.grid_thw, features.placeholder, dict(features.inputs)]
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(features.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.raw.shape]).encode())
        digest.update(np.ascontiguousarray(tensor.raw).data)
    return digest.hexdigest()
